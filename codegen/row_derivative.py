"""Reverse-mode derivatives of row programs, as steps of the same kind.

Pointwise steps follow `moefx.codegen.derivative`. A sum over a row passes its gradient to every expert of the row, a
value per row collects what the experts of its row send, and what was picked goes back to the chosen experts alone.
Maxima have none: they stand in softmax and its kin, which do not depend on what they subtract.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefx.codegen.derivative import Mask, _Reverse, _rules
from moefx.codegen.pointwise import Arg, Builder, Step
from moefx.codegen.rows import ROW_OPS, RowProgram, broadcast, evaluate, kinds_of

_WITHOUT_GRADIENT = frozenset({"row_max", "chosen_max", "stop"})


@dataclass(frozen=True)
class RowDerivative:
    """For the gradients ``g0, g1, ...`` of some outputs of a program, those of its inputs."""

    program: RowProgram
    #: Positions of the outputs that have a gradient; output ``i`` has ``g{i}``.
    seeds: tuple[int, ...]
    steps: tuple[Step, ...]
    #: Of ``z0, z1, ...``.
    grads: tuple[Arg, ...]

    def evaluate(self, experts: Tensor, seeds: dict[int, Tensor], *inputs: Tensor) -> list[Tensor]:
        """Return the gradients as ``[T, E]`` in float64: the reference for kernels that contain them."""
        values: dict[str, Any] = {f"z{i}": z.to(torch.float64) for i, z in enumerate(inputs)}
        nothing = torch.zeros((experts.shape[0], self.program.experts), dtype=torch.bool)
        for i, seed in seeds.items():
            slot = self.program.outputs[i][0] == "slot"
            seed = seed.to(torch.float64)
            values[f"g{i}"] = torch.zeros(nothing.shape, dtype=seed.dtype).scatter(1, experts, seed) if slot else seed
        evaluate(self.steps, values, nothing.scatter(1, experts, True))
        return [broadcast(values, grad, nothing) for grad in self.grads]


def differentiate(program: RowProgram, seeds: tuple[int, ...]) -> RowDerivative:
    """Return the derivative of a program with respect to all inputs."""
    return _RowReverse(program, seeds).rows()


class _RowReverse(_Reverse):
    """One backward walk over the steps of a row program."""

    def __init__(self, program: RowProgram, seeds: tuple[int, ...]) -> None:
        self.rows_of, self.seeds = program, seeds
        self.b = Builder(program.inputs, *(f"g{i}" for i in seeds))
        self.names = {f"z{i}": f"z{i}" for i in range(program.inputs)}
        self.bars: dict[str, list[tuple[Mask, Arg]]] = {}
        self.kinds = kinds_of(program.steps, dict.fromkeys(self.names, "wide"))

    def rows(self) -> RowDerivative:
        program = self.rows_of
        for step in program.steps:
            self.names[step.name] = self.b.step(step.op, *map(self.new, step.args))
        for i in self.seeds:
            value = program.outputs[i][1]
            if isinstance(value, str):
                self.bars.setdefault(value, []).append(((), f"g{i}"))
        for step in reversed(program.steps):
            mask, bar = self.adjoint(step.name)
            if bar == 0.0 or step.op in _WITHOUT_GRADIENT or self.b.is_bool(self.names[step.name]):
                continue
            for arg, chosen, value in self.contributions(step, mask, bar):
                self.bars.setdefault(arg, []).append((chosen, value))
        grads = [self.applied(*self.adjoint(f"z{i}")) for i in range(program.inputs)]
        kept, found = self.b.finish_all(*grads)
        return RowDerivative(program, self.seeds, kept, found)

    def contributions(self, step: Step, mask: Mask, bar: Arg) -> Iterator[tuple[str, Mask, Arg]]:
        """Yield (argument, when it counts, its gradient) of one step."""
        if step.op in ROW_OPS:
            source = str(step.args[0])
            back = "spread" if step.op == "row_sum" else "unpick"
            yield source, (), self.b.step(back, self.applied(mask, bar))
            return
        args, kind = [self.new(a) for a in step.args], self.kinds[step.name]
        for position, when, value in _rules(self, step.op, args, self.names[step.name], bar):
            arg = step.args[position]
            if not isinstance(arg, str):
                continue
            if self.kinds[arg] == "one" and kind != "one":
                total = "chosen_sum" if kind == "slot" else "row_sum"
                yield arg, (), self.b.step(total, self.applied((*mask, *when), value))
            else:
                yield arg, (*mask, *when), value
