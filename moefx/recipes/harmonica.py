"""Sub-layers that reuse what they returned at an earlier sampler step."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="harmonica",
        summary="attention and FFN -> a learned table says at which sampler steps they run; else their last output",
        paper="Huang et al., HarmoniCa, arXiv 2410.01723",
        equation="y = g fresh + (1 - g) cached,  g = 1[sigmoid(table[step]) > 0.1], straight through",
        passes={"step-cache-attention": {}, "step-cache-ffn": {}},
        choices=Choices(
            granularity="sampler step",
            reads="step index",
            scorer="table",
            selector="threshold",
            normaliser="1, straight through",
            experts="the sub-layer, or its last output",
            combine="hard switch",
            losses="sum of the table 7e-8, added by the training loop",
            start="equal",
        ),
        notes="The step is told by moefx.routing.step_cache.StepCaches instead of being read from the timestep, so "
        "batches may hold any timesteps and nothing waits for the device. period=2 starts with every second step "
        "cached. A sub-layer that is written in its block's own forward stays as it is.",
        waives={
            "gradient": "the table learns inside a run over sampler steps, in training, where both sides are computed"
        },
    )
)
