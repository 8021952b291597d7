"""RMoE: routers that remember, through one recurrent cell, what the layers before decided."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="rmoe",
        summary="FFN -> top-2 of 8 FFNs, chosen by a GRU that runs over the layers",
        paper="Qiu et al., Layerwise Recurrent Router for Mixture-of-Experts, arXiv 2408.06793",
        equation="s_l = GRU(W_1 x, s_{l-1}), s_0 = 0; p = softmax(W_2 s_l); y = sum_{e in top2} p_e / sum p E_e(x)",
        passes={
            "fresh-experts": {
                "experts": 8,
                "top_k": 2,
                "state": "recurrent",
                "state_width": 256,
                "normalise": "softmax_topk_renorm",
                "losses": {"balance": 0.001},
            }
        },
        choices=Choices(
            granularity="token",
            reads="token, state of the layer before",
            scorer="GRU over layers, linear",
            selector="top-2 of 8",
            normaliser="softmax, renormalised",
            experts="FFNs",
            losses="balance 0.001",
            start="different: the experts are drawn anew",
        ),
        notes="The state passes through the blocks to the next layer of the same tokens, and begins at zero in every "
        "call of the model, so that nothing is remembered from one sampling step to the next. All layers of a stream "
        "share one cell; models of two streams have one for each; under FSDP2 "
        "wrap the cells before the blocks that share them. Sizes are ours, and so are the starts of W_1 and W_2 "
        "(normal, deviations D^-1/2 and 0.02).",
    )
)
