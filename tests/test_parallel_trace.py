"""Layers for more ranks than there are processes: traced over a fake process group, never run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import sys
import torch, torch.distributed as dist
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore
from moefx.parallel import ParallelExperts, Roster
from moefx.routing import Experts, random_weights

ranks = int(sys.argv[1])
dist.init_process_group("fake", rank=3, world_size=ranks, store=FakeStore())
experts = Experts(random_weights(8, 12, num_experts=2 * ranks), torch.nn.functional.gelu)
homes = tuple((2 * g, 2 * g + 1) for g in range(ranks))
layer = ParallelExperts(experts, Roster(homes, ((),) * ranks), 3, dist.group.WORLD.group_name)
inputs = torch.randn(16, 8), torch.randint(0, 2 * ranks, (16, 2)), torch.rand(16, 2)
with torch.no_grad():
    graph = make_fx(lambda *a: layer(*a), tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs).graph
names = [str(node.target) for node in graph.nodes]
print(*(sum(part in name for name in names) for part in ("all_to_all_single", "wait_tensor", "grouped")))
"""


def test_sixty_four_ranks_trace_to_three_exchanges_with_one_wait_each() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "64"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "3", "2"]


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
