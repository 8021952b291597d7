"""Other options for a routed model for good, with the weights it has: fewer experts per token, another capacity.

The dense model is transformed once more, with the other options, and gets the weights of the routed one. So the result
is what the same transform would have made, is saved as such, and can be undone.
"""

from __future__ import annotations

import copy
import glob
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from moefx.errors import OptionError, PlanError, nearest
from moefx.graph.signature import Inputs
from moefx.model.captures import Captures
from moefx.model.diffusers import build_dense, is_diffusers
from moefx.model.handle import Applied, Handle, handle_of
from moefx.model.install import apply_changes
from moefx.model.plan import Plan
from moefx.model.realise import realise
from moefx.model.report import Report
from moefx.model.transform import Clock, attach, plan_model, untransform_model
from moefx.passes.rewrite.base import Pass, get_pass

_PLACED = ("moefx.parallel", "moefx.offloading")


def retarget(model: nn.Module, inputs: Inputs = None, *, dense: nn.Module | None = None, **options: Any) -> nn.Module:
    """Give the passes that made ``model`` other options, in place, and return it.

    Its parameters stay the objects that an optimizer knows, modules that were not replaced keep their hooks.

    Args:
        model: what :func:`moefx.transform` made, or was loaded.
        inputs: example inputs, as for :func:`moefx.transform`.
        dense: a dense model of the class and config it had before, on ``meta`` if you like, which becomes part of it.
            Needed only for a loaded model that is not from diffusers.
        options: options that need no other parameters, such as ``top_k=1``; each goes to every pass that has it.

    Raises:
        PlanError: the model was not transformed, its experts are placed elsewhere, a budget chose the options of its
            sites, or ``dense`` is missing.
        OptionError: no pass has such an option, it is impossible, or it needs other parameters; nothing was changed.
    """
    handle = handle_of(model)
    asked = f"retarget {type(model).__name__} to {', '.join(f'{k}={v!r}' for k, v in options.items()) or 'nothing'}"
    if handle is None:
        raise PlanError(asked, found="it was not transformed", do="pass what moefx.transform returned")
    for name, module in model.named_modules():
        if type(module).__module__.startswith(_PLACED):
            do = "retarget first, then parallelize or offload"
            raise PlanError(asked, found=f"{name} is divided among processes or streamed from files", do=do)
    rules = [_rules(plan, options, asked) for plan in handle.plans]
    _check_known(handle.plans, options, asked)
    undoable = dense is None and handle.undoable
    twin = (
        _undone(model, handle)
        if undoable
        else _of_its_dtypes(model, dense if dense is not None else _built(model, handle, asked))
    )
    for plan, changed in zip(handle.plans, rules, strict=True):
        _transform(twin, inputs, plan, changed, asked, undoable=undoable)
    _move_weights(model, twin, asked)
    made = handle_of(twin)
    assert made is not None
    _adopt(model, twin, set())
    handle.applied[:] = made.applied
    return model


def _rules(plan: Plan, options: Mapping[str, Any], asked: str) -> list[Pass]:
    """Return the passes of a plan with the options changed; its sites are named, so none is left out by number."""
    if any(site.options for site in plan.sites):
        chosen = "a budget chose the options of each site"
        raise PlanError(asked, found=chosen, do="transform the dense model with another budget")
    found: list[Pass] = []
    for rule in plan.passes:
        known = get_pass(rule.name).Options.model_fields
        given = rule.options | {k: v for k, v in options.items() if k in known}
        found.append(get_pass(rule.name)(**given | ({"every": 1} if "every" in known else {})))
    return found


def _check_known(plans: Iterable[Plan], options: Mapping[str, Any], asked: str) -> None:
    known = {name for plan in plans for rule in plan.passes for name in get_pass(rule.name).Options.model_fields}
    if not options:
        raise OptionError(asked, found="no option", do=f"choose among {', '.join(sorted(known))}")
    for name in options:
        if name not in known:
            raise OptionError(asked, found=f"none of its passes has an option {name!r}", do=nearest(name, known))


def _undone(model: nn.Module, handle: Handle) -> nn.Module:
    """Return a model with the modules that ``model`` had before; what both have are the same tensors."""
    return untransform_model(copy.deepcopy(model, {id(t): t for t in _tensors(model, handle)}))


def _built(model: nn.Module, handle: Handle, asked: str) -> nn.Module:
    """Build the dense model on ``meta`` from its config."""
    if is_diffusers(model):
        return build_dense(handle.applied[0].model_class, dict(model.config)).to("meta")  # type: ignore[arg-type]
    found = "it was loaded from a folder, which holds no dense model"
    raise PlanError(asked, found=found, do="pass a fresh dense model: dense=")


def _of_its_dtypes(model: nn.Module, dense: nn.Module) -> nn.Module:
    """Let ``dense`` have the dtypes of ``model``: they are part of a plan."""
    known = {name: parameter.dtype for name, parameter in model.named_parameters()}
    usual = next((known[name] for name, _ in dense.named_parameters() if name in known), None)
    for name, parameter in dense.named_parameters():
        parameter.data = parameter.data.to(known.get(name) or usual or parameter.dtype)
    return dense


def _tensors(model: nn.Module, handle: Handle) -> Iterator[torch.Tensor]:
    """Yield what the model holds, and what it needs to be undone."""
    undos = [undo for applied in handle.applied for undo in applied.undos or ()]
    for module in [model, *(child for undo in undos for child in undo.children.values() if child is not None)]:
        yield from module.parameters()
        yield from module.buffers()
    for undo in undos:
        yield from (p for owned in undo.parameters.values() for p in owned.values() if p is not None)


def _transform(twin: nn.Module, inputs: Inputs, plan: Plan, rules: list[Pass], asked: str, *, undoable: bool) -> None:
    """Do once more what ``plan`` did, with other rules."""
    names = [glob.escape(site.name) for site in plan.sites if site.kind != "model"]
    graph, new = plan_model(
        twin, inputs, rules, recipe=plan.recipe, only=names or None, skip=None, seed=plan.seed, clock=Clock()
    )
    if {(s.rule, s.name) for s in new.sites} != {(s.rule, s.name) for s in plan.sites}:
        missing = sorted({s.name for s in plan.sites} - {s.name for s in new.sites})
        reason = next((s.reason for s in new.skipped if s.name in missing), "other sites would be rewritten")
        raise OptionError(asked, found=f"{', '.join(missing[:3])}: {reason}", do="transform the dense model instead")
    was = type(twin)
    changes, _ = realise(twin, new, None, Captures.of(graph))
    undos = apply_changes(twin, changes)
    report = Report(plan=new, unverified="made with other options; its weights are those of the model it was")
    attach(twin, Applied(report, undos if undoable else None, was))


def _move_weights(model: nn.Module, twin: nn.Module, asked: str) -> None:
    """Let ``twin`` have the tensors of ``model``.

    Raises:
        OptionError: it needs others.
    """
    state = model.state_dict(keep_vars=True)
    wanted = {name: value.shape for name, value in twin.state_dict().items()}
    other = sorted(
        name for name in wanted.keys() | state.keys() if name not in state or state[name].shape != wanted.get(name)
    )
    if other:
        found = f"{len(other)} tensors that it has not or of another shape, such as {other[0]}"
        raise OptionError(asked, found=found, do="transform the dense model with these options")
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    twin.load_state_dict(state, strict=True, assign=True)
    for name, parameter in twin.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(learns[name])
    old = dict(model.named_buffers())
    for name, buffer in twin.named_buffers():
        if buffer.is_meta and name in old:
            owner, _, leaf = name.rpartition(".")
            twin.get_submodule(owner)._buffers[leaf] = old[name]


def _adopt(old: nn.Module, new: nn.Module, seen: set[int]) -> None:
    """Make ``old`` what ``new`` is; modules that both have stay those of ``old``, with their hooks and processors."""
    if id(old) in seen:
        return
    seen.add(id(old))
    before = dict(old._modules)
    old.__class__ = type(new)
    old._parameters, old._buffers, old._modules = new._parameters, new._buffers, {}
    for name, child in new._modules.items():
        known = before.get(name)
        old._modules[name] = child
        if child is None:
            continue
        if known is None or _is_ours(child) or type(child).__name__ != type(known).__name__:
            child.train(old.training if known is None else known.training)
        else:
            _adopt(known, child, seen)
            old._modules[name] = known


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "moefx"
