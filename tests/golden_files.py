"""Golden files: what is compared, how a difference is shown, and who may write them."""

import os
from collections.abc import Callable
from difflib import unified_diff
from pathlib import Path

import pytest

GOLDENS = Path(__file__).parent / "goldens"
DIFF_LINES = 200


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write tests/goldens/ instead of comparing with it")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--update-goldens") and os.environ.get("CI"):
        raise pytest.UsageError("--update-goldens is refused where CI is set: golden files are reviewed by a person")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run only the tests that own golden files when these are being written."""
    if not config.getoption("--update-goldens"):
        return
    keep = [item for item in items if "golden" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=[item for item in items if item not in keep])
    items[:] = keep


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with the file `tests/goldens/<name>`: `golden("dit.txt", text)`."""
    update = bool(request.config.getoption("--update-goldens"))

    def compare(name: str, text: str) -> None:
        path = GOLDENS / name
        if GOLDENS.resolve() not in path.resolve().parents:
            raise ValueError(f"a golden file lies inside {GOLDENS.name}/, not at {name!r}")
        text = text if text.endswith("\n") else text + "\n"
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        elif not path.exists():
            pytest.fail(f"no golden file {name}; write it with `make goldens` and review it", pytrace=False)
        elif (expected := path.read_text(encoding="utf-8")) != text:
            pytest.fail(_difference(name, expected, text), pytrace=False)

    return compare


def _difference(name: str, expected: str, found: str) -> str:
    lines = list(
        unified_diff(expected.splitlines(), found.splitlines(), f"goldens/{name}", "this run", lineterm="", n=3)
    )
    shown = "\n".join(lines[:DIFF_LINES])
    rest = f"\n… and {len(lines) - DIFF_LINES} more lines" if len(lines) > DIFF_LINES else ""
    return f"{name} differs from its golden file; if that is meant, run `make goldens` and review:\n{shown}{rest}"
