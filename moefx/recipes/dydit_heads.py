"""Heads that the timestep switches off, within a budget."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="dydit-heads",
        summary="attention -> heads switched on and off by the timestep; exact at its start",
        paper="Zhao et al., Dynamic Diffusion Transformer, arXiv 2410.03456 (width of the attention)",
        equation="g_h = 1[sigmoid(W c(t) + b)_h > 1/2], g_1 = 1;  y = sum_h g_h H_h W_O,h;  loss 2 (share - budget)^2",
        passes={"mixture-of-heads": {"router_input": "timestep"}},
        choices=Choices(
            granularity="sample",
            reads="timestep",
            scorer="linear with bias",
            selector="threshold, Gumbel-sigmoid in training",
            normaliser="1, straight through",
            experts="attention heads",
            combine="gate before the output projection",
            losses="budget 2",
            start="equal",
        ),
        notes="The router's weights start at zero, its bias at +15. In joint attention one gate serves all streams: a "
        "head that is off needs no keys and values either. The budget is each layer's own; "
        "moefx.routing.budget_loss is the whole model's, as in the paper. The released code steps its optimiser twice.",
    )
)
