"""Layers for more ranks than there are processes: traced over a fake process group, never run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_ranks_of_large_jobs_agree_with_each_other_and_with_the_plan() -> None:
    """Of 64 ranks by their traces; of 512, whose traces take minutes, by what they hold and tell each other."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel_scale", "64", "512"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    jobs = json.loads(done.stdout.strip().splitlines()[-1])
    assert jobs["64"]["exchanges"] == 3
    assert len(jobs["64"]["held"]) > 1, "all ranks hold as much: nothing was compared"
    for found in jobs.values():
        assert not [name for name, value in found.items() if value is False], found
        assert found["predicted"] == found["counted"] > 0
