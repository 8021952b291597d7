"""TREAD: tokens that take a short cut in training."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="tread",
        summary="segment of blocks -> a random half of the tokens goes through it in training; exact at inference",
        paper="Krause et al., TREAD, arXiv 2501.04765",
        equation="training: y_i = segment(x_S)_i for i in a random set S of half the tokens, y_i = x_i for the others; "
        "inference: y = segment(x)",
        passes={"token-drop": {}},
        choices=Choices(
            granularity="token",
            reads="nothing",
            scorer="random",
            selector="a random half",
            normaliser="none",
            experts="segment or skip",
            combine="re-insertion",
            losses="none; training only",
            start="equal",
            router="none",
            batch_invariant=True,
        ),
        notes="The segment is blocks 2 to 7 of 12, in proportion for other depths. Where blocks read rotary tables "
        "that all samples share, one set is drawn for the batch, otherwise one per sample. The optional guidance by a "
        "second rate at inference is not reproduced, nor that the block after the re-insertion ran in float32.",
    )
)
