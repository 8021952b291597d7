"""Small random-weight instances of the denoisers in diffusers, and builders from a config without weights.

Nothing is downloaded; diffusers is imported on the first call.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moefx.errors import InputError, nearest
from moefx.zoo._tiny import TINY

__all__ = ["from_config", "names", "tiny", "tiny_config"]


def names() -> list[str]:
    """Return the class names that `tiny` can build, sorted."""
    return sorted(TINY)


def tiny_config(class_name: str) -> dict[str, Any]:
    """Return the config overrides of the tiny instance of a class."""
    if class_name not in TINY:
        raise InputError(f"no tiny config for {class_name!r}", do=nearest(class_name, TINY))
    return dict(TINY[class_name])


def tiny(class_name: str, *, seed: int = 0, nonzero: bool = True, **overrides: Any) -> nn.Module:
    """Return a tiny instance of a diffusers denoiser in evaluation mode: two or three blocks, random weights.

    ``overrides`` replace entries of the tiny config. The weights depend on ``seed`` alone; torch's global random state
    is left as it was. With ``nonzero``, parameters which the class initialises to zero (gates, output layers) or leaves
    uninitialised get small normals: otherwise many outputs would be zero and an equality test would mean nothing.
    """
    model = from_config(class_name, tiny_config(class_name) | overrides, seed=seed)
    if nonzero:
        _fill(model, seed + 1, _all_zero, std=0.05)
    return model.eval()


def from_config(
    class_name: str, config: Mapping[str, Any] | str | Path, *, device: str = "cpu", seed: int = 0
) -> nn.Module:
    """Return a diffusers class built from a config (a mapping, or the path of a config.json), with random weights.

    ``device="meta"`` builds a model of any size without memory.
    """
    kind = _diffusers_class(class_name)
    if isinstance(config, (str, Path)):
        config = _read(Path(config))
    entries = {k: v for k, v in config.items() if not k.startswith("_")}
    with torch.random.fork_rng(devices=[]), torch.device(device), _uninitialised_is_nan(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op")
        torch.manual_seed(seed)
        model: nn.Module = kind.from_config(entries)
    if torch.device(device).type != "meta":
        _fill(model, seed + 2, lambda parameter: parameter.isnan(), std=0.05)
    return model


@contextlib.contextmanager
def _uninitialised_is_nan() -> Iterator[None]:
    """Let ``torch.empty`` return NaN, so that parameters which a class leaves uninitialised can be told."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # The attribute is a property of the module's class, which type checkers do not see.
    switches: Any = torch.utils.deterministic
    fill = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switches.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = fill


def _diffusers_class(class_name: str) -> Any:
    import diffusers

    kind = getattr(diffusers, class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "from_config")):
        raise InputError(
            f"diffusers {diffusers.__version__} has no model class {class_name!r}", do=nearest(class_name, TINY)
        )
    return kind


def _read(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read the config {path}", found=str(error), do="pass the path of a config.json"
        ) from error
    if not isinstance(read, dict):
        raise InputError(f"the config {path} is not a JSON object", found=type(read).__name__, do="pass a config.json")
    return read


def _fill(model: nn.Module, seed: int, where: Callable[[Tensor], Tensor], std: float) -> None:
    """Replace by normals those entries of each float parameter for which ``where`` holds."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        chosen = where(parameter.data)
        if parameter.is_floating_point() and chosen.any():
            drawn = (torch.randn(parameter.shape, generator=generator) * std).to(parameter)
            parameter.data.copy_(torch.where(chosen, drawn, parameter.data))


def _all_zero(parameter: Tensor) -> Tensor:
    return (~parameter.any()).expand_as(parameter)
