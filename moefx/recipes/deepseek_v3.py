"""DeepSeek-V3: many fine sigmoid-gated experts in groups, balanced by a selection bias instead of a loss."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="deepseek-v3",
        summary="FFN -> top-8 of 64 fine experts in 8 groups, sigmoid gates, selection bias, + a shared expert",
        paper="DeepSeek-AI, DeepSeek-V3 Technical Report, arXiv 2412.19437 (experts: DeepSeekMoE, arXiv 2401.06066)",
        equation="y = S(u) + 2.5 sum_{e in K} s_e / sum_K s * E_e(u), s = sigmoid(W u), K = top-8 of s + b in the "
        "4 best of 8 groups",
        passes={
            "fresh-experts": {
                "experts": 64,
                "top_k": 8,
                "form": "swiglu",
                "hidden": 0.125,
                "shared": "fresh",
                "shared_hidden": 0.125,
                "selector": "group-limited",
                "select_groups": 8,
                "keep_groups": 4,
                "normalise": "sigmoid_topk_renorm",
                "scale": 2.5,
                "selection_bias": True,
                "losses": {"sequence_balance": 0.0001},
            }
        },
        choices=Choices(
            granularity="token",
            reads="token",
            scorer="linear, sigmoid",
            selector="top-8 of 64 in 4 of 8 groups, biased",
            normaliser="sigmoid, renormalised x 2.5",
            experts="fine SwiGLU FFNs",
            combine="weighted sum + shared",
            losses="bias update 0.001, sequence balance 1e-4",
            start="different: the experts are drawn anew",
        ),
        notes="64 experts instead of 256: one eighth of the FFN each, so that 8 make one FFN. Call "
        "moefx.training.update_biases after every optimiser step. Masked groups get -inf, not 0, and "
        "biased scores choose but never weigh. The first layers stay dense with skip=.",
    )
)
