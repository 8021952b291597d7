"""A few words on a site, a module, a routed module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from moefx.inspect.text import clean
from moefx.passes.analysis.site import Site
from moefx.passes.rewrite import get_pass

_GATES = {"HeadGate", "TokenRouter"}


def describe_site(site: Site) -> str:
    """Return ``ffn gated silu 3072→12288→3072`` or ``attention joint 24×128, qk-norm, rope``."""
    parts = {"ffn": _ffn, "attention": _attention}.get(site.kind, lambda _: "")(site)
    words = [site.kind, site.flavour if site.flavour != "plain" else "", parts]
    notes = [site.role if site.role != "main" else "", "dead" if site.dead else ""]
    noted = ", ".join(n for n in notes if n)
    return clean(" ".join(w for w in words if w) + (f" ({noted})" if noted else ""))


def _ffn(site: Site) -> str:
    shapes = site.shapes
    widths = "→".join(str(shapes[name]) for name in ("D", "F", "D_out") if name in shapes)
    return f"{site.operands.get('act', '')} {widths}".strip()


def _attention(site: Site) -> str:
    shapes, operands = site.shapes, site.operands
    heads = f"{shapes.get('heads')}×{shapes.get('head_dim')}"
    groups = shapes.get("kv_heads", shapes.get("heads"))
    notes = [f"{groups} kv heads"] if groups != shapes.get("heads") else []
    flags = (("qk_norm", "qk-norm"), ("rope", "rope"), ("causal", "causal"))
    notes += [text for name, text in flags if operands.get(name) is True or _present(operands.get(name))]
    notes += ["mask"] if operands.get("mask") is not None else []
    return ", ".join([heads, *notes])


def _present(value: Any) -> bool:
    return value is not None and not isinstance(value, bool)


def describe_module(module: nn.Module) -> str:
    """Return a module as its class and its sizes: ``Linear 64→3072``."""
    name = clean(type(module).__name__)
    if is_routed(module):
        return _routed(module) or name
    if isinstance(module, nn.Linear):
        return f"{name} {module.in_features}→{module.out_features}{'' if module.bias is not None else ', no bias'}"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return f"{name} {module.in_channels}→{module.out_channels}, {_conv(module)}"
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return f"{name} {'×'.join(str(n) for n in module.normalized_shape)}"
    if isinstance(module, nn.GroupNorm):
        return f"{name} {module.num_channels} in {module.num_groups} groups"
    if isinstance(module, nn.Embedding):
        return f"{name} {module.num_embeddings}→{module.embedding_dim}"
    return name


def _conv(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str:
    words = [f"kernel {_size(module.kernel_size)}"]
    words += [f"stride {_size(module.stride)}"] if any(s != 1 for s in module.stride) else []
    words += [f"groups {module.groups}"] if module.groups != 1 else []
    return ", ".join(words)


def _size(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else "×".join(str(s) for s in sizes)


def is_trivial(module: nn.Module) -> bool:
    """Tell whether a module is not worth a line: dropouts and identities."""
    return type(module).__name__.startswith(("Dropout", "Identity"))


def is_routed(module: nn.Module) -> bool:
    """Tell whether a module is one of moefx's routed building blocks."""
    return type(module).__module__.startswith("moefx.routing")


def routed_mark(module: nn.Module) -> str:
    """Return ``routed: top-2 of 8`` for a routed module, whatever kind it is."""
    experts = getattr(getattr(module, "experts", None), "num_experts", None)
    if experts is not None:
        return f"routed: top-{getattr(module, 'top_k', '?')} of {experts}{_extras(module)}"
    if type(module).__name__ in _GATES and hasattr(module, "num_heads"):
        shared = f", {module.shared} shared" if getattr(module, "shared", 0) else ""
        return f"routed: {getattr(module, 'top_k', '?')} of {getattr(module, 'routed', '?')} heads{shared}"
    return f"routed: {clean(module.extra_repr())}" if module.extra_repr() else "routed"


def _extras(module: nn.Module) -> str:
    words = []
    taps: tuple[str, ...] = tuple(getattr(module, "taps", ()))
    if getattr(module, "granularity", 1) != 1:
        words.append(f"shards of 1/{module.granularity}")
    if getattr(module, "shared", None) is not None:
        words.append("shared expert")
    if taps:
        words.append(f"reads token + {' + '.join(clean(tap) for tap in taps)}")
    return "".join(f", {word}" for word in words)


def _routed(module: nn.Module) -> str:
    experts = getattr(module, "experts", None)
    w_in, w_out = getattr(experts, "w_in", None), getattr(experts, "w_out", None)
    if w_in is None or w_out is None:
        return clean(type(module).__name__)
    act = getattr(experts, "act", "")
    name = clean(act.extra_repr() if isinstance(act, nn.Module) and act.extra_repr() else act)
    gated = "gated " if getattr(experts, "w_gate", None) is not None else ""
    if isinstance(act, nn.Module) and not act.extra_repr():
        name = clean(type(act).__name__)
    return f"experts {gated}{name} {w_in.shape[-1]}→{w_in.shape[-2]}→{w_out.shape[-2]}"


def plan_mark(rule: str, options: Mapping[str, Any]) -> str:
    """Return what a pass with ``options`` would make of a site: ``upcycle: top-2 of 8, noise 0.1``."""
    words, said = [], {"experts", "top_k"}
    if options.get("experts") is not None and options.get("top_k") is not None:
        words.append(f"top-{options['top_k']} of {options['experts']}")
    else:
        said = set()
    for name, field in get_pass(rule).Options.model_fields.items():
        value = options.get(name)
        if name not in said and value != field.get_default(call_default_factory=True):
            words.append(f"{name} {value}")
    return clean(f"{rule}: {', '.join(words)}" if words else rule)
