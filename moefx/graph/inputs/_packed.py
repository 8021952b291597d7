"""Makers for image transformers whose latent is packed to tokens [B, T, C].

Shapes: B batch, C channels of a packed latent token, T image tokens, L text tokens, D width.
"""

from __future__ import annotations

from typing import Any

from moefx.graph.inputs._registry import register_inputs
from moefx.graph.inputs._request import Request


@register_inputs("FluxTransformer2DModel")
def flux(request: Request) -> dict[str, Any]:
    """The model scales a time of (0, 1) by 1000 itself; position ids carry no batch dimension."""
    return request.default(timestep=request.unit_steps())


@register_inputs("QwenImageTransformer2DModel")
def qwen_image(request: Request) -> dict[str, Any]:
    """One image per sample, spelled as (frames, rows, columns); layered and edit models need more conditions."""
    given: dict[str, Any] = {
        "timestep": request.unit_steps(),
        "img_shapes": [[(1, *request.grid)] for _ in range(request.batch)],
    }
    if request.get("use_additional_t_cond"):
        given["additional_t_cond"] = request.integers(2, request.batch)
    return request.default(**given)
