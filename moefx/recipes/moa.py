"""Mixture of attention experts: queries and outputs of their own over shared keys and values."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="moa",
        summary="attention -> top-2 of 8 copies of its query and output projections; exact at its start",
        paper="Shen et al., JetMoE, arXiv 2404.07413 (mixture of attention heads)",
        equation="y = sum_j g_j W_o,e_j attend(W_q,e_j x; K, V) + b_o,  g = softmax of the selected logits",
        passes={"attention-experts": {"experts": 8, "top_k": 2, "normalise": "topk_softmax"}},
        choices=Choices(
            granularity="token",
            reads="token",
            scorer="linear",
            selector="top-2 of 8",
            normaliser="softmax over the selected",
            experts="pairs of query and output projections",
            losses="balance 0.01, z 0.001",
            start="equal",
        ),
        notes="The attention runs once per slot. In joint attention each stream has experts of its own. Losses are "
        "means over the layers, where the released code sums. A fused projection goes on computing its dense queries, "
        "which nothing reads. The router starts small instead of as a linear layer; it changes nothing.",
    )
)
