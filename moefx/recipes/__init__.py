"""Recipes: published systems as lists of passes, one file each."""

from moefx.recipes import (
    drop_upcycling,
    mixture_of_depths,
    mixture_of_heads,
    sparse_upcycling,
    timestep_upcycling,
    virtual_groups,
)
from moefx.recipes.base import Recipe, build_passes, get_recipe, recipes, register_recipe

# Importing these modules registers their recipes.
_MODULES = (drop_upcycling, mixture_of_depths, mixture_of_heads, sparse_upcycling, timestep_upcycling, virtual_groups)

__all__ = ["Recipe", "build_passes", "get_recipe", "recipes", "register_recipe"]
