"""The calibration of a whole model: statistics by layer, and how tokens are grouped."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moefx.errors import InputError, nearest
from moefx.passes.calibration.layer import LayerStatistics, Sample
from moefx.passes.calibration.parts import PartStatistics


@dataclass
class Calibration:
    """Statistics of every feed-forward network of a model, and of the heads and tokens that a budget may leave out.

    A token's group is ``(branch · modalities + modality) · buckets + bucket``; buckets cut the range of timesteps into
    equal parts, and a layer has more than one modality where text and image tokens go through it together.

    Attributes:
        model: class name of the calibrated model.
        buckets: number of timestep buckets.
        span: lowest and highest timestep.
        branches: names of the branches of guidance, such as conditional and unconditional.
        layers: statistics by site name.
        skipped: networks without statistics, and why.
        parts: what heads of attentions and tokens of blocks contribute, by site name, over all modalities.
    """

    model: str
    buckets: int
    span: tuple[float, float]
    branches: tuple[str, ...]
    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    parts: dict[str, PartStatistics] = field(default_factory=dict)

    @property
    def edges(self) -> list[float]:
        """The inner edges of the buckets."""
        low, high = self.span
        return [low + (high - low) * i / self.buckets for i in range(1, self.buckets)]

    def bucket(self, timestep: Tensor) -> Tensor:
        """Return the bucket of each timestep; beyond the span, the nearest."""
        edges = torch.tensor(self.edges, dtype=torch.float64, device=timestep.device)
        return torch.bucketize(timestep.to(torch.float64), edges, right=True)

    def layer(self, name: str) -> LayerStatistics:
        """Return the statistics of a site.

        Raises:
            InputError: there are none.
        """
        if name in self.layers:
            return self.layers[name]
        why = self.skipped.get(name)
        raise InputError(
            f"use the calibration of {name}",
            found=why or "no statistics of that site",
            do="leave it dense with skip=" if why else nearest(name, self.layers),
        )

    def part(self, name: str) -> PartStatistics:
        """Return the statistics of the heads or the tokens of a site.

        Raises:
            InputError: there are none.
        """
        if name in self.parts:
            return self.parts[name]
        raise InputError(
            f"use the calibration of {name}",
            found="no statistics of its heads or tokens",
            do="calibrate again, or leave it dense with skip=",
        )

    def merged(self, other: Calibration) -> Calibration:
        """Return the calibration of both parts' data.

        Raises:
            InputError: they group tokens differently, or are of different models.
        """
        mine, theirs = (
            (c.model, c.buckets, c.span, c.branches, sorted(c.layers), sorted(c.parts)) for c in (self, other)
        )
        if mine != theirs:
            raise InputError(
                "merge two calibrations",
                found="another model, other timestep buckets or other branches",
                do="calibrate both with the same model, buckets, timesteps and branches",
            )
        layers = {name: layer.merged(other.layers[name]) for name, layer in self.layers.items()}
        parts = {name: part.merged(other.parts[name]) for name, part in self.parts.items()}
        return replace(self, layers=layers, parts=parts)

    def gathered(self, group: dist.ProcessGroup | None = None) -> Calibration:
        """Return the calibration of the data of all processes, the same on each; itself where there is one process."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        parts: list[Calibration | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, self, group=group)
        total = parts[0]
        assert total is not None
        for part in parts[1:]:
            assert part is not None
            total = total.merged(part)
        return total

    def without_tokens(self) -> Calibration:
        """Return the statistics alone: small, and without the user's data."""
        layers = {name: replace(layer, sample=Sample.empty(layer.sizes[0])) for name, layer in self.layers.items()}
        return replace(self, layers=layers)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; see `moefx.passes.calibration.file`."""
        from moefx.passes.calibration.file import write

        write(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises:
            UnsafeInputError: it is damaged, something else, or of a newer version.
        """
        from moefx.passes.calibration.file import read

        return read(path)

    def __repr__(self) -> str:
        tokens = max((layer.count for layer in self.layers.values()), default=0)
        return (
            f"<moefx.Calibration of {self.model}: {len(self.layers)} layers, {self.buckets} timestep buckets, "
            f"branches {', '.join(self.branches)}, up to {tokens} tokens>"
        )
