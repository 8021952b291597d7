"""Run the emitted kernels in Triton's interpreter, which has to be chosen before Triton is imported: in a child."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def why_no_interpreter() -> str | None:
    """Return why Triton's interpreter cannot run here, or ``None``."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"

    def version(name: str) -> tuple[int, ...]:
        return tuple(int(part) for part in importlib.metadata.version(name).split(".")[:2] if part.isdigit())

    if version("triton") < (3, 9) and version("numpy") >= (2, 4):
        return "Triton before 3.9 cannot interpret with numpy 2.4 or newer (triton#9171)"
    return None


def interpret(script: str, cache: Path, *more: str) -> None:
    """Run files of tests in one process whose Triton interprets: each such process takes seconds to start."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MOEFX_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    files = [str(TESTS / name) for name in (script, *more)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=900", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(why_no_interpreter() is not None, reason=str(why_no_interpreter()))
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "scripts",
    [
        (
            "interpreted_kernels.py",
            "interpreted_tokens.py",
            "interpreted_attention.py",
            "interpreted_tma.py",
            "interpreted_few_rows.py",
            "interpreted_trials.py",
        ),
        ("interpreted_backend.py", "interpreted_models.py", "interpreted_selectors.py"),
        ("interpreted_backward.py", "interpreted_fuzz.py", "interpreted_router.py", "interpreted_choice.py"),
    ],
    ids=["forward", "backend", "backward"],
)
def test_in_the_interpreter(scripts: tuple[str, ...], tmp_path: Path) -> None:
    if "interpreted_models.py" in scripts:
        pytest.importorskip("diffusers")
    interpret(scripts[0], tmp_path, *scripts[1:])
