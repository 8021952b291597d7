"""ANT: timesteps that want the same share an interval, found by clustering the log-SNR."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="ant",
        summary="FFN -> one copy per interval of timesteps, 5 intervals clustered by log-SNR",
        paper="Go et al., Addressing Negative Transfer in Diffusion Models, arXiv 2306.00354 (its intervals)",
        equation="y = FFN_i(h), i = interval of t; intervals: min sum_i sum_{t in i} |logSNR(t) - logSNR(centre_i)|",
        passes={
            "upcycle": {
                "experts": 5,
                "top_k": 1,
                "selector": "interval",
                "intervals": [5],
                "cut": "clusters",
                "normalise": "unit",
                "losses": {},
            }
        },
        choices=Choices(
            granularity="sample",
            reads="timestep",
            scorer="rule",
            selector="interval of t, 5 clusters of log-SNR",
            normaliser="1",
            experts="FFN copies",
            combine="hard switch",
            start="equal",
            router="none",
        ),
        notes="The paper weighs the losses of the intervals in one network; here each interval has an FFN of its own, "
        "and weighing is left to the trainer (moefx.routing.intervals.interval_index). noise_schedule= says whose "
        "log-SNR is clustered; flow models take 'flow', with timesteps=1.0 if they receive sigma. Other numbers of "
        "intervals: experts=N, intervals=[N].",
    )
)
