"""Distillation: a student's outputs and inner features are pulled towards those of its dense teacher.

The losses are plain functions of tensors, and `Features` lends the outputs of inner modules, so any training loop can
use them; `distil` is a short loop of its own for the usual case.

Legend: B samples, any further axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from moefx.errors import InputError
from moefx.graph.signature import normalise_inputs
from moefx.training.aux_loss import aux_loss, routing_records
from moefx.training.schedules import step_schedules

Outputs = Any
Loss = Callable[[Outputs, Any], Tensor]


def output_loss(student: Outputs, teacher: Outputs) -> Tensor:
    """Return the mean squared difference of the floating tensors of two outputs, in at least float32.

    Raises:
        InputError: they have no floating tensor, or other shapes.
    """
    pairs = list(zip(_tensors(student), _tensors(teacher), strict=False))
    if not pairs or any(s.shape != t.shape for s, t in pairs):
        shapes = [(tuple(s.shape), tuple(t.shape)) for s, t in pairs]
        raise InputError("distil from outputs", found=f"shapes {shapes}", do="run both models on the same inputs")
    return torch.stack([_squared(s, t) for s, t in pairs]).mean()


def feature_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], *, balance: bool = True) -> Tensor:
    """Return ``Σ_l w_l mean|f_l − f̂_l|²``, a mean over l.

    With ``balance`` the weight is ``w_l = (Σ_j ‖f_j‖) / (L ‖f_l‖)``, detached, so that large features do not drown the
    others (Dense2MoE, arXiv 2510.09094, stage 2).

    Raises:
        InputError: the layers differ.
    """
    if not student or student.keys() != teacher.keys():
        raise InputError(
            "distil from features", found=f"{sorted(student)} and {sorted(teacher)}", do="record the same modules"
        )
    norms = {name: value.detach().float().norm() for name, value in teacher.items()}
    mean = torch.stack(list(norms.values())).mean()
    weights = {name: mean / norm.clamp_min(1e-12) if balance else torch.ones_like(norm) for name, norm in norms.items()}
    return torch.stack([weights[name] * _squared(student[name], teacher[name]) for name in student]).mean()


class Features:
    """The outputs of inner modules during a ``with`` block; the hooks are gone after it, whatever happened.

    Args:
        model: any module.
        names: module paths; a module that returns several tensors gives its first.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.values: dict[str, Tensor] = {}
        self._modules = {name: model.get_submodule(name) for name in names}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> dict[str, Tensor]:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._record(name)))
        return self.values

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _record(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            self.values[name] = next(iter(_tensors(output)))

        return record


def distil(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int,
    rate: float = 1e-3,
    inputs: Callable[[Any], Any] | None = None,
    task: Loss | None = None,
    task_weight: float = 1.0,
    features: Sequence[str] = (),
    feature_weight: float = 1.0,
    optimiser: torch.optim.Optimizer | None = None,
    clip: float = 1.0,
    progress: bool = True,
) -> list[float]:
    """Train ``student`` for ``steps`` steps to do what ``teacher`` does; return the loss of every step.

    ``L = output_loss + w_t · task + w_f · feature_loss + aux_loss``, AdamW, a linear decay of the rate to zero. The
    teacher is run in evaluation mode without gradients and given back as it was.

    Args:
        student: usually what :func:`moefx.transform` made of a copy of the teacher.
        teacher: the dense model.
        batches: at least ``steps`` of them.
        steps: of the optimiser.
        rate: highest learning rate.
        inputs: maps a batch to the models' inputs, if it holds more than those.
        task: maps an output and the batch to a scalar.
        task_weight: w_t.
        features: paths of modules whose outputs are matched, such as the blocks.
        feature_weight: w_f.
        optimiser: instead of AdamW; its rate is left alone.
        clip: largest norm of the gradient.
        progress: show a bar.

    Raises:
        InputError: too few batches, or a loss that is not finite.
    """
    own = optimiser is None
    chosen = optimiser or torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=rate)
    losses: list[float] = []
    was = {name: module.training for name, module in teacher.named_modules()}
    student.train()
    teacher.eval()
    try:
        bar = tqdm(zip(range(steps), batches, strict=False), total=steps, desc="distil", disable=not progress)
        for step, batch in bar:
            step_schedules(student, step / steps)
            if own:
                for group in chosen.param_groups:
                    group["lr"] = rate * (1 - step / steps)
            loss, output = _loss(student, teacher, batch if inputs is None else inputs(batch), features, feature_weight)
            if task is not None:
                loss = loss + task_weight * task(output, batch)
            chosen.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(student.parameters(), clip)
            chosen.step()
            losses.append(float(loss.detach()))
            if losses[-1] != losses[-1]:
                raise InputError("distil", found=f"a NaN loss at step {step}", do="lower the rate")
    finally:
        for name, module in teacher.named_modules():
            module.training = was[name]
    if len(losses) < steps:
        raise InputError("distil", found=f"{len(losses)} batches for {steps} steps", do="give as many as steps")
    return losses


def _loss(
    student: nn.Module, teacher: nn.Module, inputs: Any, features: Sequence[str], feature_weight: float
) -> tuple[Tensor, Outputs]:
    """Return the loss against the teacher with the auxiliary terms, and the student's output."""
    args, kwargs = normalise_inputs(student, inputs)
    with torch.no_grad(), Features(teacher, features) as wanted:
        target = teacher(*args, **kwargs)
    with Features(student, features) as found:
        output = student(*args, **kwargs)
    total = output_loss(output, target)
    if features:
        total = total + feature_weight * feature_loss(found, wanted)
    terms = any(record.terms for _, record in routing_records(student))
    return (total + aux_loss(student) if terms else total), output


def _tensors(tree: Any) -> list[Tensor]:
    leaves = vars(tree).values() if hasattr(tree, "__dataclass_fields__") else pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _squared(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) - b.detach().to(wide)).square().mean()
