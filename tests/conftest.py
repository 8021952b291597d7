"""What every test gets: fixed seeds, one thread, no network, reproducible hypothesis runs."""

import gc
import os
import random
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: it reads this once
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

pytest_plugins = ["pytester", "tests.golden_files"]

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
