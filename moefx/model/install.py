"""Changing the user's modules, and changing them back: the only place where a model is mutated."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from moefx.errors import PlanError
from moefx.model.forward import Forward

_subclasses: dict[Any, type] = {}


@dataclass
class Undo:
    """What one module was before: its class, its children that were replaced, added (None) or removed, and their order."""

    path: str
    cls: type[nn.Module] | None = None
    children: dict[str, nn.Module | None] = field(default_factory=dict)
    order: tuple[str, ...] = ()


@dataclass
class Change:
    """What one module becomes: children to set (None removes) and, if rewritten itself, its new forward."""

    path: str
    children: dict[str, nn.Module | None] = field(default_factory=dict)
    forward: Forward | None = None


def apply_changes(model: nn.Module, changes: list[Change]) -> list[Undo]:
    """Apply all changes, or none: an exception half way restores what was."""
    done: list[Undo] = []
    try:
        for change in changes:
            done.append(Undo(change.path))
            _apply(model.get_submodule(change.path), change, done[-1])
    except BaseException:
        undo_changes(model, done)
        raise
    return done


def changed_clone(module: nn.Module, change: Change) -> nn.Module:
    """Return a shallow copy of ``module`` as it will be after ``change``; the two share their parameters."""
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__.update(module.__dict__)
    clone.__dict__["_modules"] = dict(module._modules)
    _apply(clone, change, Undo(change.path))
    return clone


def undo_changes(model: nn.Module, undos: list[Undo]) -> None:
    """Put every module back, last change first."""
    for undo in reversed(undos):
        module = model.get_submodule(undo.path)
        for name, child in undo.children.items():
            _set_child(module, name, child)
        # Children that came since, such as adapters, follow those that were there.
        for name in [*undo.order, *(n for n in module._modules if n not in undo.order)]:
            if name in module._modules:
                module._modules[name] = module._modules.pop(name)
        if undo.cls is not None:
            module.__class__ = undo.cls


def _apply(module: nn.Module, change: Change, undo: Undo) -> None:
    undo.order = tuple(module._modules)
    for name, child in change.children.items():
        undo.children[name] = module._modules.get(name)
        _set_child(module, name, child)
    if change.forward is not None:
        undo.cls = type(module)
        module.__class__ = subclass_with(type(module), change.forward)


def _set_child(module: nn.Module, name: str, child: nn.Module | None) -> None:
    if child is not None:
        # Assigning to the dict keeps the child's position, which sequences and offloading rely on.
        module._modules[name] = child
    elif name in module._modules:
        del module._modules[name]


def subclass_with(cls: type[nn.Module], forward: Forward) -> type[nn.Module]:
    """Return a subclass of ``cls`` of the same name whose forward is ``forward``; one per pair."""
    key = (cls, forward)
    if key not in _subclasses:
        body: dict[str, Any] = {"forward": forward, "__reduce_ex__": _refuse_pickle, "__copy__": _copy}
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
    for registry_name in ("TransformerBlockRegistry", "AttentionProcessorRegistry"):
        registry = getattr(helpers, registry_name, None)
        stores = [v for k, v in vars(registry).items() if k.startswith("_") and isinstance(v, dict)] if registry else []
        for store in stores:
            if cls in store:
                store[made] = store[cls]
