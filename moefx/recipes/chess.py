"""CHESS: a threshold per channel on the activated gate."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="chess",
        summary="FFN -> neurons whose activated gate exceeds a calibrated threshold, half of them",
        paper="He et al., CHESS, arXiv 2409.01366",
        equation="y = W_out (h * 1[|act(g)_i| > t_i]);  t_i = sqrt(tau / E[u_i^2])",
        passes={"sparse-neurons": {"rule": "threshold", "keep": 0.5}},
        choices=Choices(
            granularity="token",
            reads="hidden layer",
            scorer="parameter-free statistic",
            selector="threshold per channel",
            normaliser="unit",
            experts="single neurons",
            combine="mask",
            start="approximate",
            router="none",
        ),
        notes="Without a gate E[u_i^2] is 1, which is one threshold for all neurons of a layer (CATS). Where the "
        "raw timestep is in sight, timestep_thresholds gives a threshold per noise level, which is ours. "
        "Thresholds of the attention's inputs are not part of it.",
    )
)
