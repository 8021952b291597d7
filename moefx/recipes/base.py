"""What a recipe is: a name, its source, and the passes with their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Literal, get_args

from moefx.errors import OptionError, nearest
from moefx.passes.rewrite.base import Pass, get_pass

Rule = Literal["gradient", "host", "graph"]
Router = Literal["learned", "fitted", "none"]
ROUTERS: tuple[Router, ...] = get_args(Router)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a system chooses in each slot of the routing algebra, in a few words: a row of the table of recipes.

    Attributes:
        granularity: what is routed as one: token, sample, sampler step, head, channel group, block.
        reads: what the router reads.
        scorer: how it scores.
        selector: how scores become a choice.
        normaliser: how scores become gates.
        experts: what is chosen.
        combine: how results meet.
        losses: auxiliary terms, schedules and bias updates.
        start: what the rewritten model computes before training, against the dense one.
        router: where the router's weights come from. ``learned``: a task loss moves them, in training and in evaluation
            mode; ``fitted``: before training, and hard gates send them no gradient; ``none``: it has no weights.
        batch_invariant: whether a sample's result is the same whatever else is in its batch.
    """

    granularity: str
    reads: str
    scorer: str
    selector: str
    normaliser: str
    experts: str
    combine: str = "weighted sum"
    losses: str = "none"
    start: str
    router: Router = "learned"
    batch_invariant: bool = True


@dataclass(frozen=True)
class Recipe:
    """One published system, or one idea.

    Attributes:
        name: how it is asked for.
        summary: one line.
        paper: reference.
        equation: what a rewritten site computes.
        passes: pass names in order, with the options that make the recipe; users override them by name.
        choices: its row in the table of recipes.
        notes: choices made where the source is silent, and what of the released code is not reproduced.
        aliases: short names.
        waives: which of the rules for all recipes this one cannot keep, and why: ``gradient`` (the router learns by
            calling the model), ``host`` (no value reaches Python), ``graph`` (one graph for every call).
    """

    name: str
    summary: str
    paper: str
    equation: str
    passes: Mapping[str, Mapping[str, Any]]
    choices: Choices
    notes: str = ""
    aliases: tuple[str, ...] = field(default=())
    waives: Mapping[Rule, str] = field(default_factory=dict)


ENTRY_POINTS = "moefx.recipes"
_RECIPES: dict[str, Recipe] = {}


def register_recipe(recipe: Recipe) -> Recipe:
    """Make a recipe available by its name and aliases.

    Raises:
        OptionError: another recipe has one of these names.
    """
    for name in (recipe.name, *recipe.aliases):
        owner = _RECIPES.get(name, recipe).name
        if owner != recipe.name:
            raise OptionError(f"register the recipe {name!r}", found=f"{owner!r} has this name", do="choose another")
        _RECIPES[name] = recipe
    return recipe


@cache
def _load_entry_points() -> None:
    """Import what other packages offer: once, and only when recipes are asked for."""
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()


def recipes() -> list[Recipe]:
    """Return all recipes, by name."""
    _load_entry_points()
    return sorted({r.name: r for r in _RECIPES.values()}.values(), key=lambda r: r.name)


def get_recipe(name: str) -> Recipe:
    """Return a recipe by name; names with commas between them are composed to one.

    Raises:
        OptionError: there is none; the message names the nearest. Or two of them have a pass in common.
    """
    _load_entry_points()
    parts = [part.strip() for part in name.split(",")]
    if len(parts) > 1:
        return _composed([get_recipe(part) for part in parts])
    if name not in _RECIPES:
        raise OptionError(f"use recipe {name!r}", found="no such recipe", do=nearest(name, [r.name for r in recipes()]))
    return _RECIPES[name]


def _composed(parts: list[Recipe]) -> Recipe:
    """Return several recipes as one, all of whose passes are applied together."""
    name, passes = ",".join(part.name for part in parts), dict[str, Mapping[str, Any]]()
    for part in parts:
        again = sorted(passes.keys() & part.passes.keys())
        if again:
            found = f"{part.name} has the pass {again[0]} in common with another"
            raise OptionError(f"compose {name}", found=found, do="name recipes of different kinds of sites")
        passes |= part.passes
    words = {
        slot.name: " + ".join(dict.fromkeys(getattr(part.choices, slot.name) for part in parts))
        for slot in fields(Choices)
        if slot.type == "str"
    }
    return Recipe(
        name,
        " + ".join(part.summary for part in parts),
        "; ".join(part.paper for part in parts),
        ";  ".join(part.equation for part in parts),
        passes,
        Choices(
            **words,
            router=next(kind for kind in ROUTERS if any(part.choices.router == kind for part in parts)),
            batch_invariant=all(part.choices.batch_invariant for part in parts),
        ),
        " ".join(part.notes for part in parts if part.notes),
        waives={rule: why for part in parts for rule, why in part.waives.items()},
    )


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
