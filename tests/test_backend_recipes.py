"""``torch.compile(model, backend="moefx")`` equals eager for a recipe of every family, training and inference.

Every family and every one of five denoisers appears, the costly denoisers with one recipe each and blocks of each kind
once, so that the file takes three quarters of a minute; ``backend_grid.py`` has all pairs (``make long``). The emitted
kernels do the same in ``interpreted_models.py``.
"""

from __future__ import annotations

import pytest

from tests import backend_support as backend
from tests import recipe_support as support
from tests.recipe_support import DIT, FLUX, SD3, UNET, WAN

pytestmark = support.MARKS

# Compiled by AOTAutograd where that is cheap; the backward pass of the rest is autograd's, of the same graph.
TRAINED = [
    ("sparse-upcycling", FLUX, "eager"),  # the best k of the FFNs
    ("ec-dit", DIT, "aot_eager"),  # tokens chosen by experts
    ("moe++", DIT, "eager"),  # experts without computation
    ("lora-moe", WAN, "eager"),  # low-rank experts
    ("moefx-split", DIT, "eager"),  # slices of neurons
    ("mixture-of-heads", SD3, "eager"),
    ("mixture-of-depths", DIT, "eager"),  # tokens
    ("timestep-upcycling", UNET, "eager"),
    ("mixture-of-blocks", DIT, "eager"),
]
INFERRED = [("lazy-neuron", DIT)]  # evaluation takes another path than training


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "name", "inner"), TRAINED)
def test_training_equals_eager(recipe: str, name: str, inner: str) -> None:
    backend.check(recipe, name, training=True, options={"inner": inner})


@pytest.mark.parametrize(("recipe", "name"), INFERRED)
def test_inference_equals_eager(recipe: str, name: str) -> None:
    backend.check(recipe, name, training=False, options={"inner": "eager"})
