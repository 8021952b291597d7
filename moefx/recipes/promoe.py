"""ProMoE: tokens go to the expert whose prototype they resemble."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="promoe",
        summary="every 2nd FFN -> 1 of 12 half-width SwiGLU experts by cosine to prototypes, + a shared one",
        paper="ProMoE, arXiv 2510.24711",
        equation="y = S(x) + cos(x, P_e) E_e(x), e = argmax_i cos(x, P_i)",
        passes={
            "fresh-experts": {
                "experts": 12,
                "top_k": 1,
                "form": "swiglu",
                "hidden": 0.5,
                "shared": "fresh",
                "shared_hidden": 0.5,
                "scorer": "cosine",
                "normalise": "identity",
                "every": 2,
                "losses": {"contrastive": 1.0},
            }
        },
        choices=Choices(
            granularity="token",
            reads="token",
            scorer="cosine to prototypes",
            selector="top-1 of 12",
            normaliser="identity",
            experts="half-width SwiGLU FFNs",
            combine="weighted sum + shared",
            losses="contrastive 1, temperature 0.07",
            start="different: the experts are drawn anew",
        ),
        notes="The first of the two routing steps, a fixed expert for samples without a label, is left out: "
        "whether a sample's label was dropped is no value that the blocks of a denoiser see.",
    )
)
