"""Compile kernels ahead of time, without a device, and report what they need of one.

Registers, spills and instructions come from the disassembly: Triton's metadata knows only shared memory.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefx.codegen import _aot_child
from moefx.codegen.emit import emit, operand_names
from moefx.codegen.reasons import CannotLower
from moefx.codegen.schedule import Schedule, combine_columns
from moefx.codegen.spec import CombineSpec, KernelSpec, LinearSpec
from moefx.codegen.targets import Target

_TRITON_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
#: Instructions that tell how a kernel computes and copies, by the start of their SASS or GCN name.
_CUDA_INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "LDL", "STL")
_HIP_INSTRUCTIONS = ("v_mfma", "scratch_load", "scratch_store")
_TIMEOUT_S = 300


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

    def row(self) -> str:
        """Return one line of a resource table."""
        counts = " ".join(f"{name}:{count}" for name, count in self.instructions)
        sizes = (f"{self.registers:>4} reg", f"{self.spill_bytes:>5} B spilled", f"{self.shared_bytes:>7} B shared")
        return f"{self.target:<8} {' '.join(sizes)} {self.warps:>2} warps  {counts}  {self.kernel}"


def signature(spec: KernelSpec) -> dict[str, str]:
    """Return the Triton types of the kernel's arguments, in order."""
    item = "*" + _TRITON_TYPES[spec.dtype]
    if isinstance(spec, CombineSpec):
        return {"rows_ptr": item, "position_ptr": "*i64", "weights_ptr": "*fp32", "out_ptr": item}
    weights, biases = operand_names(spec)
    arguments = {"x_ptr": item} | {f"{name}_ptr": item for name in (*weights, *biases)}
    if spec.gather:
        arguments["order_ptr"] = "*i64"
    arguments |= {"map_ptr": "*i32", "out_ptr": item, "x_stride": "i32", "experts": "i32", "tiles": "i32"}
    return arguments | {"UPCAST": "constexpr"}


def _divisible(spec: KernelSpec) -> list[str]:
    """Return the arguments that Triton may assume to be multiples of 16, as its launcher finds for ordinary tensors."""
    names = [name for name, kind in signature(spec).items() if kind.startswith("*")]
    if isinstance(spec, LinearSpec) and spec.in_features % 16 == 0:
        names.append("x_stride")
    return names


def compile_for(spec: KernelSpec, schedule: Schedule | None, target: Target) -> Resources:
    """Compile the kernel of ``spec`` for ``target`` in a child process and return what it needs.

    Raises :class:`CannotLower` with the compiler's last lines if it fails.
    """
    if target.is_interpreter or importlib.util.find_spec("triton") is None:
        found = "the interpreter compiles nothing" if target.is_interpreter else "Triton is not installed"
        raise CannotLower(f"compile {spec.name} for {target.name}", found=found, do="pip install 'moefx[gpu]'")
    with tempfile.TemporaryDirectory(prefix="moefx-aot-") as folder:
        job = _job(spec, schedule, target, Path(folder))
        result = _run(job, Path(folder), f"compile {spec.name} for {target.name}")
        binary = Path(job["binary"])
        if target.backend == "cuda":
            registers, spills, counts = _read_cubin(binary)
        else:
            registers, spills, counts = _read_gcn(binary.read_text())
    instructions = tuple((name, count) for name, count in counts.items() if count)
    return Resources(spec.name, target.name, registers, spills, result["shared_bytes"], result["warps"], instructions)


def _job(spec: KernelSpec, schedule: Schedule | None, target: Target, folder: Path) -> dict[str, Any]:
    source = folder / "emitted.py"
    source.write_text(emit(spec, schedule))
    options: dict[str, int] = {"num_warps": combine_columns(spec)[1]} if isinstance(spec, CombineSpec) else {}
    if schedule is not None and isinstance(spec, LinearSpec):
        options = {"num_warps": schedule.num_warps, "num_stages": schedule.num_stages}
    return {
        "source": str(source),
        "function": "kernel",
        "signature": signature(spec),
        "constants": {"UPCAST": False} if isinstance(spec, LinearSpec) else {},
        "divisible_by_16": _divisible(spec),
        "target": [target.backend, target.arch, target.warp_size],
        "options": options,
        "binary": str(folder / "binary"),
        "result": str(folder / "result.json"),
    }


def _run(job: dict[str, Any], folder: Path, asked: str) -> dict[str, Any]:
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(Path(_aot_child.__file__)), str(path)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise CannotLower(asked, found=f"no result after {_TIMEOUT_S} s", do="take smaller tiles") from error
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise CannotLower(asked, found=f"exit status {done.returncode}: {tail}", do="take another schedule or target")
    result: dict[str, Any] = json.loads(Path(job["result"]).read_text())
    return result


def _tool(name: str) -> str:
    """Return a CUDA tool shipped in the Triton wheel."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        raise CannotLower(f"run {name}", found="Triton is not installed", do="pip install 'moefx[gpu]'")
    return str(Path(found.origin).parent / "backends" / "nvidia" / "bin" / name)


def _read_cubin(binary: Path) -> tuple[int, int, dict[str, int]]:
    def dump(option: str) -> str:
        return subprocess.run(
            [_tool("cuobjdump"), option, str(binary)], capture_output=True, text=True, check=True
        ).stdout

    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump("-res-usage"))}
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", dump("-sass"), re.MULTILINE)
    counts = {wanted: sum(name == wanted for name in names) for wanted in _CUDA_INSTRUCTIONS}
    return usage["REG"], usage.get("STACK", 0) + usage.get("LOCAL", 0), counts


def _read_gcn(text: str) -> tuple[int, int, dict[str, int]]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    counts = {wanted: len(re.findall(rf"^\s+{wanted}", text, re.MULTILINE)) for wanted in _HIP_INSTRUCTIONS}
    return number("vgpr_count"), 4 * number("vgpr_spill_count"), counts
