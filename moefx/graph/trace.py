"""``moefx.trace``: one captured graph of a model, shared parameters, guards listed and enforced."""

from __future__ import annotations

import contextlib
import random
import traceback
from collections.abc import Collection, Iterator
from typing import Any, Literal

import numpy
import torch
from torch import nn
from torch.utils import _pytree as pytree

from moefx.errors import CaptureError, InputError, MoefxError
from moefx.graph.graph import Graph
from moefx.graph.origin import HIDDEN, Origin, short_path, show_source
from moefx.graph.outputs import take_apart
from moefx.graph.patches import Snapshot, patched, undisturbed
from moefx.graph.signature import STATIC, CallSpec, Inputs, normalise_inputs
from moefx.graph.tracer import GuidedTracer, NeedsData


def trace(
    model: nn.Module,
    inputs: Inputs = None,
    *,
    leaf: Literal["nn", "torch", "children"] = "nn",
    expand: Collection[str] = (),
    symbolic_int: bool = False,
) -> Graph:
    """Capture ``model`` on one example as a graph.

    Args:
        model: any module, on any device; on ``meta`` no weight is ever materialised.
        inputs: a dict of keyword arguments, a tuple of positional ones, or ``(tuple, dict)``; ``None`` synthesises them
            for models with a known input maker (every diffusers denoiser).
        leaf: which modules stay nodes: those of ``torch.nn`` and of moefx, those of ``torch.nn`` alone (``"torch"``:
            routed modules show their operators), or all below ``model`` but the paths in ``expand``.
        expand: see ``leaf``.
        symbolic_int: let ``int(size ** 0.5)`` and its like in the model's own files stay in the graph, where it would
            otherwise be a guard. For code in which no type is compared with ``int`` by identity.

    Raises:
        InputError: ``model`` is not a module, or the inputs do not fit it.
        CaptureError: the model cannot be traced faithfully; the message shows its own source line.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            "trace a model", found=f"an object of type {type(model).__name__}", do="pass a torch.nn.Module"
        )
    with undisturbed():
        args, kwargs = normalise_inputs(model, _example(model) if inputs is None else inputs)
        args, kwargs = _on_model_device(model, args, kwargs)
        spec = CallSpec(model, args, kwargs)
        _check_devices(model, spec)
        return _trace_as_needed(model, spec, leaf, expand, symbolic_int)


def _trace_as_needed(model: nn.Module, spec: CallSpec, leaf: str, expand: Collection[str], symbolic_int: bool) -> Graph:
    """Trace on values without data; where forward reads data, run the example."""
    try:
        return _trace(model, spec, leaf, expand, symbolic_int, real=False)
    except NeedsData as reason:
        fake = any(isinstance(t, torch._subclasses.FakeTensor) for t in spec.examples)
        if fake or any(t.is_meta for t in [*model.parameters(), *model.buffers()]):
            raise CaptureError(
                f"trace {type(model).__name__} without its weights",
                found=str(reason),
                do="the graph depends on data, so trace it with real weights and inputs",
            ) from None
    try:
        with torch.random.fork_rng(devices=[]):
            return _trace(model, spec, leaf, expand, symbolic_int, real=True)
    except NeedsData as reason:
        raise CaptureError(
            f"trace {type(model).__name__}", found=str(reason), do="keep the data-dependent part out of forward"
        ) from None


def _example(model: nn.Module) -> Inputs:
    from moefx.graph.inputs import synthesise

    return synthesise(model)


def _trace(
    model: nn.Module, spec: CallSpec, leaf: str, expand: Collection[str], symbolic_int: bool, *, real: bool
) -> Graph:
    modes = [t.fake_mode for t in spec.examples if isinstance(t, torch._subclasses.FakeTensor)]
    tracer = GuidedTracer(model, leaf, real, modes[0] if modes else None, expand)
    tracer.symbolic_int = symbolic_int
    snapshot = Snapshot(model)
    try:
        with _random_state_kept(model, torch_too=not real):
            out_spec = _record(tracer, model, spec)
    except (MoefxError, NeedsData) as error:
        traceback.clear_frames(error.__traceback__)
        raise
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        raise _capture_error(model, error) from error
    finally:
        changed, written = snapshot.restore()
        kept = tracer.close()
    notes = [f"forward writes module attributes: {', '.join(sorted(set(changed)))}"] if changed else []
    notes += [f"forward keeps traced values in: {', '.join(kept)}"] if kept else []
    guards = [tracer.guards[n] for n in tracer.graph.nodes if n in tracer.guards]
    graph = Graph(
        model,
        tracer.graph,
        call_spec=spec,
        out_spec=out_spec,
        guards=guards,
        calls=tracer.calls,
        constants=tracer.constants,
        notes=notes,
        written=written,
        reads_mode=tracer.reads_mode,
    )
    graph.prune()
    graph.fx.lint()
    return graph


@contextlib.contextmanager
def _random_state_kept(model: nn.Module, torch_too: bool) -> Iterator[None]:
    """Refuse a forward that draws random numbers outside the graph, and put the generators back."""
    before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    yield
    python = random.getstate() != before[0]
    array = any(not numpy.array_equal(a, b) for a, b in zip(numpy.random.get_state(), before[1], strict=True))
    tensor = torch_too and not torch.equal(torch.get_rng_state(), before[2])
    if python or array or tensor:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
        torch.set_rng_state(before[2])
        source = "Python's random" if python else "numpy.random" if array else "torch's seed"
        raise CaptureError(
            f"trace {type(model).__name__}",
            found=f"its forward changes the state of {source}, which a graph would leave out",
            do="draw with torch functions such as torch.rand",
        )


def _record(tracer: GuidedTracer, model: nn.Module, spec: CallSpec) -> pytree.TreeSpec:
    """Run the model's forward on proxies and return the structure of its output."""
    with torch.enable_grad():
        proxies = [
            _placeholder(tracer, s.name, example) for s, example in zip(spec.tensors, spec.examples, strict=True)
        ]
        args, kwargs = spec.rebuild(proxies)
        with patched(tracer):
            output = model.forward(*args, **kwargs)
        leaves, out_spec = take_apart(output)
        for leaf in leaves:
            if not isinstance(leaf, (torch.Tensor, *STATIC)):
                raise CaptureError(
                    f"trace {type(model).__name__}",
                    found=f"its forward returns a {type(leaf).__name__}, which a graph cannot build",
                    do="return tensors, numbers, None, or tuples, lists, dicts and dataclasses of them",
                )
        tracer.graph.output([tracer.arg(leaf) for leaf in leaves])
    return out_spec


def _placeholder(tracer: GuidedTracer, name: str, example: torch.Tensor) -> Any:
    node = tracer.graph.placeholder(name)
    node.meta["moefx"] = Origin("")
    value = example.detach().clone() if tracer.real else tracer.example(example.detach())
    return tracer.wrap(node, value)


def _on_model_device(model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A model on ``meta`` is traced with inputs on ``meta``."""
    if not any(p.is_meta for p in model.parameters()):
        return args, kwargs

    def to_meta(leaf: Any) -> Any:
        return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(to_meta, args), pytree.tree_map(to_meta, kwargs)


def _check_devices(model: nn.Module, spec: CallSpec) -> None:
    devices = {p.device.type for p in model.parameters()}
    for tensor in spec.tensors:
        if devices and tensor.device.type not in devices:
            raise InputError(
                f"use example inputs for {type(model).__name__}",
                found=f"{tensor.name} is on {tensor.device}, the model on {', '.join(sorted(devices))}",
                do="move the inputs to the model's device",
            )


def _capture_error(model: nn.Module, error: Exception) -> MoefxError:
    """Explain an exception that the model raised during the trace, at the user's own line."""
    return CaptureError(
        f"trace {type(model).__name__}",
        found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} at {where(error)}",
        do="check that the model runs on these inputs; what a graph cannot hold must stay out of forward",
    )


def where(error: BaseException) -> str:
    """Return the user's own line at which ``error`` was raised, with its text."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(HIDDEN) and not f.filename.startswith("<")]
    return show_source(f"{short_path(own[-1].filename)}:{own[-1].lineno}") if own else "its forward"
