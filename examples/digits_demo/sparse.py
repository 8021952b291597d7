"""Make the dense model sparse with moefx, prove that nothing changed, and look at what the experts do."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import moefx
from examples.digits_demo.config import RoutingConfig
from examples.digits_demo.cost import routed_layers
from examples.digits_demo.data import Digits
from examples.digits_demo.flow import Batch, inputs, velocity_errors
from examples.dit import DiT

PROOF_TIMES = (0.02, 0.25, 0.5, 0.75, 0.98)
TOLERANCE = 1e-5


def example_inputs(data: Digits, count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return a few noisy validation images with times and labels, in the order of the model's arguments."""
    generator = torch.Generator().manual_seed(0)
    x, y = data.validation_x[:count], data.validation_y[:count]
    return inputs(Batch(x, y, torch.linspace(0.1, 0.9, count), torch.randn(x.shape, generator=generator)))


def transform(dense: DiT, data: Digits, routing: RoutingConfig, seed: int) -> Any:
    """Return a routed copy of the dense model; the dense model is left alone."""
    return moefx.transform(
        copy.deepcopy(dense),
        example_inputs(data),
        recipe=routing.recipe,
        seed=seed,
        experts=routing.experts,
        top_k=routing.top_k,
    )


@torch.no_grad()
def prove_equal(dense: nn.Module, routed: nn.Module, data: Digits) -> dict[str, Any]:
    """Compare both models on all validation images at several times; refuse to go on if they differ.

    The error is the largest absolute difference over the largest absolute dense output, per time.
    """
    generator = torch.Generator().manual_seed(1)
    errors = {}
    for time in PROOF_TIMES:
        noise = torch.randn(data.validation_x.shape, generator=generator)
        batch = Batch(data.validation_x, data.validation_y, torch.full((len(noise),), time), noise)
        expected, found = dense(*inputs(batch)), routed(*inputs(batch))
        errors[f"{time:.2f}"] = ((found - expected).abs().max() / expected.abs().max()).item()
    worst = max(errors.values())
    if not worst <= TOLERANCE:
        raise SystemExit(f"the routed model differs from the dense one by {worst:.1e} (allowed: {TOLERANCE:.0e})")
    return {
        "images": len(data.validation_x),
        "max_relative_error_by_time": errors,
        "max_relative_error": worst,
        "tolerance": TOLERANCE,
    }


@torch.no_grad()
def expert_load(routed: nn.Module, data: Digits, buckets: int, seed: int) -> Tensor:
    """Return the share of tokens that each expert gets [layer, bucket of time, expert] on validation images."""
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for bucket in range(buckets):
        t = (bucket + torch.rand(len(data.validation_x), generator=generator)) / buckets
        noise = torch.randn(data.validation_x.shape, generator=generator)
        velocity_errors(routed, Batch(data.validation_x, data.validation_y, t, noise))
        columns.append(torch.stack([layer.expert_load().clone() for _, layer in routed_layers(routed)]))
    return torch.stack(columns, dim=1)
