"""Maker for the protein denoiser of RFdiffusion 4.

Shapes: B batch, N residues, 37 atoms of a residue.
"""

from __future__ import annotations

from typing import Any

import torch

from moefx.graph.inputs._registry import register_inputs
from moefx.graph.inputs._request import Request

RESIDUES = 24
"""Length N of the chain."""


@register_inputs("RFD4ProteinaTransformer")
def proteina(request: Request) -> dict[str, Any]:
    """Noisy backbone and latents, each with its time, and the annotations without which features cannot be computed."""
    config, batch = request.config, request.batch
    residues = (batch, RESIDUES)
    return request.default(
        bb_ca=request.normal(*residues, 3),
        local_latents=request.normal(*residues, config["latent_dim"]),
        bb_ca_time=request.unit_steps(),
        local_latents_time=request.unit_steps(),
        padding_mask=request.mask(*residues),
        token_type=request.integers(config["num_token_types"], *residues),
        atom37_mask=request.mask(*residues, 37),
        conditioning=_annotations(request),
    )


def _annotations(request: Request) -> dict[str, torch.Tensor]:
    from diffusers.models.transformers.transformer_rfd4_proteina import CONDITION_KEYS

    residues = (request.batch, RESIDUES)
    atoms = ("hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal_coord")
    return {
        "is_in_context_conditioning": request.zeros(*residues, dtype=torch.bool),
        "supports_local_latent": request.mask(*residues),
        "token_bond_path_length": request.integers(5, *residues, RESIDUES),
        "molecule_iid": request.integers(2, *residues),
        "molecule_entity_id": request.integers(2, *residues),
        CONDITION_KEYS["index_group"]: request.integers(2, *residues),
        **{CONDITION_KEYS[name]: request.integers(4, *residues, 37) for name in atoms},
    }
