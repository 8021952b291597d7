"""Saving a routed model: weights, config and plan as one unit; never a pickle."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from moefx import __version__
from moefx.errors import InputError, OptionError
from moefx.model.diffusers import config_of, is_diffusers
from moefx.model.handle import Handle, handle_of
from moefx.model.layout import (
    BUFFERS,
    CALIBRATION,
    CONFIG,
    JSON,
    MANIFEST,
    PLANS,
    SCHEMA,
    Manifest,
    describe,
    is_owned,
    write_manifest,
)
from moefx.model.staging import replacing

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SHARD = "10GB"


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str = _SHARD,
    variant: str | None = None,
) -> None:
    """Save a transformed model into ``folder``, in place of an older save if there is one.

    The folder is staged beside its place and renamed: an interrupted save leaves the older one whole.

    Args:
        model: what :func:`moefx.transform` returned; compiled or wrapped in DistributedDataParallel is fine.
        state_dict: weights to save instead of the model's own, such as averaged or gathered ones.
        max_shard_size: bytes, or text such as ``"5GB"``; larger models are split and get an index.
        variant: a label in the names of the weights' files, as in diffusers.

    Raises:
        InputError: the model cannot be saved as it is, or the folder cannot be replaced.
    """
    whole = unwrap(model)
    handle = _check(whole)
    tensors, shared = _collect(whole, state_dict)
    limit = parse_size(max_shard_size)
    target = Path(os.path.realpath(folder))
    _check_variant(target, variant)
    with replacing(target, is_owned) as stage:
        weights = _write_weights(stage, tensors, limit, _weights_stem(whole, variant), variant)
        buffers = _unsaved_buffers(whole)
        if buffers:
            _store(buffers, stage / BUFFERS)
        if handle.calibration is not None:
            handle.calibration.without_tokens().save(stage / CALIBRATION)
        _write_json(stage / PLANS, [plan.model_dump(mode="json") for plan in handle.plans])
        _write_json(stage / CONFIG, _config(whole, handle))
        files = {path.name: describe(stage, path.name) for path in sorted(stage.iterdir())}
        manifest = Manifest(
            model=dense_class(whole).__qualname__,
            library=dense_class(whole).__module__,
            variant=variant,
            files=files,
            weights=weights,
            shared=shared,
        )
        write_manifest(stage, manifest)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's model inside a compiled or a data-parallel one."""
    inner: Any = model
    while True:
        if type(inner).__name__ == "OptimizedModule":
            inner = inner._orig_mod
        elif isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = inner.module
        else:
            return inner  # type: ignore[no-any-return]


def dense_class(model: nn.Module) -> type[nn.Module]:
    """Return the class that the model had before it was transformed."""
    handle = handle_of(model)
    return handle.applied[0].model_class if handle else type(model)


def parse_size(size: int | str) -> int:
    """Return a number of bytes.

    Raises:
        OptionError: it is no positive integer and no text like ``"10GB"``.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"(\d+)\s*([KMGT]i?B)", size.strip(), re.IGNORECASE) if isinstance(size, str) else None
    if match is None or int(match[1]) == 0:
        raise OptionError(f"save with max_shard_size = {size!r}", found="no size", do="pass bytes, or text like '5GB'")
    return int(match[1]) * _UNITS[match[2].upper()]


def _check(model: nn.Module) -> Handle:
    asked = f"save {type(model).__name__}"
    if not isinstance(model, nn.Module):
        raise InputError(asked, found="no torch.nn.Module", do="pass a model")
    handle = handle_of(model)
    if handle is None:
        raise InputError(asked, found="it was not transformed", do="save dense models with the tool they came with")
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise InputError(
                asked,
                found=f"an adapter of PEFT at {name!r}",
                do="save the adapter with save_lora_adapter, then fuse it or remove it, and save the model",
            )
    return handle


def _collect(model: nn.Module, given: Mapping[str, Tensor] | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to store, and those that are stored once under another name."""
    own = model.state_dict()
    asked = f"save {type(model).__name__}"
    found = own if given is None else dict(given)
    if found.keys() != own.keys():
        names = sorted(found.keys() ^ own.keys())
        raise InputError(asked, found=f"another set of tensors: {', '.join(names[:4])}", do="pass a whole state_dict")
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.is_meta:
            what = "on meta, without values" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise InputError(asked, found=f"{name} is {what}", do="load or compute the weights first")
        if hasattr(value, "full_tensor"):
            raise InputError(
                asked,
                found=f"{name} is split over processes",
                do="gather with torch.distributed.checkpoint.state_dict.get_model_state_dict and pass state_dict=",
            )
        shape, wanted, stacked = list(value.shape), list(own[name].shape), int(value.ndim > 2)
        # A stack may hold more experts than this process does.
        if shape[stacked:] != wanted[stacked:]:
            do = "pass weights of this model, experts as [experts, out, in]"
            raise InputError(asked, found=f"{name} is {shape}, the model's is {wanted}", do=do)
        detached = value.detach()
        key = (detached.device, detached.data_ptr(), detached.shape, detached.stride(), detached.dtype)
        if detached.numel() and key in first:
            shared[name] = first[key]
        else:
            first[key] = name
            tensors[name] = detached
    return tensors, shared


def _check_variant(folder: Path, variant: str | None) -> None:
    if variant is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", variant):
        raise OptionError(f"save with variant = {variant!r}", found="no plain name", do="use letters and digits")
    if not (folder / MANIFEST).exists():
        return
    try:
        older = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("variant")
    except (OSError, ValueError, AttributeError):
        return  # a damaged save may be replaced
    if older != variant:
        raise InputError(
            f"save variant {variant!r} into {str(folder)!r}",
            found=f"it holds variant {older!r}, and a folder holds one",
            do="choose another folder",
        )


def _weights_stem(model: nn.Module, variant: str | None) -> str:
    stem = "diffusion_pytorch_model" if is_diffusers(model) else "model"
    return f"{stem}.{variant}" if variant else stem


def _write_weights(stage: Path, tensors: dict[str, Tensor], limit: int, stem: str, variant: str | None) -> list[str]:
    """Write the tensors in shards of at most ``limit`` bytes, and an index if there are several."""
    shards = _shards(tensors, limit)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(_size(t) for t in tensors.values())
        base = stem.removesuffix(f".{variant}") if variant else stem
        index = f"{base}.safetensors.index.{variant}.json" if variant else f"{base}.safetensors.index.json"
        _write_json(stage / index, {"metadata": {"total_size": total}, "weight_map": where})
    for name, shard in zip(names, shards, strict=True):
        # A copy of its own: safetensors refuses tensors that overlap in memory.
        content = {key: _own(value) for key, value in shard.items()}
        _store(content, stage / name)
    return names


def _store(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # how safetensors reports that the disk took no more
        raise OSError(f"{path.name}: {error}") from error


def _own(value: Tensor) -> Tensor:
    whole = value.is_contiguous() and value.untyped_storage().nbytes() == _size(value)
    return value if whole else value.clone(memory_format=torch.contiguous_format)


def _size(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _shards(tensors: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, value in tensors.items():
        if shards[-1] and used + _size(value) > limit:
            shards.append({})
            used = 0
        shards[-1][name] = value
        used += _size(value)
    return shards


def _unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a state dict leaves out; a model built on ``meta`` has no other source for them."""
    kept = model.state_dict().keys()
    return {name: _own(b.detach()).clone() for name, b in model.named_buffers() if name not in kept and not b.is_meta}


def _config(model: nn.Module, handle: Handle) -> JSON:
    block = {
        "schema_version": SCHEMA,
        "moefx_version": __version__,
        "torch_version": str(torch.__version__),
        "class": {"module": dense_class(model).__module__, "name": dense_class(model).__qualname__},
        "recipes": [plan.recipe or [p.name for p in plan.passes] for plan in handle.plans],
        "layout": "experts stacked [experts, out, in]",
        "proof": [applied.report.proof_summary() for applied in handle.applied],
    }
    own = config_of(model) if is_diffusers(model) else {}
    return {**own, "moefx": block}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=isinstance(content, dict)) + "\n", encoding="utf-8")
