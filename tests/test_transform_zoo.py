"""Sparse upcycling of every denoiser of the zoo: equal at the start, trainable, and undone to the bit."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import moefx
from moefx import zoo
from moefx.errors import CaptureError, GuardError, NothingMatched
from moefx.graph.inputs import synthesise
from moefx.model.plan import Plan
from moefx.routing import RoutedFFN
from tests.trace_support import QUIET, attempt, call, error, fingerprint, resized, skeleton, tensors
from tests.zoo_models import NAMED

pytest.importorskip("diffusers")
pytestmark = [pytest.mark.filterwarnings(line) for line in (*QUIET, "ignore::moefx.errors.MoefxWarning")]

UNTRACEABLE = {"AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel", "WanAnimate2Transformer3DModel"}
# Models without a feed-forward network between tokens.
WITHOUT_SITES = {"StableCascadeUNet", "UNet1DModel", "UNet2DModel"}
# Blocks whose own Python asks about the batch (a mask that is None for one sample, chunks of samples) refuse others.
FIXED = {"HunyuanVideoFramepackTransformer3DModel": (1,), "SanaWMTransformer3DModel": (1, 3)}
REWRITTEN = [name for name in zoo.names() if name not in UNTRACEABLE | WITHOUT_SITES]
BOUND = 1e-5


def routed_modules(model: nn.Module) -> dict[str, RoutedFFN]:
    return {name: m for name, m in model.named_modules() if isinstance(m, RoutedFFN)}


@pytest.mark.parametrize("name", REWRITTEN)
def test_equal_at_the_start_and_undone_to_the_bit(name: str) -> None:
    model = zoo.tiny(name)
    before = skeleton(model)
    examples = {batch: synthesise(model, batch=batch) for batch in (2, 3, 1)}
    dense = {batch: call(model, inputs) for batch, inputs in examples.items()}
    random_state = torch.get_rng_state()
    assert moefx.transform(model, experts=4, top_k=2) is model
    assert torch.equal(random_state, torch.get_rng_state())

    report = model.moefx.report
    assert report.plan.sites
    assert {check.name for check in report.checks} >= {s.name for s in report.plan.sites if s.tier == "module"}
    assert {check.name for check in report.checks} >= {s.block for s in report.plan.sites if s.tier == "block"}
    assert all(check.contract == "exact" and check.error <= check.bound for check in report.checks)
    assert report.model_error <= report.model_bound <= 1e-5 * len(report.plan.sites)
    assert len(routed_modules(model)) == len(report.plan.sites)
    if not any(site.flavour == "conv" for site in report.plan.sites):
        assert sum(p.numel() for p in model.parameters()) == report.plan.cost.parameters_after

    for batch, inputs in examples.items():
        found = attempt(model, inputs)
        if isinstance(found, GuardError):
            assert batch in FIXED.get(name, ()), found
        else:
            assert error(found, dense[batch]) <= BOUND, batch

    moefx.untransform(model)
    assert skeleton(model) == before
    assert error(call(model, examples[2]), dense[2]) == 0


@pytest.mark.parametrize("name", sorted(UNTRACEABLE | WITHOUT_SITES))
def test_refused_with_a_reason_and_nothing_changed(name: str) -> None:
    model = zoo.tiny(name)
    before = fingerprint(model)
    with pytest.raises(CaptureError if name in UNTRACEABLE else NothingMatched) as caught:
        moefx.transform(model)
    assert name in caught.value.asked
    assert caught.value.found
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", NAMED)
def test_experts_and_routers_learn(name: str) -> None:
    """Every expert that got tokens gets a gradient, and no other; with N10 the task reaches the routers."""
    model = zoo.tiny(name)
    moefx.transform(model, experts=4, top_k=1, normalise="N10")
    output = [t for t in tensors(call(model, synthesise(model), grad=True)) if t.is_floating_point()]
    sum(t.square().mean() for t in output).backward()
    routed = routed_modules(model)
    for path, module in routed.items():
        router = {n: p.grad for n, p in module.router.named_parameters()}
        assert any(g is not None and g.abs().max() > 0 for g in router.values()), path
        used = module.record.load.flatten() > 0
        for key, parameter in module.experts.named_parameters():
            if parameter.ndim == 3 and parameter.shape[0] == len(used):
                assert parameter.grad is not None, f"{path}.{key}"
                moved = parameter.grad.flatten(1).abs().amax(1) > 0
                # The record is that of the last call; CogView4 calls each network twice.
                assert torch.equal(moved & used, used), f"{path}.{key}"
                assert name == "CogView4Transformer2DModel" or torch.equal(moved, used), f"{path}.{key}"


def test_with_equal_experts_only_the_auxiliary_loss_reaches_the_router() -> None:
    """Theorem T5, on a real model."""
    model = zoo.tiny("DiTTransformer2DModel").double()
    moefx.transform(model, experts=4, top_k=2)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in synthesise(model).items()}
    tensors(call(model, inputs, grad=True))[0].square().mean().backward()
    routers = [p for n, p in model.named_parameters() if ".router." in n]
    assert routers
    assert max(float(p.grad.abs().max()) for p in routers) < 1e-12
    call(model, inputs, grad=True)
    moefx.aux_loss(model).backward()
    assert min(float(p.grad.abs().max()) for p in routers) > 1e-9


@pytest.mark.parametrize("sizes", [(8, 4, 7), (4, 8, 5), (12, 12, 9)], ids=str)
@pytest.mark.parametrize("name", NAMED)
def test_other_resolutions_and_text_lengths(name: str, sizes: tuple[int, int, int]) -> None:
    dense, routed = both(name)
    inputs = resized(synthesise(dense), *sizes)
    try:
        wanted = call(dense, inputs)
    except (RuntimeError, ValueError, IndexError):
        pytest.skip("the dense model is made for one size")
    assert error(call(routed, inputs), wanted) <= BOUND


@functools.cache
def both(name: str) -> tuple[nn.Module, nn.Module]:
    return zoo.tiny(name), moefx.transform(zoo.tiny(name), experts=4)


@pytest.mark.parametrize("name", NAMED)
def test_float64_to_rounding_per_layer(name: str) -> None:
    model = zoo.tiny(name).double()
    inputs = {k: _wide(v) for k, v in synthesise(model).items()}
    model = moefx.transform(model, inputs, experts=4, top_k=2)
    report = model.moefx.report
    assert report.checks
    for check in report.checks:
        assert check.dtype == "float64"
        assert check.error <= check.bound, check.name
        # Lumina2 computes its activation in float32.
        assert check.bound == 1e-12 or name == "Lumina2Transformer2DModel"


def _wide(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _wide(v) for k, v in value.items()}
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel", "CogView4Transformer2DModel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    dense = zoo.tiny(name).to(dtype)
    routed = moefx.transform(zoo.tiny(name).to(dtype), experts=4)
    inputs = synthesise(dense, batch=3)
    assert error(call(routed, inputs), call(dense, inputs)) <= (2e-2 if dtype is torch.bfloat16 else 3e-3)
    assert {p.dtype for n, p in routed.named_parameters() if ".experts." in n} == {dtype}


@pytest.mark.parametrize("name", [name for name in NAMED if name != "Lumina2Transformer2DModel"])  # reads its mask
def test_a_plan_on_meta_is_the_plan(name: str) -> None:
    """No weight is read: the plan of a model without weights has the same sites and costs."""
    meta = zoo.from_config(name, zoo.tiny_config(name), device="meta").eval()
    on_meta, real = moefx.plan(meta, experts=4), moefx.plan(zoo.tiny(name), experts=4)
    assert on_meta.to_json() == real.to_json()
    assert Plan.from_json(on_meta.to_json()) == real
    assert all(p.is_meta for p in meta.parameters())


@pytest.mark.parametrize("name", NAMED)
def test_mixture_of_heads_is_exact_too(name: str) -> None:
    model = zoo.tiny(name)
    inputs = synthesise(model, batch=3)
    dense, before = call(model, inputs), fingerprint(model)
    try:
        moefx.transform(model, recipe="mixture-of-heads")
    except NothingMatched as refusal:
        assert fingerprint(model) == before
        pytest.skip(refusal.found.splitlines()[1].strip())
    assert error(call(model, inputs), dense) <= BOUND
    moefx.untransform(model)
    assert fingerprint(model) == before


# No timestep at all.
NO_TIMESTEP = {"UVit2DModel"}


@pytest.mark.parametrize("name", NAMED)
def test_timestep_routing(name: str) -> None:
    model = zoo.tiny(name)
    inputs = synthesise(model, batch=3)
    dense, before = call(model, inputs), fingerprint(model)
    try:
        moefx.transform(model, recipe="timestep-upcycling", experts=4)
    except NothingMatched as refusal:
        assert fingerprint(model) == before
        reason = refusal.found.splitlines()[1].strip()
    else:
        reason = ""
    assert bool(reason) == (name in NO_TIMESTEP), reason
    if reason:
        return
    assert error(call(model, inputs), dense) <= BOUND
    sites = model.moefx.report.plan.sites
    assert all(site.taps and site.taps[0].name == "timestep" for site in sites)

    # The value a router reads must change with the timestep of its sample, and with that of no other.
    routed = routed_modules(model)
    first, again = _taps(model, inputs), _taps(model, inputs)
    assert first.keys() == again.keys() == routed.keys()
    later = inputs["timestep"].clone()
    later[1] = later[1] * 0.5 + 3
    other = _taps(model, inputs | {"timestep": later})
    text = {k: v + 0.5 if k.startswith("encoder_hidden") and v.is_floating_point() else v for k, v in inputs.items()}
    for path, tap in first.items():
        assert torch.equal(tap, again[path])
        assert [torch.equal(a, b) for a, b in zip(tap, other[path], strict=True)] == [True, False, True], path
        assert torch.equal(tap, _taps(model, text)[path]), path
    moefx.untransform(model)
    assert fingerprint(model) == before


def _taps(model: nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    """Return what each router gets besides the tokens."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        module.router.register_forward_pre_hook(lambda _, args, path=path: found.update({path: args[1].clone()}))
        for path, module in routed_modules(model).items()
    ]
    call(model, inputs)
    for handle in handles:
        handle.remove()
    return found
