"""Small routed models, dense twins and pipelines for the tests of saving and of compatibility."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moefx
from moefx.graph.inputs import synthesise
from moefx.zoo import tiny

DIT, FLUX = "DiTTransformer2DModel", "FluxTransformer2DModel"
MODELS = (DIT, FLUX)
DIFFERING: dict[str, Any] = {"experts": 4, "noise": 0.05, "max_error": 10.0}  # equal experts would hide mistakes


@functools.cache
def _pair(name: str) -> tuple[nn.Module, nn.Module]:
    dense = tiny(name)
    routed = moefx.transform(copy.deepcopy(dense), **DIFFERING)
    return dense, routed


def dense_model(name: str) -> Any:
    """Return a fresh copy of the tiny dense model."""
    return copy.deepcopy(_pair(name)[0])


def routed_model(name: str) -> Any:
    """Return a fresh copy of the tiny routed model; its experts differ."""
    return copy.deepcopy(_pair(name)[1])


def transformed(name: str, **options: Any) -> Any:
    """Return a model transformed just now, which can be untransformed."""
    return moefx.transform(dense_model(name), **(DIFFERING | options))


def inputs_of(model: nn.Module) -> dict[str, Any]:
    """Return example inputs."""
    found = synthesise(model)
    assert isinstance(found, dict)
    return found


def output_of(model: Any, inputs: dict[str, Any] | None = None) -> Tensor:
    """Return the sample that the model predicts."""
    found = model(**(inputs_of(model) if inputs is None else inputs), return_dict=False)[0]
    assert isinstance(found, Tensor)
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the gradients that are set."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_state(one: nn.Module, two: nn.Module) -> bool:
    """Tell whether both have the same state, to the bit and the type."""
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def run_python(code: str, *args: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, offline and in one thread."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": _path()}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)


def _path() -> str:
    here = Path(__file__).parent
    return os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])


class Block(nn.Module):
    """A pre-norm feed-forward block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Plain(nn.Module):
    """A model that no library knows, with a tied weight and a buffer outside the state dict."""

    def __init__(self, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.into = nn.Linear(width, width, bias=False)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.out = nn.Linear(width, width, bias=False)
        self.out.weight = self.into.weight
        self.register_buffer("positions", torch.linspace(-1, 1, width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def plain_inputs(width: int = 16) -> tuple[Tensor]:
    """Return tokens for :class:`Plain`."""
    return (torch.randn(2, 6, width, generator=torch.Generator().manual_seed(1)),)


def routed_plain(seed: int = 0, depth: int = 2, **options: Any) -> Plain:
    """Return a transformed :class:`Plain`."""
    torch.manual_seed(seed)
    return moefx.transform(
        Plain(depth=depth), plain_inputs(), **({"experts": 4, "noise": 0.05, "max_error": 10.0} | options)
    )
