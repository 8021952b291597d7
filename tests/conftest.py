"""What every test gets: fixed seeds, one thread, no network, reproducible hypothesis runs, golden files."""

import gc
import os
import random
from collections.abc import Callable, Iterator
from difflib import unified_diff
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: it reads this once
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

pytest_plugins = ["pytester"]

GOLDENS = Path(__file__).parent / "goldens"
DIFF_LINES = 200

# Shared machines make timings useless as a criterion, and tracing is slow next to what hypothesis expects.
settings.register_profile(
    "ci", derandomize=True, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", deadline=None, print_blob=True, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)
gc.disable()  # until everything is collected: see pytest_collection_finish


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """Seed every generator, and fail a test that leaves torch's global switches changed."""
    value = 0
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    before = _switches()
    yield value
    after = _switches()
    torch.set_default_dtype(before["default dtype"])
    torch.set_grad_enabled(before["grad mode"])
    assert after == before, "the test left global state behind"


def _switches() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "default device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


# --------------------------------------------------------------------------------------------------------- collection


def pytest_collection_finish() -> None:
    """Set aside what imports and collection left: every full collection would visit a million objects in vain.

    That was an eighth of the processor time of the suite.
    """
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


# ---------------------------------------------------------------------------------------------------- golden files


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
