"""Local attention among image tokens, within a disc."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="clear",
        summary="attention -> image tokens attend within a disc and to all text; text attends to everything",
        paper="Liu et al., CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers, arXiv 2412.16112",
        equation="image query i sees image key j iff dy^2 + dx^2 < r^2, and every text key",
        passes={"attention-mechanisms": {"mechanisms": ["disc"], "radius": 16.0}},
        choices=Choices(
            granularity="token",
            reads="position",
            scorer="rule",
            selector="distance below r",
            normaliser="none",
            experts="attention mechanism",
            combine="hard switch",
            start="approximate; equal once the radius covers the grid",
            router="none",
        ),
        notes="The grid of the image tokens is the latent's over the patch size; where a pipeline packs latents into "
        "tokens itself, as for FLUX, a square is taken, or grid=[height, width]. On videos the disc is a ball. "
        "Tiles of 8 x 8 image tokens (4 x 4 x 4 on videos) attend to the window around them where that saves a third "
        "of the products; else the mask is dense and saves nothing. The paper's optional pooled keys are left out, and "
        "its distillation is the training loop's.",
    )
)
