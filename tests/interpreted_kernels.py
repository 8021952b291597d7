"""Emitted kernels against float64, in Triton's interpreter; run by ``test_codegen_kernels.py`` in a process of its own.

Shapes: T tokens, k slots, R = T * k rows, E experts, K input and N output columns.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moefx import ops
from moefx.codegen import CombineSpec, LinearSpec, Pointwise, RegionSpec, Schedule, runtime, trace_pointwise

# numpy warns where float32 exp overflows to infinity, which is what the kernels count on.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")

TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.5e-2}  # bfloat16 stores truncate in the interpreter
Function = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every new tensor start as NaN or -1, so that what a kernel forgets to write shows."""
    original = {"new_empty": Tensor.new_empty, "empty": torch.empty}

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: poison(original["new_empty"](self, *a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(original["empty"](*a, **k)))


def swiglu(z: Tensor) -> Tensor:
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate) * up


def identity(z: Tensor) -> Tensor:
    return z


def experts_of(case: str, tokens: int, slots: int, experts: int) -> Tensor:
    """Return expert ids [T, k] of a named load."""
    if tokens == 0:
        return torch.empty(0, slots, dtype=torch.int64)
    if case == "one takes all":
        return torch.full((tokens, slots), experts - 1)
    chosen = torch.stack([torch.randperm(experts)[:slots] for _ in range(tokens)])
    if case == "empty experts":
        chosen[chosen % 2 == 1] = 0
    if case == "dropped":
        chosen[torch.rand(tokens, slots) < 0.3] = -1
    if case == "all dropped":
        chosen.fill_(experts + 3)
    return chosen


def error(got: Tensor, want: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


class Region:
    """Random operands of a routed FFN, and its float64 reference."""

    def __init__(self, tokens: int, slots: int, experts: int, width: int, hidden: int, case: str, dtype: str) -> None:
        torch.manual_seed(tokens + hidden)
        make = getattr(torch, dtype)
        self.slots, self.dtype = slots, dtype
        self.x = torch.randn(tokens, width).to(make)
        self.w_in = (torch.randn(experts, hidden, width) / width**0.5).to(make)
        self.b_in = torch.randn(experts, hidden).to(make)
        self.out_hidden = hidden
        self.gates = torch.rand(tokens, slots)
        self.order, self.offsets = ops.group(experts_of(case, tokens, slots, experts), experts)
        self.width, self.experts = width, experts

    def finish(self, hidden: int) -> None:
        make = getattr(torch, self.dtype)
        self.w_out = (torch.randn(self.experts, self.width, hidden) / hidden**0.5).to(make)
        self.b_out = torch.randn(self.experts, self.width).to(make)

    def spec(self, act: Function) -> RegionSpec:
        epilogue = trace_pointwise(act, self.out_hidden)
        hidden = self.out_hidden // epilogue.inputs
        self.finish(hidden)
        up = LinearSpec(self.width, hidden, self.dtype, True, True, self.slots, epilogue)
        down = LinearSpec(hidden, self.width, self.dtype, True)
        return RegionSpec((up, down), CombineSpec(self.width, self.slots, self.dtype))

    def run(self, spec: RegionSpec) -> Tensor:
        operands = [self.x, self.offsets, self.order, self.w_in, self.b_in, self.w_out, self.b_out, self.gates]
        return torch.ops.moefx.region(operands, runtime.register(spec))

    def reference(self, act: Function) -> Tensor:
        x, w_in, b_in, w_out, b_out = (t.double() for t in (self.x, self.w_in, self.b_in, self.w_out, self.b_out))
        out = torch.zeros(x.shape[0], self.width, dtype=torch.float64)
        bounds = self.offsets.tolist()
        for expert in range(self.experts):
            for flat in self.order[bounds[expert] : bounds[expert + 1]].tolist():
                token, slot = divmod(flat, self.slots)
                h = act((w_in[expert] @ x[token] + b_in[expert])[None])[0]
                out[token] += self.gates[token, slot].double() * (w_out[expert] @ h + b_out[expert])
        return out


@pytest.mark.parametrize(
    ("tokens", "slots", "experts", "width", "hidden", "case"),
    [
        (37, 2, 5, 45, 70, "balanced"),
        (64, 1, 4, 32, 64, "empty experts"),
        (41, 3, 7, 33, 100, "dropped"),
        (1, 1, 1, 17, 13, "balanced"),
        (50, 2, 8, 64, 128, "one takes all"),
        (5, 4, 4, 16, 48, "balanced"),
    ],
)
def test_region_equals_float64(tokens: int, slots: int, experts: int, width: int, hidden: int, case: str) -> None:
    region = Region(tokens, slots, experts, width, hidden, case, "float32")
    spec = region.spec(F.gelu)
    assert error(region.run(spec), region.reference(F.gelu)) < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str) -> None:
    region = Region(29, 2, 3, 40, 56, "dropped", dtype)
    spec = region.spec(F.silu)
    assert error(region.run(spec), region.reference(F.silu)) < TOLERANCE[dtype]


def test_gated_projection_uses_both_halves() -> None:
    region = Region(19, 2, 3, 24, 2 * 35, "balanced", "float32")
    spec = region.spec(swiglu)
    assert spec.linears[0].halves == 2
    assert error(region.run(spec), region.reference(swiglu)) < TOLERANCE["float32"]


def test_two_weights_equal_one_of_two_halves() -> None:
    region = Region(19, 2, 3, 24, 2 * 35, "dropped", "float32")
    spec = region.spec(swiglu)
    pair = trace_pointwise(lambda gate, up: F.silu(gate) * up, 35, inputs=2)
    up = dataclasses.replace(spec.linears[0], epilogue=pair, weights=2)
    split = RegionSpec((up, spec.linears[1]), spec.combine)
    w, b = (list(t.chunk(2, 1)) for t in (region.w_in, region.b_in))
    operands = [region.x, region.offsets, region.order, *w, *b, region.w_out, region.b_out, region.gates]
    assert torch.equal(torch.ops.moefx.region(operands, runtime.register(split)), region.run(spec))


def test_dropped_rows_are_zero() -> None:
    region = Region(9, 2, 3, 24, 20, "all dropped", "float32")
    assert torch.equal(region.run(region.spec(F.gelu)), torch.zeros(9, 24))


def test_no_tokens() -> None:
    region = Region(0, 2, 3, 24, 20, "all dropped", "float32")
    assert region.run(region.spec(F.gelu)).shape == (0, 24)


def test_repeated_runs_are_bitwise_equal() -> None:
    region = Region(37, 3, 5, 45, 70, "dropped", "float32")
    spec = region.spec(F.gelu)
    assert torch.equal(region.run(spec), region.run(spec))


def test_strided_input_rows() -> None:
    region = Region(11, 1, 2, 24, 20, "balanced", "float32")
    spec = region.spec(F.relu)
    region.x = torch.randn(24, 11).t()
    assert error(region.run(spec), region.reference(F.relu)) < TOLERANCE["float32"]


@pytest.mark.parametrize("block_m", [16, 32, 128])
def test_tile_map_covers_every_row_once(block_m: int) -> None:
    order, offsets = ops.group(experts_of("dropped", 71, 2, 6), 6)
    rows = order.shape[0]
    tiles = runtime.tile_map(offsets, rows, block_m).tolist()
    seen = [-1] * rows
    bounds = offsets.tolist()
    for expert, start, end in zip(*tiles, strict=True):
        if expert < 0:
            assert (start, end) == (-1, -1)
            continue
        group_end = rows if expert == 6 else bounds[expert + 1]
        assert bounds[expert] <= start < end <= min(group_end, start + block_m)
        for row in range(start, end):
            assert seen[row] == -1
            seen[row] = expert
    assert -1 not in seen


@pytest.mark.parametrize("load", [1, 5, 200])
def test_tile_bound_is_enough(load: int) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        _, offsets = ops.group(torch.randint(-1, 9, (load, 1)), 9)
        counts = torch.diff(torch.cat([offsets, torch.tensor([load])]))
        assert int(-(-counts // 16).sum()) <= runtime.tile_bound(load, 9, 16)


UNARY = ["exp", "tanh", "sigmoid", "erf", "silu", "relu", "gelu", "neg", "abs", "square", "sin", "softplus", "expm1"]
BINARY = ["add", "sub", "mul", "div", "maximum", "minimum", "where"]


def random_expression(seed: int) -> Function:
    """Return a random pointwise function; what it does depends on the seed alone."""

    def build(pick: random.Random, depth: int, z: Tensor) -> Tensor:
        if depth == 0:
            return z if pick.random() < 0.8 else torch.full_like(z, pick.uniform(-2, 2))
        if pick.random() < 0.5:
            value = build(pick, depth - 1, z)
            name = pick.choice(UNARY)
            if name in ("exp", "expm1"):
                value = value.clamp(-4.0, 2.0)
            function = getattr(torch, name, None) or getattr(F, name)
            return function(value)
        left, right = build(pick, depth - 1, z), build(pick, depth - 1, z)
        name = pick.choice(BINARY)
        if name == "where":
            return torch.where(left > right, left, 0.5 * right)
        if name == "div":
            return left / (1.0 + right * right)
        return getattr(torch, name)(left, right)

    return lambda z: build(random.Random(seed), 4, z) + 0.25 * z


def project(act: Function | Pointwise, z: Tensor) -> Tensor:
    """Run an expression inside a projection by the identity, on values [T, N]."""
    width = z.shape[1]
    epilogue = act if isinstance(act, Pointwise) else trace_pointwise(act, width)
    spec = LinearSpec(width, width // epilogue.inputs, "float32", epilogue=epilogue)
    offsets = torch.tensor([0, z.shape[0]])
    tiles = runtime.tile_map(offsets, z.shape[0], 32)
    out = z.new_empty((z.shape[0], spec.out_features))
    kernel = runtime.Projection(spec, Schedule(32, 32, 32, 1, 1, 1))
    return kernel(z, [torch.eye(width)[None]], [], None, tiles, out)


@pytest.mark.parametrize("seed", range(30))
def test_random_expressions(seed: int) -> None:
    torch.manual_seed(seed)
    z = torch.randn(32, 32) * 2
    act = random_expression(seed)
    assert error(project(act, z), act(z.double())) < 5e-6


def test_erf_and_tanh_are_accurate_everywhere() -> None:
    z = torch.cat([torch.linspace(-6, 6, 2016), torch.logspace(-6, 0, 32)]).view(64, 32)
    for function in (torch.erf, torch.tanh, torch.expm1):
        got, want = project(function, z).double(), function(z.double())
        assert float(((got - want).abs() / want.abs()).max()) < 1e-6, function.__name__


def test_special_values_follow_torch() -> None:
    # In columns of their own: the product with the identity would spread a NaN over its row.
    z = torch.zeros(32, 32)
    z[0, 0], z[1, 0], z[2, 0] = 80.0, -80.0, 0.0
    for function in (F.gelu, torch.sigmoid, torch.tanh, F.silu, F.softplus, torch.erf):
        torch.testing.assert_close(project(function, z), function(z), atol=1e-6, rtol=1e-5)
    nan = project(lambda v: F.relu(torch.where(v > 79.0, torch.full_like(v, float("nan")), v)), z)
    assert bool(nan[0, 0].isnan())
    assert bool(torch.isfinite(nan[1:]).all())
