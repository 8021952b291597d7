"""The documents: their example runs, their links lead somewhere, their commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from moefx.inspect.recipes import recipes_markdown

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """Return the anchors that a renderer makes from the headings."""
    headings = HEADING.findall(document.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_relative_links_lead_somewhere(document: Path) -> None:
    for target, anchor in LINK.findall((ROOT / document).read_text()):
        if "://" in target:
            continue
        path = (ROOT / document).parent / target if target else ROOT / document
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), f"{target}#{anchor}"


def test_the_python_example_of_the_readme_runs(tmp_path: Path) -> None:
    (example,) = blocks("README.md", "python")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:moefx", "-c", example], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_make_targets_in_the_documents_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    known = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = {name for document in DOCUMENTS for name in re.findall(r"\bmake ([a-z]+)\b", (ROOT / document).read_text())}
    prose = {"a", "all", "one"}
    assert named - prose <= known
    assert {"demo", "test"} <= named


def test_the_first_screen_of_the_readme_has_the_two_commands() -> None:
    first_screen = (ROOT / "README.md").read_text().splitlines()[:25]
    assert any(line.startswith("$ make demo") for line in first_screen)
    assert any(line.startswith("$ make test") for line in first_screen)


def test_the_page_of_recipes_is_what_the_recipe_files_say() -> None:
    written = (ROOT / "docs" / "recipes.md").read_text()
    assert written == recipes_markdown(), "write it anew: moefx recipes --markdown --out docs/recipes.md"


def test_the_page_on_kernels_names_what_there_is() -> None:
    from moefx.codegen import TARGETS

    page = (ROOT / "docs" / "codegen.md").read_text()
    sources = [*(ROOT / "codegen").rglob("*.py"), ROOT / "moefx" / "backend.py"]
    read = {name for path in sources for name in re.findall(r"\bMOEFX_[A-Z_]*[A-Z]", path.read_text())}
    assert read <= set(re.findall(r"\bMOEFX_[A-Z_]*[A-Z]", page))
    assert all(f"`{name}`" in page for name in TARGETS if name != "interpreter")


def test_the_dumps_of_the_page_on_kernels_run() -> None:
    from typer.testing import CliRunner

    from moefx.cli import app

    lines = [line for block in blocks("docs/codegen.md", "bash") for line in block.splitlines()]
    dumps = [line.split() for line in lines if line.startswith("moefx dump")]
    results = [CliRunner().invoke(app, words[1:]) for words in dumps]
    assert [result.exit_code for result in results] == [0] * len(dumps)
    assert "gather or scatter of tokens at" in results[0].stdout
    assert "def launch(" in results[1].stdout
