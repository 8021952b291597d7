"""Time a routed FFN against its rivals: ``python benchmarks/routed_ffn.py --threads 2 --json out.json``.

Every variant computes the same routed FFN, ``combine(act(x W1_e^T) W2_e^T)``, from the same expert ids and weights; the
sorting that a variant needs is inside its time. ``dense`` is the yardstick: one ordinary FFN over ``T*k`` rows, which
has the FLOPs of the routed one and nothing to route. All variants run interleaved in one process, after each has been
checked against a float64 loop; each round has its own order. The FLOP floor is the work divided by the best
rate that one plain matrix product of the same dtype reaches here.

Shapes: ``T`` tokens, ``K`` slots, ``R = T*K`` rows, ``E`` experts, ``D`` model and ``F`` expert width.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moefx import ops

# Error of a routed FFN in each dtype, relative to the float64 loop, that is still its own rounding.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
OURS = "moefx"


@dataclass(frozen=True)
class Case:
    """One problem: routed inputs and stacked weights, all leaves that may take a gradient."""

    x: Tensor  # [T, D]
    experts: Tensor  # [T, K]
    gates: Tensor  # [T, K]
    w1: Tensor  # [E, F, D]
    w2: Tensor  # [E, D, F]

    @cached_property
    def dense_leaves(self) -> tuple[Tensor, ...]:
        """T*K rows and one expert's weights as leaves: a gradient of slices would be zeros for all other experts."""
        rows = self.x.detach().repeat(self.experts.shape[1], 1)
        return rows, self.w1[0].detach().clone(), self.w2[0].detach().clone()

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.gates, self.w1, self.w2

    def to(self, dtype: torch.dtype) -> Case:
        """Return a detached copy in ``dtype``; gates stay at least float32, as a router gives them."""
        wide = torch.promote_types(dtype, torch.float32)
        x, w1, w2 = (t.detach().to(dtype, copy=True) for t in (self.x, self.w1, self.w2))
        return Case(x, self.experts, self.gates.detach().to(wide, copy=True), w1, w2)


def make_case(tokens: int, width: int, hidden: int, experts: int, slots: int, dtype: torch.dtype) -> Case:
    """Draw inputs of unit scale and a softmax-top-k routing with mildly uneven loads."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    gates_TK, experts_TK = torch.topk((draw(tokens, experts) + 0.3 * draw(experts)).softmax(-1), slots)
    x_TD, w1, w2 = draw(tokens, width), draw(experts, hidden, width), draw(experts, width, hidden)
    return Case(x_TD, experts_TK, gates_TK, w1 * width**-0.5, w2 * hidden**-0.5).to(dtype)


act = partial(F.gelu, approximate="tanh")


def moefx(case: Case) -> Tensor:
    order, offsets = ops.group(case.experts, case.w1.shape[0])
    stack = ops.FFNStack(case.w1, None, None, None, case.w2)
    return ops.combine(ops.grouped_ffn(case.x, stack, act, order, offsets, case.experts.shape[1]), order, case.gates)


def dense(case: Case) -> Tensor:
    """Run one FFN over T*K rows: the FLOPs of the routed FFN without routing (not the same function)."""
    rows_RD, w1, w2 = case.dense_leaves
    return F.linear(act(F.linear(rows_RD, w1)), w2)


def index_add_loop(case: Case) -> Tensor:
    """Loop over experts, gather, FFN, weighted ``index_add``: what most published code does."""
    wide = case.gates.dtype
    y_TD = torch.zeros(case.x.shape, dtype=wide)
    for expert in range(case.w1.shape[0]):
        token, slot = torch.where(case.experts == expert)
        rows = F.linear(act(F.linear(case.x[token], case.w1[expert])), case.w2[expert])
        y_TD = y_TD.index_add(0, token, rows.to(wide) * case.gates[token, slot].unsqueeze(1))
    return y_TD.to(case.x.dtype)


def _sorted(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    flat_R = case.experts.reshape(-1)
    order_R = torch.argsort(flat_R, stable=True)
    counts_E = torch.bincount(flat_R, minlength=case.w1.shape[0])
    return order_R, flat_R, counts_E


def _scatter_back(case: Case, rows_RD: Tensor, order_R: Tensor) -> Tensor:
    slots = case.experts.shape[1]
    weighted_RD = rows_RD.to(case.gates.dtype) * case.gates.reshape(-1)[order_R].unsqueeze(1)
    y_TD = torch.zeros(case.x.shape, dtype=weighted_RD.dtype)
    return y_TD.index_add(0, order_R // slots, weighted_RD).to(case.x.dtype)


def grouped_mm(case: Case) -> Tensor:
    order_R, _, counts_E = _sorted(case)
    offs = counts_E.cumsum(0).to(torch.int32)
    rows_RD = case.x[order_R // case.experts.shape[1]]
    hidden_RF = act(F.grouped_mm(rows_RD, case.w1.transpose(1, 2), offs=offs))
    return _scatter_back(case, F.grouped_mm(hidden_RF, case.w2.transpose(1, 2), offs=offs), order_R)


def padded_bmm(case: Case) -> Tensor:
    """Pad every expert to the largest load and multiply in one batch."""
    order_R, flat_R, counts_E = _sorted(case)
    starts_E = counts_E.cumsum(0) - counts_E
    expert_R = flat_R[order_R]
    place_R = torch.arange(order_R.shape[0]) - starts_E[expert_R]
    capacity, width = int(counts_E.max()), case.x.shape[1]
    rows_RD = case.x[order_R // case.experts.shape[1]]
    slot_R = expert_R * capacity + place_R
    padded = rows_RD.new_zeros(counts_E.shape[0] * capacity, width).index_copy(0, slot_R, rows_RD)
    hidden = act(torch.bmm(padded.view(-1, capacity, width), case.w1.transpose(1, 2)))
    out = torch.bmm(hidden, case.w2.transpose(1, 2)).flatten(0, 1)
    return _scatter_back(case, out[slot_R], order_R)


VARIANTS: dict[str, Callable[[Case], Tensor]] = {
    OURS: moefx,
    "dense": dense,
    "index_add loop": index_add_loop,
    "padded bmm": padded_bmm,
    "F.grouped_mm": grouped_mm,
}


def run(variant: Callable[[Case], Tensor], case: Case, grad_TD: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Run one variant; with a gradient, backward too."""
    if grad_TD is None:
        with torch.no_grad():
            return variant(case), []
    output = variant(case)
    seed = grad_TD if output.shape == grad_TD.shape else grad_TD.repeat(output.shape[0] // grad_TD.shape[0], 1)
    used = case.dense_leaves if variant is dense else case.leaves
    return output, list(torch.autograd.grad(output, used, seed))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def check(case: Case, tolerance: float) -> dict[str, float]:
    """Return the largest relative error of output and gradients of each variant on the first tokens of the case."""
    few = Case(case.x[:96], case.experts[:96], case.gates[:96], case.w1, case.w2).to(case.x.dtype)
    exact = few.to(torch.float64)
    for leaf in (*few.leaves, *exact.leaves):
        leaf.requires_grad_()
    grad_TD = torch.randn(few.x.shape, generator=torch.Generator().manual_seed(1)).to(few.x.dtype)
    expected, expected_grads = run(index_add_loop, exact, grad_TD.double())
    errors: dict[str, float] = {}
    for name, variant in VARIANTS.items():
        if variant is dense:
            continue
        found, grads = run(variant, few, grad_TD)
        pairs = zip([found, *grads], [expected, *expected_grads], strict=True)
        errors[name] = max(relative(a.detach(), b.detach()) for a, b in pairs)
        if not errors[name] <= tolerance:
            raise SystemExit(f"{name}: relative error {errors[name]:.2e} exceeds {tolerance:.0e}; nothing was timed")
    return errors


# Processor time of one thread is what a busy machine disturbs least; the wall is what a user waits for.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(case: Case, backward: bool, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return the seconds of every variant in every round, one warm-up round aside."""
    for leaf in (*case.leaves, *case.dense_leaves):
        leaf.requires_grad_(backward)
    grad_TD = torch.randn_like(case.x) if backward else None
    names = list(VARIANTS)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    shuffle = random.Random(0)
    for turn in range(rounds + 1):
        for name in shuffle.sample(names, len(names)):
            start = clock()
            run(VARIANTS[name], case, grad_TD)
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def peak_flops(case: Case, rounds: int, clock: Callable[[], float]) -> float:
    """Return the best FLOP/s of one plain product of the shape of an expert's first layer."""
    rows = case.experts.numel()
    x_RD, w_DF = case.x.detach().repeat(case.experts.shape[1], 1), case.w1[0].detach().t()
    out = torch.empty(rows, w_DF.shape[1], dtype=x_RD.dtype)
    best = float("inf")
    for _ in range(rounds + 1):
        start = clock()
        torch.mm(x_RD, w_DF, out=out)
        best = min(best, clock() - start)
    return 2 * rows * w_DF.shape[0] * w_DF.shape[1] / best


@dataclass(frozen=True)
class Row:
    """One line of the result; ratios are medians over rounds, above 1 where moefx or the variant is faster."""

    variant: str
    direction: str
    median_ms: float
    best_ms: float
    gflops: float
    rate_over_dense: float
    moefx_speedup: float
    error: float | None


def summarise(seconds: dict[str, list[float]], direction: str, flops: float, errors: dict[str, float]) -> list[Row]:
    """Summarise one direction; ratios are taken round by round, so that a slow spell of the machine cancels."""

    def over(left: str, right: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds[left], seconds[right], strict=True))

    return [
        Row(
            variant=name,
            direction=direction,
            median_ms=1e3 * statistics.median(times),
            best_ms=1e3 * min(times),
            gflops=flops / statistics.median(times) / 1e9,
            rate_over_dense=over(name, "dense"),
            moefx_speedup=over(OURS, name),
            error=errors.get(name),
        )
        for name, times in seconds.items()
    ]


def report(console: Console, title: str, floor_ms: float, rows: list[Row]) -> None:
    table = Table(title=f"{title}; FLOP floor {floor_ms:.0f} ms")
    for heading in ("variant", "median ms", "best ms", "GFLOP/s", "rate / dense", "moefx speed-up", "rel. error"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in rows:
        error = "-" if row.error is None else f"{row.error:.1e}"
        numbers = (f"{row.median_ms:.1f}", f"{row.best_ms:.1f}", f"{row.gflops:.0f}")
        table.add_row(row.variant, *numbers, f"{row.rate_over_dense:.3f}", f"{row.moefx_speedup:.3f}", error)
    console.print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--hidden", type=int, default=4608)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu: with --threads 1, on a busy machine"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directions", nargs="+", choices=("forward", "training"), default=("forward", "training"))
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


def machine() -> dict[str, object]:
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
    }


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    dtype: torch.dtype = getattr(torch, options.dtype)
    case = make_case(options.tokens, options.width, options.hidden, options.experts, options.top_k, dtype)
    before, clock = machine(), CLOCKS[options.clock]
    errors = check(case, TOLERANCE[dtype])
    peak = peak_flops(case, options.rounds, clock)
    forward_flops = 4.0 * case.experts.numel() * options.width * options.hidden
    console, rows, floors = Console(), [], {}
    for direction in options.directions:
        flops = forward_flops * (3 if direction == "training" else 1)
        floors[direction] = 1e3 * flops / peak
        found = summarise(measure(case, direction == "training", options.rounds, clock), direction, flops, errors)
        shape = f"T={options.tokens} D={options.width} F={options.hidden} E={options.experts} k={options.top_k}"
        report(
            console,
            f"{direction}, {shape}, {options.dtype}, {options.threads} threads, {options.clock}",
            floors[direction],
            found,
        )
        rows += found
    if options.json:
        asked = {name: value for name, value in vars(options).items() if name != "json"}
        result = {"asked": asked, "machine": before, "peak_gflops": peak / 1e9, "floor_ms": floors}
        result["load_average_after"] = os.getloadavg()
        result["rows"] = [asdict(row) for row in rows]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
