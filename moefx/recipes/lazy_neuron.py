"""The lazy neuron: only the largest activations of every token are kept."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="lazy-neuron",
        summary="FFN -> the half of the neurons with the largest activation per token",
        paper="Li et al., The Lazy Neuron Phenomenon, arXiv 2210.06313",
        equation="y = W_out (h * 1[|h_i| among the k largest])",
        passes={"sparse-neurons": {"rule": "top-k", "keep": 0.5}},
        choices=Choices(
            granularity="token",
            reads="hidden layer",
            scorer="parameter-free statistic",
            selector="top-k neurons",
            normaliser="unit",
            experts="single neurons",
            combine="mask",
            start="equal while at most k neurons fire",
            router="none",
        ),
        notes="Made for ReLU; with other functions the absolute value ranks. Needs no calibration. The hidden layer "
        "is computed in full, so only the output projection could be saved.",
    )
)
