"""Recipes as a page: the unifying table, then each recipe with its equation, its options and its notes."""

from __future__ import annotations

import dataclasses
from typing import Any

from moefx.passes.rewrite import get_pass
from moefx.recipes import Choices, Recipe, recipes

HEAD = """# Recipes

Published ways to route a diffusion model, each a few choices over one set of blocks. This page is written by
`moefx recipes --markdown --out docs/recipes.md` from the recipe files.

`moefx.transform(model, recipe="name", option=value)` applies one; `moefx recipes NAME` shows its options. *Start* is
what the rewritten model computes before training, against the dense one. *Router* says where the router's weights come
from: *learned* by a task loss, in training and in evaluation mode; *fitted* before training; *none*, nothing to learn.
*Batch* says whether a sample's result is the same whatever else is in its batch.

Every recipe can be saved and loaded, exports and compiles as one graph that serves other batch sizes and steps, and
lets no value of the routed path reach the host; what one cannot keep is said at its end.
"""

WAIVED = {
    "gradient": "the router learns whenever the model is called",
    "host": "no value reaches the host",
    "graph": "one graph for every call",
}


def options_of(recipe: Recipe) -> list[dict[str, Any]]:
    """Return the options of a recipe's passes, with the defaults that the recipe sets."""
    rows = []
    for pass_name, chosen in recipe.passes.items():
        for key, field in get_pass(pass_name).Options.model_fields.items():
            default = chosen.get(key, field.get_default(call_default_factory=True))
            kind = str(getattr(field.annotation, "__name__", field.annotation)).replace("typing.", "")
            about = field.description or ""
            rows.append({"pass": pass_name, "option": key, "type": kind, "default": default, "about": about})
    return rows


def recipes_markdown() -> str:
    """Return the page of all recipes."""
    names = [field.name for field in dataclasses.fields(Choices)]
    titles = [name.replace("batch_invariant", "batch").replace("_", " ") for name in names]
    lines = [HEAD, "## The table", "", f"| recipe | {' | '.join(titles)} |", "|---" * (len(names) + 1) + "|"]
    for recipe in recipes():
        cells = [_cell(getattr(recipe.choices, name)) for name in names]
        lines.append(f"| [{recipe.name}](#{_anchor(recipe.name)}) | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(_section(recipe) for recipe in recipes())])


def _cell(value: object) -> str:
    text = {True: "invariant", False: "**depends**"}[value] if isinstance(value, bool) else str(value)
    return text.replace("|", "\\|")


def _anchor(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum() or c in "-_")


def _section(recipe: Recipe) -> str:
    """Return one recipe: what it makes, where it is from, what it computes, what it sets."""
    chosen = {name: ", ".join(f"`{k}={v!r}`" for k, v in options.items()) for name, options in recipe.passes.items()}
    passes = "; ".join(f"`{name}`" + (f" with {options}" if options else "") for name, options in chosen.items())
    also = f" Also called {', '.join(f'`{alias}`' for alias in recipe.aliases)}." if recipe.aliases else ""
    parts = [
        f"## {recipe.name}\n",
        f"{recipe.summary}.{also}\n",
        f"Source: {recipe.paper}.\n",
        f"```text\n{recipe.equation}\n```\n",
        f"Passes: {passes}.\n",
    ]
    parts += [f"{recipe.notes}\n"] if recipe.notes else []
    return "\n".join([*parts, *(f"Not kept: {WAIVED[rule]}, because {why}.\n" for rule, why in recipe.waives.items())])
