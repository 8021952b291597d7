"""What the analysis tests share: models in float64, their graphs, and sites recomputed from their named operands."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from examples.dit import DiT
from examples.functional_dit import FunctionalDiT
from examples.inline_dit import InlineDiT
from examples.randomise import randomise_zeros
from examples.vit import VisionTransformer
from moefx import zoo
from moefx.graph import Graph, trace
from moefx.graph.inputs import synthesise
from moefx.passes.analysis import Site

SMALL = {"image_size": 8, "patch": 2, "in_channels": 3, "depth": 2, "width": 32, "heads": 4, "classes": 5}
OURS: dict[str, Any] = {
    "DiT": lambda: DiT(**SMALL),
    "InlineDiT": lambda: InlineDiT(**SMALL),
    "FunctionalDiT": lambda: FunctionalDiT(**SMALL),
    "VisionTransformer": lambda: VisionTransformer(image_size=8, patch=2, depth=2, width=32, heads=4, qk_norm=True),
}


def doubled(tree: Any) -> Any:
    """Return example inputs with floating point tensors in float64."""
    return torch.utils._pytree.tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, tree
    )


def example(name: str, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword inputs in float64."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 8, 8, generator=generator).double()
    if name == "VisionTransformer":
        return (x,), {}
    if name in OURS:
        return (x, torch.rand(3, generator=generator).double() * 1000, torch.arange(3)), {}
    inputs = synthesise(model)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else inputs
    return doubled(args), doubled(kwargs)


@functools.cache
def traced(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Graph]:
    """Return a small model in float64, its inputs, and its graph."""
    torch.manual_seed(0)
    model: nn.Module = randomise_zeros(OURS[name]()).eval() if name in OURS else zoo.tiny(name)
    model = model.double()
    args, kwargs = example(name, model)
    return model, args, kwargs, trace(model, (args, kwargs))


@functools.cache
def exported(name: str) -> Graph:
    """Return the same model as ``torch.export`` sees it."""
    model, args, kwargs, _ = traced(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Graph.from_export(torch.export.export(model, args, kwargs, strict=False), model)


def linear(x: Tensor, graph: Graph, site: Site, name: str) -> Tensor:
    """Apply ``w_<name>`` and ``b_<name>``."""
    weight, bias = site.operands[f"w_{name}"], site.operands.get(f"b_{name}")
    return F.linear(x, weight.tensor(graph), bias.tensor(graph) if bias else None)


def recompute_ffn(site: Site, graph: Graph, values: dict[Any, Tensor]) -> Tensor:
    """Compute the output of a feed-forward site from its operands with plain torch."""
    o, axis = site.operands, site.shapes["axis"]
    x = values[o["x"]].movedim(axis, -1)
    gated = "w_gate" in o

    def hidden(name: str) -> Tensor:
        h = linear(x, graph, site, name)
        suffix = "" if name == "in" else "_gate"
        if f"w_depth{suffix}" not in o:
            return h
        weight, bias = o[f"w_depth{suffix}"].tensor(graph), o.get(f"b_depth{suffix}")
        h = o["act_in"](h).movedim(-1, axis)
        h = F.conv2d(h, weight, bias.tensor(graph) if bias else None, padding=weight.shape[-1] // 2, groups=len(weight))
        return h.movedim(axis, -1)

    up = hidden("in")
    if not gated:
        h = o["act"](up)
    elif o["act"].arity == 2:
        h = o["act"](hidden("gate"), up)
    else:
        h = o["act"](hidden("gate")) * up
    out = linear(h, graph, site, "out")
    for part, columns in o.get("rest", ()):
        out = out + F.linear(values[part], columns.tensor(graph))
    return out.movedim(-1, axis)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention ``[..., T, d]`` written out, repeating grouped keys."""
    repeat = q.shape[-3] // k.shape[-3]
    k, v = k.repeat_interleave(repeat, -3), v.repeat_interleave(repeat, -3)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(-1) @ v


def features_last(value: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Bring the feature dimensions of a lane to the end, flattened."""
    other = [d for d in range(value.ndim) if d not in dims]
    return value.permute(*other, *dims).flatten(len(other))


def close(a: Tensor, b: Tensor, nodes: Iterable[Node] = ()) -> bool:
    """Compare up to rounding; a model that computes in float32 inside (``nodes``) gets the precision of that."""
    kinds = {a.dtype, b.dtype, *(n.meta["val"].dtype for n in nodes if isinstance(n.meta.get("val"), Tensor))}
    tolerance = 1e-5 if torch.float32 in kinds else 1e-11
    a, b = a.detach().double(), b.detach().double()
    return bool(torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max())))


def fingerprint(site: Site) -> tuple[Any, ...]:
    """What must not depend on how torch was spelled."""
    weights = tuple(sorted((name, str(weight)) for name, weight in site.weights().items()))
    act = str(site.operands.get("act", ""))
    heads = (site.shapes.get("heads"), site.shapes.get("head_dim"))
    return site.kind, site.flavour, site.gate_first, site.role, site.dead, act, heads, weights
