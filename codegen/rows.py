"""Row programs: what a router computes of the logits of one token, as data.

A row is the vector of a token over experts.  Besides the pointwise steps of :mod:`moefx.codegen.pointwise` there are
sums and maxima over a row, the choice of the top k, and *picking*: a value of the chosen experts stays in the column of
its expert, so that picking, and adding up what was picked, are masks and no movement of data.  Softmax, sigmoid, any
normalisation and any bias arrive as such steps; there is no list of routers here.

Kinds of values: ``wide`` one per expert, ``slot`` one per chosen expert, ``one`` one per row.
Shapes: T tokens, E experts, K chosen ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefx.codegen.pointwise import OPS, Arg, PointOp, Step, spell
from moefx.routing.select import group_limited_top_k, top_k


def _over(mask: Tensor, a: Any, rest: float) -> Tensor:
    return torch.where(mask, torch.as_tensor(a, dtype=torch.float64), rest)


#: Steps over rows; ``known`` marks the experts that exist, ``chosen`` those that were picked. In torch they take the
#: mask ``chosen`` first.
ROW_OPS: dict[str, PointOp] = {
    "row_sum": PointOp("tl.sum(tl.where(known, {0}, 0.0), 1)[:, None]", lambda c, a: a.expand_as(c).sum(-1, True)),
    "row_max": PointOp('tl.max(tl.where(known, {0}, float("-inf")), 1)[:, None]', lambda c, a: a.amax(-1, True)),
    "chosen_sum": PointOp(
        "tl.sum(tl.where(chosen, {0}, 0.0), 1)[:, None]", lambda c, a: _over(c, a, 0.0).sum(-1, True)
    ),
    "chosen_max": PointOp(
        'tl.max(tl.where(chosen, {0}, float("-inf")), 1)[:, None]',
        lambda c, a: _over(c, a, float("-inf")).amax(-1, True),
    ),
    "pick": PointOp("{0}", lambda c, a: a),
    "stop": PointOp("{0}", lambda c, a: a),
    "spread": PointOp("tl.where(known, {0}, 0.0)", lambda c, a: torch.as_tensor(a).expand_as(c)),
    "unpick": PointOp("tl.where(chosen, {0}, 0.0)", lambda c, a: _over(c, a, 0.0)),
}
_REDUCTIONS = frozenset({"row_sum", "row_max", "chosen_sum", "chosen_max"})
TABLE: dict[str, PointOp] = OPS | ROW_OPS


@dataclass(frozen=True)
class Limit:
    """Only the ``keep`` best of equal ``groups`` are eligible; the ``best`` highest scores of a group count."""

    groups: int
    keep: int
    best: int


@dataclass(frozen=True)
class Choice:
    """The top ``k`` of a row by ``scores``, ties to the lowest expert."""

    scores: Arg
    k: int
    limit: Limit | None = None

    @property
    def text(self) -> str:
        """The choice in one line."""
        limit = self.limit
        within = f" within the best {limit.keep} of {limit.groups} groups by {limit.best}" if limit else ""
        return f"choose {self.k} by {spell(self.scores)}{within}"

    def experts(self, scores_TE: Tensor) -> Tensor:
        """Return the chosen experts ``[T, K]``: the reference for kernels."""
        if self.limit is None:
            return top_k(scores_TE, self.k)
        return group_limited_top_k(scores_TE, self.k, **dataclasses.asdict(self.limit))


@dataclass(frozen=True)
class RowProgram:
    """Steps over rows of ``experts`` values: ``z0`` the product with the router's weight, ``z1, ...`` operands."""

    experts: int
    steps: tuple[Step, ...]
    choice: Choice
    #: "row" [T, E], "sample" [B, E], "column" [E] or "scalar" [], for ``z1, ...``.
    operands: tuple[str, ...] = ()
    #: (kind, value) of what leaves the kernel besides the chosen experts.
    outputs: tuple[tuple[str, Arg], ...] = ()

    @property
    def inputs(self) -> int:
        """How many values ``z0, z1, ...`` there are."""
        return 1 + len(self.operands)

    def pruned(self) -> tuple[RowProgram, list[int]]:
        """Return the program without the operands that nothing reads, and the places of the others."""
        read = {self.choice.scores, *(value for _, value in self.outputs), *(a for s in self.steps for a in s.args)}
        kept = [i for i in range(len(self.operands)) if f"z{i + 1}" in read]
        names = {f"z{i + 1}": f"z{place}" for place, i in enumerate(kept, 1)}

        def renamed(value: Arg) -> Arg:
            return names.get(value, value) if isinstance(value, str) else value

        steps = tuple(Step(s.name, s.op, tuple(map(renamed, s.args))) for s in self.steps)
        choice = dataclasses.replace(self.choice, scores=renamed(self.choice.scores))
        outputs = tuple((kind, renamed(value)) for kind, value in self.outputs)
        return RowProgram(self.experts, steps, choice, tuple(self.operands[i] for i in kept), outputs), kept

    def text(self) -> str:
        """Return the program as one line per step: the form that is hashed and dumped."""
        lines = [f"z{i + 1}: {kind}" for i, kind in enumerate(self.operands)]
        lines += [f"{s.name} = {s.op}({', '.join(map(spell, s.args))})" for s in self.steps]
        return "\n".join([*lines, self.choice.text, *(f"return {kind} {spell(v)}" for kind, v in self.outputs)])

    def before_choice(self) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
        """Return the steps that the scores need, and the others."""
        needed: set[Arg] = {self.choice.scores}
        for step in reversed(self.steps):
            if step.name in needed:
                needed.update(step.args)
        first = tuple(s for s in self.steps if s.name in needed)
        return first, tuple(s for s in self.steps if s.name not in needed)

    def evaluate(self, *inputs: Tensor, experts: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return the chosen experts ``[T, K]`` and the outputs in float64: the reference for kernels.

        ``inputs`` broadcast to ``[T, E]``; with ``experts`` the choice is given.
        """
        values: dict[str, Any] = {f"z{i}": z.to(torch.float64) for i, z in enumerate(inputs)}
        nothing = torch.zeros((inputs[0].shape[0], self.experts), dtype=torch.bool)
        first, rest = self.before_choice()
        evaluate(first, values, nothing)
        if experts is None:
            scores = broadcast(values, self.choice.scores, nothing)
            experts = self.choice.experts(scores)
        chosen = nothing.scatter(1, experts, True)
        evaluate(rest, values, chosen)
        outputs = [broadcast(values, value, nothing) for _, value in self.outputs]
        kinds = [kind for kind, _ in self.outputs]
        return experts, [o.gather(1, experts) if k == "slot" else o for k, o in zip(kinds, outputs, strict=True)]


def evaluate(steps: Iterable[Step], values: dict[str, Any], chosen: Tensor) -> None:
    """Add the value of every step to ``values``, in float64."""
    for step in steps:
        args = [values[a] if isinstance(a, str) else a for a in step.args]
        mask = (chosen,) if step.op in ROW_OPS else ()
        values[step.name] = TABLE[step.op].torch(*mask, *args)


def broadcast(values: Mapping[str, Any], value: Arg, like: Tensor) -> Tensor:
    """Return a value as ``[T, E]``."""
    found = values[value] if isinstance(value, str) else value
    return torch.as_tensor(found, dtype=torch.float64).expand_as(like)


def kinds_of(steps: Iterable[Step], inputs: Mapping[str, str]) -> dict[str, str]:
    """Return the kind of every value."""
    kinds = dict(inputs)
    for step in steps:
        of_args = {kinds[a] for a in step.args if isinstance(a, str)}
        if step.op in _REDUCTIONS:
            kinds[step.name] = "one"
        elif step.op in ("spread", "unpick"):
            kinds[step.name] = "wide"
        elif step.op == "pick":
            kinds[step.name] = "slot"
        else:
            kinds[step.name] = next((kind for kind in ("slot", "wide") if kind in of_args), "one")
    return kinds


def statements(steps: Iterable[Step]) -> list[str]:
    """Return steps as Triton statements, one each."""
    return [f"{s.name} = {TABLE[s.op].triton.format(*map(spell, s.args))}" for s in steps]


def helpers(steps: Iterable[Step]) -> tuple[str, ...]:
    """Return the names of the device functions that printed steps call, callees first."""
    return tuple(dict.fromkeys(helper for step in steps for helper in TABLE[step.op].helpers))
