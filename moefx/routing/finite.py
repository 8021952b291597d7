"""What a router does with logits that are not numbers.

=============  =====================================================================================================
policy         NaN or +inf among the logits of a token, or all of them −inf
=============  =====================================================================================================
``propagate``  they reach the gates and so the output: the usual behaviour of torch, and the default
``shared``     the token is served by no routed expert: only the shared FFN and the output bias remain
``raise``      `InputError`; costs a wait for the device, and acts as ``propagate`` in compiled or exported graphs
=============  =====================================================================================================

A single −inf is legal: it takes an expert out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefx.errors import InputError, OptionError, nearest

POLICIES = ("propagate", "raise", "shared")


def check_policy(policy: str) -> str:
    """Return ``policy``, or raise `OptionError` unless it is one of `POLICIES`."""
    if policy not in POLICIES:
        raise OptionError(f"policy {policy!r} for logits", found="no such policy", do=nearest(policy, POLICIES))
    return policy


def handle_non_finite(logits: Tensor, policy: str) -> Tensor | None:
    """Return a mask ``[..., 1]`` of the tokens to leave out, or None.

    Raises:
        InputError: policy ``raise`` found one.
    """
    if policy == "propagate":
        return None
    if policy == "raise" and (torch.compiler.is_compiling() or torch.compiler.is_exporting()):
        return None
    highest = logits.amax(-1, keepdim=True)  # NaN wins
    broken = ~highest.isfinite()
    if policy == "shared":
        return broken
    if not logits.is_meta and bool(broken.any()):
        raise InputError(
            "route tokens",
            found=f"NaN or infinity in the logits of {int(broken.sum())} of {broken.numel()} tokens",
            do="look for what diverged, or use non_finite='shared' or 'propagate'",
        )
    return None
