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


def interpret(script: str, cache: Path) -> None:
    """Run a file of tests in a process whose Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MOEFX_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(why_no_interpreter() is not None, reason=str(why_no_interpreter()))
@pytest.mark.parametrize("script", ["interpreted_kernels.py", "interpreted_backend.py"])
def test_in_the_interpreter(script: str, tmp_path: Path) -> None:
    interpret(script, tmp_path)
