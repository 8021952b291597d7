"""``moefx doctor``."""

from __future__ import annotations

import importlib.metadata
import json as json_module
import os
import platform
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from moefx import __version__
from moefx.cli import options as o
from moefx.cli.frame import emit, working

_PACKAGES = ("torch", "numpy", "scipy", "safetensors", "networkx", "diffusers", "transformers", "peft", "triton")
_OPTIONAL = frozenset({"diffusers", "transformers", "peft", "triton"})


@dataclass(frozen=True)
class Check:
    """One line: ``needed`` ones decide the exit code."""

    name: str
    ok: bool
    found: str
    needed: bool = False
    advice: str = ""


def doctor(json: o.Json = False, out: o.Out = None) -> None:
    """Report what moefx finds on this machine: versions, devices, compilers, cache folder, entry points.

    Exits with 4 if something that moefx needs is missing.
    """
    with working(0):
        checks = [*_packages(), *_devices(), _compiler(), _cache(), *_registrations()]
    ok = all(check.ok or not check.needed for check in checks)
    if json:
        head = {"format": "moefx.doctor", "schema_version": 1, "ok": ok}
        emit(json_module.dumps(head | {"checks": [asdict(check) for check in checks]}, indent=1) + "\n", out)
    else:
        emit(_text(checks), out)
    if not ok:
        raise typer.Exit(4)


def _text(checks: list[Check]) -> str:
    from moefx.inspect.text import clean

    lines = [f"moefx {__version__}"]
    for check in checks:
        mark = "ok" if check.ok else "missing" if check.needed else "-"
        advice = f"  ({check.advice})" if check.advice and not check.ok else ""
        lines.append(f"  {mark:<8}{check.name:<22}{clean(check.found)}{advice}")
    return "\n".join(lines) + "\n"


def _packages() -> list[Check]:
    checks = [Check("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    for name in _PACKAGES:
        needed = name not in _OPTIONAL
        try:
            checks.append(Check(name, True, importlib.metadata.version(name), needed))
        except importlib.metadata.PackageNotFoundError:
            extra = {"triton": "gpu", "peft": "dev"}.get(name, "diffusers")
            checks.append(Check(name, False, "not installed", needed, f"pip install 'moefx[{extra}]'"))
    return checks


def _devices() -> list[Check]:
    import torch

    checks = [Check("cpu", True, f"{torch.get_num_threads()} threads of {os.cpu_count()}, {_isa()}")]
    if not torch.cuda.is_available():
        return [*checks, Check("gpu", False, "none", advice="the CPU lowering is used")]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        checks.append(Check(f"gpu {i}", True, f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"))
    return checks


def _isa() -> str:
    import torch

    return str(torch.backends.cpu.get_cpu_capability()).lower()


def _compiler() -> Check:
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++", "cc", "gcc", "clang"]
    found = next((name for name in names if name and shutil.which(name)), "")
    advice = "torch.compile needs one on CPU"
    return Check("C++ compiler", bool(found), found or "none on the PATH", advice=advice)


def _cache() -> Check:
    from moefx.codegen.store import cache_folder

    folder = cache_folder()
    shown = str(folder).replace(str(Path.home()), "~")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Check("cache folder", True, shown)
    except OSError as error:
        return Check("cache folder", False, f"{shown}: {error.strerror}", advice="set MOEFX_CACHE_DIR")


def _registrations() -> list[Check]:
    import torch

    import moefx.ops
    import moefx.recipes

    backends = importlib.metadata.entry_points(group="torch_dynamo_backends")
    backend = next((e.value for e in backends if e.name == "moefx"), "")
    commands = importlib.metadata.entry_points(group="console_scripts")
    command = next((e.value for e in commands if e.name == "moefx"), "")
    dialect = [name for name in moefx.ops.__all__ if hasattr(torch.ops.moefx, name)]
    recipes = [recipe.name for recipe in moefx.recipes.recipes()]
    advice = "install moefx with pip; running from a folder registers nothing"
    return [
        Check("torch.compile backend", bool(backend), backend or "not registered", advice=advice),
        Check("command", bool(command), command or "not registered", advice=advice),
        Check("dialect", bool(dialect), ", ".join(f"moefx::{name}" for name in dialect) or "none", True),
        Check("recipes", bool(recipes), f"{len(recipes)}: {', '.join(recipes)}", True),
    ]
