"""All kernels of a model's regions for a target, compiled without a device and written to a folder.

A configuration that does not compile, spills or does not fit is pruned, and the next one of the short list is taken.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moefx.codegen import aot, backward
from moefx.codegen.aot import Compiled, Job
from moefx.codegen.disassembly import MATRIX_PREFIXES
from moefx.codegen.reasons import CannotLower
from moefx.codegen.schedule import Schedule, load_class, row_tile, short_list
from moefx.codegen.spec import CombineSpec, Kernel, KernelSpec, LinearSpec, RegionSpec
from moefx.codegen.targets import Target

_SUFFIXES = (".cubin", ".hsaco")
#: Row tile of kernels outside of regions, where one is read.
_OTHER_ROWS = 128
#: A region, its rows and its experts.
Use = tuple[RegionSpec, int, int]


@dataclass(frozen=True)
class Built:
    """One kernel for one target: its source and binaries, or why there is none."""

    name: str
    target: Target
    schedule: Schedule | None = None
    compiled: Compiled | None = None
    #: Configurations that were left out, with the reason.
    pruned: tuple[tuple[str, str], ...] = field(default_factory=tuple)

    @property
    def problems(self) -> list[str]:
        """What is wrong with the kernel, if no configuration was without fault."""
        if self.compiled is None:
            return [f"{self.name} does not compile for {self.target.name}: {self.pruned[-1][1]}"]
        return self.compiled.problems(self.target)

    def row(self) -> dict[str, Any]:
        """Return one row of the resource table."""
        row: dict[str, Any] = {"kernel": self.name, "target": self.target.name}
        row["schedule"] = self.schedule.describe() if self.schedule else ""
        if self.compiled is not None:
            main = self.compiled.main
            matrix = {name: count for name, count in main.instructions if name in MATRIX_PREFIXES}
            row |= {"registers": main.registers, "spill_bytes": main.spill_bytes, "shared_bytes": main.shared_bytes}
            row |= {"warps": main.warps, "matrix": matrix, "divided_warps": main.is_specialised}
            row["instructions"] = dict(main.instructions)
        return row | {"problems": self.problems, "pruned": [list(one) for one in self.pruned]}


def build(
    regions: Iterable[Use],
    targets: Sequence[Target],
    training: bool = False,
    done: Callable[[], Any] = lambda: None,
    others: Sequence[Kernel] = (),
) -> list[Built]:
    """Compile the kernels of regions, and others, for every target, each once; ``done`` is called after each.

    With ``training`` the forward kernels keep what the backward pass reads, and those of the backward pass come with
    them.
    """
    work = _work(regions, targets, training, others)

    def run(task: _Task) -> Built:
        try:
            return task.build()
        finally:
            done()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(run, work.values()))


def count(
    regions: Iterable[Use], targets: Sequence[Target], training: bool = False, others: Sequence[Kernel] = ()
) -> int:
    """Return how many kernels :func:`build` will compile."""
    return len(_work(regions, targets, training, others))


def _work(
    regions: Iterable[Use], targets: Sequence[Target], training: bool, others: Sequence[Kernel]
) -> dict[tuple[Any, ...], _Task]:
    uses = list(regions)
    tasks = [task for device in targets for use in uses for task in _tasks(*use, device, training)]
    tasks += [_Task(spec, device, 1024, 1, _OTHER_ROWS) for device in targets for spec in others]
    return {task.key: task for task in tasks}


@dataclass(frozen=True)
class _Task:
    """A kernel to build; no spec stands for the tile map."""

    spec: KernelSpec | None
    target: Target
    load: int
    experts: int
    block_m: int

    @property
    def key(self) -> tuple[Any, ...]:
        name = self.spec.name if self.spec else "tile_map"
        return (name, self.target.name, self.load if self.spec else 0, self.block_m)

    def jobs(self) -> list[tuple[Schedule | None, Job]]:
        """Return what to compile, the preferred configuration first."""
        spec = self.spec
        if spec is None:
            return [(None, aot.tile_map_job(self.target, self.block_m))]
        found: Sequence[Schedule | None]
        if isinstance(spec, LinearSpec):
            found = short_list(spec, self.target, self.load, self.experts, self.block_m)
        elif isinstance(spec, CombineSpec):
            found = [None]
        else:
            found = spec.candidates(self.target, self.load, self.block_m)
        return [(schedule, aot.job(spec, schedule, self.target)) for schedule in found]

    def build(self) -> Built:
        pruned: list[tuple[str, str]] = []
        faulty: Built | None = None
        for schedule, job in self.jobs():
            text = schedule.describe() if schedule else "the only one"
            try:
                compiled = aot.compile_module(job)
            except CannotLower as error:
                pruned.append((text, error.found))
                continue
            problems = compiled.problems(self.target)
            if not problems:
                return Built(job.name, self.target, schedule, compiled, tuple(pruned))
            faulty = faulty or Built(job.name, self.target, schedule, compiled)
            pruned.append((text, "; ".join(problems)))
        return faulty or Built(self.spec.name if self.spec else "tile_map", self.target, pruned=tuple(pruned))


def _tasks(region: RegionSpec, rows: int, experts: int, target: Target, training: bool) -> list[_Task]:
    load = load_class(rows, experts)
    specs: list[KernelSpec | None] = [None, *region.kernels]
    if training:
        specs = [None, *backward.training_region(region).kernels, *backward.kernels(region)]
    return [_Task(spec, target, load, experts, row_tile(load)) for spec in specs]


def write(built: Sequence[Built], folder: Path) -> list[Path]:
    """Write sources and binaries under ``folder/TARGET/`` and the resource table; return the files."""
    files: list[Path] = []
    for one in built:
        if one.compiled is None:
            continue
        here = folder / one.target.name
        here.mkdir(parents=True, exist_ok=True)
        files.append(here / f"{one.name}.py")
        files[-1].write_text(one.compiled.source)
        for binary in sorted(p for p in one.compiled.folder.iterdir() if p.suffix in _SUFFIXES):
            files.append(here / f"{one.name}.{binary.name}")
            files[-1].write_bytes(binary.read_bytes())
    folder.mkdir(parents=True, exist_ok=True)
    files.append(folder / "resources.json")
    files[-1].write_text(json.dumps(document(built), indent=1) + "\n")
    return files


def document(built: Sequence[Built]) -> dict[str, Any]:
    """Return the resource table as data, with the schedules in full."""
    rows = [one.row() | {"tiles": dataclasses.asdict(one.schedule) if one.schedule else None} for one in built]
    return {"format": "moefx.kernels", "schema_version": 1, "kernels": rows}
