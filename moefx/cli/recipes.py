"""``moefx recipes``."""

from __future__ import annotations

import dataclasses
import json as json_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moefx.cli import options as o
from moefx.cli.frame import emit, working

if TYPE_CHECKING:
    from moefx.recipes import Recipe


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Show one recipe with its options.", autocompletion=o.recipe_names),
    ] = None,
    json: o.Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Write the page of all recipes.")] = False,
    out: o.Out = None,
) -> None:
    """List the recipes, or show one: paper, equation, passes and every option with its default."""
    with working(0):
        from moefx.inspect.recipes import recipes_markdown
        from moefx.inspect.tables import table_text
        from moefx.recipes import get_recipe
        from moefx.recipes import recipes as all_recipes

        found = all_recipes() if name is None else [get_recipe(name)]
        if markdown:
            text = recipes_markdown()
        elif json:
            head = {"format": "moefx.recipes", "schema_version": 1}
            text = json_module.dumps(head | {"recipes": [_data(r) for r in found]}, indent=1) + "\n"
        elif name is None:
            columns = (("recipe", "left"), ("what it makes", "left"), ("paper", "left"))
            text = table_text(f"{len(found)} recipes", columns, [(r.name, r.summary, r.paper) for r in found])
        else:
            text = _one(found[0])
    emit(text, out)


def _data(recipe: Recipe) -> dict[str, Any]:
    from moefx.inspect.recipes import options_of

    return {
        "name": recipe.name,
        "aliases": list(recipe.aliases),
        "summary": recipe.summary,
        "paper": recipe.paper,
        "equation": recipe.equation,
        "notes": recipe.notes,
        "choices": dataclasses.asdict(recipe.choices),
        "waives": dict(recipe.waives),
        "passes": {name: dict(chosen) for name, chosen in recipe.passes.items()},
        "options": options_of(recipe),
    }


def _one(recipe: Recipe) -> str:
    from moefx.inspect.recipes import options_of
    from moefx.inspect.tables import table_text
    from moefx.inspect.text import wrap

    lines = [f"{recipe.name}: {recipe.summary}"]
    facts = {"paper": recipe.paper, "equation": recipe.equation, "notes": recipe.notes}
    facts["aliases"] = ", ".join(recipe.aliases)
    facts["waives"] = "; ".join(f"{rule}: {why}" for rule, why in recipe.waives.items())
    for title, text in facts.items():
        lines += wrap(f"  {title:<9} {text}", " " * 12) if text else []
    choices = [(key.replace("_", " "), value) for key, value in dataclasses.asdict(recipe.choices).items()]
    lines.append("\n" + table_text("choices", (("slot", "left"), ("choice", "left")), choices))
    columns = (("option", "left"), ("default", "left"), ("type", "left"), ("about", "left"))
    rows = [(row["option"], row["default"], row["type"], row["about"]) for row in options_of(recipe)]
    return "\n".join(lines) + "\n\n" + table_text(f"passes: {', '.join(recipe.passes)}", columns, rows)
