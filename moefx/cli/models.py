"""From the name of a model on the command line to the model and its example inputs."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moefx.cli.frame import debugging
from moefx.errors import InputError, MoefxError, nearest

if TYPE_CHECKING:
    from torch import nn

DIFFUSERS = "diffusers:"


def is_folder(name: str) -> bool:
    """Tell whether ``name`` is the path of a saved folder rather than something to build."""
    return Path(name).is_dir() or (":" not in name and ("/" in name or name.startswith(".")))


def build(
    name: str, *, config: Path | None = None, meta: bool = False, seed: int = 0, inputs: str | None = None
) -> tuple[nn.Module, Any]:
    """Return the model called ``name`` and its example inputs (None: to be synthesised).

    Raises:
        InputError: there is no such model, or it cannot be built.
        UnsafeInputError: a saved folder is damaged.
    """
    if name.startswith(DIFFUSERS):
        model, given = _diffusers(name.removeprefix(DIFFUSERS), config, meta, seed), None
    else:
        if config is not None:
            raise InputError(f"build {name!r} from a config", found="no diffusers class", do="drop --config")
        model, given = (_load(name, meta), None) if is_folder(name) else _factory(name, meta, seed)
    if inputs is not None:
        with _as_input_error(f"make inputs with {inputs!r}"):
            given = load_callable(inputs)(model)
    return model, given


def _diffusers(class_name: str, config: Path | None, meta: bool, seed: int) -> nn.Module:
    from moefx import zoo

    with _needs("diffusers"):
        if config is not None:
            return zoo.from_config(class_name, config, device="meta" if meta else "cpu", seed=seed).eval()
        if meta:
            return zoo.from_config(class_name, zoo.tiny_config(class_name), device="meta").eval()
        return zoo.tiny(class_name, seed=seed)


def _load(name: str, meta: bool) -> nn.Module:
    from moefx.model.load import load

    if meta:
        raise InputError(f"load {name!r} on meta", found="a saved folder", do="drop --meta")
    return load(name)


def _factory(name: str, meta: bool, seed: int) -> tuple[nn.Module, Any]:
    import torch
    from torch import nn

    make = load_callable(name)
    with (
        _as_input_error(f"build a model with {name!r}"),
        torch.random.fork_rng(devices=[]),
        torch.device("meta" if meta else "cpu"),
    ):
        torch.manual_seed(seed)
        made = make()
    model, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"build a model with {name!r}",
            found=f"it returned a {type(model).__name__}",
            do="return a torch.nn.Module, or (module, inputs)",
        )
    return model, given


def load_callable(name: str) -> Any:
    """Import ``package.module:attribute``; the current folder is searched first, as by ``python -m``.

    Raises:
        InputError: there is no such callable.
    """
    module_name, mark, path = name.partition(":")
    if not mark or not module_name or not path:
        do = "write package.module:factory, diffusers:ClassName, or the path of a saved folder"
        raise InputError(f"use the model {name!r}", found="neither a name nor a folder", do=do)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    with _as_input_error(f"import {module_name!r}"):
        found: Any = importlib.import_module(module_name)
    for part in path.split("."):
        if not hasattr(found, part):
            known = [n for n, v in vars(found).items() if callable(v) and not n.startswith("_")][:40]
            raise InputError(f"use {name!r}", found=f"no {part!r} in {module_name}", do=nearest(part, known))
        found = getattr(found, part)
    if isinstance(found, types.ModuleType) or not callable(found):
        raise InputError(f"use {name!r}", found=f"a {type(found).__name__}", do="name a callable")
    return found


def random_batches(model: nn.Module, count: int, seed: int) -> list[Any]:
    """Return batches of synthesised inputs.

    Raises:
        InputError: none can be made for this model.
    """
    from moefx.graph.inputs import synthesise

    return [synthesise(model, batch=2, seed=seed + i) for i in range(count)]


@contextlib.contextmanager
def _as_input_error(asked: str) -> Iterator[None]:
    """Report what the user's own code raises as an unusable input."""
    try:
        yield
    except MoefxError:
        raise
    except Exception as error:
        if debugging():
            raise
        found = f"{type(error).__name__}: {error}"
        raise InputError(asked, found=found, do="set MOEFX_DEBUG=1 to see where it was raised") from error


@contextlib.contextmanager
def _needs(package: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise InputError(
            f"build a model of {package}", found=f"{package} is not installed", do=f"pip install 'moefx[{package}]'"
        ) from error
