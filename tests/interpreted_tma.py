"""Kernels that load through tensor descriptors, in Triton's interpreter; run by ``test_codegen_kernels.py``."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moefx import ops
from moefx.codegen import LinearSpec, Schedule, runtime, trace_pointwise

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")

# Stores of bfloat16 truncate in the interpreter.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
PERMUTED = Schedule(32, 32, 32, 1, 1, 2, variant="tma", programs=3)
GATHERED = dataclasses.replace(PERMUTED, descriptor_gather=True)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every new tensor start as NaN or -1, so that what a kernel forgets to write shows."""
    original = Tensor.new_empty

    def poisoned(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        made = original(self, *args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else -1)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def swiglu(z: Tensor) -> Tensor:
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate) * up


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, offsets: Tensor, slots: int) -> Tensor:
    """Return each row's pre-activation in float64, one row at a time."""
    z = torch.zeros(order.shape[0], weight.shape[1], dtype=torch.float64)
    bounds = offsets.tolist()
    for expert in range(weight.shape[0]):
        for row in range(bounds[expert], bounds[expert + 1]):
            z[row] = weight[expert].double() @ x[int(order[row]) // slots].double()
            if bias is not None:
                z[row] += bias[expert].double()
    return z


def check(spec: LinearSpec, schedule: Schedule, act: object, experts_TK: Tensor, experts: int) -> None:
    tokens, slots = experts_TK.shape
    dtype = getattr(torch, spec.dtype)
    order, offsets = ops.group(experts_TK, experts)
    x = torch.randn(tokens, spec.in_features).to(dtype)
    rows_x = x if spec.gather else x[order // slots]
    weight = (torch.randn(experts, spec.weight_rows, spec.in_features) / spec.in_features**0.5).to(dtype)
    bias = torch.randn(experts, spec.weight_rows).to(dtype) if spec.bias else None
    z = expected(x, weight, bias, order, offsets, slots)
    want = act(z)  # type: ignore[operator]
    want[int(offsets[-1]) :] = 0
    tiles = runtime.tile_map(offsets, order.shape[0], schedule.block_m)
    out = x.new_empty((order.shape[0], spec.out_features))
    kept = x.new_empty((order.shape[0], spec.weight_rows)) if spec.keep else None
    biases = [] if bias is None else [bias]
    runtime.Projection(spec, schedule)(rows_x, [weight], biases, order if spec.gather else None, tiles, out, kept)
    if kept is not None:
        assert float((kept.double() - z).norm() / (1e-12 + z.norm())) < TOLERANCE[dtype]
    assert float((out.double() - want).norm() / (1e-12 + want.norm())) < TOLERANCE[dtype]
    assert not bool(out[int(offsets[-1]) :].any()), "dropped rows are zero"


CHOICES = {
    "uneven": lambda tokens, slots, experts: torch.randint(0, experts, (tokens, slots)),
    "empty experts": lambda tokens, slots, experts: torch.randint(0, experts, (tokens, slots)) // 2 * 2,
    "one takes all": lambda tokens, slots, experts: torch.full((tokens, slots), experts - 1),
    "dropped": lambda tokens, slots, experts: torch.randint(-1, experts, (tokens, slots)),
    "all dropped": lambda tokens, slots, experts: torch.full((tokens, slots), experts),
}


@pytest.mark.parametrize("schedule", [PERMUTED, GATHERED], ids=["permuted", "gathered"])
@pytest.mark.parametrize("case", sorted(CHOICES))
@pytest.mark.parametrize(("tokens", "slots", "width", "hidden"), [(37, 2, 40, 70), (1, 1, 16, 8)])
def test_gathered_rows(schedule: Schedule, case: str, tokens: int, slots: int, width: int, hidden: int) -> None:
    spec = LinearSpec(width, hidden, "float16", True, True, slots, trace_pointwise(F.gelu, hidden))
    check(spec, schedule, F.gelu, CHOICES[case](tokens, slots, 5), 5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sorted_rows(dtype: str) -> None:
    spec = LinearSpec(72, 33, dtype)
    check(spec, PERMUTED, lambda z: z, CHOICES["dropped"](41, 3, 7), 7)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("schedule", [PERMUTED, GATHERED], ids=["permuted", "gathered"])
def test_gated(schedule: Schedule, keep: bool) -> None:
    spec = LinearSpec(24, 35, "float16", True, True, 1, trace_pointwise(swiglu, 70), keep=keep)
    check(spec, schedule, swiglu, CHOICES["dropped"](50, 1, 3), 3)


def test_more_tiles_than_one_count_reads() -> None:
    experts_TK = torch.randint(0, 1100, (1100, 1))
    spec = LinearSpec(8, 16, "float16")
    check(spec, dataclasses.replace(PERMUTED, block_m=16, block_n=16, block_k=16), lambda z: z, experts_TK, 1100)


def test_rows_that_do_not_start_at_multiples_of_16_bytes_are_copied() -> None:
    spec = LinearSpec(16, 16, "float16")
    wide = torch.randn(9, 17).half()
    weight = torch.randn(1, 16, 16).half()
    offsets = torch.tensor([0, 9])
    out = wide.new_empty((9, 16))
    tiles = runtime.tile_map(offsets, 9, 32)
    runtime.Projection(spec, PERMUTED)(wide[:, 1:], [weight], [], None, tiles, out)
    torch.testing.assert_close(out, (wide[:, 1:].double() @ weight[0].double().t()).half(), atol=1e-2, rtol=1e-2)
