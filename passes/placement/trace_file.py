"""Files of routing traces: one ``.npz`` without pickles, in which mostly empty tables are kept as their entries."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefx.errors import UnsafeInputError
from moefx.passes.placement.trace import OPTIONAL, RoutingTrace

VERSION = 2
# These grow with the square of the number of experts, and most of their entries are zero.
_SPARSE = ("affinity", "coactivation")
_LARGEST_TABLE = 2**31


def write(trace: RoutingTrace, target: Path) -> None:
    """Write a trace; an older file is replaced only by a whole new one."""
    fields: dict[str, Any] = {
        "version": np.int64(VERSION),
        "sigmas": trace.sigmas,
        "layers": np.array(trace.layers, dtype=np.str_),
        "experts": np.array(trace.experts, dtype=np.int64),
        "load": trace.load,
    }
    for name in OPTIONAL:
        counts = getattr(trace, name)
        if counts is not None:
            fields |= _packed(name, counts) if name in _SPARSE else {name: counts}
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, **fields)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> RoutingTrace:
    """Read a trace; files of version 1 hold the load only.

    Raises:
        UnsafeInputError: the file is missing, damaged or of a newer version.
        InputError: its numbers are no trace.
    """
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            version = int(file["version"])
            if not 1 <= version <= VERSION:
                raise UnsafeInputError(
                    f"read the routing trace {path}", found=f"version {version}", do=f"write it as {VERSION}"
                )
            layers, experts = tuple(map(str, file["layers"])), tuple(map(int, file["experts"]))
            optional = {name: _unpacked(name, file) for name in OPTIONAL}
            return RoutingTrace(file["sigmas"], layers, experts, file["load"], **optional)
    except (OSError, ValueError, KeyError, EOFError, TypeError, IndexError, zipfile.BadZipFile) as error:
        raise UnsafeInputError(
            f"read the routing trace {path}", found=f"{type(error).__name__}: {error}", do="collect it again"
        ) from error


def _packed(name: str, counts: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    flat = counts.reshape(-1)
    places = np.flatnonzero(flat)
    shape = np.array(counts.shape, dtype=np.int64)
    return {f"{name}_shape": shape, f"{name}_places": places, f"{name}_values": flat[places]}


def _unpacked(name: str, file: Mapping[str, NDArray[Any]]) -> NDArray[np.float64] | None:
    if name in file:
        return file[name]
    if f"{name}_shape" not in file:
        return None
    shape = tuple(int(n) for n in file[f"{name}_shape"])
    if int(np.prod(shape)) > _LARGEST_TABLE:
        raise ValueError(f"{name} of shape {shape}")
    flat = np.zeros(int(np.prod(shape)))
    flat[file[f"{name}_places"]] = file[f"{name}_values"]
    return flat.reshape(shape)
