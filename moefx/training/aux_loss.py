"""The auxiliary loss of a routed model, as one scalar to add to the task loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moefx.errors import InputError
from moefx.routing.record import RoutingRecord


def routing_records(model: nn.Module) -> Iterator[tuple[str, RoutingRecord]]:
    """Yield (name of the routed layer, its record) for every routed layer of the model, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, RoutingRecord):
            yield name.rpartition(".")[0], module


def aux_loss(model: nn.Module, coefficient: float = 0.01, *, z_coefficient: float = 0.0) -> Tensor:
    """Return ``coefficient · mean_l balance_l + z_coefficient · mean_l z_l`` over the routed layers l.

    ``balance_l = E Σ_e f_e P_e`` is 1 for a balanced layer and E for one in which a single expert takes every token
    (Switch Transformer); ``z_l`` is the mean of logsumexp². The mean over layers keeps the coefficient's meaning when
    the number of routed layers changes; code that sums over L layers has L times this value. Add it before
    ``backward``::

        loss = mse(model(**batch), target) + moefx.aux_loss(model)
        (loss / accumulation_steps).backward()

    It covers the last forward pass, in it the *last* call of each layer: ask once per forward pass. Why the terms live
    on the layers, and what that means for checkpointing, DDP, compilation and copies, is told in
    `moefx.routing.record`.

    Raises:
        InputError: no routed layer, no forward pass yet, or a forward pass that kept no gradient although gradients are
            on.
    """
    layers = list(routing_records(model))
    seen = [(name, record.terms) for name, record in layers if record.terms is not None]
    if not seen:
        found = f"{len(layers)} routed layers, none called since the model was made, loaded or copied"
        raise InputError(
            "the auxiliary loss", found=found, do="transform the model, then call it, then ask for the loss"
        )
    if torch.is_grad_enabled():
        for name, (balance, _) in seen:
            _check_gradient(name, balance, model.get_submodule(name))
    device = seen[0][1][0].device
    balances, zs = zip(*(terms for _, terms in seen), strict=True)
    balance = torch.stack([term.to(device) for term in balances]).mean()
    z = torch.stack([term.to(device) for term in zs]).mean()
    return coefficient * balance + z_coefficient * z


def _check_gradient(name: str, balance: Tensor, layer: nn.Module) -> None:
    """Refuse a constant where the router could learn: silently it never would."""
    router = getattr(layer, "router", None)
    parameters = router.parameters() if isinstance(router, nn.Module) else layer.parameters(recurse=False)
    if not balance.requires_grad and any(parameter.requires_grad for parameter in parameters):
        raise InputError(
            "the auxiliary loss",
            found=f"layer {name!r} ran without gradients: torch.no_grad, or checkpointing with use_reentrant=True",
            do="run the forward pass with gradients and use_reentrant=False, or ask for the loss under torch.no_grad",
        )
