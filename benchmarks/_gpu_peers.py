"""Implementations of one routed FFN, ``combine(gelu(x W1_e^T) W2_e^T)``, that ``gpu.py`` times beside each other.

Each entry builds a callable from a case; what a peer needs besides (sorting, padding) is inside its call.  A peer that
cannot be built says why.  More peers: files with a function ``build(case)`` in the folder given by ``--peers``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from _gpu_cases import Case
from torch import Tensor

from moefx import ops
from moefx.codegen.runtime import interpreting

Run = Callable[[], Tensor]
Build = Callable[[Case], Run]
act = partial(F.gelu, approximate="tanh")


def _dialect(x: Tensor, experts: Tensor, gates: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    order, offsets = ops.group(experts, w1.shape[0])
    hidden = act(ops.grouped_linear(x, w1, None, order, offsets, experts.shape[1]))
    return ops.combine(ops.grouped_linear(hidden, w2, None, None, offsets), order, gates)


def moefx_kernels(options: dict[str, str] | None) -> Build:
    """Return the builder of ours: what ``torch.compile(model, backend="moefx")`` makes of a routed FFN."""

    def build(case: Case) -> Run:
        compiled = torch.compile(_dialect, backend="moefx", fullgraph=True, dynamic=False, options=options)
        return lambda: compiled(case.x, case.experts, case.gates, case.w1, case.w2)

    return build


def moefx_eager(case: Case) -> Run:
    """Return the operators as they are, without a compiler."""
    return lambda: _dialect(case.x, case.experts, case.gates, case.w1, case.w2)


class Dense:
    """One FFN over T*K rows: the FLOPs of the routed FFN, nothing routed (not the same function).

    Its weights are its own leaves: the gradient of a slice of the stacked ones would also be zeros for all others.
    """

    def __init__(self, case: Case) -> None:
        wanted = case.x.requires_grad
        rows = case.x.detach().repeat(case.shape.slots, 1)
        self.leaves = [
            t.requires_grad_(wanted) for t in (rows, case.w1[0].detach().clone(), case.w2[0].detach().clone())
        ]

    def __call__(self) -> Tensor:
        rows, w1, w2 = self.leaves
        return F.linear(act(F.linear(rows, w1)), w2)


def _sorted(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    flat = case.experts.reshape(-1)
    sorted_ids, order = torch.sort(flat, stable=True)
    counts = torch.zeros(case.shape.experts, dtype=torch.int64, device=flat.device)
    return order, sorted_ids, counts.scatter_add_(0, flat, torch.ones_like(flat))


def _scatter_back(case: Case, rows: Tensor, order: Tensor) -> Tensor:
    weighted = rows.float() * case.gates.reshape(-1)[order].unsqueeze(1)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    return weighted[back].view(case.shape.tokens, case.shape.slots, -1).sum(1).to(case.x.dtype)


def sorted_loop(case: Case) -> Run:
    """Return a loop over contiguous segments; reads the counts on the host once."""

    def run() -> Tensor:
        order, _, counts = _sorted(case)
        parts = case.x[order // case.shape.slots].split(counts.tolist())
        rows = [F.linear(act(F.linear(p, case.w1[e])), case.w2[e]) for e, p in enumerate(parts) if p.shape[0]]
        return _scatter_back(case, torch.cat(rows), order)

    return run


def index_add_loop(case: Case) -> Run:
    """Return a loop of gather, FFN and weighted ``index_add``: what most published code does."""

    def run() -> Tensor:
        total = torch.zeros(case.x.shape, dtype=torch.float32, device=case.x.device)
        for expert in range(case.shape.experts):
            token, slot = torch.where(case.experts == expert)
            rows = F.linear(act(F.linear(case.x[token], case.w1[expert])), case.w2[expert])
            total = total.index_add(0, token, rows.float() * case.gates[token, slot].unsqueeze(1))
        return total.to(case.x.dtype)

    return run


def padded_bmm(case: Case) -> Run:
    """Return a batch of all experts, padded to the largest load."""

    def run() -> Tensor:
        order, ids, counts = _sorted(case)
        capacity = int(counts.max())
        place = torch.arange(order.shape[0], device=order.device) - (counts.cumsum(0) - counts)[ids]
        slot = ids * capacity + place
        padded = case.x.new_zeros(case.shape.experts * capacity, case.shape.width)
        padded = padded.index_copy(0, slot, case.x[order // case.shape.slots]).view(case.shape.experts, capacity, -1)
        out = torch.bmm(act(torch.bmm(padded, case.w1.mT)), case.w2.mT).flatten(0, 1)
        return _scatter_back(case, out[slot], order)

    return run


def _grouped(case: Case) -> Tensor:
    order, _, counts = _sorted(case)
    offs = counts.cumsum(0).to(torch.int32)
    multiply = getattr(F, "grouped_mm", None) or torch._grouped_mm
    hidden = act(multiply(case.x[order // case.shape.slots], case.w1.mT, offs=offs))
    return _scatter_back(case, multiply(hidden, case.w2.mT, offs=offs), order)


def grouped_mm(case: Case) -> Run:
    """Return torch's grouped product, eager."""
    return lambda: _grouped(case)


def grouped_mm_compiled(case: Case) -> Run:
    """Return torch's grouped product under Inductor, which fuses sorting and activation around it."""
    compiled = torch.compile(lambda: _grouped(case), fullgraph=True, dynamic=False)
    return lambda: compiled()


def transformers_experts(name: str) -> Build:
    """Return the builder of one of transformers' experts functions, given ungated weights of its own layout."""

    def build(case: Case) -> Run:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        module: Any = SimpleNamespace(
            num_experts=case.shape.experts, has_gate=False, has_bias=False, has_post_expert_norm=False,
            is_transposed=False, _is_expert_parallel=False, act_fn=act, up_proj=case.w1, down_proj=case.w2,
        )  # fmt: skip
        function = ALL_EXPERTS_FUNCTIONS[name]
        return lambda: function(module, case.x, case.experts, case.gates)

    return build


def rehearsal_options() -> dict[str, str]:
    """Return options without Inductor; the emitted kernels run where Triton's interpreter is on."""
    return {"inner": "eager", "kernels": "triton" if interpreting() else "auto"}


def implementations(device: torch.device, quick: bool, folder: Path | None) -> dict[str, Build]:
    """Return what is to be timed, ours first."""
    options = rehearsal_options() if quick else None
    found: dict[str, Build] = {
        "moefx": moefx_kernels(options),
        "moefx eager": moefx_eager,
        "dense, equal FLOPs": Dense,
        "sorted loop": sorted_loop,
        "index_add loop": index_add_loop,
        "padded bmm": padded_bmm,
        "grouped_mm": grouped_mm,
    }
    if device.type == "cuda":
        found["grouped_mm compiled"] = grouped_mm_compiled
    if importlib.util.find_spec("transformers") is not None:
        found["transformers grouped_mm"] = transformers_experts("grouped_mm")
    return found | (peers_in(folder) if folder else {})


def peers_in(folder: Path) -> dict[str, Build]:
    """Return the peers that files of a folder define, by file name."""
    found: dict[str, Build] = {}
    for path in sorted(folder.glob("[a-z]*.py")):
        spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise SystemExit(f"{path} is no Python module")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[path.stem] = module.build
    return found
