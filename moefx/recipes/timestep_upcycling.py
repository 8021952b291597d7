"""Upcycling with a router that reads the timestep beside the token."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="timestep-upcycling",
        summary="FFN -> top-2 of 8 copies, routed by timestep and token",
        paper="router input as in Nucleus-Image (arXiv 2604.12163); start as in arXiv 2212.05055",
        equation="logits = W x + V c(t), V = 0 at the start",
        passes={"upcycle": {"experts": 8, "top_k": 2, "router_input": "timestep+token"}},
        choices=Choices(
            granularity="token",
            reads="token + timestep",
            scorer="linear",
            selector="top-2 of 8",
            normaliser="softmax, renormalised",
            experts="FFN copies",
            losses="balance 0.01",
            start="equal",
        ),
        notes="c(t) is the raw timestep in a sinusoid where the block sees it, else the block's timestep embedding.",
    )
)
