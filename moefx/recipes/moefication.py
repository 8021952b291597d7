"""MoEfication: neurons with like weights share a slice, and a small network foresees which slices fire."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="moefication",
        summary="FFN -> top-4 of 16 slices by foreseen activation, weight 1",
        paper="Zhang et al., MoEfication, arXiv 2110.01786",
        equation="y = sum_{e in topk(s)} FFN_e(x);  s = W_b tanh(W_a x / |x|)",
        passes={
            "split": {
                "experts": 16,
                "shared": 0,
                "top_k": 4,
                "partition": "clusters",
                "router": "tanh",
                "target": "mass",
                "router_steps": 1000,
            }
        },
        choices=Choices(
            granularity="token",
            reads="token, normalised",
            scorer="MLP, tanh",
            selector="top-4 of 16",
            normaliser="unit",
            experts="FFN slices (balanced k-means of weight rows)",
            losses="cross-entropy with the slices' positive activation, before training",
            start="approximate",
            router="fitted",
        ),
        notes="Made for ReLU, whose activations are sparse; with GELU expect more loss. partition='coactivation' is "
        "the paper's graph variant, cut spectrally instead of by METIS. Slices of 32 neurons and 20 % of them "
        "are the paper's; the defaults divide the widths of most diffusion models. The router's best state is "
        "kept by its loss schedule; the release keeps the second best.",
    )
)
