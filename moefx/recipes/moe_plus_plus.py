"""MoE++: experts that compute nothing beside those that do, so that easy tokens are cheap."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="moe++",
        summary="FFN -> top-2 of 8 FFNs, a zero, a copy and 2 constant experts",
        paper="Jin et al., MoE++, arXiv 2410.07348",
        equation="z_l = W_b tanh(W_a x) + W_g z_{l-1}, y = sum_{e in top2} g_e E_e(x), "
        "E = FFN | 0 | x | a_1 x + a_2 v with a = softmax(W_c x), g "
        "renormalised without the zero expert",
        passes={
            "fresh-experts": {
                "experts": 12,
                "top_k": 2,
                "zero_experts": 1,
                "copy_experts": 1,
                "constant_experts": 2,
                "scorer": "mlp",
                "scorer_act": "tanh",
                "scorer_hidden": 96,
                "state": "residual",
                "normalise": "softmax_topk_renorm",
                "tau": 0.75,
                "losses": {"weighted_balance": 0.01},
            }
        },
        choices=Choices(
            granularity="token",
            reads="token, logits of the layer before",
            scorer="MLP, tanh, plus gating residual",
            selector="top-2 of 12",
            normaliser="softmax, renormalised",
            experts="FFNs, zero, copy, constant",
            losses="heterogeneous balance 0.01, tau 0.75",
            start="different: the experts are drawn anew",
        ),
        notes="The logits pass through the blocks to the next layer of the same tokens; the first layer has no W_g, "
        "and W_g starts at zero; state='none' leaves the residual out. Dropless: the "
        "capacity of the paper is in no released code. Experts read x, not 2x as the released inference "
        "does. A copy expert copies what the FFN reads, which in an adaLN block is the modulated token.",
        aliases=("moe-plus-plus",),
    )
)
