"""Drop-Upcycling: copies of which a fraction of the neurons is drawn anew, so that experts specialise."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="drop-upcycling",
        summary="FFN -> top-2 of 8 copies, half of the neurons of each drawn anew",
        paper="Nakamura et al., Drop-Upcycling, arXiv 2502.19261",
        equation="as sparse-upcycling; rows I of w_in and columns I of w_out ~ N(mean, std) of what they replace",
        passes={"upcycle": {"experts": 8, "top_k": 2, "reinitialise": 0.5}},
        choices=Choices(
            granularity="token",
            reads="token",
            scorer="linear",
            selector="top-2 of 8",
            normaliser="softmax, renormalised",
            experts="FFN copies, half of the neurons drawn anew",
            losses="balance 0.01",
            start="different",
        ),
        notes="One index set I per expert, as in the paper; independent_sets=True gives the released code, whose error "
        "at the start exceeds the output itself (1.10), so it needs max_error above 1.",
    )
)
