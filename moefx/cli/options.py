"""Options that several commands take, and ``-o key=value`` turned into typed pass options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moefx.errors import InputError, OptionError

_REWRITE, _OUTPUT, _BUILD = "Rewrite", "Output", "Model"
STAGE_NAMES = ("tree", "graph", "sites", "plan", "routed", "lowered", "kernels")
TARGET_NAMES = ("sm_80", "sm_90", "sm_100", "gfx942")
FORMAT_NAMES = ("text", "python", "json", "dot", "svg")


def _starting(names: list[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _models(incomplete: str) -> list[str]:
    from moefx.zoo import names

    return _starting([f"diffusers:{name}" for name in names()], incomplete)


def recipe_names(incomplete: str) -> list[str]:
    """Complete the name of a recipe."""
    from moefx.recipes import recipes

    return _starting([recipe.name for recipe in recipes()], incomplete)


def _stages(incomplete: str) -> list[str]:
    return _starting(list(STAGE_NAMES), incomplete)


def _formats(incomplete: str) -> list[str]:
    return _starting(list(FORMAT_NAMES), incomplete)


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="package.module:factory, diffusers:ClassName, or a saved folder.",
        autocompletion=_models,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="config.json of a diffusers model, in place of a tiny one.", rich_help_panel=_BUILD),
]
Meta = Annotated[
    bool, typer.Option("--meta", help="Build without weights, on the meta device: any size.", rich_help_panel=_BUILD)
]
InputsFrom = Annotated[
    str | None,
    typer.Option(
        "--inputs",
        metavar="MODULE:FUNCTION",
        help="A callable that takes the model and returns example inputs (dict, tuple, or both).",
        rich_help_panel=_BUILD,
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe", "-r", help="Rewrite to apply, or several with commas; see [bold]moefx recipes[/bold].",
        autocompletion=recipe_names, rich_help_panel=_REWRITE,
    ),
]  # fmt: skip
PassOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", metavar="KEY=VALUE", help="Option of the recipe's passes; repeat for more.",
        rich_help_panel=_REWRITE,
    ),
]  # fmt: skip
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration", metavar="FILE", help="What [bold]moefx calibrate[/bold] wrote.", rich_help_panel=_REWRITE
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget", metavar="SHARE", help="Active FLOPs to keep; which sites are routed, how far, is chosen.",
        rich_help_panel=_REWRITE,
    ),
]  # fmt: skip
Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="GLOB", help="Only these sites: kind, name or glob.", rich_help_panel=_REWRITE),
]  # fmt: skip
Skip = Annotated[
    list[str] | None,
    typer.Option("--skip", metavar="GLOB", help="Not these sites: kind, name or glob.", rich_help_panel=_REWRITE),
]  # fmt: skip
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.", rich_help_panel=_REWRITE)]
Json = Annotated[bool, typer.Option("--json", help="Write JSON, errors too.", rich_help_panel=_OUTPUT)]
Out = Annotated[Path | None, typer.Option("--out", help="Write to this file, not to stdout.", rich_help_panel=_OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No warnings on stderr.", rich_help_panel=_OUTPUT)]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="Log more on stderr; -vv for all.", rich_help_panel=_OUTPUT)
]
Stage = Annotated[
    str,
    typer.Option(
        "--stage", help=f"What to show: {', '.join(STAGE_NAMES)}.", autocompletion=_stages, rich_help_panel=_OUTPUT
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        help=f"Device of stages lowered and kernels: {', '.join(TARGET_NAMES)}.",
        autocompletion=lambda incomplete: _starting(list(TARGET_NAMES), incomplete),
        rich_help_panel=_OUTPUT,
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format", "-f", help=f"How: {', '.join(FORMAT_NAMES)}.", autocompletion=_formats, rich_help_panel=_OUTPUT
    ),
]


def verbosity(quiet: bool, verbose: int) -> int:
    """Return -1 for quiet, else how often ``-v`` was given."""
    return -1 if quiet else verbose


def output_format(format: str | None, as_json: bool) -> str | None:
    """Combine ``--format`` and ``--json``.

    Raises:
        OptionError: they contradict each other.
    """
    if as_json and format not in (None, "json"):
        raise OptionError(f"write {format!r} and JSON", found="--json and --format differ", do="give one of them")
    return "json" if as_json else format


def pass_options(given: list[str] | None, recipe: str | None, budget: float | None = None) -> dict[str, Any]:
    """Return ``-o`` options with the types that the passes of ``recipe`` declare; a budget has another default recipe.

    Raises:
        OptionError: an option is no ``key=value``, unknown, or of the wrong type.
    """
    from moefx.inspect.stages import DEFAULT_RECIPE
    from moefx.passes.rewrite import get_pass
    from moefx.recipes import build_passes, get_recipe

    found: dict[str, Any] = {}
    chosen = get_recipe(recipe or (DEFAULT_RECIPE if budget is None else "moefx-split"))
    fields = {name: field for p in chosen.passes for name, field in get_pass(p).Options.model_fields.items()}
    for item in given or []:
        key, mark, text = item.partition("=")
        key = key.strip().replace("-", "_")
        if not mark or not key:
            raise OptionError(f"use option {item!r}", found="no '='", do="write -o key=value")
        if key not in fields:
            build_passes(chosen.passes, {key: text})  # refuses it, with the nearest name
        found[key] = _typed(key, text, fields[key].annotation)
    return found


def _typed(key: str, text: str, annotation: Any) -> Any:
    from pydantic import TypeAdapter, ValidationError

    kind: TypeAdapter[Any] = TypeAdapter(annotation)
    text = text.strip()
    if text.lower() in ("none", "null"):
        text_values: list[Any] = [None, text]
    else:
        text_values = [text]
    problem: Any = None
    for value in text_values:
        try:
            return kind.validate_python(value) if value is None else kind.validate_strings(value)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
    raise OptionError(f"use {key} = {text!r}", found=problem, do="see the options with moefx recipes NAME")


def load_calibration(path: Path | None) -> Any:
    """Return the calibration in a file; None without one.

    Raises:
        UnsafeInputError: it is no calibration.
    """
    from moefx.passes.calibration import Calibration

    return None if path is None else Calibration.load(path)


def check_folder_name(out: Path | None) -> Path:
    """Return the folder to write.

    Raises:
        InputError: none was given.
    """
    if out is None:
        raise InputError("save the routed model", found="no folder", do="give --out FOLDER")
    return out
