"""Models for the tests of the command line, named as ``tests.cli_models:factory``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import moefx
from examples.dit import DiT
from moefx.graph.inputs import synthesise
from moefx.inspect.dump import STAGES


def dit() -> nn.Module:
    """A small transformer; its inputs have to be given."""
    print("noise on stdout, as libraries make it")
    return DiT(image_size=8, patch=2, in_channels=3, depth=2, width=32, heads=4, classes=5).eval()


def dit_inputs(model: nn.Module) -> tuple[Any, ...]:
    """Inputs of ``dit``."""
    del model
    return torch.zeros(2, 3, 8, 8), torch.tensor([10.0, 900.0]), torch.tensor([1, 2])


def dit_with_inputs() -> tuple[nn.Module, tuple[Any, ...]]:
    """The same, with inputs."""
    return dit(), dit_inputs(nn.Identity())


def every_dump() -> str:
    """Return what ``moefx.dump`` writes about ``dit``, in every stage and format."""
    torch.manual_seed(0)
    model = dit()
    inputs = dit_inputs(model)
    return "".join(
        moefx.dump(model, inputs, stage=stage, format=kind) for stage, formats in STAGES.items() for kind in formats
    )


def batches(model: nn.Module) -> dict[str, list[Any]]:
    """Return inputs of a tiny DiT by guidance branch."""
    return {name: [synthesise(model, seed=i)] for i, name in enumerate(("conditional", "unconditional"))}


def squares(output: Any, batch: Any) -> torch.Tensor:
    """A loss of a tiny DiT."""
    loss: torch.Tensor = output.sample.square().mean()
    return loss


def plain() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """A model without any site."""
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.zeros(2, 4),)


def sick() -> tuple[nn.Module, tuple[Any, ...]]:
    """A model with NaN in its weights."""
    model, inputs = dit_with_inputs()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.startswith("blocks.") and "mlp" in name).fill_(
            float("nan")
        )
    return model, inputs


def broken() -> nn.Module:
    """Raise."""
    raise RuntimeError("no such \x1b[31mweights")


def number() -> int:
    """Return no model."""
    return 3
