"""What the tracing and transform tests share: running, comparing and fingerprinting models."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moefx.errors import GuardError

# What some models of diffusers say when they run on a CPU and are not compiled.
QUIET = (
    "ignore:In CPU autocast:UserWarning",
    "ignore:CPU Autocast only supports:UserWarning",
    "ignore:flex_attention called without torch.compile:UserWarning",
)


def leaves(tree: Any) -> list[Any]:
    """Return everything in an output, dataclasses taken apart."""
    if hasattr(tree, "to_tuple"):
        tree = tree.to_tuple()
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        tree = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)}
    return pytree.tree_leaves(tree)


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in an output."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def error(found: Any, wanted: Any) -> float:
    """Return the largest relative error over the tensors of two outputs; infinity if they differ in kind."""
    pairs = list(zip(tensors(found), tensors(wanted), strict=True))
    if not pairs or any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return float("inf")
    return max(_relative(a.detach(), b.detach()) for a, b in pairs)


def _relative(found: Tensor, wanted: Tensor) -> float:
    if torch.equal(found, wanted):
        return 0.0
    wide, base = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (found, wanted))
    difference = float((wide - base).norm() / base.norm().clamp_min(1e-30))
    return difference if difference == difference else float("inf")


def call(model: Any, inputs: Any, *, grad: bool = False) -> Any:
    """Run a model or a graph on inputs of any accepted form; the random state is the same each time."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    if len(args) == 2 and isinstance(args[0], tuple) and isinstance(args[1], dict):
        args, kwargs = args
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad):
        return model(*args, **kwargs)


def attempt(model: Any, inputs: Any) -> Any:
    """Run like :func:`call`, or return the GuardError that refused to."""
    try:
        return call(model, inputs)
    except GuardError as refusal:
        return refusal


def gradients(function: Any, model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Return the gradients of a weighted sum of the outputs, by parameter name."""
    model.zero_grad(set_to_none=True)
    outputs = [t for t in tensors(call(function, inputs, grad=True)) if t.is_floating_point()]
    draws = torch.Generator().manual_seed(5)
    loss = sum((t * torch.randn(t.shape, generator=draws, dtype=torch.float64).to(t)).sum() for t in outputs)
    assert isinstance(loss, Tensor)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def same_gradients(one: dict[str, Tensor], two: dict[str, Tensor], bound: float = 1e-5) -> None:
    """Assert that the same parameters have the same gradients."""
    assert one
    assert one.keys() == two.keys()
    scale = max(float(g.norm()) for g in one.values())
    for name, gradient in one.items():
        assert float((gradient - two[name]).norm()) <= bound * max(float(gradient.norm()), 1e-3 * scale), name


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Identify everything a trace or a failed transform must leave alone: objects, classes, modes, values."""
    found: dict[str, Any] = {"classes": {name: type(m) for name, m in model.named_modules()}}
    for name, module in model.named_modules():
        found[name] = {key: _identity(value) for key, value in module.__dict__.items()}
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        if isinstance(value, Tensor) and not value.is_meta:
            digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    found["values"] = digest.hexdigest()
    found["hooks"] = (
        torch.is_grad_enabled(),
        nn.Module.__call__,
        nn.Module.__getattr__,
        nn.Module.__setattr__,
        torch.arange,
    )
    return found


def skeleton(model: nn.Module) -> dict[str, Any]:
    """Identify a model by its modules, parameters and values, leaving out what its forward may cache."""
    whole = fingerprint(model)
    found = {"classes": whole["classes"], "values": whole["values"]}
    for name, module in model.named_modules():
        found[name] = _identity(module._modules), _identity(module._parameters), list(module._buffers), module.training
    return found


def _identity(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, id(item)) for key, item in value.items()]
    return [id(item) for item in value] if isinstance(value, list) else id(value)


TEXT_TOKENS = 7


def resized(inputs: dict[str, Any], rows: int, columns: int, text: int) -> dict[str, Any]:
    """Return example inputs of a diffusers denoiser at another latent size and text length, freshly drawn."""
    draws = torch.Generator().manual_seed(rows * 100 + columns * 10 + text)
    made: dict[str, Any] = {}
    for name, value in inputs.items():
        shape = list(value.shape) if isinstance(value, Tensor) else []
        if name in ("hidden_states", "sample"):
            shape[1 if len(shape) == 3 else -2 :] = [rows * columns, shape[-1]] if len(shape) == 3 else [rows, columns]
        elif name == "img_ids":
            grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(value)
            made[name] = torch.cat([torch.zeros(rows * columns, 1).to(value), grid], 1)
            continue
        elif name.startswith(("encoder_hidden_states", "encoder_attention_mask")):
            shape[1] = text
        elif name == "txt_ids":
            shape[0] = text
        if not shape or shape == list(value.shape):
            made[name] = value
        elif value.is_floating_point() and "mask" not in name:
            made[name] = torch.randn(shape, generator=draws).to(value)
        else:
            made[name] = torch.ones(shape, dtype=value.dtype)
    return made
