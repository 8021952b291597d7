"""All or nothing: a failure anywhere changes nothing, contracts are proved, and untransform gives the model back."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moefx
from moefx.errors import MoefxWarning, VerifyError
from moefx.model.install import apply_changes
from tests.trace_support import QUIET, call, error, fingerprint
from tests.transform_support import OURS, Residual, build, example, routed_modules

pytestmark = [pytest.mark.filterwarnings(line) for line in (*QUIET, "ignore::moefx.errors.MoefxWarning")]


STAGES = [
    "moefx.model.transform.trace",
    "moefx.model.transform.make_plan",
    "moefx.model.transform.check_weights",
    "moefx.model.transform.run_dense",
    "moefx.model.transform.realise",
    "moefx.model.transform.check_sites",
    "moefx.model.transform.check_blocks",
    "moefx.model.transform.apply_changes",
    "moefx.model.transform.run",
    "moefx.model.transform.compare_models",
    "moefx.model.transform.Report",
    "moefx.model.transform.attach",
    "moefx.model.transform.as_saved_class",
    "moefx.model.install.subclass_with",
    "moefx.model.install.set_child",
    "moefx.model.realise.make_forward",
    "moefx.model.realise.verify_graph",
    "moefx.model.realise._inline_site",
    "moefx.passes.rewrite.upcycle.RoutedFFN",
    "moefx.passes.rewrite.upcycle.granular_copies",
    "moefx.passes.rewrite.cut.Splice.replace",
]


class Planted(BaseException):
    """Not an Exception, as an interrupt from the keyboard is none."""


@pytest.mark.parametrize("call_number", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_anywhere_changes_nothing(stage: str, call_number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import pydoc

    model = build("InlineDiT")
    before, random_state = fingerprint(model), torch.get_rng_state()
    original, count = pydoc.locate(stage), 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call_number:
            raise Planted
        return original(*args, **kwargs)  # type: ignore[operator]

    assert original is not None, stage
    monkeypatch.setattr(stage, failing)
    with contextlib.suppress(Planted):
        moefx.transform(model, example("InlineDiT"), experts=4)
    monkeypatch.undo()
    assert count
    assert count >= call_number or "moefx" in model.__dict__
    if count >= call_number:
        assert fingerprint(model) == before
        assert torch.equal(random_state, torch.get_rng_state())


def test_a_broken_contract_is_refused_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewrite that computes something else must not survive its own proof, at either place of checking."""
    import moefx.passes.rewrite.upcycle as rule

    original = rule.granular_copies

    def wrong(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        made.w_out.mul_(1.001)
        return made

    monkeypatch.setattr(rule, "granular_copies", wrong)
    for name in ("DiT", "InlineDiT"):
        model = build(name)
        before = fingerprint(model)
        with pytest.raises(VerifyError, match="exact") as caught:
            moefx.transform(model, example(name), experts=4)
        assert "blocks.0" in caught.value.asked
        assert fingerprint(model) == before
        unchecked = moefx.transform(model, example(name), experts=4, verify=False)
        assert unchecked.moefx.report.unverified == "verify=False"
        assert error(call(unchecked, example(name)), call(build(name), example(name))) > 1e-5


def test_the_whole_model_is_compared_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    import moefx.model.transform as stage

    monkeypatch.setattr(stage, "check_sites", lambda *_: [])
    monkeypatch.setattr(stage, "apply_changes", lambda model, changes: _spoil(model, apply_changes(model, changes)))
    model = build()
    before = fingerprint(model)
    with pytest.raises(VerifyError, match="the whole model's output changed by"):
        moefx.transform(model, example(), experts=4)
    assert fingerprint(model) == before


def _spoil(model: nn.Module, undos: Any) -> Any:
    with torch.no_grad():
        model.blocks[0].mlp.experts.w_out.mul_(1.1)
    return undos


def test_state_that_forward_writes_is_not_changed_by_the_proof() -> None:
    class Counting(Residual):
        def __init__(self) -> None:
            super().__init__(8, 16)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return super().forward(x) * self.seen

    model = Counting()
    moefx.transform(model, (torch.randn(2, 3, 8),))
    assert float(model.seen) == 0
    assert model.moefx.report.model_error < 1e-5


# ---------------------------------------------------------------------------- warnings, undo


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({}, True),
        ({"normalise": "N1"}, True),
        ({"top_k": 1, "normalise": "N2"}, True),
        ({"noise": 1e-3}, False),
        ({"reinitialise": 0.1}, False),
        ({"top_k": 1, "normalise": "N10"}, False),
        ({"normalise": "N3"}, False),
        ({"experts": 1, "top_k": 1}, False),
    ],
)
def test_a_router_that_cannot_learn_is_warned_of(options: dict[str, Any], warned: bool) -> None:
    """Theorem T5: equal experts and gates that sum to one give no task gradient."""
    options = {"max_error": 9.0} | options
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = moefx.transform(build(), example(), **options)
        plan = moefx.plan(build(), example(), **options)
    texts = [str(w.message) for w in caught if issubclass(w.category, MoefxWarning)]
    assert plan.warnings == model.moefx.report.plan.warnings
    assert bool(plan.warnings) == warned == bool(texts)
    if warned:
        assert all(way in texts[0] for way in ("aux_loss", "noise", "N10"))
    # The warning is right: the gradient of the task is zero exactly where it is given.
    wide = tuple(t.double() if t.is_floating_point() else t for t in example())
    call(model.double(), wide, grad=True).square().mean().backward()
    routers = [m.router.weight.grad for m in routed_modules(model) if m.router.weight is not None]
    largest = max((float(g.abs().max()) for g in routers if g is not None), default=0.0)
    assert (largest < 1e-12) == (warned or options.get("experts") == 1)


def test_a_warning_that_is_an_error_leaves_the_model_alone() -> None:
    model = build()
    before = fingerprint(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MoefxWarning)
        with pytest.raises(MoefxWarning):
            moefx.transform(model, example())
    assert fingerprint(model) == before


@pytest.mark.parametrize("options", [{}, {"shared": 1}, {"granularity": 2}, {"experts": 1, "top_k": 1}])
@pytest.mark.parametrize("name", OURS)
def test_no_parameter_lies_in_the_dense_ones(name: str, options: dict[str, Any]) -> None:
    model = build(name)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    moefx.transform(model, example(name), **options)
    own = [p.untyped_storage().data_ptr() for module in routed_modules(model) for p in module.parameters()]
    assert own
    assert not storages & set(own)


@pytest.mark.parametrize("name", OURS)
def test_undo_after_training_gives_the_dense_model_back(name: str) -> None:
    model = build(name)
    before = fingerprint(model)
    moefx.transform(model, example(name), noise=1e-3)
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if ".experts." in n or ".router." in n], lr=0.1)
    call(model, example(name), grad=True).square().mean().backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)
    moefx.untransform(model)
    assert not hasattr(model, "moefx")
    assert fingerprint(model) == before


def test_train_and_eval_reach_the_new_modules() -> None:
    model = moefx.transform(build().train(), example())
    assert all(m.training for m in model.modules())
    model.eval()
    assert not any(m.training for m in model.modules())
    assert moefx.transform(build(), example()).training is False
