"""EC-DiT: every expert chooses the tokens it wants, so tokens get as much compute as they need."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="ec-dit",
        summary="every 2nd FFN -> 8 experts that each choose their tokens, 2 experts per token on average",
        paper="Sun et al., EC-DiT, arXiv 2410.02098",
        equation="y_s = sum_{e: s in T_e} A_se E_e(x_s), A = softmax_e(W x), T_e = the ceil(2 S / E) tokens with "
        "the highest A_e",
        passes={
            "fresh-experts": {
                "experts": 8,
                "selector": "expert-choice",
                "capacity": 2.0,
                "pool": "sample",
                "normalise": "softmax_topk",
                "router_std": 0.006,
                "every": 2,
                "losses": {},
            }
        },
        choices=Choices(
            granularity="token",
            reads="token",
            scorer="linear",
            selector="expert choice per sample, capacity 2",
            normaliser="softmax over experts, raw",
            experts="FFNs",
            losses="none",
            start="different: the experts are drawn anew",
        ),
        notes="Tokens of one sample compete, so a sample's result does not depend on its batch; the paper pools "
        "1,024 tokens in training and 512 at inference: pool=1024. Capacity is rounded up. Router N(0, "
        "0.006) as in public reproductions, and every 2nd FFN as the paper; the router reads what the FFN "
        "reads. From a dense model: passes='upcycle', selector='expert-choice', capacity=experts is "
        "exact.",
    )
)
