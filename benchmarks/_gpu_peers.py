"""Implementations of one routed FFN, ``combine(activate(x W1_e^T) W2_e^T)``, that ``gpu.py`` times beside each other.

Each entry builds a callable from a case; what a peer needs besides (sorting, padding) is inside its call.  A peer that
cannot be built says why; one that has no business with a case raises ``NotHere``.  Peers that are installed
(liger-kernel, scattermoe) are in `_gpu_installed`; more are files with a function ``build(case)`` in the folder of
``--peers``.
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
from _gpu_cases import Build, Case, NotHere, Run, standard_shapes
from _gpu_installed import installed
from torch import Tensor

from moefx import ops
from moefx.codegen.runtime import interpreting


def _dialect(case: Case, x: Tensor, experts: Tensor, gates: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    order, offsets = ops.group(experts, w1.shape[0])
    hidden = case.activate(ops.grouped_linear(x, w1, None, order, offsets, experts.shape[1]))
    return ops.combine(ops.grouped_linear(hidden, w2, None, None, offsets), order, gates)


def moefx_kernels(options: dict[str, str] | None) -> Build:
    """Return the builder of ours: what ``torch.compile(model, backend="moefx")`` makes of a routed FFN."""

    def build(case: Case) -> Run:
        routed = partial(_dialect, case)
        compiled = torch.compile(routed, backend="moefx", fullgraph=True, dynamic=False, options=options)
        return lambda: compiled(case.x, case.experts, case.gates, case.w1, case.w2)

    return build


def moefx_eager(case: Case) -> Run:
    """Return the operators as they are, without a compiler."""
    return lambda: _dialect(case, case.x, case.experts, case.gates, case.w1, case.w2)


class Dense:
    """One FFN, nothing routed (not the same function): over T*K rows, the FLOPs of the routed one, or over T.

    Its weights are its own leaves: the gradient of a slice of the stacked ones would also be zeros for all others.
    """

    def __init__(self, case: Case, slots: int | None = None) -> None:
        wanted, self.case = case.x.requires_grad, case
        rows = case.x.detach().repeat(slots or case.shape.slots, 1)
        self.leaves = [
            t.requires_grad_(wanted) for t in (rows, case.w1[0].detach().clone(), case.w2[0].detach().clone())
        ]

    def __call__(self) -> Tensor:
        rows, w1, w2 = self.leaves
        return F.linear(self.case.activate(F.linear(rows, w1)), w2)


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
        rows = [F.linear(case.activate(F.linear(p, case.w1[e])), case.w2[e]) for e, p in enumerate(parts) if p.shape[0]]
        return _scatter_back(case, torch.cat(rows), order)

    return run


def index_add_loop(case: Case) -> Run:
    """Return a loop of gather, FFN and weighted ``index_add``: what most published code does."""

    def run() -> Tensor:
        total = torch.zeros(case.x.shape, dtype=torch.float32, device=case.x.device)
        for expert in range(case.shape.experts):
            token, slot = torch.where(case.experts == expert)
            rows = F.linear(case.activate(F.linear(case.x[token], case.w1[expert])), case.w2[expert])
            total = total.index_add(0, token, rows.float() * case.gates[token, slot].unsqueeze(1))
        return total.to(case.x.dtype)

    return run


def inference_loop(case: Case) -> Run:
    """Return the loop of HiDream's inference: counts as numpy on the host, results added where they came from.

    Raises :class:`NotHere` in training.
    """
    if case.x.requires_grad:
        raise NotHere

    def run() -> Tensor:
        order = case.experts.flatten().argsort()
        ends = case.experts.flatten().bincount(minlength=case.shape.experts).cpu().numpy().cumsum()
        total = torch.zeros(case.x.shape, dtype=torch.float32, device=case.x.device)
        for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if start == end:
                continue
            pair = order[start:end]
            token = pair // case.shape.slots
            rows = F.linear(case.activate(F.linear(case.x[token], case.w1[expert])), case.w2[expert])
            weighted = rows.float() * case.gates.flatten()[pair, None]
            total.scatter_reduce_(0, token[:, None].expand_as(weighted), weighted, reduce="sum")
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
        out = torch.bmm(case.activate(torch.bmm(padded, case.w1.mT)), case.w2.mT).flatten(0, 1)
        return _scatter_back(case, out[slot], order)

    return run


def _grouped(case: Case) -> Tensor:
    order, _, counts = _sorted(case)
    offs = counts.cumsum(0).to(torch.int32)
    multiply = getattr(F, "grouped_mm", None) or torch._grouped_mm
    hidden = case.activate(multiply(case.x[order // case.shape.slots], case.w1.mT, offs=offs))
    return _scatter_back(case, multiply(hidden, case.w2.mT, offs=offs), order)


def grouped_mm(case: Case) -> Run:
    """Return torch's grouped product, eager."""
    return lambda: _grouped(case)


def compiled(function: Callable[[Case], Tensor], **options: Any) -> Build:
    """Return the builder of a function under Inductor, which fuses sorting and activation around the products."""

    def build(case: Case) -> Run:
        made = torch.compile(lambda: function(case), dynamic=False, **options)
        return lambda: made()

    return build


def only(build: Build, wanted: Callable[[Case], bool]) -> Build:
    """Return a builder that takes part in some cases."""

    def chosen(case: Case) -> Run:
        if not wanted(case):
            raise NotHere
        return build(case)

    return chosen


def transformers_experts(name: str) -> Build:
    """Return the builder of one of transformers' experts functions, given weights of its own layout."""

    def build(case: Case) -> Run:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        module: Any = SimpleNamespace(
            num_experts=case.shape.experts, has_gate=case.shape.gated, has_bias=False, has_post_expert_norm=False,
            is_transposed=False, _is_expert_parallel=False, act_fn=case.activate, _apply_gate=case.activate,
            up_proj=case.w1, gate_up_proj=case.w1, down_proj=case.w2,
        )  # fmt: skip
        function = ALL_EXPERTS_FUNCTIONS[name]
        return lambda: function(module, case.x, case.experts, case.gates)

    return build


def transformers_eager(case: Case) -> Run:
    """Return the loop of transformers' own experts module, which has gated ones only.

    Raises :class:`NotHere` for others.
    """
    if not case.shape.gated:
        raise NotHere
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=case.shape.width, moe_intermediate_size=case.shape.hidden, num_experts=case.shape.experts,
        num_experts_per_tok=case.shape.slots, hidden_act="silu", experts_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        module: Any = Qwen3MoeExperts(config)
    leaves = {"gate_up_proj": case.w1, "down_proj": case.w2}
    return lambda: torch.func.functional_call(module, leaves, (case.x, case.experts, case.gates))


def rehearsal_options(kernels: bool = False) -> dict[str, str]:
    """Return options without Inductor; with ``kernels`` they run where Triton's interpreter is on, which is slow."""
    return {"inner": "eager", "kernels": "triton" if kernels and interpreting() else "auto"}


def implementations(device: torch.device, quick: bool, folder: Path | None) -> dict[str, Build]:
    """Return what is to be timed, ours first."""
    options = rehearsal_options(kernels=True) if quick else None
    first = standard_shapes()[0]
    found: dict[str, Build] = {
        "moefx": moefx_kernels(options),
        "moefx eager": moefx_eager,
        "dense, equal FLOPs": Dense,
        "dense, equal tokens": partial(Dense, slots=1),
        "sorted loop": sorted_loop,
        "index_add loop": index_add_loop,
        "HiDream's loop": inference_loop,
        "padded bmm": padded_bmm,
        "grouped_mm": grouped_mm,
    }
    if device.type == "cuda":
        searched = compiled(_grouped, fullgraph=True, mode="max-autotune-no-cudagraphs")
        found["grouped_mm compiled"] = compiled(_grouped, fullgraph=True)
        found["grouped_mm max-autotune"] = only(searched, lambda case: case.shape == first)
        looped = compiled(lambda case: index_add_loop(case)())
        found["index_add loop compiled"] = only(looped, lambda case: case.shape == first)
    if importlib.util.find_spec("transformers") is not None:
        found["transformers loop"] = transformers_eager
        found["transformers grouped_mm"] = transformers_experts("grouped_mm")
        # It copies the weights of every row.
        found["transformers batched_mm"] = only(transformers_experts("batched_mm"), lambda case: case.shape.rows <= 512)
    return found | installed() | (peers_in(folder) if folder else {})


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
