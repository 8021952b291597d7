"""Mixture of blocks: of every group of consecutive blocks, some adjacent ones run."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="mixture-of-blocks",
        summary="groups of three blocks -> two adjacent ones run, chosen per sample",
        paper="Zheng et al., Dense2MoE, arXiv 2510.09094 (mixture of blocks)",
        equation="w = argmax a W_x [mean(x); mean(c)] + (1 - a) W_y y over windows of adjacent blocks; "
        "x_{j+1} = x_j + g_j (block_j(x_j) - x_j), g_j = 1 inside w else 0, straight through",
        passes={"block-choice": {}},
        choices=Choices(
            granularity="sample",
            reads="pooled tokens, pooled text, timestep and label",
            scorer="linear",
            selector="adjacent, argmax of windows",
            normaliser="1, straight through",
            experts="block or skip",
            combine="gate on the update",
            losses="balance 0.01 over windows",
            start="approximate; equal if all run",
        ),
        notes="The source publishes no code; a = 1/2, the straight-through gradient by the probability of the windows "
        "and the balance term are ours. Samples of one batch may choose different blocks. On a CPU without gradients, "
        "outside of compilation, a block runs on the samples that take it. Elsewhere nothing waits for the device and "
        "shapes are fixed: a block runs on all samples and the choice gates them; with capacity=0.75 it runs on three "
        "quarters of the batch, and those it has no place for pass it by. The distillation stages are a matter "
        "of training.",
        aliases=("mob",),
    )
)
