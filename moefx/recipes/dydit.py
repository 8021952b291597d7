"""Dynamic width: heads and channel groups that the timestep switches off, within a budget."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="dydit",
        summary="attention and FFN -> heads and channel groups switched by the timestep; exact at its start",
        paper="Zhao et al., Dynamic Diffusion Transformer, arXiv 2410.03456 (timestep-wise dynamic width)",
        equation="y = W_2 act(m(t) * (W_1 x + b_1)) + b_2, m = 1[sigmoid(W c(t) + b) > 1/2] per group; heads likewise",
        passes={"mixture-of-heads": {"router_input": "timestep"}, "channel-groups": {}},
        choices=Choices(
            granularity="sample",
            reads="timestep",
            scorer="linear with bias",
            selector="threshold, Gumbel-sigmoid in training",
            normaliser="1, straight through",
            experts="attention heads, channel groups",
            combine="gate before the output projection, mask before the activation",
            losses="budget 2",
            start="equal",
        ),
        notes="The width part of DyDiT; tokens are routed by the recipes of their own. As many groups as heads in the "
        "paper, 8 here. The budget is each layer's own; moefx.routing.budget_loss is the whole model's, as in the "
        "paper. The released code steps its optimiser twice and has FLOPs tables per model name; neither is kept.",
    )
)
