"""Rewriting passes, one file each."""

from moefx.passes.rewrite import (
    attention_experts,
    attention_mechanisms,
    channel_groups,
    channel_windows,
    fresh_experts,
    linear_mask,
    low_rank_experts,
    mixture_of_depths,
    mixture_of_heads,
    segments,
    sparse_neurons,
    split,
    step_cache,
    token_bypass,
    upcycle,
    weight_mixture,
)
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

# Importing these modules registers their passes.
_MODULES = (
    attention_experts,
    attention_mechanisms,
    channel_groups,
    channel_windows,
    fresh_experts,
    linear_mask,
    low_rank_experts,
    mixture_of_depths,
    mixture_of_heads,
    segments,
    sparse_neurons,
    split,
    step_cache,
    token_bypass,
    upcycle,
    weight_mixture,
)

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
