"""A recipe that no paper has: tokens find experts by likeness, as many as it takes, and the timestep has a say.

Copies of the FFN are chosen by the cosine of learnt prototypes with [timestep ; token before modulation]. The sharper
the likeness, the fewer experts a token gets: the fewest that hold 60 % of the probability. Exact at the start, since
renormalised gates sum to one. Run it: ``python examples/new_recipe.py``.
"""

import moefx
from moefx.recipes import Choices, Recipe, register_recipe
from moefx.zoo import tiny

RECIPE = Recipe(
    name="likeness",
    summary="FFN -> as many of 8 copies as it takes, by likeness to prototypes",
    paper="none",
    equation="y = sum_{e in S} p_e / sum_S p * FFN_e(x), S = fewest with sum_S p >= 0.6, p = softmax cos([t ; n], P)",
    passes={
        "upcycle": {
            "experts": 8, "router_input": "timestep+unmodulated", "scorer": "cosine", "selector": "top-p", "top_p": 0.6,
            "losses": {"balance": 0.01, "entropy": 1e-4},
        }
    },
    choices=Choices(
        granularity="token", reads="timestep + un-modulated token", scorer="cosine", selector="top-p 0.6",
        normaliser="softmax, renormalised", experts="FFN copies", losses="balance, entropy", start="equal",
    ),
)  # fmt: skip

if __name__ == "__main__":
    register_recipe(RECIPE)
    print(moefx.transform(tiny("DiTTransformer2DModel"), recipe="likeness").moefx.report)
