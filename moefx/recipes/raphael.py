"""RAPHAEL: the timestep alone picks one FFN, so that experts paint different stages of an image."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="raphael",
        summary="FFN -> 1 of 4 copies chosen by the timestep (time-MoE)",
        paper="Xue et al., RAPHAEL, arXiv 2305.18295",
        equation="h' = FFN_r(h), r = argmax softmax(G(E(t)) + noise)",
        passes={
            "upcycle": {
                "experts": 4,
                "top_k": 1,
                "router_input": "timestep",
                "scorer": "mlp",
                "selector": "noisy-top-k",
                "router_noise": 1.0,
                "normalise": "ste",
            }
        },
        choices=Choices(
            granularity="sample",
            reads="timestep",
            scorer="MLP",
            selector="argmax, noisy in training",
            normaliser="straight-through 1",
            experts="FFN copies",
            combine="hard switch",
            losses="balance 0.01",
            start="equal",
        ),
        notes="How the gate learns is not published; a straight-through gate of 1 is used. The time experts only: "
        "the space experts, which prompt tokens choose and cross-attention maps place, are the block "
        "moefx.routing.space; no pass wires them in, since fused attention never forms the maps. The edge loss is not "
        "there. The deviation of the noise is not published either.",
    )
)
