"""Rewriting passes, one file each: every module of this folder registers its pass when it is imported."""

from __future__ import annotations

import importlib
import pkgutil

from moefx.passes.rewrite.base import (
    BlockContext,
    BlockPass,
    Context,
    Contract,
    Costs,
    Edit,
    Options,
    Pass,
    SitePass,
    get_pass,
    passes,
    register_pass,
)

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = [
    "BlockContext",
    "BlockPass",
    "Context",
    "Contract",
    "Costs",
    "Edit",
    "Options",
    "Pass",
    "SitePass",
    "get_pass",
    "passes",
    "register_pass",
]
