"""A ``torch.export`` program as a Graph: the oracle that our own traces are compared with."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node

from moefx.graph.graph import Graph
from moefx.graph.origin import ModuleCall, Origin, short_path


def from_export(program: ExportedProgram, root: nn.Module) -> Graph:
    """Read an exported program: ATen spelling, parameters as placeholders named in ``meta["moefx_param"]``.

    Args:
        program: what ``torch.export.export(root, ..., strict=False)`` returned.
        root: the module it came from, for the parameters.
    """
    signature = program.graph_signature
    lifted = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    inside: dict[tuple[str, int], list[Node]] = {}
    types: dict[tuple[str, int], str] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in lifted:
            node.meta["moefx_param"] = lifted[node.name]
        stack = [_invocation(key, *entry) for key, entry in (node.meta.get("nn_module_stack") or {}).items()]
        path, index, _ = stack[-1] if stack else ("", 0, "")
        node.meta["moefx"] = Origin(path, index, _source(node))
        for path, index, kind in stack:
            inside.setdefault((path, index), []).append(node)
            types[path, index] = kind
    calls = [
        ModuleCall(path, index, types[path, index], (), {}, None, tuple(nodes))
        for (path, index), nodes in inside.items()
        if path
    ]
    return Graph(root, program.graph, calls=calls, constants=dict(program.tensor_constants))


def _invocation(key: str, path: str, kind: Any) -> tuple[str, int, str]:
    name, (_, _, index) = path.partition("@")[0], key.partition("@")
    name = name.removeprefix("L['self']").removeprefix(".")
    return name, int(index) if index.isdigit() else 0, str(kind).rpartition(".")[2].removesuffix("'>")


def _source(node: Node) -> str:
    trace = str(node.meta.get("stack_trace", ""))
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    if not lines:
        return ""
    name, _, rest = lines[-1].removeprefix('File "').partition('", line ')
    return f"{short_path(name)}:{rest.partition(',')[0]}"
