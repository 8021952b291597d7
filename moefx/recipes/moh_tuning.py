"""Mixture of heads out of a trained model: heads chosen by the length of their queries, gates of 1 and 0."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="moh-tuning",
        summary="attention -> half of the heads always on, of the others those with the longest queries; no parameters",
        paper="Jin et al., MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842, continue-tuning",
        equation="g_i = 1 for shared heads and for the top k of |q_i| / std_j |q_j| among the others, else 0",
        passes={"mixture-of-heads": {"router_input": "query", "shared_heads": 0.5, "active_heads": 0.25}},
        choices=Choices(
            granularity="token",
            reads="query of each head",
            scorer="norm of the query over its spread",
            selector="shared + top-k heads",
            normaliser="1, straight through",
            experts="attention heads",
            combine="gate before the output projection",
            losses="balance 0.01 k",
            start="approximate: a quarter of the heads is off; equal with active_heads=None",
            router="none",
        ),
        notes="Which heads are shared is not learnt: the first ones. The queries are read as they leave their "
        "projection, before a norm over them, which would make all lengths equal; rotary embeddings do not matter. The "
        "released code takes as many shared heads as routed ones for granted; here the two numbers are free.",
    )
)
