"""CMoE: slices by which tokens use their neurons, and a router made of one neuron per slice; no training."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="cmoe",
        summary="FFN -> 2 shared and 2 of 14 routed slices by activation markers: 25 % active, no training",
        paper="Pei et al., CMoE, arXiv 2502.04416",
        equation="y = FFN_s(x) + sum_{e in top2(s)} (1 + u_e softmax(s)_e) FFN_e(x);  s_e = |h_j|, j typical of e",
        passes={
            "split": {
                "experts": 14,
                "shared": 2,
                "top_k": 2,
                "partition": "markers",
                "importance": "usage",
                "router": "neurons",
                "normalise": "one_plus_su",
                "selection_bias": True,
            }
        },
        choices=Choices(
            granularity="token",
            reads="token",
            scorer="one neuron per slice",
            selector="top-2 of 14, biased",
            normaliser="1 + u softmax, u = 0 at the start",
            experts="FFN slices (assignment of activation markers) + shared slices",
            losses="selection bias",
            start="approximate",
        ),
        notes="Markers are taken from the network's own hidden layer; the release normalises inputs and rows for "
        "the markers only, so its router sees another curvature. Rows of the router have length one, biases "
        "scaled with them. One assignment, as in the release.",
    )
)
