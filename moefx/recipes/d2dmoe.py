"""D2DMoE: as many slices per token as its predicted output norms ask for."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="d2dmoe",
        summary="FFN -> slices whose predicted norm is near the token's largest; 8 of 32 on average",
        paper="Szatkowski et al., Exploiting Activation Sparsity with Dense to Dynamic-k MoE, arXiv 2310.04361",
        equation="y = sum_e 1[s_e >= (1 - tau) max s] FFN_e(x);  s = |MLP(x)| ~ |FFN_e(x)|",
        passes={
            "split": {
                "experts": 32,
                "shared": 0,
                "top_k": 8,
                "partition": "clusters",
                "router": "mlp",
                "target": "norm",
                "selector": "relative",
            }
        },
        choices=Choices(
            granularity="token",
            reads="token",
            scorer="MLP, absolute value",
            selector="dynamic k, relative to the best",
            normaliser="unit",
            experts="FFN slices (balanced k-means of weight rows)",
            losses="squared error of predicted norms, before training",
            start="equal at tau = 1",
            router="fitted",
        ),
        notes="tau is set on the calibration sample so that top_k slices run on average; tau= fixes it. One model "
        "serves every tau. The penalty on activations before the split (squared Hoyer) belongs to the "
        "training of the dense model. The released dropout of 0.5 in the routed path is not reproduced.",
    )
)
