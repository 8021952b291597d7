"""Nucleus-Image: fine experts choose tokens by the timestep and the un-modulated token."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="nucleus",
        summary="FFN -> 64 fine SwiGLU experts that choose tokens, 8 per token on average, + a shared one",
        paper="Nucleus-Image, arXiv 2604.12163",
        equation="y = S(h) + 2.5 sum_{e: s in T_e} A_se / sum A * E_e(h), A = softmax(W [t ; LN(x)]), T_e the "
        "ceil(8 S / E) best tokens of a sample",
        passes={
            "fresh-experts": {
                "experts": 64,
                "form": "swiglu",
                "hidden": 0.125,
                "shared": "fresh",
                "shared_hidden": 0.125,
                "router_input": "timestep+unmodulated",
                "selector": "expert-choice",
                "capacity": 8.0,
                "normalise": "softmax_topk_renorm",
                "scale": 2.5,
                "losses": {},
            }
        },
        choices=Choices(
            granularity="token",
            reads="timestep + un-modulated token",
            scorer="linear",
            selector="expert choice per sample, capacity 8",
            normaliser="softmax, renormalised per token x 2.5",
            experts="fine SwiGLU FFNs",
            combine="weighted sum + shared",
            losses="none",
            start="different: the experts are drawn anew",
        ),
        notes="64 experts of an eighth of the FFN (published: 128 of 1,344 at width 2,048). The first three and "
        "the last block stay dense with skip=. Needs a block in which the norm and the adaLN scale are "
        "visible apart.",
        aliases=("nucleus-image",),
    )
)
