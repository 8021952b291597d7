"""MoMa: experts per modality, each choosing tokens from the whole batch."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="moma",
        summary="FFN of each stream -> 4 copies that choose tokens of that stream, sigmoid gates",
        paper="Lin et al., MoMa, arXiv 2407.21770",
        equation="y = sum_{j: x in T_j} sigmoid(W x)_j FFN_j(x), T_j the b/E best tokens of the batch in one modality",
        passes={
            "upcycle": {
                "experts": 4,
                "selector": "expert-choice",
                "pool": "batch",
                "capacity": 1.0,
                "normalise": "sigmoid_topk",
                "router_noise": 1.0,
                "losses": {},
            }
        },
        choices=Choices(
            granularity="token, by modality",
            reads="token",
            scorer="linear, sigmoid",
            selector="expert choice over the batch, Gumbel noise in training",
            normaliser="sigmoid",
            experts="FFN copies",
            losses="none",
            start="different: gates near 1/2, some tokens unserved",
            batch_invariant=False,
        ),
        notes="Models with a network per stream (SD3, FLUX double blocks) have the modality groups already: "
        "each is routed by itself. Streams that mix text and image tokens are one group. pool='sample' "
        "makes evaluation independent of the batch. The auxiliary routers that predict the choice for "
        "causal inference have no use in a denoiser.",
    )
)
