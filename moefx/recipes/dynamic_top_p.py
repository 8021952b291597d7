"""Dynamic top-p routing: a token gets as many experts as its router is undecided."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="dynamic-top-p",
        summary="every 2nd FFN -> the fewest of 16 experts whose probability reaches 0.4",
        paper="Huang et al., Harder Tasks Need More Experts, arXiv 2403.07652",
        equation="y = sum_{e in S} p_e E_e(x), S = shortest prefix of the experts by p = softmax(W x) with sum_S p "
        ">= 0.4",
        passes={
            "fresh-experts": {
                "experts": 16,
                "selector": "top-p",
                "top_p": 0.4,
                "normalise": "softmax_topk",
                "every": 2,
                "losses": {"balance": 0.01, "entropy": 0.0001},
            }
        },
        choices=Choices(
            granularity="token",
            reads="token",
            scorer="linear",
            selector="top-p 0.4",
            normaliser="softmax, raw",
            experts="FFNs",
            losses="balance 0.01, entropy 1e-4",
            start="different: the experts are drawn anew",
        ),
        notes="The expert that crosses the threshold stays, so one always does. Coefficients of both losses are "
        "those of the paper's text; no training code is public. max_per_token bounds the slots of a "
        "token. With copies (upcycle, selector='top-p', normalise=None) the gates are renormalised and "
        "the start is exact.",
    )
)
