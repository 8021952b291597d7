"""SparseDiT: the blocks in the middle see pooled tokens."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="sparsedit",
        summary="blocks in the middle -> run on a pooled grid of tokens; dense blocks at both ends",
        paper="Chang et al., FlexDiT / SparseDiT, arXiv 2412.06028 (pooling and recovery)",
        equation="s = blocks(pool(x)), y = W1 up(s) + W2 x; W1 = 0, W2 = I at the start",
        passes={"sparse-segment": {}},
        choices=Choices(
            granularity="token",
            reads="position",
            scorer="none",
            selector="average pooling to side x side",
            normaliser="none",
            experts="blocks on sparse tokens",
            combine="W1 up(s) + W2 x",
            start="approximate: the stream before the segment",
            router="none",
        ),
        notes="One segment instead of four; the merging and recovering cross-attentions of the paper, its pooling "
        "attention in the first blocks and its schedule over timesteps are left out: a plain mean pools, and the dense "
        "blocks after the recovery mix. Needs a square grid and blocks without tables per token (DiT, PixArt).",
        aliases=("sparse-dit",),
    )
)
