"""γ-MoD: one router for all blocks, weights on the feed-forward branch alone."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="gamma-mod",
        summary="blocks -> half of the tokens pass, chosen by one shared router that weighs their FFN",
        paper="Luo et al., γ-MoD, arXiv 2410.13859",
        equation="p = softmax(W x)_1; the C tokens of largest p: x' = x + Attn(x), out = x' + p FFN(x'); others: x",
        passes={
            "mixture-of-depths": {
                "capacity": 0.5,
                "weight": "probability",
                "gate": "ffn",
                "shared_router": True,
                "router_std": 0.02,
                "dense_first": 3,
                "dense_last": 1,
                "losses": {"selection": 0.01},
            }
        },
        choices=Choices(
            granularity="token",
            reads="token",
            scorer="linear, shared by all blocks",
            selector="expert choice per sample",
            normaliser="softmax over {skip, pass}",
            experts="block or skip",
            combine="gate on the FFN branch",
            losses="cross-entropy with the selection 0.01",
            start="approximate",
        ),
        notes="The router reads the stream as it enters the block. Layers 0, 1, 2 and the last stay dense, as "
        "in the released code; choosing by the rank of attention maps is left to only= and skip=. Text tokens of a "
        "joint block always stay. Positions stay the original ones. The loss is a mean over layers (the paper's is a "
        "sum). Selection is the same in training and inference; the released threshold is not reproduced.",
    )
)
