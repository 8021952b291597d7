"""What changes while a routed model is trained: schedules over progress, and biases that balance without a loss."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moefx.errors import InputError


@runtime_checkable
class Scheduled(Protocol):
    """A module with something that depends on how far training is."""

    def set_progress(self, progress: float) -> None:
        """Set the fraction of the training that is done, 0 … 1."""


def step_schedules(model: nn.Module, progress: float) -> list[str]:
    """Tell every scheduled module how far training is; return their names.

    Args:
        model: a transformed model.
        progress: fraction of the training that is done, 0 … 1.

    Raises:
        InputError: ``progress`` is not in [0, 1].
    """
    if not 0 <= progress <= 1:
        raise InputError("step the schedules", found=f"progress {progress}", do="pass step / total_steps, 0 to 1")
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Scheduled)]
    for _, module in found:
        module.set_progress(progress)
    return [name for name, _ in found]


@torch.no_grad()
def update_biases(
    model: nn.Module, rate: float = 1e-3, *, group: dist.ProcessGroup | None = None, momentum: float = 0.0
) -> list[str]:
    """Move every selection bias towards balance: ``b_e += rate · sign(mean load − load_e)``; return the layers' names.

    Auxiliary-loss-free balancing (DeepSeek-V3, arXiv 2412.19437, rate 0.001). Call it after every optimiser step: the
    load is counted over all forward passes since the last call, hence over accumulated batches, and summed over the
    processes of ``group`` (the default group if torch.distributed runs), so the biases stay equal everywhere. The
    biases are buffers: no optimiser and no weight decay touches them. A layer that saw no tokens is left alone.

    Args:
        model: a transformed model.
        rate: step γ; 0 only clears the counts.
        group: processes that share the model.
        momentum: keep this fraction of the counts for the next call; with small batches the sign of one batch's load
            is noise.

    Raises:
        InputError: no layer has a selection bias.
    """
    layers = [(name, module) for name, module in model.named_modules() if _bias(module) is not None]
    if not layers:
        raise InputError(
            "update the selection biases", found="no routed layer has one", do="transform with selection_bias=True"
        )
    counts = [module.record.assigned for _, module in layers]
    totals = _summed_over_processes(counts, group)
    for (_, module), mine, total in zip(layers, counts, totals, strict=True):
        bias = _bias(module)
        assert bias is not None
        bias += rate * (total.mean() - total).sign().to(bias.dtype)
        mine.mul_(momentum)
    return [name for name, _ in layers]


def _bias(module: nn.Module) -> Tensor | None:
    bias = module._buffers.get("selection_bias")
    return bias if hasattr(module, "record") else None


def _summed_over_processes(counts: list[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Return the counts of all processes, with one collective; what comes in is left as it is."""
    if not (dist.is_available() and dist.is_initialized()):
        return counts
    together = torch.cat(counts)
    dist.all_reduce(together, group=group)
    return list(torch.split(together, [len(count) for count in counts]))
