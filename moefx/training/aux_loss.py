"""The auxiliary loss of a routed model, as one scalar to add to the task loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from moefx.errors import InputError, nearest
from moefx.routing.record import RoutingRecord


def routing_records(model: nn.Module) -> Iterator[tuple[str, RoutingRecord]]:
    """Yield (name of the routed layer, its record) for every routed layer of the model, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, RoutingRecord):
            yield name.rpartition(".")[0], module


def aux_loss(model: nn.Module, **coefficients: float) -> Tensor:
    """Return ``Σ_n mean_l c_{l,n} · term_{l,n}`` over the terms n, each a mean over the routed layers l that have it.

    ``balance_l = E Σ_e f_e P_e`` is 1 for a balanced layer and E for one in which a single expert takes every token
    (Switch Transformer); ``z_l`` is the mean of logsumexp²; recipes add terms of their own. Each layer knows its
    coefficients, which a keyword replaces in all layers. The mean over layers keeps a coefficient's meaning when the
    number of routed layers changes; code that sums over L layers has L times this value. Add it before ``backward``::

        loss = mse(model(**batch), target) + moefx.aux_loss(model, z=1e-3)
        (loss / accumulation_steps).backward()

    It covers the last forward pass, in it the *last* call of each layer: ask once per forward pass. Why the terms live
    on the layers, and what that means for checkpointing, DDP, compilation and copies, is told in
    `moefx.routing.record`.

    Raises:
        InputError: no routed layer, no forward pass yet, a term that no layer has, or a forward pass that kept no
            gradient although gradients are on.
    """
    layers = list(routing_records(model))
    seen = [(name, record) for name, record in layers if record.terms]
    if not seen:
        found = f"{len(layers)} routed layers, none called since the model was made, loaded or copied"
        raise InputError(
            "the auxiliary loss", found=found, do="transform the model, then call it, then ask for the loss"
        )
    _check_names(coefficients, {term for _, record in seen for term in record.terms})
    if torch.is_grad_enabled():
        for name, record in seen:
            _check_gradient(name, record, model.get_submodule(name))
    by_name: dict[str, list[Tensor]] = {}
    for _, record in seen:
        for term, value in record.terms.items():
            coefficient = coefficients.get(term, record.coefficients.get(term, 0.0))
            if coefficient:
                by_name.setdefault(term, []).append(coefficient * value)
    means = [_mean(by_name[term]) for term in sorted(by_name)]
    return sum(means[1:], means[0]) if means else next(iter(seen[0][1].terms.values())) * 0.0


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack([value.to(values[0].device) for value in values]).mean()


def _check_names(coefficients: Mapping[str, float], known: set[str]) -> None:
    for name in coefficients:
        if name not in known:
            raise InputError(
                f"the auxiliary loss with {name}={coefficients[name]}",
                found="no layer has such a term",
                do=nearest(name, sorted(known)),
            )


def _check_gradient(name: str, record: RoutingRecord, layer: nn.Module) -> None:
    """Refuse a constant where the router could learn: silently it never would."""
    router = getattr(layer, "router", None)
    parameters = router.parameters() if isinstance(router, nn.Module) else layer.parameters(recurse=False)
    learns = any(term.requires_grad for term in record.terms.values())
    if not learns and any(parameter.requires_grad for parameter in parameters):
        raise InputError(
            "the auxiliary loss",
            found=f"layer {name!r} ran without gradients: torch.no_grad, or checkpointing with use_reentrant=True",
            do="run the forward pass with gradients and use_reentrant=False, or ask for the loss under torch.no_grad",
        )
