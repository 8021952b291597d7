"""The proof of a transform: each site against its dense original, and the whole model against what it was."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from moefx.errors import InputError, MoefxError, VerifyError
from moefx.graph import Graph
from moefx.graph.outputs import take_apart
from moefx.graph.patches import Snapshot
from moefx.graph.trace import where
from moefx.model.carry import asked_for, described, inside
from moefx.model.install import Change, changed_tree
from moefx.model.local import JSON, example_call
from moefx.model.plan import Plan
from moefx.model.realise import Realised
from moefx.model.report import SiteCheck

# Rounding only: what reordering sums costs in each dtype, relative to the output.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
_TOKENS = 32


def rounding(graph: Graph, dtype: torch.dtype) -> float:
    """Return the tolerance for ``dtype``; a float64 model that computes in float32 somewhere gets the latter's."""
    values = [node.meta.get("val") for node in graph.fx.nodes]
    narrow = any(isinstance(v, torch.Tensor) and v.dtype is torch.float32 for v in values)
    return TOLERANCE[torch.float32 if dtype is torch.float64 and narrow else dtype]


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return ``|found - wanted| / |wanted|`` in float64."""
    wide, base = found.detach().double(), wanted.detach().double()
    return float((wide - base).norm() / base.norm().clamp_min(1e-30))


def check_blocks(
    model: nn.Module, plan: Plan, changes: list[Change], built: Sequence[Realised], seed: int
) -> list[SiteCheck]:
    """Compare every module whose own forward was rewritten with what it was, on random inputs of the planned shapes.

    A model whose forward only hands values on is left to the comparison of the whole.

    Raises:
        VerifyError: a block is further from its dense original than the contracts of its sites allow.
    """
    inputs = {made.plan.block: made.plan.block_inputs for made in built} | {c.path: c.inputs for c in plan.carriers}
    checks = []
    for change in changes:
        sites = [made for made in built if made.plan.block == change.path]
        if change.forward is None or not (sites or change.path):
            continue
        sites = sites or [made for made in built if inside(made.plan.block or "", change.path)]
        checks.append(_check_block(model, plan, change, changes, sites, inputs[change.path] or {}, seed))
    return checks


def _check_block(
    model: nn.Module, plan: Plan, change: Change, changes: list[Change], sites: list[Realised], inputs: JSON, seed: int
) -> SiteCheck:
    contracts = [made.rule.contract() for made in sites]
    module = model.get_submodule(change.path)
    taken = described(asked_for(plan.carried, plan.sites), change.path)
    args, kwargs = random_call(module, inputs | {"kwargs": {**inputs["kwargs"], **taken}}, seed)
    before = run(module, args, {name: value for name, value in kwargs.items() if name not in taken})
    after = run(changed_tree(model, change.path, changes), args, kwargs)
    exact = all(contract.kind == "exact" for contract in contracts)
    dtype = before[0].dtype
    bound = TOLERANCE[dtype] * len(sites) if exact else max(contract.bound for contract in contracts)
    kind = "exact" if exact else "approximate"
    # What is handed on follows the output.
    error = compare_models(before, after[: len(before)])
    name = change.path or type(module).__name__
    if not error <= bound:
        raise _broken(name, sites[0].plan.rule, error, bound, kind)
    return SiteCheck(name=name, contract=kind, error=error, bound=bound, dtype=str(dtype)[6:])


def random_call(module: nn.Module, inputs: JSON, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Fill a described call with random numbers; integers are zero and masks keep everything, which is always legal."""
    draws = torch.Generator().manual_seed(seed)

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.dtype is torch.bool:
            return torch.ones(leaf.shape, dtype=leaf.dtype, device=leaf.device)
        if not (leaf.is_floating_point() or leaf.is_complex()):
            return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
        wide = torch.complex64 if leaf.is_complex() else torch.float32
        return torch.randn(leaf.shape, generator=draws, dtype=wide).to(leaf.device, leaf.dtype)

    args, kwargs = example_call(module, inputs, FakeTensorMode(allow_non_fake_inputs=True))
    return pytree.tree_map(fill, args), pytree.tree_map(fill, kwargs)


def check_sites(built: Sequence[Realised], seed: int) -> list[SiteCheck]:
    """Compare every replaced module with the dense one on random tokens.

    Raises:
        VerifyError: a site is further from its dense original than its contract allows.
    """
    checks = []
    for made in built:
        if made.dense is None:
            continue
        checks.append(_check_site(made, seed))
    return checks


def _check_site(made: Realised, seed: int) -> SiteCheck:
    assert made.dense is not None
    assert made.site is not None
    contract = made.rule.contract()
    x = _tokens(made, seed)
    taps = _tap_values(made, x, seed)
    axis, width = int(made.site.shapes["axis"]), made.rule.state_width
    state = [x.movedim(axis, -1).new_zeros(*x.movedim(axis, -1).shape[:-1], width)] if width else []
    modes = made.routed.training, made.dense.root.training
    routed, dense = made.routed.eval(), made.dense.root.eval()
    try:
        with torch.no_grad():
            wanted, found = dense(x), routed(x, *taps, *state)
    finally:
        routed.train(modes[0])
        dense.train(modes[1])
    error = relative_error(found[0] if state else found, wanted)
    bound = rounding(made.dense, x.dtype) if contract.kind == "exact" else contract.bound
    check = SiteCheck(name=made.plan.name, contract=contract.kind, error=error, bound=bound, dtype=str(x.dtype)[6:])
    if not error <= bound:
        raise _broken(made.plan.name, made.plan.rule, error, bound, contract.kind)
    return check


def _broken(name: str, rule: str, error: float, bound: float, kind: str) -> VerifyError:
    return VerifyError(
        f"apply {rule} to {name}",
        found=f"relative error {error:.3g} against the dense original, its contract ({kind}) allows {bound:.1g}",
        do="raise max_error if this start is wanted" if kind != "exact" else "report this as a bug of the pass",
    )


def _tokens(made: Realised, seed: int) -> torch.Tensor:
    assert made.dense is not None
    assert made.site is not None
    parameter = next(p for p in made.dense.root.parameters() if p.is_floating_point())
    axis = int(made.site.shapes["axis"])
    shape = list(made.site.shapes["x"])
    if axis == len(shape) - 1:
        shape = [2, _TOKENS // 2, shape[-1]] if len(shape) > 2 else [_TOKENS, shape[-1]]
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draws).to(parameter)


def _tap_values(made: Realised, x: torch.Tensor, seed: int) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(seed + 1)
    values = []
    for tap in made.plan.taps:
        # One head, word or position will do for what has several.
        shape = (x.shape[0], *[1] * (tap.rank - 2), *[tap.width] * (tap.rank > 1))
        values.append(torch.rand(shape, generator=draws).to(x))
    return values


def run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Run the model in eval mode without gradients and return its floating tensors.

    Modes, random state, buffers and whatever forward writes into its modules are as before afterwards.
    """
    devices = {t.device.index or 0 for t in model.parameters() if t.is_cuda}
    with _state_kept(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        model.eval()
        leaves, _ = take_apart(model(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]


@contextlib.contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    modes = {name: m.training for name, m in model.named_modules()}
    snapshot = Snapshot(model)
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        snapshot.restore()
        for name, module in model.named_modules():
            module.training = modes.get(name, model.training)
        for buffer, saved in buffers:
            buffer.detach().copy_(saved)


def run_dense(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Run the dense model on its example inputs.

    Raises:
        InputError: it cannot run on them, or returns nothing that could be compared.
        VerifyError: its output is not finite.
    """
    try:
        outputs = run(model, args, kwargs)
    except MoefxError:
        raise
    except Exception as error:
        raise InputError(
            f"run {type(model).__name__} on its example inputs",
            found=f"{type(error).__name__}: {str(error).partition(chr(10))[0]} at {where(error)}",
            do="pass inputs on which the model runs; verify=False skips the comparison",
        ) from error
    if not sum(output.numel() for output in outputs):
        raise InputError(
            f"compare {type(model).__name__} with its dense original",
            found="its output on the example inputs holds no floating point number",
            do="pass inputs with at least one sample; verify=False skips the comparison",
        )
    check_finite(model, outputs)
    return outputs


def check_finite(model: nn.Module, outputs: Sequence[torch.Tensor]) -> None:
    """Refuse a dense model whose own output is not finite: nothing could be compared with it.

    Raises:
        VerifyError: an output holds NaN or infinity.
    """
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        raise VerifyError(
            f"transform {type(model).__name__}",
            found="NaN or infinity in the dense model's own output on these inputs",
            do="load sound weights, or pass other inputs; verify=False skips the comparison",
        )


def compare_models(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """Return the largest relative error over the outputs."""
    return max((relative_error(a, b) for a, b in zip(after, before, strict=True)), default=0.0)


def check_weights(graph: Graph, names: Sequence[str]) -> None:
    """Refuse weights that are not finite, before anything is built from them.

    Raises:
        VerifyError: a weight of a site holds NaN or infinity.
    """
    for name in names:
        weight = graph.parameter(name)
        # One pass without temporaries: NaN and infinity both survive the extremes.
        if not weight.is_meta and weight.numel() and not all(bool(torch.isfinite(e)) for e in weight.aminmax()):
            raise VerifyError(
                f"transform {type(graph.root).__name__}",
                found=f"NaN or infinity in {name}",
                do="load sound weights first",
            )
