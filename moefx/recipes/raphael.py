"""RAPHAEL: the timestep picks one FFN and the words of the prompt pick others, placed by their attention maps."""

from moefx.recipes.base import Choices, Recipe, register_recipe

RECIPE = register_recipe(
    Recipe(
        name="raphael",
        summary="FFN -> 1 of 4 copies chosen by the timestep, + 6 experts that words choose and attention maps place",
        paper="Xue et al., RAPHAEL, arXiv 2305.18295",
        equation="h' = FFN_r(h), r = argmax softmax(G(E(t)) + noise); y = h' + 1/S sum_i E_{r_i}(h' o M_i), "
        "r_i = argmax softmax(G'(y_i) + noise), M_i[j] = 1 where a_i[j] >= 0.2 max a_i",
        passes={
            "space-experts": {
                "experts": 4,
                "top_k": 1,
                "router_input": "timestep",
                "scorer": "mlp",
                "selector": "noisy-top-k",
                "router_noise": 1.0,
                "normalise": "ste",
                "space_experts": 6,
                "alpha": 0.2,
            }
        },
        choices=Choices(
            granularity="sample; word",
            reads="timestep; word and its attention map",
            scorer="MLP",
            selector="argmax, noisy in training",
            normaliser="straight-through 1",
            experts="FFN copies",
            combine="hard switch; masked mean over words",
            losses="balance 0.01, edge focal",
            start="equal",
        ),
        notes="How the gates learn is not published; straight-through gates of 1 are used. Nor are the deviation of "
        "the noise (1 here) and what the space experts start from: here copies that add nothing yet, to h', so that "
        "the start is the dense model. The maps are recomputed beside the fused attention: cross-attention, or in "
        "joint attention the image's queries against the words' keys alone, averaged over heads. The edge loss (alpha "
        "0.5, gamma 2) is on with edge=1.0 while moefx.routing.given(model, edges=maps, edge_samples=t < 500) holds; "
        "its head of 5 convolutions reads the mean of the words' maps, each divided by its maximum. Models without "
        "text: space_experts=0.",
    )
)
