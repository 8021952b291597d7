"""Compile kernels ahead of time, without a device, and report what they need of one.

What is compiled is what the emitted module's own ``launch`` starts, for stand-in tensors.  Registers, spills and
instructions come from the disassembly: Triton's metadata knows only shared memory.  Results are kept on disk.

Shapes: T tokens, k slots, R = T * k routed rows, E experts, K input and N output columns, D model width.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefx.codegen import _aot_child, store
from moefx.codegen.disassembly import read_cubin, read_gcn
from moefx.codegen.emit import emit, emit_tile_map, operand_names
from moefx.codegen.reasons import CannotLower
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import CombineSpec, Kernel, KernelSpec, LinearSpec, digest
from moefx.codegen.targets import Target

_TRITON_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_STAND_INS = {**_TRITON_TYPES, "int64": "i64", "int32": "i32"}
_TIMEOUT_S = 300
#: What emitted modules call the kernel that does the work.
_MAIN = "kernel"
# Sizes of the stand-ins that are no multiples of 16, so that the binary assumes nothing about loads.
_ROWS, _EXPERTS, _TILES = 4098, 7, 39

#: Matrix instructions that a kernel of 16-bit inputs is to show on each target.
MATRIX_INSTRUCTIONS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs of a device."""

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    #: (instruction, count) of matrix, asynchronous-copy and spill instructions; absent ones are left out.
    instructions: tuple[tuple[str, int], ...]

    def count(self, instruction: str) -> int:
        """Return how often an instruction occurs in the kernel's code."""
        return dict(self.instructions).get(instruction, 0)

    @property
    def is_specialised(self) -> bool:
        """Whether warps have roles of their own: registers move from the loading warps to the multiplying ones."""
        return self.count("USETMAXREG") > 0

    def row(self) -> str:
        """Return one line of a resource table."""
        counts = " ".join(f"{name}:{count}" for name, count in self.instructions)
        sizes = (f"{self.registers:>4} reg", f"{self.spill_bytes:>5} B spilled", f"{self.shared_bytes:>7} B shared")
        return f"{self.target:<8} {' '.join(sizes)} {self.warps:>2} warps  {counts}  {self.kernel}"


@dataclass(frozen=True)
class Compiled:
    """The kernels of one emitted module, the main one last, and the folder of their binaries."""

    source: str
    kernels: tuple[Resources, ...]
    folder: Path

    @property
    def main(self) -> Resources:
        """The kernel that does the work; the others prepare its operands, or add its results."""
        return self.kernels[-1]

    def problems(self, target: Target) -> list[str]:
        """Return what would make the kernels slow or unable to run on ``target``."""
        found = []
        for one in self.kernels:
            if one.spill_bytes:
                found.append(f"{one.kernel} spills {one.spill_bytes} B of registers on {target.name}")
            if one.shared_bytes > target.shared_limit_bytes:
                found.append(
                    f"{one.kernel} needs {one.shared_bytes} B of shared memory, "
                    f"{target.name} allows {target.shared_limit_bytes}"
                )
        return found


class NotInTime(CannotLower):
    """A compilation that was stopped."""


@dataclass(frozen=True)
class Job:
    """An emitted module to compile, and what its ``launch`` takes."""

    name: str
    source: str
    arguments: tuple[Any, ...]
    target: Target


def job(spec: KernelSpec, schedule: Schedule | None, target: Target) -> Job:
    """Return the job of a spec's kernel."""
    given = arguments(spec, schedule.partials(spec.halves) if isinstance(spec, LinearSpec) and schedule else 0)
    return Job(spec.name, emit(spec, schedule), tuple(given), target)


def launch_job(spec: KernelSpec, schedule: Schedule | None, given: Sequence[Any], target: Target) -> Job:
    """Return the job of exactly one launch: what the compiler assumes of sizes and addresses is what they are."""
    described = [
        [_STAND_INS[str(value.dtype).removeprefix("torch.")], list(value.shape)] if hasattr(value, "dtype") else value
        for value in given
    ]
    return Job(spec.name, emit(spec, schedule), tuple(described), target)


def tile_map_job(target: Target, block_m: int) -> Job:
    """Return the job of the kernel that every region starts with."""
    given = (["i64", [_EXPERTS + 1]], ["i32", [3, _TILES]], _ROWS, block_m)
    return Job("tile_map", emit_tile_map(), given, target)


def arguments(spec: KernelSpec, partials: int = 0) -> list[Any]:
    """Return what ``launch`` of the spec's module takes: ``[Triton type, shape]`` of a tensor, or a number.

    ``partials`` is how many sums of each result of a grouped projection are stored before they are added.
    """
    if isinstance(spec, Kernel):
        return spec.arguments(_ROWS, _EXPERTS, _TILES)
    item = _TRITON_TYPES[spec.dtype]
    if isinstance(spec, CombineSpec):
        tokens, slots = _ROWS, spec.top_k
        flat = tokens * slots
        shapes: list[Any] = [[item, [flat, spec.features]], ["i64", [flat]], ["i64", [flat]]]
        shapes += [["fp32", [tokens, slots]]] if spec.weighted else []
        leading = {"row": [tokens], "sample": [2], "column": []}
        shapes += [[item, [*leading[kind], spec.features]] for kind in spec.operands]
        return [*shapes, *[[item, [tokens, spec.features]]] * (1 + spec.keep)]
    rows = _ROWS * (spec.top_k if spec.gather else 1)
    weights, biases = operand_names(spec)
    found: list[Any] = [[item, [_ROWS, spec.in_features]]]
    found += [[item, [_EXPERTS, spec.weight_rows, spec.in_features]] for _ in weights]
    found += [[item, [_EXPERTS, spec.weight_rows]] for _ in biases]
    found += [["i64", [rows]]] if spec.gather else []
    kept = [[item, [rows, spec.out_features * spec.halves]]] if spec.keep else []
    scratch = [["fp32", [partials, rows, spec.out_features]]] if partials else []
    return [*found, ["i32", [3, _TILES]], *scratch, [item, [rows, spec.out_features]], *kept, False]


def compile_for(spec: KernelSpec, schedule: Schedule | None, target: Target) -> Resources:
    """Compile the kernel of ``spec`` for ``target`` in a child process and return what its main kernel needs.

    Raises :class:`CannotLower` with the compiler's last lines if it fails.
    """
    return compile_module(job(spec, schedule, target)).main


def compile_all(
    jobs: Sequence[Job], workers: int | None = None, done: Callable[[], Any] = lambda: None
) -> list[Compiled | CannotLower]:
    """Compile many kernels, several at a time; a failure stands in the place of its result."""

    def one(job: Job) -> Compiled | CannotLower:
        try:
            return compile_module(job)
        except CannotLower as error:
            return error
        finally:
            done()

    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, jobs))


def compile_within(jobs: Sequence[Job], seconds: float, workers: int | None = None) -> list[Compiled | CannotLower]:
    """Compile as :func:`compile_all` does, for at most so long: what is not done by then is stopped."""
    deadline = time.monotonic() + seconds

    def one(job: Job) -> Compiled | CannotLower:
        try:
            return compile_module(job, deadline - time.monotonic())
        except CannotLower as error:
            return error

    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, jobs))


def compile_module(job: Job, seconds: float = _TIMEOUT_S) -> Compiled:
    """Compile one module, or take the result of an earlier compilation of the same text for the same target.

    Raises :class:`NotInTime` if that takes longer than so many seconds, another :class:`CannotLower` if it fails.
    """
    asked = f"compile {job.name} for {job.target.name}"
    if job.target.is_interpreter or importlib.util.find_spec("triton") is None:
        found = "the interpreter compiles nothing" if job.target.is_interpreter else "Triton is not installed"
        raise CannotLower(asked, found=found, do="pip install 'moefx[gpu]'")
    key = digest(repr((job.source, job.arguments, job.target.name, _versions())))[:32]
    folder = store.cache_folder() / "aot" / key
    kept = _kept(folder, job.source)
    return kept if kept is not None else _compile(job, folder, asked, seconds)


def _versions() -> str:
    return f"triton {importlib.metadata.version('triton')}, format 1"


def _kept(folder: Path, source: str) -> Compiled | None:
    """Return an earlier result; whatever is damaged is compiled again."""
    try:
        rows = json.loads((folder / "resources.json").read_text())
        kernels = tuple(Resources(**row | {"instructions": tuple(map(tuple, row["instructions"]))}) for row in rows)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return Compiled(source, kernels, folder) if kernels else None


def _compile(job: Job, folder: Path, asked: str, seconds: float) -> Compiled:
    shutil.rmtree(folder, ignore_errors=True)  # what could not be read
    work = _work_folder(folder.parent)
    try:
        kernels = _resources(_run(job, work, asked, seconds), job, work)
        (work / "resources.json").write_text(json.dumps([dataclasses.asdict(one) for one in kernels]))
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return Compiled(job.source, kernels, _keep(work, folder))


def _work_folder(parent: Path) -> Path:
    """Return a new folder beside the results, to be renamed into place; a temporary one if none can be made there."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="work-", dir=parent))
    except OSError:
        return Path(tempfile.mkdtemp(prefix="moefx-aot-"))


def _keep(work: Path, folder: Path) -> Path:
    """Rename a finished compilation into the cache and return where it is; another process may have been faster."""
    try:
        os.rename(work, folder)
    except OSError:
        if not (folder / "resources.json").exists():
            return work
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _resources(kernels: list[dict[str, Any]], job: Job, folder: Path) -> tuple[Resources, ...]:
    found = []
    for one in sorted(kernels, key=lambda one: bool(one["function"] == _MAIN)):
        name = one["function"]
        if job.target.backend == "cuda":
            read = read_cubin(folder / f"{name}.cubin")
        else:
            read = read_gcn((folder / f"{name}.amdgcn").read_text())
        instructions = tuple((word, count) for word, count in read.counts.items() if count)
        label = job.name if name == _MAIN else f"{job.name}.{name}"
        sizes = (read.registers, read.spill_bytes, one["shared_bytes"], one["warps"])
        found.append(Resources(label, job.target.name, *sizes, instructions))
    return tuple(found)


def _run(job: Job, folder: Path, asked: str, seconds: float) -> list[dict[str, Any]]:
    """Compile in a child process and return its report."""
    if seconds <= 0:
        raise NotInTime(asked, found="no time left", do="raise MOEFX_AUTOTUNE_SECONDS")
    (folder / "emitted.py").write_text(job.source)
    order = {
        "source": str(folder / "emitted.py"),
        "arguments": job.arguments,
        "target": [job.target.backend, job.target.arch, job.target.warp_size],
        "folder": str(folder),
    }
    (folder / "job.json").write_text(json.dumps(order))
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(Path(_aot_child.__file__)), str(folder / "job.json")]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise NotInTime(asked, found=f"no result after {seconds:.0f} s", do="take smaller tiles") from error
    if done.returncode != 0:
        found = f"exit status {done.returncode}: {_last_words(done.stderr.replace(str(folder), ''))}"
        raise CannotLower(asked, found=found, do="take another schedule or target")
    (folder / "job.json").unlink()
    result: list[dict[str, Any]] = json.loads((folder / "kernels.json").read_text())
    return result


def _last_words(text: str) -> str:
    """Return the compiler's errors, and the end of what it printed."""
    lines = text.strip().splitlines()
    errors = [line[:300] for line in lines if "error:" in line][:3]
    return "\n".join([*errors, *(line[:300] for line in lines[-3:])])
