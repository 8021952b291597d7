"""Every recipe on every one of five denoisers through the backend: part of ``make long``, since it takes an hour.

python -m pytest -q tests/backend_grid.py                      the operators of the dialect on CPU
TRITON_INTERPRET=1 python -m pytest -q tests/backend_grid.py   the emitted kernels in Triton's interpreter
"""

from __future__ import annotations

import pytest

from moefx.codegen.runtime import interpreting
from moefx.errors import NothingMatched
from moefx.recipes import recipes
from tests import backend_support as backend
from tests import recipe_support as support

pytestmark = support.MARKS


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", support.MODELS)
@pytest.mark.parametrize("recipe", [recipe.name for recipe in recipes()])
def test_equals_eager(recipe: str, name: str, training: bool) -> None:
    options = {"kernels": "triton", "inner": "eager"} if interpreting() else {"inner": "aot_eager"}
    try:
        backend.check(recipe, name, training=training, options=options)
    except NothingMatched as refusal:
        pytest.skip(str(refusal))
