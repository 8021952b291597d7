"""Recipes: published systems as lists of passes, one file each.

Every module of this folder registers its recipe when it is imported. Other packages add theirs through the entry-point
group ``moefx.recipes``: each entry names a module to import.
"""

from __future__ import annotations

import importlib
import pkgutil

from moefx.recipes.base import Choices, Recipe, build_passes, get_recipe, recipes, register_recipe

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = ["Choices", "Recipe", "build_passes", "get_recipe", "recipes", "register_recipe"]
