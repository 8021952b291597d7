"""Where the experts lie that are not on the device: page-locked host memory, or memory-mapped safetensors files.

Legend: L routed layers, E experts of a layer.
"""

from __future__ import annotations

import json
import mmap
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moefx.errors import InputError

Weights = dict[str, Tensor]
_HEADER_bytes = 8


class Store:
    """Stacked tensors ``[E, ...]`` of each layer, of which single experts are copied out."""

    layers: list[Weights]

    def read(self, layer: int, expert: int, into: Mapping[str, Tensor]) -> int:
        """Copy tensors of one expert into those of the same names, on any device, and return the number of bytes."""
        total = 0
        for name, target in into.items():
            target.copy_(self.layers[layer][name][expert], non_blocking=True)
            total += target.nbytes
        return total


class HostStore(Store):
    """Host memory, page-locked where the device is an accelerator: only then do copies overlap with computing."""

    def __init__(self, layers: Sequence[Mapping[str, Tensor]], device: torch.device) -> None:
        lock = device.type != "cpu"
        self.layers = [
            {name: t.detach().cpu().pin_memory() if lock else t.detach().cpu() for name, t in tensors.items()}
            for tensors in layers
        ]


class FileStore(Store):
    """One safetensors file per layer in a folder of its own, mapped into memory; the folder goes with the store.

    Pages are dropped from the process as soon as they were copied, so that only the operating system's cache, which it
    gives up on demand, holds more than was asked for.
    """

    def __init__(self, layers: Sequence[Mapping[str, Tensor]], folder: Path | None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="moefx-offload-", dir=folder))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._maps: list[mmap.mmap] = []
        self._starts: list[dict[str, int]] = []
        self.layers = []
        for i, tensors in enumerate(layers):
            self._add(self._folder / f"layer-{i:05}.safetensors", tensors)

    def _add(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        _write(path, tensors)
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # writable for torch, private to us
        starts = _starts(mapped)
        everything = torch.frombuffer(mapped, dtype=torch.uint8)
        self._maps.append(mapped)
        self._starts.append(starts)
        self.layers.append(
            {
                name: everything[starts[name] : starts[name] + t.nbytes].view(t.dtype).view(t.shape)
                for name, t in tensors.items()
            }
        )

    def read(self, layer: int, expert: int, into: Mapping[str, Tensor]) -> int:
        """Copy one expert and let its pages go."""
        total = super().read(layer, expert, into)
        for name, target in into.items():
            begin = self._starts[layer][name] + expert * target.nbytes
            first = begin // mmap.PAGESIZE * mmap.PAGESIZE
            if hasattr(mmap, "MADV_DONTNEED"):
                self._maps[layer].madvise(mmap.MADV_DONTNEED, first, begin + target.nbytes - first)
        return total


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"write experts to {path.parent}", found=str(error), do="pass folder= on a disk with enough room"
        ) from error


def _starts(mapped: mmap.mmap) -> dict[str, int]:
    """Return the first byte of each tensor: a safetensors file is a length, a JSON header and the tensors' bytes."""
    length = int.from_bytes(mapped[:_HEADER_bytes], "little")
    header = json.loads(mapped[_HEADER_bytes : _HEADER_bytes + length])
    base = _HEADER_bytes + length
    return {name: base + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
