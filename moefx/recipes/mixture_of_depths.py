"""Mixture of depths: tokens skip blocks."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="mixture-of-depths",
        summary="every second block -> a router lets tokens skip it; exact until capacity is lowered",
        paper="Raposo et al., Mixture-of-Depths, arXiv 2404.02258",
        equation="x_i' = x_i + r_i (f(x)_i - x_i) for the C tokens of largest r_i = w.x_i + b, else x_i",
        passes={"mixture-of-depths": {"every": 2}},
        choices=Choices(
            granularity="token",
            reads="token",
            scorer="linear",
            selector="expert choice per sample",
            normaliser="identity",
            experts="block or skip",
            combine="gate on the update",
            start="equal at capacity 1",
        ),
        notes="b = 1, w = 0 at the start is ours: r = 1, so capacity 1 is the dense block to the bit. Skipped tokens "
        "are neither queries nor keys; with keep_keys they stay keys and values of the others. Rotary tables, masks "
        "and modulations per token follow the tokens, at their original positions; of two streams the image's is "
        "routed and the text stays; where text and image are one stream, both are. Blocks whose tokens see their "
        "neighbours (convolutions) are left dense. The capacity may follow a schedule over the layers "
        "(capacity_schedule) and over the training (warm_up).",
        aliases=("mod",),
    )
)
