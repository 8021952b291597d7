"""Loading a saved folder: build the dense model without weights, apply its plans, fill in the weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from moefx.errors import InputError, UnsafeInputError
from moefx.model.diffusers import build_dense, resolve_class
from moefx.model.handle import Applied, handle_of
from moefx.model.install import apply_changes
from moefx.model.layout import BUFFERS, CALIBRATION, Saved, read_folder, unsafe
from moefx.model.plan import Plan
from moefx.model.realise import realise
from moefx.model.report import Report
from moefx.model.transform import attach
from moefx.passes.calibration import Calibration

_LARGEST_OPTION = 1 << 16  # a forged number of experts would be built one by one before the weights disagree


def load(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load what :func:`moefx.save` or ``save_pretrained`` of a transformed model wrote.

    Args:
        folder: the saved folder.
        model: a fresh dense model of the saved class, with any weights or on ``meta``; it becomes the routed one. Not
            needed for diffusers models, which are built from their config.

    Raises:
        UnsafeInputError: the folder is missing, damaged, changed, of another model, or of a newer version.
        InputError: the model cannot be built here, or the one passed cannot be used.
    """
    saved = read_folder(folder)
    if model is None:
        return load_class(saved, resolve_class(saved))
    if not isinstance(model, nn.Module):
        raise InputError(
            "load into a model", found=f"an object of type {type(model).__name__}", do="pass a torch.nn.Module"
        )
    if handle_of(model) is not None:
        raise InputError("load into a model", found="it was transformed before", do="pass a fresh dense model")
    if type(model).__qualname__ != saved.manifest.model:
        raise _other_model(saved, f"a save of {saved.manifest.model}, not of {type(model).__qualname__}")
    return fill(model, saved)


def load_class(saved: Saved, dense: type[nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
    """Build ``dense`` from the saved config and fill it; in evaluation mode, as diffusers does."""
    try:
        model = build_dense(dense, saved.own_config)
    except Exception as error:  # a config is untrusted data: whatever a class makes of it is an unusable folder
        raise unsafe(saved.folder, f"a config that {dense.__name__} refuses: {error}") from error
    return fill(model, saved, dtype).eval()


def fill(model: nn.Module, saved: Saved, dtype: torch.dtype | None = None) -> nn.Module:
    """Apply the saved plans to a dense model and give it the saved weights.

    On an error the model that was passed has to be thrown away.
    """
    dense = type(model)
    applied = [_apply(model, plan, saved) for plan in saved.plans]
    tensors = read_weights(saved)
    _check_tensors(model, tensors, saved)
    _assign(model, tensors, saved, dtype)
    _fill_buffers(model, saved)
    for report in applied:
        attach(model, Applied(report, None, dense))
    handle = handle_of(model)
    if handle is not None and CALIBRATION in saved.manifest.files:
        handle.calibration = Calibration.load(saved.folder / CALIBRATION)
    return model


def _apply(model: nn.Module, plan: Plan, saved: Saved) -> Report:
    for rule in plan.passes:
        for name, value in rule.options.items():
            if isinstance(value, int) and abs(value) > _LARGEST_OPTION:
                raise unsafe(saved.folder, f"a plan with {name} = {value} for {rule.name}")
    try:
        changes, _ = realise(model, plan)
        apply_changes(model, changes)
    except Exception as error:  # a plan is untrusted data: whatever it leads to is an unusable folder
        reason = getattr(error, "found", None) or f"{type(error).__name__}: {error}"
        raise _other_model(saved, f"its plan does not fit {type(model).__name__}: {reason}") from error
    return Report(plan=plan, unverified=f"loaded from {saved.folder.name!r}; its files have the saved hashes")


def read_weights(saved: Saved) -> dict[str, Tensor]:
    """Return the saved state dict.

    Raises:
        UnsafeInputError: a file is no safetensors file, or a tensor is stored twice.
    """
    tensors: dict[str, Tensor] = {}
    for name in saved.manifest.weights:
        for key, value in _read_tensors(saved, name).items():
            if key in tensors:
                raise unsafe(saved.folder, f"{key} is stored twice")
            tensors[key] = value
    for name, source in saved.manifest.shared.items():
        if source not in tensors:
            raise unsafe(saved.folder, f"{name} is stored as {source}, which is missing")
        tensors[name] = tensors[source]
    return tensors


def _read_tensors(saved: Saved, name: str) -> dict[str, Tensor]:
    try:
        with safe_open(saved.folder / name, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except Exception as error:  # safetensors' own error type derives from Exception alone
        raise unsafe(saved.folder, f"{name} is no safetensors file: {error}") from error


def _check_tensors(model: nn.Module, tensors: Mapping[str, Tensor], saved: Saved) -> None:
    wanted = model.state_dict()
    for kind, names in (("missing", wanted.keys() - tensors), ("unknown", tensors.keys() - wanted)):
        if names:
            raise _other_model(saved, f"{len(names)} tensors are {kind}: {', '.join(sorted(names)[:4])}")
    for name, value in wanted.items():
        if value.shape != tensors[name].shape:
            raise _other_model(saved, f"{name} is {list(tensors[name].shape)}, the model's is {list(value.shape)}")


def _assign(model: nn.Module, tensors: Mapping[str, Tensor], saved: Saved, dtype: torch.dtype | None) -> None:
    """Replace parameters and buffers; each keeps the device that it had, ``meta`` becomes the CPU."""
    wide = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    placed: dict[tuple[int, torch.device], Tensor] = {}
    state = {}
    for name, old in model.state_dict().items():
        value = tensors[name]
        key = (id(value), old.device)
        if key not in placed:
            target = dtype if value.is_floating_point() and not any(part in name.split(".") for part in wide) else None
            placed[key] = value.to(device="cpu" if old.is_meta else old.device, dtype=target)
        state[name] = placed[key]
    model.load_state_dict(state, strict=True, assign=True)
    for name, source in saved.manifest.shared.items():
        _tie(model, name, source)


def _tie(model: nn.Module, name: str, source: str) -> None:
    """Let two names be one parameter again, as they were when saved."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if module._parameters.get(leaf) is not None:
        module._parameters[leaf] = model.get_parameter(source)


def _fill_buffers(model: nn.Module, saved: Saved) -> None:
    """Give buffers that no state dict holds their values, if the model was built on ``meta``."""
    stored = _read_tensors(saved, BUFFERS) if BUFFERS in saved.manifest.files else {}
    empty = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    for name in empty:
        if name not in stored:
            raise unsafe(saved.folder, f"no values for the buffer {name}", do="pass a model that is not on meta")
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = stored[name]
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise unsafe(saved.folder, f"no values for {', '.join(left[:4])}")


def _other_model(saved: Saved, found: str) -> UnsafeInputError:
    return unsafe(saved.folder, found, do="pass the model that was saved, or save again")


def local_folder(path: str | os.PathLike[str], subfolder: str | None) -> Path:
    """Return the folder that ``from_pretrained`` is asked for.

    Raises:
        UnsafeInputError: the subfolder leaves the folder.
    """
    base = Path(path)
    inner = base / (subfolder or "")
    if base.resolve() not in (inner.resolve(), *inner.resolve().parents):
        raise unsafe(base, f"the subfolder {subfolder!r} lies outside it")
    return inner
