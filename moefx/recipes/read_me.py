"""Read-ME: a subset of the neurons per domain; here the domains are noise levels."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="read-me",
        summary="FFN -> the neurons most active at the sample's noise level, half of them",
        paper="Cai et al., Read-ME, arXiv 2410.19123",
        equation="y = W_out[:, I_e] h_{I_e}(x);  I_e = top half by E[|h| | domain e];  e = argmax(W mean(x) + b)",
        passes={"sparse-neurons": {"rule": "subset", "keep": 0.5, "experts": 8}},
        choices=Choices(
            granularity="sample",
            reads="mean token",
            scorer="linear",
            selector="top-1 of 8",
            normaliser="straight-through 1",
            experts="overlapping subsets of neurons",
            losses="balance 0.01",
            start="approximate",
        ),
        notes="Domains are timestep buckets instead of text corpora, which is ours. Subsets overlap and are kept as "
        "index lists into the one dense network, so their intersection is the paper's always-on residual "
        "without a second copy. The paper has one router in front of all layers; here every layer tells the "
        "noise level from its own mean token, fitted by softmax regression. Exactly the top half is kept; the "
        "release loses one neuron to a strict comparison.",
    )
)
