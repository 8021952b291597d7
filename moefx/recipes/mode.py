"""MoDE: the noise level alone chooses the experts, so that a sampler step runs two fused FFNs."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="mode",
        summary="FFN -> 2 of 4 SwiGLU experts chosen by the timestep",
        paper="Reuss et al., Efficient Diffusion Transformer Policies with Mixture of Expert Denoisers, arXiv "
        "2412.12953",
        equation="y = sum_{e in S} p_e / sum_S p * E_e(x), p = softmax(MLP(c(t))), S drawn from p without "
        "replacement, top-2 in evaluation",
        passes={
            "fresh-experts": {
                "experts": 4,
                "top_k": 2,
                "form": "swiglu",
                "router_input": "timestep",
                "scorer": "mlp",
                "selector": "multinomial",
                "normalise": "softmax_topk_renorm",
                "losses": {"importance": 0.01},
            }
        },
        choices=Choices(
            granularity="sample",
            reads="timestep",
            scorer="MLP, GELU",
            selector="multinomial, top-2 in evaluation",
            normaliser="softmax, renormalised",
            experts="SwiGLU FFNs",
            losses="importance 0.01",
            start="different: the experts are drawn anew",
        ),
        notes="The router reads the raw timestep in a sinusoid where the block sees it, else the block's "
        "timestep embedding. Draws without replacement are the top 2 of Gumbel-perturbed logits. The "
        "residual stays the block's own; the released code adds the normalised tensor instead.",
    )
)
