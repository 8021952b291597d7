"""Mixture of heads at its identity start: all heads active, every gate exactly 1."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="mixture-of-heads",
        summary="attention -> a gate per token and head; exact with all heads active",
        paper="Jin et al., MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842",
        equation="y = sum_h g_h(x) H_h W_O,h;  g = k softmax(W_r x)_S / sum_S for routed heads",
        passes={"mixture-of-heads": {}},
        choices=Choices(
            granularity="token",
            reads="token",
            scorer="linear",
            selector="shared + top-k heads",
            normaliser="softmax, renormalised, times k; two-level",
            experts="attention heads",
            combine="gate before the output projection",
            losses="balance 0.01 k",
            start="equal with all heads active",
        ),
        notes="The factors k, h_s and 2 are those of the released code, which the paper does not print. shared_heads "
        "and active_heads below all heads drop heads, which is approximate. Where at most half of them are on, and "
        "nothing but movement lies between the attention and its projection, the others are not computed.",
        aliases=("moh",),
    )
)
