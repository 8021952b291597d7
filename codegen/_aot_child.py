"""Compile one emitted module for a named target; run as a script in a process of its own.

A failing compilation prints whole modules to the error stream and LLVM may abort, so this never runs inside the
caller's process.  What is compiled is what the module's own ``launch`` would start: it is called with stand-ins for
tensors, and every kernel that it starts is recorded instead of run.  Imports Triton alone.

Usage: ``python _aot_child.py JOB.json``; binaries and ``kernels.json`` go to the job's folder.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "i1": 1}
_BINARY = {"cuda": "cubin", "hip": "hsaco"}


@dataclass(frozen=True)
class _Dtype:
    name: str

    @property
    def itemsize(self) -> int:
        return _ITEM_BYTES[self.name]


class StandIn:
    """What ``launch`` may ask of a tensor: dtype, shape, strides, an aligned address, and more of the same."""

    def __init__(self, dtype: str, shape: list[int]) -> None:
        self.dtype, self.shape = _Dtype(dtype), tuple(shape)

    def stride(self, dim: int | None = None) -> Any:
        """Return contiguous strides."""
        strides = [1]
        for size in reversed(self.shape[1:]):
            strides.insert(0, strides[0] * size)
        return tuple(strides) if dim is None else strides[dim]

    def data_ptr(self) -> int:
        """Return an address as aligned as those of allocators."""
        return 512

    def numel(self) -> int:
        """Return the number of elements."""
        product = 1
        for size in self.shape:
            product *= size
        return product

    def new_empty(self, *shape: Any, dtype: Any = None) -> StandIn:
        """Return another stand-in."""
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return StandIn((dtype or self.dtype).name, list(sizes))


def launches(module: Any, arguments: list[Any]) -> list[tuple[Any, dict[str, Any], dict[str, int]]]:
    """Return the kernels that ``module.launch(*arguments)`` starts, with their arguments by name and their options."""
    from triton.runtime.jit import JITFunction

    found: list[tuple[Any, dict[str, Any], dict[str, int]]] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        del grid, warmup
        named = dict(zip(self.arg_names, args, strict=False))
        options = {key: kwargs.pop(key) for key in list(kwargs) if key not in self.arg_names}
        found.append((self, named | kwargs, options))

    before, JITFunction.run = JITFunction.run, record
    try:
        module.launch(*arguments)
    finally:
        JITFunction.run = before
    return found


def _describe(value: Any, constant: bool) -> tuple[str, list[list[Any]] | None]:
    """Return the Triton type of an argument and what is known of it: whether it is a multiple of 16, if that counts.

    Spelt as Triton spells it when it compiles at a launch, so that a launch finds in its cache what is compiled here.
    """
    divisible, nothing = [["tt.divisibility", 16]], list[list[Any]]()
    if constant:
        return "constexpr", nothing
    if isinstance(value, StandIn):
        return f"*{value.dtype.name}", divisible
    if isinstance(value, bool):
        return "u1", None
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64", nothing if value % 16 else divisible
    return "fp32", None


def compile_launch(function: Any, named: dict[str, Any], options: dict[str, int], target: list[Any]) -> Any:
    """Compile one recorded launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    constant = {param.name: param.is_constexpr or named[param.name] == 1 for param in function.params}
    kinds = {name: _describe(named[name], constant[name]) for name in function.arg_names}
    index = {name: i for i, name in enumerate(function.arg_names)}
    source = ASTSource(
        function,
        {name: kind for name, (kind, _) in kinds.items()},
        constexprs={(index[name],): named[name] for name in kinds if constant[name]},
        attrs={(index[name],): known for name, (_, known) in kinds.items() if known is not None},
    )
    return compile(source, target=GPUTarget(*target), options=options)


def run_job(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Compile every kernel of a module, write the binaries into the job's folder and return their metadata."""
    loader = importlib.util.spec_from_file_location("emitted", job["source"])
    if loader is None or loader.loader is None:
        raise ImportError(job["source"])
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    arguments = [StandIn(*value) if isinstance(value, list) else value for value in job["arguments"]]
    results = []
    for function, named, options in launches(module, arguments):
        compiled = compile_launch(function, named, options, job["target"])
        name, kind = function.__name__, _BINARY[job["target"][0]]
        folder = Path(job["folder"])
        (folder / f"{name}.{kind}").write_bytes(compiled.asm[kind])
        if kind == "hsaco":
            (folder / f"{name}.amdgcn").write_text(compiled.asm["amdgcn"])
        metadata = compiled.metadata
        results.append({"function": name, "shared_bytes": metadata.shared, "warps": metadata.num_warps})
    return results


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    (Path(given["folder"]) / "kernels.json").write_text(json.dumps(run_job(given)))
