"""Channel masks that slide with the timestep."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="dtr",
        summary="block -> reads a window of its stream's channels that slides with the timestep; no parameters",
        paper="Park et al., Denoising Task Routing for Diffusion Models, arXiv 2310.07138",
        equation="y = block(x * M_t) + (1 - M_t) * x,  M_t = channels o_t to o_t + n, o_t = round((t/(T-1))^4 (D - n))",
        passes={"channel-windows": {}},
        choices=Choices(
            granularity="sample",
            reads="timestep",
            scorer="fixed table",
            selector="window",
            normaliser="none",
            experts="channels of the stream",
            combine="mask and complement residual",
            start="approximate: a fifth of the channels is hidden from each block",
            router="none",
        ),
        notes="For training from scratch: a trained model is changed. The norms inside a block see the hidden channels "
        "as zeros, as in the released code. In joint blocks every stream is masked. last_timestep is 999 for models "
        "that count to 1000, and 1 for those that take sigma.",
        aliases=("denoising-task-routing",),
    )
)
