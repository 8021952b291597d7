"""What a compiled kernel needs and does, read from its machine code: registers, spills, instructions."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from moefx.codegen.reasons import CannotLower

#: Instructions that tell how a kernel multiplies, copies, divides roles and spills, by the start of their name.
CUDA_INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "USETMAXREG", "LDL", "STL")
HIP_INSTRUCTIONS = ("v_mfma", "scratch_load", "scratch_store")
#: Those of them that multiply matrices.
MATRIX_PREFIXES = ("HGMMA", "HMMA", "UTCHMMA", "v_mfma")


@dataclass(frozen=True)
class MachineCode:
    """Registers of a thread, bytes that do not fit in them, and how often the instructions of interest occur."""

    registers: int
    spill_bytes: int
    counts: dict[str, int]


def read_cubin(binary: Path) -> MachineCode:
    """Read a CUDA binary with the disassembler that Triton brings with it."""

    def dump(option: str) -> str:
        command = [_tool("cuobjdump"), option, str(binary)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump("-res-usage"))}
    pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)"
    names = Counter(re.findall(pattern, dump("-sass"), re.MULTILINE))
    counts = {wanted: names[wanted] for wanted in CUDA_INSTRUCTIONS}
    return MachineCode(usage["REG"], usage.get("STACK", 0) + usage.get("LOCAL", 0), counts)


def read_gcn(text: str) -> MachineCode:
    """Read AMD assembly."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    counts = {wanted: len(re.findall(rf"^\s+{wanted}", text, re.MULTILINE)) for wanted in HIP_INSTRUCTIONS}
    return MachineCode(number("vgpr_count"), 4 * number("vgpr_spill_count"), counts)


def _tool(name: str) -> str:
    """Return a CUDA tool shipped in the Triton wheel."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        raise CannotLower(f"run {name}", found="Triton is not installed", do="pip install 'moefx[gpu]'")
    return str(Path(found.origin).parent / "backends" / "nvidia" / "bin" / name)
