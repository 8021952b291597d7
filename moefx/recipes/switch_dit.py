"""Switch-DiT: a mask of the residual stream, made of linear experts that the timestep chooses."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="switch-dit",
        summary="block -> runs on x * (1 + top-2 of 3 linear experts of t), complement added back",
        paper="Park et al., Switch Diffusion Transformer, arXiv 2403.09176",
        equation="m = 1 + sum_{j in top2} p_j(t) (W_j x + b_j), out = Block(x * m) + (1 - m) * x, p = softmax(W_g "
        "SiLU(c(t)) + b_g)",
        passes={"linear-mask": {"experts": 3, "top_k": 2}},
        choices=Choices(
            granularity="sample",
            reads="timestep",
            scorer="linear on SiLU",
            selector="top-2 of 3",
            normaliser="softmax, raw",
            experts="linear masks",
            combine="mask, complement residual",
            losses="diffusion prior (moefx.training.DiffusionPrior)",
            start="equal",
        ),
        notes="The router reads what the block sees of the timestep, raw or embedded, so that samplers with "
        "real-valued timesteps work; the released code looks integers up. The prior loss spans all "
        "layers: moefx.training.DiffusionPrior.",
    )
)
