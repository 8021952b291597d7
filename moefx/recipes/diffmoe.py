"""DiffMoE: experts choose among the tokens of the whole batch; a predictor frees inference from the batch."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="diffmoe",
        summary="every 2nd FFN -> 8 experts that choose among all tokens of the batch, thresholds in evaluation",
        paper="Shi et al., DiffMoE, arXiv 2503.14487",
        equation="y = sum_{e: s in T_e} p_e E_e(x), p = softmax(W x); T_e the S/E best tokens of the batch, in "
        "evaluation those with predictor_e(x) > EMA threshold_e",
        passes={
            "fresh-experts": {
                "experts": 8,
                "selector": "predicted",
                "capacity": 1.0,
                "normalise": "softmax_topk",
                "router_std": 0.006,
                "every": 2,
                "losses": {"predictor": 0.01},
            }
        },
        choices=Choices(
            granularity="token",
            reads="token",
            scorer="linear",
            selector="expert choice over the batch; predicted in evaluation",
            normaliser="softmax over experts, raw",
            experts="FFNs",
            losses="predictor 0.01",
            start="different: the experts are drawn anew",
        ),
        notes="Evaluation is batch-invariant: the predictor decides for every token alone. The released code "
        "counts the tokens above the threshold and takes that many by gate from the whole batch, guidance "
        "halves included. The moving average of thresholds has no bias towards its start and stands still "
        "when a checkpoint recomputes.",
    )
)
