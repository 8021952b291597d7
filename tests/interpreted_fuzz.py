"""Random pointwise graphs, printed into kernels forward and backward; run by ``test_codegen_kernels.py``.

Reference: torch autograd in float64.  What float32 itself loses on such a graph is measured on torch and allowed for.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moefx.codegen import LinearSpec, Schedule, runtime, trace_pointwise
from moefx.codegen.kernels import PointGradSpec
from moefx.codegen.launcher import Launcher
from tests.interpreted_kernels import Function, _poisoned_memory, random_expression  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")

GRAPHS = 300
ROWS = WIDTH = 16


def kernels(act: Function, z: Tensor, g: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return value and gradient by a projection by the identity, which keeps what goes in, and its backward kernel."""
    epilogue = trace_pointwise(act, WIDTH)
    spec = LinearSpec(WIDTH, WIDTH, "float32", epilogue=epilogue, keep=True)
    offsets = torch.tensor([0, ROWS])
    out, kept, grad = (z.new_empty((ROWS, WIDTH)) for _ in range(3))
    forward = runtime.Projection(spec, Schedule(16, 16, 16, 1, 1, 1))
    forward(z, [torch.eye(WIDTH)[None]], [], None, tiles, out, kept)
    assert torch.equal(kept, z)
    Launcher(PointGradSpec(WIDTH, "float32", before=epilogue), Schedule(16, 16, 16, 1, 1, 1)).launch(
        g, kept, offsets, grad
    )
    return out, grad


def autograd(act: Function, z: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    out = act(z)
    return out.detach(), torch.autograd.grad(out, z, g)[0]


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def test_random_graphs() -> None:
    tiles = runtime.tile_map(torch.tensor([0, ROWS]), ROWS, 16)
    for seed in range(GRAPHS):
        torch.manual_seed(seed)
        z, g = torch.randn(ROWS, WIDTH) * 1.5, torch.randn(ROWS, WIDTH)
        act = random_expression(1000 + seed)
        exact = autograd(act, z.double(), g.double())
        single = autograd(act, z, g)
        for what, got, want, own in zip(("value", "gradient"), kernels(act, z, g, tiles), exact, single, strict=True):
            assert torch.isfinite(got).all(), (seed, what)
            assert distance(got, want) < 5e-6 + 10 * distance(own, want), (seed, what)
