"""A calibration as one safetensors file: tensors, and a header in JSON. No pickle; what does not fit is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moefx.errors import UnsafeInputError
from moefx.passes.calibration.calibration import Calibration
from moefx.passes.calibration.layer import MOMENTS, LayerStatistics, Sample
from moefx.passes.calibration.moments import Moments
from moefx.passes.calibration.parts import STATISTICS, PartStatistics, PartUnit

SCHEMA = 2  # 1: without parts
KEY = "moefx_calibration"
_MOST = 1 << 20


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Layer(_Data):
    name: str
    role: str
    sizes: tuple[int, int, int]
    gated: bool
    size: int = Field(ge=1)
    active: int = Field(ge=1)
    modalities: tuple[str, ...] = Field(min_length=1, max_length=64)


class _Part(_Data):
    name: str
    unit: PartUnit
    parts: int = Field(ge=1, le=_MOST)


class _Header(_Data):
    schema_version: int
    model: str
    buckets: int = Field(ge=1, le=_MOST)
    span: tuple[float, float]
    branches: tuple[str, ...] = Field(min_length=1, max_length=_MOST)
    layers: tuple[_Layer, ...]
    skipped: dict[str, str]
    parts: tuple[_Part, ...] = ()


def write(calibration: Calibration, path: str | os.PathLike[str]) -> None:
    """Write the file beside its place and rename it."""
    layers = [
        _Layer(**{field: getattr(s, field) for field in _Layer.model_fields}) for s in calibration.layers.values()
    ]
    header = _Header(
        schema_version=SCHEMA,
        model=calibration.model,
        buckets=calibration.buckets,
        span=calibration.span,
        branches=calibration.branches,
        layers=tuple(layers),
        skipped=calibration.skipped,
        parts=tuple(_Part(name=p.name, unit=p.unit, parts=p.parts) for p in calibration.parts.values()),
    )
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(calibration.layers.values()):
        for name, moments in layer.moments.items():
            tensors |= _tensors(f"{i}.{name}", moments)
        for part in ("x", "group", "key"):
            tensors[f"{i}.sample.{part}"] = getattr(layer.sample, part).contiguous()
    for i, statistics in enumerate(calibration.parts.values()):
        for name in STATISTICS:
            tensors |= _tensors(f"part.{i}.{name}", getattr(statistics, name))
    target = Path(path)
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        save_file(tensors, staged, metadata={KEY: header.model_dump_json()})
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)


def _tensors(key: str, moments: Moments) -> dict[str, Tensor]:
    return {f"{key}.{part}": getattr(moments, part).contiguous() for part in ("count", "mean", "squares")}


def read(path: str | os.PathLike[str]) -> Calibration:
    """Read a file and check every shape, type and number of it.

    Raises:
        UnsafeInputError: it is damaged, something else, or of a newer version.
    """
    target = Path(path)
    try:
        with safe_open(target, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY, "")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except Exception as error:  # safetensors' own error type derives from Exception alone
        raise _unsafe(target, f"no safetensors file: {error}") from error
    header = _header(target, text)
    layers = {spec.name: _layer(target, i, spec, header, tensors) for i, spec in enumerate(header.layers)}
    parts = {spec.name: _part(target, i, spec, header, tensors) for i, spec in enumerate(header.parts)}
    if tensors:
        raise _unsafe(target, f"unknown tensors: {', '.join(sorted(tensors)[:4])}")
    return Calibration(header.model, header.buckets, header.span, header.branches, layers, dict(header.skipped), parts)


def _header(path: Path, text: str) -> _Header:
    try:
        version = json.loads(text).get("schema_version")
    except (ValueError, AttributeError, RecursionError) as error:
        raise _unsafe(path, f"no header {KEY}") from error
    if isinstance(version, int) and version > SCHEMA:
        raise _unsafe(path, f"schema {version}, this is schema {SCHEMA}", "upgrade moefx")
    try:
        return _Header.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise _unsafe(path, f"header, {'.'.join(map(str, first['loc'])) or 'text'}: {first['msg']}") from error


def _layer(path: Path, i: int, spec: _Layer, header: _Header, tensors: dict[str, Tensor]) -> LayerStatistics:
    dim, hidden, out = spec.sizes
    groups = header.buckets * len(header.branches) * len(spec.modalities)
    moments = {}
    for name in MOMENTS:
        moments[name] = _moments(path, tensors, f"{i}.{name}", groups, out if name == "output" else hidden)
    rows = tensors.get(f"{i}.sample.key", torch.zeros(0)).numel()
    x = _take(path, tensors, f"{i}.sample.x", (rows, dim), torch.float32)
    group = _take(path, tensors, f"{i}.sample.group", (rows,), torch.int64)
    key = _take(path, tensors, f"{i}.sample.key", (rows,), torch.float64)
    if rows > spec.size or (rows and not 0 <= int(group.min()) <= int(group.max()) < groups):
        raise _unsafe(path, f"the sample of {spec.name} does not fit its groups or its size")
    return LayerStatistics(
        spec.name,
        spec.role,
        spec.sizes,
        spec.gated,
        groups,
        spec.size,
        spec.active,
        moments,
        Sample(x, group, key),
        spec.modalities,
    )


def _part(path: Path, i: int, spec: _Part, header: _Header, tensors: dict[str, Tensor]) -> PartStatistics:
    groups = header.buckets * len(header.branches)
    widths = {name: 1 if name == "whole" else spec.parts for name in STATISTICS}
    found = {name: _moments(path, tensors, f"part.{i}.{name}", groups, width) for name, width in widths.items()}
    return PartStatistics(spec.name, spec.unit, **found)


def _moments(path: Path, tensors: dict[str, Tensor], key: str, groups: int, width: int) -> Moments:
    shapes = {"count": (groups,), "mean": (groups, width), "squares": (groups, width)}
    return Moments(**{p: _take(path, tensors, f"{key}.{p}", s, torch.float64) for p, s in shapes.items()})


def _take(path: Path, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    found = tensors.pop(name, None)
    if found is None or tuple(found.shape) != shape or found.dtype != dtype:
        what = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
        raise _unsafe(path, f"{name} is {what}, not {dtype} {shape}")
    if dtype.is_floating_point and not bool(torch.isfinite(found).all()):
        raise _unsafe(path, f"NaN or infinity in {name}")
    return found


def _unsafe(path: Path, found: str, do: str = "calibrate again") -> UnsafeInputError:
    return UnsafeInputError(f"load the calibration {str(path)!r}", found=found, do=do)
