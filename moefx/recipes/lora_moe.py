"""LoRA experts on a dense model: routed low-rank deltas on the second projection of every FFN."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="lora-moe",
        summary="FFN -> itself + 1 of 4 rank-32 deltas on its second projection, exact at the start",
        paper="Zhang et al., ICEdit, arXiv 2504.20690",
        equation="y = W_2 h + (alpha / r) p_e B_e A_e h, e = argmax p, p = softmax(W_r x), h the hidden layer",
        passes={
            "low-rank-experts": {
                "experts": 4,
                "top_k": 1,
                "rank": 32,
                "alpha": 32.0,
                "targets": ["out"],
                "normalise": "softmax_topk",
                "losses": {},
            }
        },
        choices=Choices(
            granularity="token",
            reads="token",
            scorer="linear",
            selector="top-1 of 4",
            normaliser="softmax, raw",
            experts="low-rank deltas",
            combine="dense + weighted sum",
            losses="none",
            start="equal",
        ),
        notes="The router reads the input of the FFN, not its hidden layer. Deltas on attention projections are "
        "not part of it. With B = 0 the router has no gradient in the first step. Freeze the dense "
        "weights yourself if they shall stay.",
        aliases=("icedit",),
    )
)
