"""Compile one emitted kernel for a named target; run as a script in a process of its own.

A failing compilation prints whole modules to the error stream and LLVM may abort, so this never runs inside the
caller's process.  It imports Triton alone.  Usage: ``python _aot_child.py JOB.json``; the job names the files.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Compile the job's kernel, write its binary and return its metadata."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    loader = importlib.util.spec_from_file_location("emitted", job["source"])
    if loader is None or loader.loader is None:
        raise ImportError(job["source"])
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    function = getattr(module, job["function"])
    index = {name: i for i, name in enumerate(function.arg_names)}
    source = ASTSource(
        function,
        job["signature"],
        constexprs={(index[name],): value for name, value in job["constants"].items()},
        attrs={(index[name],): [["tt.divisibility", 16]] for name in job["divisible_by_16"]},
    )
    compiled = compile(source, target=GPUTarget(*job["target"]), options=job["options"])
    kind = "cubin" if job["target"][0] == "cuda" else "amdgcn"
    binary = compiled.asm[kind]
    Path(job["binary"]).write_bytes(binary if isinstance(binary, bytes) else binary.encode())
    metadata = compiled.metadata
    return {"shared_bytes": metadata.shared, "warps": metadata.num_warps, "name": metadata.name}


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["result"]).write_text(json.dumps(compile_job(job)))
