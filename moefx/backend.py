"""``torch.compile(model, backend="moefx")``: routed regions become emitted kernels, the rest goes to Inductor.

Registered through the ``torch_dynamo_backends`` entry point, so it needs no import.  Parameters are inputs of the graph
here and are never changed.  Options: ``kernels`` and ``inner``, see :class:`BackendOptions`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch._logging._internal import trace_structured

from moefx.codegen import attention, backward, choice, launcher, routing, runtime, tokens
from moefx.codegen.lower import Found, Refusal, describe, lowerings, replace
from moefx.codegen.router_lowering import GroupLowering, RouterLowering
from moefx.codegen.runtime import interpreting, triton_installed
from moefx.errors import OptionError, nearest

logger = logging.getLogger(__name__)

_CHOICES = {"kernels": ("auto", "triton", "cpu", "off"), "inner": ("inductor", "aot_eager", "eager")}


@dataclass(frozen=True)
class BackendOptions:
    """What ``options=`` of ``torch.compile`` may say.

    ``kernels``: ``auto`` emits Triton kernels for CUDA tensors and keeps the dialect ops on CPU; ``triton`` insists on
    emitted kernels (on CPU they run in Triton's interpreter, if it is on); ``cpu`` keeps the dialect ops everywhere;
    ``off`` does not look for regions.  ``inner``: who compiles the rest.
    """

    kernels: str = "auto"
    inner: str = "inductor"

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> BackendOptions:
        """Check the options of a call; unknown names and values are refused with the nearest known one."""
        for name, value in (options or {}).items():
            if name not in _CHOICES:
                raise OptionError(
                    'torch.compile(backend="moefx", options=...)', found=f"option {name!r}", do=nearest(name, _CHOICES)
                )
            if value not in _CHOICES[name]:
                raise OptionError(
                    f'torch.compile(backend="moefx", options={{"{name}": ...}})',
                    found=repr(value),
                    do=nearest(str(value), _CHOICES[name]),
                )
        return cls(**dict(options or {}))


def compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a dynamo graph: the backend that ``torch.compile(model, backend="moefx")`` finds.

    ``mode`` is Inductor's. Raises :class:`moefx.errors.OptionError` for options it does not know.
    """
    chosen = BackendOptions.of(options)
    if mode is not None and chosen.inner != "inductor":
        asked = f'torch.compile(backend="moefx", mode={mode!r}, options={{"inner": {chosen.inner!r}}})'
        raise OptionError(asked, found="a mode without Inductor", do="leave out mode, or inner")
    if chosen.kernels in ("auto", "triton"):
        _lower(gm, example_inputs, insist=chosen.kernels == "triton")
    return _delegate(gm, example_inputs, chosen.inner, mode)


def reset() -> None:
    """Forget the kernels loaded in this process; ``torch.compiler.reset()`` calls this. Files stay on disk."""
    attention.clear()
    backward.clear()
    choice.clear()
    routing.clear()
    launcher.clear()
    tokens.clear()
    runtime.clear()


compile.reset = reset  # type: ignore[attr-defined]


def _lower(gm: fx.GraphModule, example_inputs: Sequence[Any], insist: bool) -> None:
    """Replace what has a kernel on its device; say what was done to the log and to ``TORCH_TRACE``."""
    training = _needs_gradients(example_inputs)
    found = lowerings(gm)
    if not found:
        return
    usable = [item for item in found if _usable(item, insist)]
    kept = "where no kernel exists or none runs on the device" if len(usable) < len(found) else ""
    text = describe(found)
    replaced = replace(gm, usable, training)
    with_gradients = ", forward and backward" if training else ""
    others = [f"{_count(usable, part)} of {_count(found, part)} {part}s" for part in ("router", "grouping")]
    numbers = (replaced, _count(found, "region"), with_gradients, ", ".join(others))
    logger.info("moefx replaced %d of %d routed regions by kernels%s; %s", *numbers)
    if kept:
        logger.info("moefx keeps the dialect ops %s", kept)
    logger.info("routed regions found:\n%s", text)
    trace_structured(
        "artifact", metadata_fn=lambda: {"name": "moefx_lowered", "encoding": "string"}, payload_fn=lambda: text
    )


def _count(items: Sequence[Found], part: str) -> int:
    return sum(_part(item) == part for item in items)


def _part(item: Found) -> str:
    """Return what a finding is: a router, a grouping, or a region of products, heads or tokens."""
    if isinstance(item, Refusal):
        return item.kind
    return {RouterLowering: "router", GroupLowering: "grouping"}.get(type(item), "region")


def _usable(item: Found, insist: bool) -> bool:
    """Whether a region's kernels can run where its tensors are."""
    if isinstance(item, Refusal):
        return False
    value = item.output.meta.get("val", item.output.meta.get("example_value"))
    value = value[0] if isinstance(value, tuple | list) else value
    device = value.device.type if isinstance(value, torch.Tensor) else "cpu"
    if device == "cuda" and triton_installed():
        return True
    if not insist:
        return False
    if not triton_installed():
        raise OptionError(
            'options={"kernels": "triton"}', found="Triton is not installed", do="pip install 'moefx[gpu]'"
        )
    if not interpreting():
        raise OptionError(
            'options={"kernels": "triton"}',
            found=f"{item.name} on {device}, and Triton's interpreter is off",
            do='move the model to a GPU, use {"kernels": "auto"}, or set TRITON_INTERPRET=1 before Python starts',
        )
    return True


def _needs_gradients(example_inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)


def _delegate(gm: fx.GraphModule, example_inputs: Sequence[Any], inner: str, mode: str | None) -> Callable[..., Any]:
    if inner == "eager":
        return gm.forward
    if inner == "aot_eager":
        from torch._dynamo.backends.registry import lookup_backend

        return lookup_backend("aot_eager")(gm, list(example_inputs))
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(mode) if mode is not None else None
    return cast(Callable[..., Any], compile_fx(gm, list(example_inputs), config_patches=patches))
