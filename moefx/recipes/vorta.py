"""Attention mechanisms per head, picked by the timestep."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="vorta",
        summary="attention -> full, windowed or coarse attention per head, picked by the timestep; exact at its start",
        paper="Sun et al., VORTA: Efficient Video Diffusion via Routing Sparse Attention, arXiv 2505.18809",
        equation="y_h = sum_m p_hm A_m(q_h, k_h, v_h), p = softmax(W c(t) + b); in evaluation the argmax, or full",
        passes={"attention-mechanisms": {"mechanisms": ["full", "window", "coarse"], "radius": 4.0}},
        choices=Choices(
            granularity="sample",
            reads="timestep",
            scorer="linear per head",
            selector="all in training, argmax over a threshold in evaluation",
            normaliser="softmax",
            experts="attention mechanisms",
            losses="full 0.02",
            start="equal in evaluation; within 1.4 % of full attention's weight in training",
        ),
        notes="Each sample is routed by its own timestep, not by the first of its batch. The windows slide over "
        "tokens, not tiles; coarse attention averages buckets where the paper keeps a core set of them. The router has "
        "no SiLU in front and starts at full attention. The threshold is not printed in the paper; 0.5 is taken. Its "
        "distillation loss (weight 20) is the training loop's.",
    )
)
