"""Remix-DiT: many timestep experts out of few bases, merged before they compute."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="remix-dit",
        summary="FFN -> weights mixed out of 4 copies for each of 8 timestep intervals",
        paper="Fang et al., Remix-DiT, arXiv 2412.05628",
        equation="y = FFN(x; sum_k a_k W_k), a = softmax(table[floor(8 t / 1000)])",
        passes={"weight-mixture": {"bases": 4, "intervals": 8}},
        choices=Choices(
            granularity="sample",
            reads="timestep interval",
            scorer="table",
            selector="all",
            normaliser="softmax",
            experts="weight mixtures",
            combine="weights merged before computing",
            losses="prior cross-entropy 1e-4, fading",
            start="equal",
        ),
        notes="The FFNs alone; the paper mixes the attention projections too. Every sample gets the mixture of "
        "its own timestep, where the released code averages the coefficients of a batch. The prior fades "
        "with moefx.training.step_schedules. Needs a block that sees the raw timestep.",
    )
)
