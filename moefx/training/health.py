"""Is the routing alive? A report per routed layer, with a warning where a layer saturates or deadlocks.

The failures that upcycled diffusion transformers were reported to have (arXiv 2605.19378): a linear router saturates
softly while the experts stay alike; an MLP router locks on one expert; updates of a bf16 router round to nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moefx.errors import MoefxWarning
from moefx.routing.record import RoutingRecord
from moefx.training.aux_loss import routing_records

PROBES = 16  # random tokens, and at most as many experts, for the cosine between expert outputs


@dataclass(frozen=True)
class Health:
    """One routed layer, over its E experts (or tied groups).

    Attributes:
        layer: module path.
        max_load: share of all assignments that the busiest expert got in the last call; 1/E is perfect.
        dead: experts that got none since the counts were last cleared (see `moefx.training.update_biases`).
        entropy: mean entropy of the router in nats.
        max_entropy: log E.
        expert_cosine: mean cosine between the outputs of two experts on random tokens; None where there are no
            stacked experts. 1 for exact copies.
        router_gradient: norm of the router's gradient; None where there is none.
        problems: what is wrong, in words.
    """

    layer: str
    max_load: float
    dead: tuple[int, ...]
    entropy: float
    max_entropy: float
    expert_cosine: float | None = None
    router_gradient: float | None = None
    problems: tuple[str, ...] = field(default=())


def health(model: nn.Module, *, warn: bool = False) -> list[Health]:
    """Return the health of each routed layer that has been called. Waits for the device: not for every step.

    One call says what one batch at one timestep did; experts that serve other timesteps look dead in it, unless several
    batches passed since the counts were cleared. Ask after ``backward`` to see the router's gradient.

    Args:
        model: a transformed model.
        warn: also issue one `MoefxWarning` that names the layers with problems.
    """
    reports = [_report(name, record, model) for name, record in routing_records(model) if record.terms]
    ill = [report for report in reports if report.problems]
    if warn and ill:
        lines = [f"  {report.layer}: {'; '.join(report.problems)}" for report in ill]
        message = f"{len(ill)} of {len(reports)} routed layers are not healthy\n" + "\n".join(lines)
        warnings.warn(MoefxWarning(message), stacklevel=2)
    return reports


def _report(name: str, record: RoutingRecord, model: nn.Module) -> Health:
    layer = model.get_submodule(name)
    load = record.load.tolist()
    facts = {
        "max_load": max(load),
        "entropy": record.entropy.item(),
        "max_entropy": math.log(len(load)),
        "expert_cosine": _expert_cosine(layer),
        "router_gradient": _router_gradient(layer),
    }
    dead = tuple(index for index, count in enumerate(record.assigned.tolist()) if count == 0)
    return Health(layer=name, dead=dead, problems=tuple(_problems(facts, dead, len(load))), **facts)


def _problems(facts: Mapping[str, float | None], dead: tuple[int, ...], experts: int) -> list[str]:
    load, cosine, gradient = facts["max_load"] or 0.0, facts["expert_cosine"], facts["router_gradient"]
    found = []
    if experts > 1 and load > 0.95:
        found.append(
            f"deadlocked: one expert takes {load:.0%}; use a selection bias, expert choice or a larger balance"
        )
    elif dead:
        found.append(f"{len(dead)} of {experts} experts got no token")
    undecided = (facts["entropy"] or 0.0) > 0.999 * (facts["max_entropy"] or 0.0)
    if experts > 1 and undecided and cosine is not None and cosine > 0.99:
        found.append(
            f"saturated: an undecided router over alike experts (cosine {cosine:.3f}); add noise to the copies"
        )
    if gradient == 0:
        found.append("the router gets no gradient")
    return found


def _router_gradient(layer: nn.Module) -> float | None:
    router = getattr(layer, "router", None)
    gradients = [p.grad for p in router.parameters() if p.grad is not None] if isinstance(router, nn.Module) else []
    return torch.stack([g.float().norm() for g in gradients]).norm().item() if gradients else None


@torch.no_grad()
def _expert_cosine(layer: nn.Module) -> float | None:
    experts = getattr(layer, "experts", None)
    weight = getattr(experts, "w_in", None)
    if not isinstance(experts, nn.Module) or not isinstance(weight, Tensor) or weight.ndim != 3 or weight.shape[0] < 2:
        return None
    x = torch.randn(PROBES, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight)
    ones = torch.ones(PROBES, 1, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    index = torch.zeros(PROBES, 1, dtype=torch.int64, device=weight.device)
    outputs = [experts(x, index + e, ones).float() for e in range(min(weight.shape[0], PROBES))]
    y = nn.functional.normalize(torch.stack(outputs, dim=1), dim=-1)  # [tokens, experts, width]
    cosines = y @ y.transpose(1, 2)
    pairs = ~torch.eye(len(outputs), dtype=torch.bool, device=y.device)
    return float(cosines[:, pairs].mean())
