"""p-MoD: weights near 1, fewer tokens the deeper the block."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="p-mod",
        summary="blocks -> fewer and fewer tokens pass, weighted by 1 + 0.2 tanh",
        paper="Zhang et al., p-MoD, arXiv 2412.04449",
        equation="w = 1 + 0.2 tanh(w.x + b); kept: x' = x + Attn(x), out = x' + w FFN(x'); skipped: out = w x; "
        "C_l/T = max(0.15, cos(pi l/(L-1))/2 + 1/2), dense above 0.85",
        passes={
            "mixture-of-depths": {
                "capacity": 0.15,
                "capacity_schedule": "cosine",
                "dense_above": 0.85,
                "weight": "one_plus_tanh",
                "alpha": 0.2,
                "gate": "ffn",
                "skipped": "weighted",
                "ties": "spread",
            }
        },
        choices=Choices(
            granularity="token",
            reads="token",
            scorer="linear with bias",
            selector="expert choice per sample",
            normaliser="1 + 0.2 tanh",
            experts="block or skip",
            combine="gate on the FFN branch; skipped tokens are scaled",
            start="approximate: tokens are skipped, every weight is 1",
        ),
        notes="The router starts at zero, so that all weights tie: the tokens that pass are then spread over the "
        "sequence, not its first ones. L is the number of blocks, not a constant. Text tokens of a two-stream block "
        "always stay, unweighted.",
        aliases=("pmod",),
    )
)
