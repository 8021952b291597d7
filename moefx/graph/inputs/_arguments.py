"""Rules that make one argument of ``forward`` from its name and the model's config.

A rule returns `OMIT` for an argument which this model does not need. An argument with a default and without a rule is
left out; a required argument without a rule is an error that names it.

Shapes: B batch, C latent channels, F latent frames, H x W latent size, T image tokens, L text tokens, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from moefx.graph.inputs._request import Request


class _Omit:
    def __repr__(self) -> str:
        return "OMIT"


OMIT: Final = _Omit()

Rule = Callable[[Request], Any]
_RULES: dict[str, Rule] = {}

TEXT_WIDTHS = (
    "caption_channels",
    "joint_attention_dim",
    "text_embed_dim",
    "text_dim",
    "cap_feat_dim",
    "context_in_dim",
    "in_text_dim",
    "text_hidden_dim",
    "encoder_hid_dim",
    "encoder_hidden_size",
    "cross_attention_dim",
)


def argument(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for arguments of these names."""

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def by_rules(
    request: Request, given: Mapping[str, Any] | None = None, without: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Return the arguments of ``forward`` in the order of its signature; ``given`` wins over the rules."""
    given = given or {}
    made: dict[str, Any] = {}
    for name, parameter in request.parameters.items():
        if name in given:
            made[name] = given[name]
        elif name not in without and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            value = _one(request, name, parameter)
            if value is not OMIT:
                made[name] = value
    return made


def _one(request: Request, name: str, parameter: inspect.Parameter) -> Any:
    required = parameter.default is inspect.Parameter.empty
    # Without a config nothing is known about the sizes: only a time can be made.
    known = request.config or name in ("timestep", "timesteps")
    if name in _RULES and known:
        value = _RULES[name](request)
        if value is not OMIT or not required:
            return value
    if required:
        why = "no rule covers it" if name not in _RULES else "the model has no diffusers config to take its size from"
        raise request.refuse(name, "", why)
    return OMIT


# ---- the latent -----------------------------------------------------------------------------------------------------


def packed(request: Request) -> bool:
    """Return whether the latent arrives as tokens [B, T, C] rather than as an image or a video."""
    return not request.parameters.keys().isdisjoint({"img_ids", "img_shapes"})


@argument("hidden_states", "sample", "latents")
def latent(request: Request) -> Tensor:
    """Return [B, T, C] for packed models, [B, C, F, H, W] for 3D ones, [B, C, T] for 1D ones, else [B, C, H, W]."""
    channels = request.want("in_channels", argument="hidden_states", shape="[batch, channels, height, width]")
    name = type(request.model).__name__
    if packed(request):
        return request.normal(request.batch, request.tokens, channels)
    if "3D" in name:
        return request.normal(request.batch, channels, request.frames, *request.size)
    if "1D" in name:
        return request.normal(request.batch, channels, request.tokens)
    return request.normal(request.batch, channels, *request.size)


# ---- time -----------------------------------------------------------------------------------------------------------


@argument("timestep", "timesteps", "t")
def timestep(request: Request) -> Tensor:
    """Return int64 [B] where the annotation says LongTensor, else floats of 1..999."""
    parameters = request.parameters
    spelled = str(next(parameters[n].annotation for n in ("timestep", "timesteps", "t") if n in parameters))
    return request.steps() if "LongTensor" in spelled else request.float_steps()


@argument("guidance")
def guidance(request: Request) -> Any:
    """Return [B] guidance scales for distilled models."""
    return request.uniform(request.batch, low=1.0, high=5.0) if request.get("guidance_embeds") else OMIT


@argument("timestep_cond")
def timestep_cond(request: Request) -> Any:
    """Return [B, D] for models distilled with guidance embeddings in the timestep."""
    width = request.get("time_cond_proj_dim")
    return request.normal(request.batch, width) if width else OMIT


# ---- text -----------------------------------------------------------------------------------------------------------


@argument("encoder_hidden_states")
def text(request: Request) -> Any:
    """Return [B, L, D], D being the width of the text encoder."""
    shape = "[batch, text tokens, width of the text encoder]"
    optional = request.parameters["encoder_hidden_states"].default is None
    if optional and request.get(*TEXT_WIDTHS) is None:
        return OMIT
    width = request.want(*TEXT_WIDTHS, argument="encoder_hidden_states", shape=shape)
    width = width if isinstance(width, int) else width[0]
    return request.normal(request.batch, request.text, width)


@argument("encoder_attention_mask", "encoder_hidden_states_mask")
def text_mask(request: Request) -> Tensor:
    """Return bool [B, L]."""
    return request.mask(request.batch, request.text)


@argument("pooled_projections")
def pooled(request: Request) -> Any:
    """Return [B, D], the pooled text embedding."""
    width = request.get("pooled_projection_dim")
    return request.normal(request.batch, width) if width else OMIT


@argument("encoder_hidden_states_image")
def image_text(request: Request) -> Any:
    """Return [B, 257, D], the tokens of a CLIP image encoder, for image-to-video models ([2 B, ...] with two)."""
    width = request.get("image_dim")
    if not width:
        return OMIT
    # A first-and-last-frame model holds a position table over the tokens of both images, which come as two samples.
    both = request.get("pos_embed_seq_len")
    return request.normal(2 * request.batch, both // 2, width) if both else request.normal(request.batch, 257, width)


# ---- positions and sizes --------------------------------------------------------------------------------------------


def axes(request: Request) -> int:
    """Return the number of rotary axes."""
    return len(request.get("axes_dims_rope", "axes_dim_rope", "rope_axes_dim", default=(0, 0, 0)))


@argument("img_ids")
def image_ids(request: Request) -> Tensor:
    """Return [T, axes]: the row and column of each image token."""
    return request.positions(*request.grid, axes=axes(request)).to(request.dtype)


@argument("txt_ids")
def text_ids(request: Request) -> Tensor:
    """Return [L, axes]: text tokens all stand at the origin."""
    return request.zeros(request.text, axes(request))


@argument("original_size", "target_size")
def image_size(request: Request) -> Tensor:
    """Return [B, 2], the image size in pixels."""
    return request.rows([request.size[0] * 8.0, request.size[1] * 8.0])


@argument("crop_coords")
def crop(request: Request) -> Tensor:
    """Return [B, 2], the corner of the crop."""
    return request.rows([0.0, 0.0])


# ---- classes and additions ------------------------------------------------------------------------------------------


@argument("class_labels")
def labels(request: Request) -> Any:
    """Return int64 [B] for class-conditional models."""
    count = request.get("num_class_embeds", "num_embeds_ada_norm")
    return request.integers(count, request.batch) if count else OMIT


@argument("added_cond_kwargs")
def additions(request: Request) -> Any:
    """Return the resolution and aspect ratio for PixArt models trained with them."""
    if not getattr(request.model, "use_additional_conditions", False):
        return OMIT
    height, width = request.size
    return {
        "resolution": request.rows([height * 8.0, width * 8.0]),
        "aspect_ratio": request.rows([height / width]),
    }


def int_mask(request: Request, tokens: int) -> Tensor:
    """Return int64 [B, tokens], for models that do arithmetic on their mask."""
    return request.mask(request.batch, tokens, dtype=torch.int64)
