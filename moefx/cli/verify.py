"""``moefx verify``."""

from __future__ import annotations

import json as json_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moefx.cli import options as o
from moefx.cli.frame import emit, working
from moefx.errors import VerifyError

if TYPE_CHECKING:
    from torch import nn

    from moefx.model.plan import Plan


def verify(
    model: o.Model,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="Dense model to compare a saved folder with."),
    ] = None,
    recipe: o.RecipeName = None,
    option: o.PassOptions = None,
    calibration: o.CalibrationFile = None,
    only: o.Only = None,
    skip: o.Skip = None,
    seed: o.Seed = 0,
    config: o.Config = None,
    inputs: o.InputsFrom = None,
    json: o.Json = False,
    out: o.Out = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> None:
    """Prove a rewrite: of a model (rewritten in memory, site by site and as a whole), or of a saved folder.

    A folder is checked for its hashes, its plan and its tensors, and is run once; with [bold]--against[/bold] its
    output is compared with a dense model's. Exits with 4 if a contract is broken, with 5 if the folder is unsafe.
    """
    with working(o.verbosity(quiet, verbose)):
        from moefx.cli.models import build, is_folder

        if is_folder(model):
            facts = _folder(model, against, config, seed, inputs)
        else:
            built, given = build(model, config=config, seed=seed, inputs=inputs)
            chosen = o.pass_options(option, recipe) | {"calibration": o.load_calibration(calibration)}
            facts = _model(built, given, recipe, chosen, only, skip, seed)
    text = facts.pop("text")
    if json:
        head = {"format": "moefx.verify", "schema_version": 1, "ok": True}
        emit(json_module.dumps(head | facts, indent=1) + "\n", out)
    else:
        emit(text, out)


def _model(
    model: nn.Module, inputs: Any, recipe: str | None, chosen: dict[str, Any],
    only: list[str] | None, skip: list[str] | None, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Transform the model, which checks every contract, and return the receipt's checks."""
    from moefx import api
    from moefx.inspect.stages import DEFAULT_RECIPE
    from moefx.inspect.tables import checks_text
    from moefx.model.handle import handle_of

    api.transform(
        model, inputs, recipe=recipe or DEFAULT_RECIPE, only=only or None, skip=skip or None, seed=seed, **chosen
    )
    handle = handle_of(model)
    assert handle is not None
    report = handle.report
    return {
        "model": report.plan.model,
        "proof": report.proof_summary(),
        "checks": [check.model_dump() for check in report.checks],
        "text": f"{report.plan.model}: {report.proof_summary()}\n{checks_text(report)}",
    }


def _folder(name: str, against: str | None, config: Any, seed: int, inputs: str | None) -> dict[str, Any]:
    """Load a saved folder (which checks hashes, plan and tensors), run it, compare it with a dense model."""
    from moefx.cli.models import build
    from moefx.model.handle import handle_of

    dense, given = (None, None) if against is None else build(against, config=config, seed=seed, inputs=inputs)
    routed, own = _load(name, dense, config, against, seed)
    handle = handle_of(routed)
    assert handle is not None
    count = sum(1 for _ in routed.state_dict())
    checks = [f"{count} tensors have the saved hashes, names and shapes; the plan fits the model"]
    outputs = _run(routed, own if own is not None else given)
    checks.append("one forward: every output is finite")
    error = bound = None
    if dense is not None:
        error, bound = _compare(dense, given, outputs, handle.plans)
        checks.append(f"relative error against the dense model {error:.2e}, at most {bound:.1e}")
    text = "\n".join([f"{name}: {type(routed).__name__}", *(f"  ok  {check}" for check in checks)]) + "\n"
    return {"model": type(routed).__name__, "checks": checks, "error": error, "bound": bound, "text": text}


def _load(name: str, dense: nn.Module | None, config: Any, against: str | None, seed: int) -> tuple[nn.Module, Any]:
    from moefx.cli.models import DIFFUSERS, build
    from moefx.model.load import load

    if dense is None or against is None or against.startswith(DIFFUSERS):
        return load(name), None
    fresh, given = build(against, config=config, seed=seed)
    return load(name, fresh), given


def _run(model: nn.Module, inputs: Any) -> list[Any]:
    import torch

    from moefx.graph.inputs import synthesise
    from moefx.graph.signature import normalise_inputs
    from moefx.model.verify import run

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        args, kwargs = normalise_inputs(model, synthesise(model) if inputs is None else inputs)
    outputs = run(model, args, kwargs)
    if not all(bool(torch.isfinite(x).all()) for x in outputs):
        raise VerifyError(
            f"run {type(model).__name__}", found="NaN or infinity in the output", do="check the weights that were saved"
        )
    return outputs


def _compare(dense: nn.Module, inputs: Any, outputs: list[Any], plans: list[Plan]) -> tuple[float, float]:
    from moefx.model.realise import build_pass
    from moefx.model.verify import TOLERANCE, compare_models

    error = compare_models(_run(dense, inputs), outputs)
    contracts = [build_pass(plan, p.name).contract() for plan in plans for p in plan.passes]
    sites = sum(len(plan.sites) for plan in plans)
    exact = all(contract.kind == "exact" for contract in contracts)
    bound = TOLERANCE.get(outputs[0].dtype, 1e-5) * max(1, sites) if exact else max(c.bound for c in contracts) * sites
    if not error <= bound:
        raise VerifyError(
            f"compare the saved {type(dense).__name__} with the dense one",
            found=f"relative error {error:.3g}, at most {bound:.2g} was promised",
            do="a model that was trained after the rewrite differs; compare with the dense weights it started from",
        )
    return error, bound
