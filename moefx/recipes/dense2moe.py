"""Dense2MoE: the important quarter of every FFN stays shared, the rest is dealt to routed slices."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="dense2moe",
        summary="FFN -> a shared quarter and top-2 of 12 slices by Taylor importance: 37.5 % active",
        paper="Zheng et al., Dense2MoE, arXiv 2510.09094",
        equation="y = MLP_s(x) + sum_{i in top2(Wx)} E softmax(Wx)_i MLP_i(x)",
        passes={
            "split": {
                "experts": 12,
                "shared": 4,
                "top_k": 2,
                "partition": "dealt",
                "importance": "taylor",
                "router": "normal",
                "normalise": "softmax_topk",
                "scale": 12.0,
                "balance": 0.01,
            }
        },
        choices=Choices(
            granularity="token",
            reads="token",
            scorer="linear",
            selector="top-2 of 12",
            normaliser="softmax, times E",
            experts="FFN slices + a shared slice",
            losses="balance 0.01; distillation of outputs and features",
            start="approximate",
        ),
        notes="Second-hand source. Softmax gates alone would scale every slice to about 1/12, so they are "
        "multiplied by E: with equal gates each slice has its dense weight. Importance is |dL/dh h| per token "
        "and neuron, so calibrate with loss=. Then distil with moefx.training.distil and features=. The "
        "mixture of blocks is another recipe.",
    )
)
