"""The example of a recipe that no paper has: short, exact at the start, and it learns."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from moefx.recipes import base
from tests import recipe_support as support
from tests.recipe_support import DIT, FLUX

pytestmark = support.MARKS
FILE = Path(__file__).parents[1] / "examples" / "new_recipe.py"


def test_it_is_short_and_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(FILE.read_text(encoding="utf-8").splitlines()) < 40
    monkeypatch.setattr(base, "_RECIPES", dict(base._RECIPES))
    runpy.run_path(str(FILE), run_name="__main__")
    assert "likeness" in capsys.readouterr().out


@pytest.mark.parametrize("name", [DIT, FLUX])
def test_it_works(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_RECIPES", dict(base._RECIPES))
    base.register_recipe(runpy.run_path(str(FILE))["RECIPE"])
    model = support.realised("likeness", name, noise=0.01, max_error=1.0)
    support.check_runs(model, name)
    support.check_equal(model, name, 0.1)
    support.check_learns(model, name, training=True)
