"""Mixture of heads at its identity start: all heads active, every gate exactly 1."""

from moefx.recipes.base import Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="mixture-of-heads",
        summary="attention -> a gate per token and head; exact with all heads active",
        paper="Jin et al., MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842",
        equation="y = sum_h g_h(x) H_h W_O,h;  g = k softmax(W_r x)_S / sum_S for routed heads",
        passes={"mixture-of-heads": {}},
        notes="The factors k, h_s and 2 are those of the released code, which the paper does not print. shared_heads "
        "and active_heads below all heads drop heads, which is approximate.",
        aliases=("moh",),
    )
)
