"""DiT-MoE: SwiGLU experts behind a softmax top-2 router, and a narrow shared expert."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="dit-moe",
        summary="FFN -> top-2 of 8 fresh SwiGLU experts + a shared one of half the width",
        paper="Fei et al., Scaling Diffusion Transformers to 16 Billion Parameters, arXiv 2407.11633",
        equation="y = sum_{e in top2(p)} p_e E_e(h) + S(h), p = softmax(W h)",
        passes={
            "fresh-experts": {
                "experts": 8,
                "top_k": 2,
                "form": "swiglu",
                "shared": "fresh",
                "shared_hidden": 0.5,
                "normalise": "softmax_topk",
                "losses": {"balance": 0.01},
            }
        },
        choices=Choices(
            granularity="token",
            reads="token",
            scorer="linear",
            selector="top-2 of 8",
            normaliser="softmax before selection, not renormalised",
            experts="SwiGLU FFNs",
            combine="weighted sum + shared",
            losses="balance 0.01",
            start="different: the experts are drawn anew",
        ),
        notes="Router N(0, 0.02) instead of the released Kaiming uniform start. The auxiliary gradient goes "
        "through the loss that the user adds, not through an identity function that ignores gradient "
        "scaling, and evaluation keeps gradients. To start from copies of a dense FFN use upcycle with "
        "normalise='N3' (not exact) or sparse-upcycling (exact).",
    )
)
