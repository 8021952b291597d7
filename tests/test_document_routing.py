"""The page about routing: its code runs from top to bottom, and the names in it exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.recipe_support import MARKS

pytestmark = MARKS
ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "routing.md").read_text()


def test_the_code_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 9
    names: dict[str, object] = {"__name__": "page"}
    for i, block in enumerate(blocks):
        exec(compile(block, f"docs/routing.md, block {i + 1}", "exec"), names)
    printed = capsys.readouterr().out
    assert "3 timesteps, 2 variants" in printed
    assert "<moefx: dtr, mixture-of-heads, sparse-upcycling, mixture-of-depths>" in printed
    assert "of the dense model)" in printed


def test_the_files_and_options_that_it_names_exist() -> None:
    for name in re.findall(r"`(\w+\.py)`", PAGE):
        assert (ROOT / "moefx" / "routing" / name).exists(), name
    options = (ROOT / "passes" / "rewrite").glob("*.py")
    text = "".join(path.read_text() for path in options)
    for option in re.findall(r"`(\w+)=", PAGE):
        assert f"{option}:" in text, option
