"""Guidance branches on different ranks: each runs a part of the batch, and all of them get all outputs.

With classifier-free guidance a batch holds every sample once per condition. Ranks along the mesh dimension ``"cfg"``
take one part of it each; in between they exchange nothing, for samples do not depend on each other.

Legend: B samples, all branches included; P ranks along the dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as fc
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from moefx.errors import InputError, PlanError

CFG_DIM = "cfg"
_MAIN_INPUTS = ("hidden_states", "sample", "x")


class GuidanceSplit:
    """What :func:`split_guidance` set up; :meth:`remove` undoes it.

    Args:
        model: the denoiser.
        mesh: one-dimensional, over the ranks that share a batch.
        whole: names of arguments that are never cut.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, whole: tuple[str, ...]) -> None:
        self._mesh, self._whole = mesh, set(whole)
        self._samples: list[int] = []  # of each call that is under way; 0 for one that is not divided
        self._hooks: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._cut, with_kwargs=True),
            model.register_forward_hook(self._join),
        ]

    def remove(self) -> None:
        """Let every rank run all samples again."""
        while self._hooks:
            self._hooks.pop().remove()

    def _cut(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        samples, ranks = _samples(args, kwargs), self._mesh.size()
        if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
            raise PlanError(
                "compute gradients of guidance branches on several ranks",
                found="gradients are on",
                do="run under torch.no_grad(); for training, give the mesh a 'data' dimension instead",
            )
        self._samples.append(samples if samples % ranks == 0 else 0)
        if not self._samples[-1]:
            return None
        size = samples // ranks
        first = self._mesh.get_local_rank() * size

        def part(value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.ndim and value.shape[0] == samples
            return value.narrow(0, first, size) if batched else value

        kept = {name: value if name in self._whole else tree_map(part, value) for name, value in kwargs.items()}
        return tree_map(part, args), kept

    def _join(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        samples = self._samples.pop()
        if not samples:
            return output
        size = samples // self._mesh.size()

        def whole(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.ndim and value.shape[0] == size):
                return value
            gathered = fc.all_gather_tensor(value.contiguous(), 0, self._mesh.get_group())
            return gathered.wait() if isinstance(gathered, fc.AsyncCollectiveTensor) else gathered

        return tree_map(whole, output)


def split_guidance(model: nn.Module, mesh: DeviceMesh, *, whole: tuple[str, ...] = ()) -> GuidanceSplit:
    """Let each rank along ``"cfg"`` run its part of every batch that ``model`` gets, and return what undoes it.

    Callers change nothing: every rank passes the whole batch and gets the outputs of the whole batch, in its order. So
    pipelines that put both guidance branches into one batch run one branch per rank. A batch that the ranks cannot
    divide evenly, as in steps without guidance, is run whole by each. For inference only.

    Args:
        model: a denoiser, parallel or not, whose samples do not depend on each other.
        mesh: with a dimension ``"cfg"``; ``parallelize`` takes the same one.
        whole: names of arguments that are not cut although their first dimension has the size of the batch.

    Raises:
        InputError: the mesh has no such dimension.
    """
    names = getattr(mesh, "mesh_dim_names", None) or ()
    if CFG_DIM not in names:
        raise InputError(
            f"divide the guidance branches of {type(model).__name__}",
            found=f"a mesh with dimensions {list(names)}",
            do=f"name one of them {CFG_DIM!r}: init_device_mesh(..., mesh_dim_names=('cfg', 'expert'))",
        )
    return GuidanceSplit(model, mesh[CFG_DIM], whole)


def _samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return B: the first dimension of the main input."""
    named = [kwargs.get(name) for name in _MAIN_INPUTS]
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim:
            return int(value.shape[0])
    return 0
