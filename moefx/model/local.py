"""One module of the model, captured by itself: with what inputs it is called, and its graph with children as leaves.

Both the plan of a fresh transform and the plan of a saved model work on such local graphs, so loading never needs the
whole model's example inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from moefx.errors import CaptureError, PlanError
from moefx.graph import Graph, ModuleCall, trace

JSON = dict[str, Any]


def encode(value: Any) -> Any:
    """Describe the inputs of a call as JSON: tensors by shape and dtype, everything else by value.

    Raises:
        PlanError: a value has no JSON form.
    """
    if isinstance(value, Node):
        return encode(value.meta["val"])
    if isinstance(value, torch.Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, torch.dtype):
        return {"torch.dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"torch.device": True}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": {str(key): encode(item) for key, item in value.items()}}
    raise PlanError(
        "write a plan", found=f"a call with an argument of type {type(value).__name__}", do="skip this site"
    )


def decode(value: Any, mode: FakeTensorMode, device: torch.device) -> Any:
    """Rebuild what :func:`encode` described, with fake tensors of ``mode`` on ``device``."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        with mode:
            return torch.empty(value["tensor"], dtype=_dtype(value["dtype"]), device=device)
    if "torch.dtype" in value:
        return _dtype(value["torch.dtype"])
    if "torch.device" in value:
        return device
    if "dict" in value:
        return {key: decode(item, mode, device) for key, item in value["dict"].items()}
    kind, items = ("list", value["list"]) if "list" in value else ("tuple", value["tuple"])
    decoded = [decode(item, mode, device) for item in items]
    return decoded if kind == "list" else tuple(decoded)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise PlanError("read the inputs of a plan", found=f"a dtype called {name!r}", do="plan the model again")
    return found


def call_inputs(call: ModuleCall) -> JSON:
    """Return the inputs of a module invocation as JSON."""
    return {"args": [encode(a) for a in call.args], "kwargs": {k: encode(v) for k, v in call.kwargs.items()}}


def local_graph(
    module: nn.Module, inputs: JSON, leaf: Literal["nn", "children"], expand: Collection[str] = ()
) -> Graph:
    """Capture ``module`` alone, called with ``inputs``; equal in train and in eval mode.

    With ``leaf="children"`` its children stay nodes, but for those in ``expand``.

    Raises:
        CaptureError: the module cannot be captured alone, or behaves otherwise in training.
    """
    graph = _capture(module, inputs, leaf, expand)
    if not graph.reads_mode:
        return graph
    was = module.training
    try:
        _set_mode(module, not was)
        other = _capture(module, inputs, leaf, expand)
    finally:
        _set_mode(module, was)
    difference = _difference(graph, other)
    if difference:
        raise CaptureError(
            f"capture {type(module).__name__} alone",
            found=f"its forward differs between train and eval mode: {difference}",
            do="skip this site, or move the dropout into an nn.Dropout module",
        )
    return graph


def empty_dicts(module: nn.Module, inputs: JSON, graph: Graph, expand: Collection[str] = ()) -> frozenset[str]:
    """Return the optional dict arguments for which ``None`` and ``{}`` give one graph: ``x or {}`` is a common idiom.

    Pipelines of diffusers pass an empty dict where a model called directly gets None.
    """
    assert graph.call_spec is not None
    bound = graph.call_spec.bind(*graph.call_spec.rebuild(graph.call_spec.examples))
    parameters = graph.call_spec.signature.parameters
    names = [n for n, p in parameters.items() if bound.get(n, 0) in (None, {}) and "dict" in str(p.annotation).lower()]
    if not names:
        return frozenset()
    args, kwargs = list(inputs["args"]), dict(inputs["kwargs"])
    for name in names:
        index = list(parameters).index(name)
        swapped: Any = {"dict": {}} if bound[name] is None else None
        if index < len(args):
            args[index] = swapped
        else:
            kwargs[name] = swapped
    try:
        alternative = _capture(module, {"args": args, "kwargs": kwargs}, "children", expand)
    except CaptureError:
        return frozenset()
    same = not _difference(graph, alternative) and len(graph.guards) == len(alternative.guards)
    return frozenset(names) if same else frozenset()


def output_flag(module: nn.Module, inputs: JSON, graph: Graph, expand: Collection[str] = ()) -> str:
    """Return the argument that asks for an output class, where without it the same values come as a tuple, else "".

    Pipelines of diffusers pass ``return_dict=False``; a model called directly returns an output class.
    """
    assert graph.call_spec is not None
    bound = graph.call_spec.bind(*graph.call_spec.rebuild(graph.call_spec.examples))
    index = list(bound).index("return_dict") if bound.get("return_dict") is True else -1
    if index < 0:
        return ""
    args, kwargs = list(inputs["args"]), dict(inputs["kwargs"])
    if index < len(args):
        args[index] = False
    else:
        kwargs["return_dict"] = False
    try:
        plain = _capture(module, {"args": args, "kwargs": kwargs}, "children", expand)
    except CaptureError:
        return ""
    is_tuple = plain.out_spec is not None and plain.out_spec.type is tuple
    return "return_dict" if is_tuple and not _difference(graph, plain) else ""


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first tensor, or the CPU."""
    first = next(itertools.chain(module.parameters(), module.buffers()), None)
    return first.device if first is not None else torch.device("cpu")


def checkpointed_children(module: nn.Module, inputs: JSON, expand: Collection[str] = ()) -> frozenset[str]:
    """Return the children that the forward calls through diffusers' gradient checkpointing once that is enabled.

    A capture takes the branch without it; a forward written anew has to take either.
    """
    if not hasattr(module, "gradient_checkpointing"):
        return frozenset()
    paths = {id(child): path for path, child in module.named_modules()}
    found: set[str] = set()

    def seen(function: Any, *args: Any) -> Any:
        found.add(paths.get(id(function), ""))
        return function(*args)

    state = module.__dict__
    before = dict(state)
    state |= {"gradient_checkpointing": True, "_gradient_checkpointing_func": seen}
    try:
        _capture(module, inputs, "children", expand)
    except CaptureError:
        return frozenset()
    finally:
        state.clear()
        state.update(before)
    return frozenset(found - {""})


def example_call(module: nn.Module, inputs: JSON, mode: FakeTensorMode) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the described inputs as fake tensors on the module's device."""
    device = device_of(module)
    args = tuple(decode(a, mode, device) for a in inputs["args"])
    return args, {k: decode(v, mode, device) for k, v in inputs["kwargs"].items()}


def _capture(module: nn.Module, inputs: JSON, leaf: Literal["nn", "children"], expand: Collection[str]) -> Graph:
    call = example_call(module, inputs, FakeTensorMode(allow_non_fake_inputs=True))
    with _buffers_on_meta(module):
        graph = trace(module, call, leaf=leaf, expand=expand)
        if not any(type(guard.expected) in (int, float) for guard in graph.guards):
            return graph
        # A forward that is written anew should serve other sizes, which int() of one hides from the graph.
        other = trace(module, call, leaf=leaf, expand=expand, symbolic_int=True)
        return other if len(other.guards) < len(graph.guards) else graph


@contextmanager
def _buffers_on_meta(module: nn.Module) -> Iterator[None]:
    """Let a module on meta have its buffers there too: those that are not saved are real while a model is loaded."""
    real: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    if any(parameter.is_meta for parameter in module.parameters()):
        for owner in module.modules():
            found = [(n, b) for n, b in owner._buffers.items() if b is not None and not b.is_meta]
            real += [(owner._buffers, name, buffer) for name, buffer in found]
    for buffers, name, buffer in real:
        buffers[name] = buffer.to("meta")
    try:
        yield
    finally:
        for buffers, name, buffer in real:
            buffers[name] = buffer


def _set_mode(module: nn.Module, training: bool) -> None:
    # Only the root's own flag: its children are leaves and keep their modes.
    module.training = training


def _difference(one: Graph, two: Graph) -> str:
    for a, b in zip(one.fx.nodes, two.fx.nodes, strict=False):
        if _spelling(a) != _spelling(b):
            return f"{a.format_node()} against {b.format_node()}"
    return "" if len(one.fx.nodes) == len(two.fx.nodes) else "another number of operations"


def _spelling(node: Node) -> tuple[str, str, str, str]:
    return node.op, str(node.target), str(node.args), str(node.kwargs)
