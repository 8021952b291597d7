"""ProMoE: tokens go to the expert whose prototype they resemble."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="promoe",
        summary="every 2nd FFN -> 1 of 12 half-width SwiGLU experts by cosine to prototypes, 1 unconditional, 1 shared",
        paper="ProMoE, arXiv 2510.24711",
        equation="y = S(x) + cos(x, P_e) E_e(x), e = argmax_i cos(x, P_i); without a condition y = S(x) + E_u(x)",
        passes={
            "fresh-experts": {
                "experts": 13,
                "top_k": 1,
                "form": "swiglu",
                "hidden": 0.5,
                "shared": "fresh",
                "shared_hidden": 0.5,
                "scorer": "cosine",
                "normalise": "identity",
                "unconditional": "given",
                "every": 2,
                "losses": {"contrastive": 1.0},
            }
        },
        choices=Choices(
            granularity="token",
            reads="token, and whether the sample has a condition",
            scorer="cosine to prototypes",
            selector="the unconditional expert by rule, else top-1 of 12",
            normaliser="identity; 1 for the unconditional expert",
            experts="half-width SwiGLU FFNs",
            combine="weighted sum + shared",
            losses="contrastive 1, temperature 0.07",
            start="different: the experts are drawn anew",
        ),
        notes="experts counts the unconditional one, which is the last. The released code knows it by the label 1000; "
        "here the caller says which samples it serves, with moefx.routing.given(model, unconditional=mask), or "
        "unconditional='label', null_label=1000 reads the label where the blocks see it. As long as nobody says so "
        "every sample has a condition. It takes one slot, where the released code fills all of top_k with it. The "
        "factor on the cosine that the paper has and the code has not is left out.",
    )
)
