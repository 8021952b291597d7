"""Our own split: what each published one does best, with statistics over noise levels."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="moefx-split",
        summary="FFN -> a shared quarter and 8 of 24 slices on average, means in place of the others: half active",
        paper="moefx; parts from arXiv 2310.04361, 2110.01786, 2411.15708",
        equation="y = FFN_s(x) + sum_e mu_e + sum_{e: s_e(x) > c} (FFN_e(x) - mu_e)",
        passes={
            "split": {
                "experts": 24,
                "shared": 8,
                "top_k": 8,
                "partition": "clusters",
                "features": "activations",
                "importance": "variance",
                "router": "ridge",
                "target": "norm",
                "selector": "threshold",
                "compensation": "mean",
                "channels": "affine",
                "normalise": "unit",
            }
        },
        choices=Choices(
            granularity="token",
            reads="token",
            scorer="linear, by ridge regression",
            selector="threshold, calibrated",
            normaliser="unit",
            experts="FFN slices (balanced k-means of activations) + shared slices, means of those left out",
            losses="distillation",
            start="approximate",
            router="fitted",
        ),
        notes="Shared neurons are those whose left-out part would vary most: Var(h_i) |w_out,i|^2, since means are "
        "put back. Calibrate over all noise levels and both branches of guidance. timestep_thresholds gives a "
        "threshold per noise level, with equal relative loss in each, where the raw timestep is in sight; "
        "elsewhere the modulated token tells the router the noise level. Then distil (moefx.training.distil).",
    )
)
