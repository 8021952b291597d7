"""Tokens that switch off their own feed-forward network, within a budget."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="dydit-tokens",
        summary="FFN of a block -> every token decides whether it passes; exact at its start",
        paper="Zhao et al., Dynamic Diffusion Transformer, arXiv 2410.03456 (token half)",
        equation="x_i += s_i gate MLP(mod(LN x_i)), s_i = 1[sigmoid(z_i) > 1/2], z = w2.relu(W1 x + b1) + b2; "
        "loss 2 (share - budget)^2 + 2 relu(0.1 - mean s)",
        passes={"token-bypass": {}},
        choices=Choices(
            granularity="token",
            reads="stream after the attention, not normalised",
            scorer="MLP",
            selector="threshold, Gumbel-sigmoid in training",
            normaliser="1, straight through",
            experts="FFN or skip",
            combine="gate before the adaLN gate",
            losses="budget 2, minimum 2",
            start="equal",
        ),
        notes="b2 starts at +35. The budget is each layer's own; moefx.routing.budget_loss is the whole model's, as in "
        "the paper, with multiply-adds read from the model instead of constants per model name. Without gradients the "
        "tokens that are off are not computed. The released code steps its optimiser twice.",
    )
)
