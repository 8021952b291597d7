"""Every bad input gives a typed error that says what was asked, what was found and what to do, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moefx
from examples.dit import DiT
from examples.randomise import randomise_zeros
from moefx.errors import (
    CaptureError,
    GuardError,
    InputError,
    MoefxError,
    NothingMatched,
    OptionError,
    PlanError,
    VerifyError,
    nearest,
)
from moefx.passes.rewrite import get_pass
from tests.trace_support import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore::moefx.errors.MoefxWarning")
X, T, Y = (
    torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    torch.tensor([3.0, 700.0]),
    torch.arange(2),
)
INPUTS = (X, T, Y)


def dit() -> nn.Module:
    torch.manual_seed(0)
    return randomise_zeros(DiT(image_size=8, patch=2, in_channels=3, depth=2, width=32, heads=4, classes=5)).eval()


class NoSite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Untraceable(NoSite):
    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(1, generator=torch.Generator())  # the line that the error must show
        return super().forward(x) + noise


class OddOutput(NoSite):
    def forward(self, x: Tensor) -> Any:
        return {"out": super().forward(x), "model": self}


def with_nan() -> nn.Module:
    model = dit()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.fc2.weight")[0, 0] = float("nan")
    return model


def with_nan_elsewhere() -> nn.Module:
    model = dit()
    with torch.no_grad():
        model.get_parameter("blocks.1.attn.proj.weight")[0, 0] = float("inf")
    return model


def inputs(*values: Any) -> dict[str, Any]:
    return {"inputs": values}


# name: (model, arguments of transform, error class, what its message must hold)
Case = tuple[Callable[[], Any], dict[str, Any], type[MoefxError], tuple[str, ...]]
CASES: dict[str, Case] = {
    # the model
    "a string": (lambda: "dit", inputs(*INPUTS), InputError, ("type str", "torch.nn.Module")),
    "a class": (lambda: DiT, inputs(*INPUTS), InputError, ("an object of type type", "torch.nn.Module")),
    "nothing": (lambda: None, inputs(*INPUTS), InputError, ("NoneType",)),
    "a function": (lambda: dit().forward, inputs(*INPUTS), InputError, ("an object of type method",)),
    "no site": (NoSite, inputs(X), NothingMatched, ("NoSite", "0 sites", "this model has none")),
    "no site, no parameter": (nn.Identity, inputs(X), NothingMatched, ("Identity", "0 sites")),
    "untraceable": (Untraceable, inputs(X), CaptureError, ("test_errors.py:", "the line that the error must show")),
    "odd output": (OddOutput, inputs(X), CaptureError, ("returns a OddOutput",)),
    "NaN in a weight": (with_nan, inputs(*INPUTS), VerifyError, ("NaN or infinity in blocks.1.mlp.fc2.weight",)),
    "NaN, unverified": (with_nan, {"inputs": INPUTS, "verify": False}, VerifyError, ("blocks.1.mlp.fc2.weight",)),
    "infinity elsewhere": (with_nan_elsewhere, inputs(*INPUTS), VerifyError, ("dense model's own output",)),
    # the inputs
    "no inputs": (dit, {}, InputError, ("argument 'x' of forward", "x: ", "register")),
    "a list": (dit, {"inputs": list(INPUTS)}, InputError, ("type list", "a tuple of positional ones")),
    "a tensor": (dit, {"inputs": X}, InputError, ("type Tensor",)),
    "a number": (dit, {"inputs": 3}, InputError, ("type int",)),
    "a set": (dit, {"inputs": {1, 2}}, InputError, ("type set",)),
    "keys that are no names": (dit, {"inputs": {1: X}}, InputError, ("keywords must be strings",)),
    "too few": (dit, inputs(X, T), InputError, ("missing a required argument: 'y'", "forward(x, t, y)")),
    "too many": (dit, inputs(X, T, Y, Y), InputError, ("too many positional arguments", "forward(x, t, y)")),
    "unknown keyword": (dit, {"inputs": {"x": X, "t": T, "z": Y}}, InputError, ("'y'", "keywords ['t', 'x', 'z']")),
    "wrong channels": (dit, inputs(X[:, :2], T, Y), CaptureError, ("3 channels", "examples/dit.py:")),
    "wrong rank": (dit, inputs(X[0], T, Y), CaptureError, ("examples/dit.py:",)),
    "unequal batches": (dit, inputs(X, torch.ones(3), Y), CaptureError, ("examples/dit.py:", "self.t_embedder(t)")),
    "float64": (dit, inputs(X.double(), T, Y), CaptureError, ("double", "examples/dit.py:")),
    "half": (dit, inputs(X.half(), T, Y), CaptureError, ("Half", "examples/dit.py:")),
    "float labels": (dit, inputs(X, T, Y.float()), CaptureError, ("float32", "embedding_table")),
    "labels out of range": (dit, inputs(X, T, Y + 100), InputError, ("IndexError", "embedding_table", "examples/dit")),
    "another device": (dit, inputs(X.to("meta"), T, Y), InputError, ("x is on meta, the model on cpu", "move")),
    "an array": (dit, inputs(X.numpy(), T, Y), CaptureError, ("'x' is a ndarray", "pass tensors")),
    "a None": (dit, inputs(None, T, Y), CaptureError, ("NoneType", "examples/dit.py:")),
    "NaN": (dit, inputs(X * np.nan, T, Y), VerifyError, ("NaN or infinity", "pass other inputs")),
    "no sample": (dit, inputs(X[:0], T[:0], Y[:0]), InputError, ("no floating point number", "at least one sample")),
    # what to rewrite
    "glob": (dit, {"only": "blokcs.*"}, NothingMatched, ("only = 'blokcs.*'", "did you mean 'blocks.")),
    "glob in a list": (dit, {"only": ["ffn", "encoder.*"]}, NothingMatched, ("'encoder.*'", "known: blocks.0")),
    "skip glob": (dit, {"skip": "nothing*"}, NothingMatched, ("skip = 'nothing*'",)),
    "everything skipped": (dit, {"skip": "*"}, NothingMatched, ("blocks.0.mlp: not selected", "examples/dit.py")),
    "kind of another pass": (dit, {"only": "attention"}, NothingMatched, ("not selected",)),
    "empty only": (dit, {"only": ""}, OptionError, ("only = ''", "globs or site kinds")),
    "only a number": (dit, {"only": 3}, OptionError, ("only = 3",)),
    "only an empty list": (dit, {"only": []}, OptionError, ("only = []",)),
    "only numbers": (dit, {"only": [3]}, OptionError, ("only = [3]",)),
    "skip bytes": (dit, {"skip": b"x"}, OptionError, ("skip = b'x'",)),
    # options
    "top_k above experts": (dit, {"experts": 2, "top_k": 4}, OptionError, ("top_k = 4 of only 2 experts",)),
    "top_k 0": (dit, {"top_k": 0}, OptionError, ("top_k = 0", "greater than or equal to 1")),
    "no experts": (dit, {"experts": 0}, OptionError, ("experts = 0", "greater than or equal to 1")),
    "experts a string": (dit, {"experts": "8"}, OptionError, ("experts = '8'", "integer")),
    "experts a float": (dit, {"experts": 8.0}, OptionError, ("experts = 8.0", "integer")),
    "experts a bool": (dit, {"experts": True}, OptionError, ("experts = True",)),
    "experts a list": (dit, {"experts": [8]}, OptionError, ("experts = [8]",)),
    "odd granularity": (dit, {"granularity": 3}, OptionError, ("multiples of granularity = 3",)),
    "width not divisible": (
        dit,
        {"experts": 10, "top_k": 5, "granularity": 5},
        NothingMatched,
        ("width 128 is not divisible by granularity 5", "[1, 2, 4, 8, 16, 32]", "blocks.0.mlp"),
    ),
    "infinite noise": (dit, {"noise": float("inf")}, OptionError, ("noise = inf", "finite")),
    "NaN noise": (dit, {"noise": float("nan")}, OptionError, ("noise = nan",)),
    "negative noise": (dit, {"noise": -1.0}, OptionError, ("noise = -1.0",)),
    "scale 0": (dit, {"scale": 0.0}, OptionError, ("scale = 0.0",)),
    "infinite scale": (dit, {"scale": float("inf")}, OptionError, ("scale = inf",)),
    "unknown mode": (dit, {"normalise": "N11"}, OptionError, ("normalise = 'N11'", "N10", "topk_softmax")),
    "unknown start": (dit, {"router_init": "zeros"}, OptionError, ("router_init = 'zeros'", "zero")),
    "too much redrawn": (dit, {"reinitialise": 2.0}, OptionError, ("reinitialise = 2.0",)),
    "every 0": (dit, {"every": 0}, OptionError, ("every = 0",)),
    "unknown option": (dit, {"expert": 8}, OptionError, ("'expert'", "did you mean 'experts'?", "top_k")),
    "unknown option, far": (dit, {"num_experts": 8}, OptionError, ("'num_experts'", "did you mean 'experts'?")),
    "start too far": (dit, {"reinitialise": 0.9, "max_error": 0.01}, VerifyError, ("blocks.0.mlp", "allows 0.01")),
    "too many heads": (dit, {"recipe": "moh", "shared_heads": 5}, NothingMatched, ("5 shared", "4 (examples/dit")),
    "no head": (dit, {"recipe": "moh", "shared_heads": 0, "active_heads": 0}, OptionError, ("no head is active",)),
    # recipes, passes, seed
    "unknown recipe": (dit, {"recipe": "sparse-upcyclng"}, OptionError, ("did you mean 'sparse-upcycling'?", "known:")),
    "recipe empty": (dit, {"recipe": ""}, OptionError, ("''", "known:")),
    "recipes of numbers": (dit, {"recipe": [3]}, OptionError, ("3",)),
    "no recipes": (dit, {"recipe": []}, OptionError, ("[]",)),
    "unknown in recipes": (dit, {"recipe": ["mod", "sparse-upcyclng"]}, OptionError, ("did you mean",)),
    "passes a string": (dit, {"passes": "upcycle"}, OptionError, ("'upcycle'", "list")),
    "passes a number": (dit, {"passes": 3}, OptionError, ("3", "list")),
    "no passes": (dit, {"passes": []}, OptionError, ("[]", "non-empty")),
    "unknown pass": (dit, {"passes": ["upcicle"]}, OptionError, ("did you mean 'upcycle'?",)),
    "passes of numbers": (dit, {"passes": [3]}, OptionError, ("int", "Pass objects")),
    "a class of passes": (dit, {"passes": [get_pass("upcycle")]}, OptionError, ("Pass objects",)),
    "a pass twice": (dit, {"passes": ["upcycle", "upcycle"]}, OptionError, ("'upcycle' twice",)),
    "seed a string": (dit, {"seed": "a"}, InputError, ("'a'", "integer")),
    "seed None": (dit, {"seed": None}, InputError, ("None",)),
    "seed a float": (dit, {"seed": 1.5}, InputError, ("1.5",)),
    "seed a bool": (dit, {"seed": True}, InputError, ("True",)),
    "seed too large": (dit, {"seed": 2**70}, InputError, ("2**63",)),
    "seed negative": (dit, {"seed": -1}, InputError, ("-1",)),
    "verify a string": (dit, {"verify": "no"}, InputError, ("'no'", "True or False")),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_before_anything_is_changed(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    build, arguments, kind, parts = CASES[name]
    model = build()
    arguments = dict(arguments)
    given = arguments.pop("inputs", INPUTS if len(arguments) else None)
    before = fingerprint(model) if isinstance(model, nn.Module) else None
    random_state = torch.get_rng_state()
    with pytest.raises(MoefxError) as caught:
        moefx.transform(model, given, **arguments)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert all(part in text for part in parts), text
    assert caught.value.asked
    assert caught.value.do
    assert torch.equal(random_state, torch.get_rng_state())
    if before is not None:
        assert fingerprint(model) == before
    assert "Traceback" not in "".join(capfd.readouterr())


# Bad weights and data: a plan reads neither.
READ = {"NaN in a weight", "NaN, unverified", "infinity elsewhere", "NaN", "no sample", "labels out of range"}
ONLY_APPLYING = READ | {"start too far", "verify a string"}


@pytest.mark.parametrize("name", [name for name in CASES if name not in ONLY_APPLYING])
def test_a_plan_refuses_the_same(name: str) -> None:
    build, arguments, kind, parts = CASES[name]
    arguments = dict(arguments)
    given = arguments.pop("inputs", INPUTS if len(arguments) else None)
    with pytest.raises(kind) as caught:
        moefx.plan(build(), given, **arguments)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize("name", sorted(ONLY_APPLYING - {"verify a string"}))
def test_a_plan_reads_no_data(name: str) -> None:
    build, arguments, *_ = CASES[name]
    arguments = {key: value for key, value in arguments.items() if key != "verify"}
    assert moefx.plan(build(), arguments.pop("inputs", INPUTS), **arguments).sites


@pytest.mark.parametrize("recipe", ["sparse-upcycling", "drop-upcycling", "virtual-groups"])
def test_transformed_twice(recipe: str) -> None:
    model = moefx.transform(dit(), INPUTS)
    before = fingerprint(model)
    for verb in (moefx.transform, moefx.plan):
        with pytest.raises(PlanError, match="by the same pass before") as caught:
            verb(model, INPUTS, recipe=recipe)
        assert "upcycle" in caught.value.asked
        assert "untransform" in caught.value.do
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: moefx.untransform(dit()), PlanError),
        (lambda: moefx.untransform("dit"), InputError),  # type: ignore[type-var]
        (lambda: moefx.sites("dit"), InputError),  # type: ignore[arg-type]
        (lambda: moefx.sites(dit()), InputError),
        (lambda: moefx.misses(None), InputError),  # type: ignore[arg-type]
        (lambda: moefx.trace("dit"), InputError),  # type: ignore[arg-type]
        (lambda: moefx.trace(dit(), [X]), InputError),  # type: ignore[arg-type]
    ],
)
def test_other_verbs(call: Callable[[], Any], kind: type[MoefxError]) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.found or "argument 'x'" in caught.value.asked
    assert caught.value.do


def test_untransform_twice() -> None:
    model = moefx.untransform(moefx.transform(dit(), INPUTS))
    with pytest.raises(PlanError, match="not transformed"):
        moefx.untransform(model)


@pytest.mark.parametrize(
    "change",
    [(X[None], T, Y), (X.double(), T, Y), (X, T, Y.int()), (X, None, Y), (X.to("meta"), T, Y), (X[:, :, :6], T, Y)],
)
def test_a_captured_graph_refuses_calls_outside_its_range(change: tuple[Any, ...]) -> None:
    graph = moefx.trace(dit(), INPUTS)
    with pytest.raises(GuardError) as caught:
        graph(*change)
    assert "captured" in caught.value.asked
    assert caught.value.found
    assert "trace" in caught.value.do


def test_messages_have_three_parts_in_order() -> None:
    assert str(MoefxError("do a thing", found="a problem", do="something else")) == (
        "do a thing\n  found: a problem\n  do: something else"
    )
    assert str(MoefxError("do a thing")) == "do a thing"


def test_every_error_is_a_moefx_error_with_its_exit_code() -> None:
    codes = {kind.__name__: kind("x").exit_code for kind in (InputError, CaptureError, GuardError, OptionError)}
    assert set(codes.values()) == {2}
    assert (NothingMatched("x").exit_code, VerifyError("x").exit_code) == (3, 4)
    assert issubclass(GuardError, CaptureError)
    assert issubclass(OptionError, PlanError)


def test_nearest_names() -> None:
    assert nearest("expert", ["top_k", "experts"]) == "did you mean 'experts'? known: experts, top_k"
    assert nearest("zzz", ["top_k"]) == "known: top_k"
