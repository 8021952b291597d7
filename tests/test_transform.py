"""What transform promises beyond equality: options, models of every kind, determinism, plans as the whole recipe."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn

import moefx
from examples.dit import DiT
from examples.randomise import randomise_zeros
from moefx import zoo
from moefx.errors import GuardError, VerifyError
from moefx.graph.inputs import synthesise
from moefx.model.install import apply_changes
from moefx.model.plan import Plan
from moefx.model.realise import realise
from moefx.passes.rewrite import get_pass
from moefx.routing import RoutedFFN
from tests.trace_support import QUIET, call, error, fingerprint, resized
from tests.transform_support import OURS, SMALL, Residual, build, example, routed_modules

pytestmark = [pytest.mark.filterwarnings(line) for line in (*QUIET, "ignore::moefx.errors.MoefxWarning")]


# ---------------------------------------------------------------------------- options


EXACT: dict[str, dict[str, Any]] = {
    "one expert": {"experts": 1, "top_k": 1},
    "all experts": {"experts": 4, "top_k": 4},
    "odd counts": {"experts": 5, "top_k": 3},
    "zero router": {"router_init": "zero"},
    "shared": {"shared": 1},
    "granular": {"experts": 8, "granularity": 4, "top_k": 4},
    "granular, two groups": {"experts": 8, "granularity": 2, "top_k": 4},
    "granular, untied": {"experts": 8, "granularity": 2, "top_k": 4, "untie": True},
    "granular and shared": {"experts": 4, "granularity": 2, "top_k": 2, "shared": 1},
    "N1": {"normalise": "N1"},
    "N2": {"normalise": "N2"},
    "N3, corrected": {"normalise": "N3", "router_init": "zero", "scale": 4.0},
    "N4": {"normalise": "N4"},
    "N6, one": {"normalise": "N6", "top_k": 1},
    "N8": {"normalise": "N8", "top_k": 8},
    "N10, one": {"normalise": "N10", "top_k": 1},
    "selection bias": {"selection_bias": True},
    "timestep": {"router_input": "timestep+token"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EXACT)
def test_exact_options(name: str, dtype: torch.dtype) -> None:
    dense = build().to(dtype)
    inputs = tuple(t.to(dtype) if t.is_floating_point() else t for t in example(batch=3))
    routed = moefx.transform(copy.deepcopy(dense), inputs, **({"experts": 8, "top_k": 2} | EXACT[name]))
    assert {check.contract for check in routed.moefx.report.checks} == {"exact"}
    assert all(check.error <= check.bound for check in routed.moefx.report.checks)
    bound = 1e-11 if dtype is torch.float64 else 1e-5
    assert error(call(routed, inputs), call(dense, inputs)) <= bound
    # A routed network must really be in the path: breaking the experts breaks the output.
    with torch.no_grad():
        for module in routed_modules(routed):
            module.experts.w_out.mul_(2)
    assert error(call(routed, inputs), call(dense, inputs)) > 1e-3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Theorem T15: E[rel^2] = r^2 + r (2 - r) / k for top-k of equal gates.
        ({"reinitialise": 0.5, "router_init": "zero"}, 0.79),
        ({"reinitialise": 0.25, "router_init": "zero"}, 0.53),
        ({"reinitialise": 0.5, "router_init": "zero", "top_k": 4}, 0.66),
        # Theorem T2: gates that are not renormalised, at a zero router: 1 - k/E.
        ({"normalise": "N3", "router_init": "zero"}, 0.75),
        ({"normalise": "N3", "router_init": "zero", "top_k": 1}, 0.875),
    ],
)
def test_approximate_starts_are_as_far_as_theory_says(options: dict[str, Any], expected: float) -> None:
    """The starts that change the function say so, and the report measures how far they are."""
    torch.manual_seed(0)
    model = nn.Sequential(Residual(64, 512))
    inputs = (torch.randn(4, 64, 64),)
    routed = moefx.transform(model, inputs, **({"experts": 8, "top_k": 2, "max_error": 2.0} | options))
    (check,) = routed.moefx.report.checks
    assert check.contract == "approximate"
    assert check.error == pytest.approx(expected, abs=0.06)
    with pytest.raises(VerifyError, match=r"allows 0\.1"):
        moefx.transform(_sequential(), inputs, **({"experts": 8, "top_k": 2} | options | {"max_error": 0.1}))


def _sequential() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Residual(64, 512))


def test_small_noise_is_a_small_error() -> None:
    inputs = (torch.randn(4, 64, 64),)
    routed = moefx.transform(_sequential(), inputs, noise=1e-3)
    assert 1e-4 < routed.moefx.report.checks[0].error < 1e-2
    half = moefx.transform(_sequential(), inputs, noise=1e-3, noise_fraction=0.25)
    assert half.moefx.report.checks[0].error < routed.moefx.report.checks[0].error


def names_of(model: nn.Module) -> list[str]:
    return [site.name for site in model.moefx.report.plan.sites]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp", "blocks.3.mlp"]),
        ({"only": "ffn"}, ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp", "blocks.3.mlp"]),
        ({"only": "blocks.2.mlp"}, ["blocks.2.mlp"]),
        ({"only": ["blocks.[12].*"]}, ["blocks.1.mlp", "blocks.2.mlp"]),
        ({"skip": ["blocks.0*", "blocks.3.mlp"]}, ["blocks.1.mlp", "blocks.2.mlp"]),
        ({"only": "blocks.*", "skip": "*.2.*"}, ["blocks.0.mlp", "blocks.1.mlp", "blocks.3.mlp"]),
        ({"every": 2}, ["blocks.0.mlp", "blocks.2.mlp"]),
        ({"every": 3, "skip": "blocks.0.*"}, ["blocks.1.mlp"]),
    ],
)
def test_selection(arguments: dict[str, Any], expected: list[str]) -> None:
    torch.manual_seed(0)
    model = randomise_zeros(DiT(**(SMALL | {"depth": 4}), classes=5)).eval()
    untouched = {name: id(m) for name, m in model.named_modules()}
    moefx.transform(model, example(), experts=4, **arguments)
    assert names_of(model) == expected
    assert [n for n, m in model.named_modules() if isinstance(m, RoutedFFN)] == expected
    for name, module in model.named_modules():
        if not any(name.startswith(site) for site in expected):
            assert id(module) == untouched[name]
    assert {s.name for s in model.moefx.report.plan.skipped} >= {f"blocks.{i}.mlp" for i in range(4)} - set(expected)


# ---------------------------------------------------------------------------- models of every kind


@pytest.mark.parametrize("recipe", ["sparse-upcycling", "virtual-groups", "mixture-of-heads", "timestep-upcycling"])
@pytest.mark.parametrize("name", OURS)
def test_our_models(name: str, recipe: str) -> None:
    if recipe == "timestep-upcycling" and name == "VisionTransformer":
        return
    model = build(name)
    before = fingerprint(model)
    dense = {batch: call(model, example(name, batch)) for batch in (1, 2, 5)}
    moefx.transform(model, example(name), recipe=recipe)
    assert type(model).__name__ == name
    assert isinstance(model, OURS[name]().__class__)
    for batch, wanted in dense.items():
        assert error(call(model, example(name, batch)), wanted) <= 1e-5
    moefx.untransform(model)
    assert fingerprint(model) == before


def test_two_passes_in_one_transform_and_one_after_the_other() -> None:
    dense, together, apart = build("InlineDiT"), build("InlineDiT"), build("InlineDiT")
    inputs = example("InlineDiT", 3)
    before = fingerprint(apart)
    moefx.transform(together, inputs, passes=["upcycle", "mixture-of-heads"])
    moefx.transform(apart, inputs)
    moefx.transform(apart, inputs, recipe="mixture-of-heads")
    for model in (together, apart):
        assert error(call(model, inputs), call(dense, inputs)) <= 1e-5
        assert {site.rule for plan in model.moefx.plans for site in plan.sites} == {"upcycle", "mixture-of-heads"}
    assert len(apart.moefx.plans) == 2
    assert sorted(together.state_dict()) == sorted(apart.state_dict())
    assert fingerprint(moefx.untransform(apart)) == before


def test_a_pass_object_with_its_own_options() -> None:
    model = moefx.transform(build(), example(), passes=[get_pass("upcycle")(experts=3, top_k=1, normalise="N10")])
    assert {m.experts.num_experts for m in routed_modules(model)} == {3}
    assert model.moefx.report.plan.recipe is None


FLUX = "FluxTransformer2DModel"


@functools.cache
def flux() -> tuple[nn.Module, nn.Module]:
    pytest.importorskip("diffusers")
    return zoo.tiny(FLUX), moefx.transform(zoo.tiny(FLUX), experts=4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sizes", [(4, 6, 7), (8, 4, 5), (3, 3, 12)], ids=str)
def test_flux_single_blocks_at_any_size(sizes: tuple[int, int, int], training: bool) -> None:
    dense, routed = flux()
    assert {s.tier for s in routed.moefx.report.plan.sites} == {"module", "block"}
    for batch in (1, 3):
        inputs = resized(synthesise(dense, batch=batch), *sizes)
        try:
            found = call(routed.train(training), inputs)
        finally:
            routed.eval()
        assert error(found, call(dense, inputs)) <= 1e-5
    copied = copy.deepcopy(routed)
    assert type(copied.single_transformer_blocks[0]) is type(routed.single_transformer_blocks[0])
    assert error(call(copied, inputs), call(routed, inputs)) == 0


def test_a_rewritten_block_looks_like_the_original() -> None:
    dense, routed = flux()
    old, new = dense.single_transformer_blocks[0], routed.single_transformer_blocks[0]
    assert isinstance(new, type(old))
    assert (type(new).__name__, type(new).__module__) == (type(old).__name__, type(old).__module__)
    import inspect

    assert str(inspect.signature(new.forward).replace(return_annotation="")).replace("'", "") != ""
    assert list(inspect.signature(new.forward).parameters) == list(inspect.signature(old.forward).parameters)


def test_a_rewritten_block_refuses_what_it_was_not_captured_for() -> None:
    _, routed = flux()
    inputs = synthesise(routed)
    with pytest.raises(GuardError, match="joint_attention_kwargs"):
        call(routed.single_transformer_blocks[0], {**_block_inputs(routed, inputs), "joint_attention_kwargs": {"x": 1}})


def _block_inputs(model: nn.Module, inputs: Any) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        import inspect

        seen.update(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    handle = model.single_transformer_blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
    call(model, inputs)
    handle.remove()
    return seen


def test_a_network_called_twice_is_replaced_once() -> None:
    pytest.importorskip("diffusers")
    model = moefx.transform(zoo.tiny("CogView4Transformer2DModel"), experts=4)
    sites = model.moefx.report.plan.sites
    assert [site.calls for site in sites] == [2] * len(sites)
    assert len(routed_modules(model)) == len(sites) == len(model.transformer_blocks)


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    _, routed = flux()
    block = copy.deepcopy(routed.single_transformer_blocks[0])
    inputs = _block_inputs(routed, synthesise(routed))
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert error(call(compiled, inputs), call(block, inputs)) <= 1e-6
    torch._dynamo.reset()


# ---------------------------------------------------------------------------- determinism and plans


@pytest.mark.parametrize("options", [{}, {"noise": 0.01, "max_error": 9.0}, {"reinitialise": 0.5, "max_error": 9.0}])
def test_the_seed_decides_everything(options: dict[str, Any]) -> None:
    states, plans = [], []
    for i, seed in enumerate((3, 3, 4)):
        torch.manual_seed(i)
        model = build()
        torch.manual_seed(i)
        moefx.transform(model, example(), experts=4, seed=seed, **options)
        states.append(model.state_dict())
        plans.append(model.moefx.report.plan.to_json())
    assert plans[0] == plans[1] != plans[2]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(a, states[1][key]) for key, a in states[0].items())
    assert any(not torch.equal(a, states[2][key]) for key, a in states[0].items())


@pytest.mark.parametrize("recipe", ["sparse-upcycling", "drop-upcycling", "mixture-of-heads", "timestep-upcycling"])
@pytest.mark.parametrize("name", ["DiT", "InlineDiT"])
def test_a_plan_read_back_makes_the_same_model(name: str, recipe: str) -> None:
    routed = moefx.transform(build(name), example(name), recipe=recipe)
    plan = Plan.from_json(routed.moefx.report.plan.to_json())
    assert plan == routed.moefx.report.plan
    again = build(name)
    apply_changes(again, realise(again, plan)[0])
    assert list(again.state_dict()) == list(routed.state_dict())
    assert all(torch.equal(v, routed.state_dict()[k]) for k, v in again.state_dict().items())
    assert error(call(again, example(name, 3)), call(routed, example(name, 3))) == 0


def test_a_model_on_meta_is_transformed_without_weights() -> None:
    model = build().to("meta")
    moefx.transform(model, example())
    assert all(p.is_meta for p in model.parameters())
    assert "meta" in model.moefx.report.unverified
    assert sorted(model.state_dict()) == sorted(moefx.transform(build(), example()).state_dict())
