"""Wan 2.2: two whole models, one for high noise and one for low noise."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="wan-switch",
        summary="model -> itself at high noise, a copy of itself at low noise, by a boundary on the timestep",
        paper="Wan 2.2 (text to video A14B), as in diffusers' WanPipeline",
        equation="y = F_high(x, t) if t >= 0.875 * 1000 else F_low(x, t)",
        passes={"model-switch": {}},
        choices=Choices(
            granularity="sample",
            reads="timestep",
            scorer="rule",
            selector="threshold",
            normaliser="1",
            experts="whole models",
            combine="hard switch",
            start="equal",
            router="none",
        ),
        notes="boundary=0.9 for image to video; it is compared with the timestep that the model receives, which the "
        "scheduler has shifted. The low-noise model is model.model_switch.low_noise_model: train it, or load the "
        "second transformer's weights into it. Which model runs is a fact that Python needs, so a call reads the "
        "timestep; moefx.specialise(model, timesteps) or model.model_switch.fixed('low') need not. Passes that rewrite "
        "the inside come before, in a transform of their own.",
        waives={
            "host": "which of two whole models runs is Python's to know",
            "graph": "each model is a graph of its own: fix the side, or specialise, and compile that",
        },
    )
)
