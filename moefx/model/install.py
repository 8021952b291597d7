"""Changing the user's modules, and changing them back: the only place where a model is mutated."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from moefx.errors import PlanError
from moefx.model.forward import CALL_CHILD, Forward, call_child

_subclasses: dict[Any, type] = {}


@dataclass
class Undo:
    """What one module was before.

    Its class, its children that were replaced, added (None) or removed and their order, and, by the path of their
    owner, all parameters of owners that lost some.
    """

    path: str
    cls: type[nn.Module] | None = None
    children: dict[str, nn.Module | None] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    parameters: dict[str, dict[str, nn.Parameter | None]] = field(default_factory=dict)


@dataclass
class Change:
    """What one module becomes: children to set (None removes), its new forward, parameters that nothing reads now.

    A child's name may be dotted: then it stands below a child that stays.
    """

    path: str
    children: dict[str, nn.Module | None] = field(default_factory=dict)
    forward: Forward | None = None
    unused: tuple[str, ...] = ()


def apply_changes(model: nn.Module, changes: list[Change]) -> list[Undo]:
    """Apply all changes, or none: an exception half way restores what was."""
    done: list[Undo] = []
    try:
        for change in changes:
            done.append(Undo(change.path))
            module = model.get_submodule(change.path)
            _apply(module, change, done[-1])
            for name in change.unused:
                _drop_parameter(module, name, done[-1])
    except BaseException:
        undo_changes(model, done)
        raise
    return done


def changed_clone(module: nn.Module, change: Change) -> nn.Module:
    """Return a shallow copy of ``module`` as it will be after ``change``; the two share their parameters."""
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__.update(module.__dict__)
    clone.__dict__["_modules"] = dict(module._modules)
    for name in change.children:
        _own_down_to(clone, name)
    _apply(clone, change, Undo(change.path))
    return clone


def changed_tree(model: nn.Module, path: str, changes: list[Change]) -> nn.Module:
    """Return a copy of the module at ``path`` with all changes to it and to what is in it; parameters are shared."""
    clone = changed_clone(model.get_submodule(path), Change(path))
    for change in changes:
        if path and change.path != path and not change.path.startswith(f"{path}."):
            continue
        local = change.path[len(path) :].lstrip(".")
        for name in change.children:
            _own_down_to(clone, f"{local}.{name}".lstrip("."))
        # A name below the module itself makes that module the clone's own.
        _own_down_to(clone, f"{local}.x" if local else "x")
        _apply(clone.get_submodule(local), change, Undo(change.path))
    return clone


def _own_down_to(clone: nn.Module, name: str) -> None:
    """Copy the modules on the way to a dotted child, so that setting it changes the clone alone."""
    first, _, rest = name.partition(".")
    inner = clone._modules.get(first)
    if rest and inner is not None:
        clone._modules[first] = copied = changed_clone(inner, Change(""))
        _own_down_to(copied, rest)


def undo_changes(model: nn.Module, undos: list[Undo]) -> None:
    """Put every module back, last change first."""
    for undo in reversed(undos):
        module = model.get_submodule(undo.path)
        for name, child in undo.children.items():
            set_child(module, name, child)
        # Children that came since, such as adapters, follow those that were there.
        _reorder(module._modules, undo.order)
        for path, saved in undo.parameters.items():
            _restore_parameters(module.get_submodule(path), saved)
        if undo.cls is not None:
            module.__class__ = undo.cls


def _reorder(entries: dict[str, Any], order: Iterable[str]) -> None:
    """Bring a dict into ``order``; keys that are not in it come last."""
    rest = dict(entries)
    entries.clear()
    entries.update({name: rest.pop(name) for name in order if name in rest} | rest)


def _drop_parameter(module: nn.Module, name: str, undo: Undo) -> None:
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    undo.parameters.setdefault(path, dict(owner._parameters))
    if isinstance(owner, nn.ParameterDict):
        del owner[key]
    else:
        del owner._parameters[key]


def _restore_parameters(owner: nn.Module, saved: dict[str, nn.Parameter | None]) -> None:
    """Put dropped parameters back where they stood; the others stay what they are now."""
    for name, parameter in saved.items():
        owner._parameters.setdefault(name, parameter)
        if isinstance(owner, nn.ParameterDict):
            owner._keys[name] = None
    _reorder(owner._parameters, saved)
    if isinstance(owner, nn.ParameterDict):
        _reorder(owner._keys, saved)


def _apply(module: nn.Module, change: Change, undo: Undo) -> None:
    undo.order = tuple(module._modules)
    for name, child in change.children.items():
        undo.children[name] = child_named(module, name)
        set_child(module, name, child)
    if change.forward is not None:
        undo.cls = type(module)
        module.__class__ = subclass_with(type(module), change.forward)


def child_named(module: nn.Module, path: str) -> nn.Module | None:
    """Return a child by its dotted name, or None."""
    owner, _, name = path.rpartition(".")
    return module.get_submodule(owner)._modules.get(name)


def set_child(module: nn.Module, path: str, child: nn.Module | None) -> None:
    """Set a child by its dotted name; None removes it."""
    owner, _, name = path.rpartition(".")
    module = module.get_submodule(owner)
    if child is not None:
        # Assigning to the dict keeps the child's position, which sequences and offloading rely on.
        module._modules[name] = child
    elif name in module._modules:
        del module._modules[name]


def subclass_with(cls: type[nn.Module], forward: Forward) -> type[nn.Module]:
    """Return a subclass of ``cls`` of the same name whose forward is ``forward``; one per pair."""
    key = (cls, forward)
    if key not in _subclasses:
        body: dict[str, Any] = {
            "forward": forward,
            CALL_CHILD: call_child,
            "__reduce_ex__": _refuse_pickle,
            "__copy__": _copy,
        }
        if not hasattr(cls, "__deepcopy__"):
            body["__deepcopy__"] = _deepcopy
        for name in ("__module__", "__qualname__", "__doc__"):
            body[name] = getattr(cls, name)
        made = _subclasses[key] = type(cls.__name__, (cls,), body)
        _inherit_registrations(cls, made)
    return _subclasses[key]


def _copy(self: nn.Module) -> nn.Module:
    new = type(self).__new__(type(self))
    new.__dict__.update(self.__dict__)
    return new


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    new = memo[id(self)] = type(self).__new__(type(self))
    new.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return new


def _refuse_pickle(self: nn.Module, protocol: Any) -> Any:
    raise PlanError(
        f"pickle a rewritten {type(self).__name__}",
        found="its forward was generated, and a pickle could not rebuild it",
        do="use save_pretrained or moefx.save, or save the state_dict",
    )


def _inherit_registrations(cls: type, made: type) -> None:
    """diffusers keys its block and cache registries by class: the subclass inherits its parent's entries."""
    helpers = sys.modules.get("diffusers.hooks._helpers")
    for name in ("TransformerBlockRegistry", "AttentionProcessorRegistry"):
        registry: Any = getattr(helpers, name, None)
        if registry is None:
            continue
        getattr(registry, "_register", lambda: None)()  # a registry fills itself when it is first read
        for store in [v for k, v in vars(registry).items() if k.startswith("_") and isinstance(v, dict)]:
            if cls in store:
                store[made] = store[cls]
