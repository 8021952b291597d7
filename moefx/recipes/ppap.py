"""PPAP: a low-rank expert per interval of timesteps, chosen by a rule."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="ppap",
        summary="FFN -> itself + the rank-16 delta of the timestep interval, 5 intervals",
        paper="Go et al., PPAP, arXiv 2212.05973",
        equation="W x + (alpha / r) B_i A_i x for each map W of the FFN, i = the interval of t",
        passes={
            "low-rank-experts": {
                "experts": 5,
                "selector": "interval",
                "intervals": [5],
                "rank": 16,
                "alpha": 8.0,
                "targets": ["in", "gate", "out"],
                "normalise": "unit",
                "losses": {},
            }
        },
        choices=Choices(
            granularity="sample",
            reads="timestep",
            scorer="rule",
            selector="interval of t, 5 equal ones",
            normaliser="1",
            experts="low-rank deltas",
            combine="dense + delta",
            losses="none",
            start="equal",
            router="none",
        ),
        notes="Intervals are half open and chosen per sample; the released code lets a boundary belong to two and "
        "takes the first sample's timestep for the batch, and leaves alpha / r out in training. Trainable biases are "
        "not part of it. bounds= and cut= take other intervals.",
        aliases=("timestep-experts",),
    )
)
