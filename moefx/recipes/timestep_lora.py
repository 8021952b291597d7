"""TimeStep Master: low-rank experts at several granularities of time, the finest always on."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="timestep-lora",
        summary="FFN -> itself + a core delta per 8 intervals and gated ones per 4 and 2",
        paper="Zhuang et al., TimeStep Master, arXiv 2503.07416",
        equation="W x + s (B_c A_c x + sum_j G_j(x, t) B_ij A_ij x), c, i_j = the intervals of t, G linear in x "
        "and the embedding of t",
        passes={
            "low-rank-experts": {
                "experts": 14,
                "selector": "interval",
                "intervals": [8, 4, 2],
                "core": True,
                "router_input": "timestep+token",
                "rank": 16,
                "alpha": 16.0,
                "targets": ["in", "gate", "out"],
                "normalise": "identity",
                "losses": {},
            }
        },
        choices=Choices(
            granularity="token",
            reads="timestep + token",
            scorer="linear",
            selector="intervals of t at three scales",
            normaliser="identity, core 1",
            experts="low-rank deltas",
            combine="dense + weighted sum",
            losses="none",
            start="equal",
        ),
        notes="One scalar gate per token and expert, the same for all maps of an FFN; the source leaves its "
        "shape open. The two stages of training (deltas, then gates) are a matter of which parameters are "
        "frozen. Needs a block that sees the raw timestep.",
        aliases=("tsm",),
    )
)
