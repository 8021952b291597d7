"""What a recipe is: a name, its source, and the passes with their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moefx.errors import OptionError, nearest
from moefx.passes.rewrite.base import Pass, get_pass


@dataclass(frozen=True)
class Recipe:
    """One published system, or one idea.

    Attributes:
        name: how it is asked for.
        summary: one line.
        paper: reference.
        equation: what a rewritten site computes.
        passes: pass names in order, with the options that make the recipe; users override them by name.
        notes: choices made where the source is silent.
    """

    name: str
    summary: str
    paper: str
    equation: str
    passes: Mapping[str, Mapping[str, Any]]
    notes: str = ""
    aliases: tuple[str, ...] = field(default=())


_RECIPES: dict[str, Recipe] = {}


def register_recipe(recipe: Recipe) -> Recipe:
    """Make a recipe available by its name and aliases."""
    for name in (recipe.name, *recipe.aliases):
        _RECIPES[name] = recipe
    return recipe


def recipes() -> list[Recipe]:
    """Return all recipes, by name."""
    return sorted({r.name: r for r in _RECIPES.values()}.values(), key=lambda r: r.name)


def get_recipe(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        OptionError: there is none; the message names the nearest.
    """
    if name not in _RECIPES:
        raise OptionError(f"use recipe {name!r}", found="no such recipe", do=nearest(name, [r.name for r in recipes()]))
    return _RECIPES[name]


def build_passes(passes: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any]) -> list[Pass]:
    """Build the passes of a recipe; each option goes to every pass that has it.

    Raises:
        OptionError: an option belongs to none of them.
    """
    classes = {name: get_pass(name) for name in passes}
    known = {field_name for cls in classes.values() for field_name in cls.Options.model_fields}
    for name in options:
        if name not in known:
            where = f"of {', '.join(classes)}"
            raise OptionError(f"use option {name!r} {where}", found="no such option", do=nearest(name, known))
    return [
        cls(**{**passes[name], **{k: v for k, v in options.items() if k in cls.Options.model_fields}})
        for name, cls in classes.items()
    ]
