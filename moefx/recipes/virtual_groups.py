"""Granular upcycling with virtual groups: copies cut into shards, equal compute, exact at the start."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="virtual-groups",
        summary="FFN -> 4 copies cut in two, one tied group per token: the dense model's FLOPs",
        paper="He et al., Upcycling Large Language Models into Mixture of Experts, arXiv 2410.07524",
        equation="y = sum_{a in topk(Rx)} w_a * sum_{g<G} shard_{a,g}(x)",
        passes={"upcycle": {"experts": 8, "granularity": 2, "top_k": 2}},
        choices=Choices(
            granularity="token",
            reads="token",
            scorer="linear",
            selector="top-1 of 4 groups of 2",
            normaliser="straight-through 1",
            experts="FFN copies cut in shards",
            losses="balance 0.01",
            start="equal",
        ),
        notes="The group's gate is computed once and multiplies the sum of its shards, so no weight is scaled; the "
        "released cube-root scaling is off by 11 to 14 % for GELU and SwiGLU and is not reproduced. untie=True gives "
        "each shard a row of the router: once rows differ, a token may get two equal halves. On MNIST "
        "(benchmarks/results/quality_upcycle_mnist.md) that cost 9.6 % of the loss where whole copies cost 0.4 %.",
    )
)
