"""What a routed layer remembers of its last call: statistics to look at, and the terms of its auxiliary loss.

Two kinds of memory, because they have two kinds of reader.

*Buffers* (``load``, ``probability``, ``entropy``, ``assigned``): float32, non-persistent, written in place without
asking the device. They are in no autograd graph, so any number of forward passes may precede a backward pass.

*Live terms* (``terms``): scalars of the last call by name *with their graph*, read by `moefx.training.aux_loss` before
``backward``: ``balance`` and ``z`` from every routing decision, and whatever else the layer adds. They are returned by
an attribute and not added to the output by an autograd trick, so the sum the user builds is what is differentiated:
gradient scalers, accumulation and world size act on it as on any other loss. Consequences:

- gradient accumulation: the terms are fresh tensors on each call, and nothing in their graph is later written in place;
- checkpointing with ``use_reentrant=False`` (diffusers' default): their graph is part of the checkpointed region, and
  the recomputation, which happens inside ``backward``, does not record: no graph is kept alive after the
  step. Re-entrant checkpointing runs the forward without a graph; `aux_loss` refuses rather than return a constant;
- DDP: each rank has the terms of its own tokens, averaged by the gradient reduction;
- ``torch.compile(fullgraph=True)``: the terms are two more outputs of the graph, the buffers mutated inputs. Where a
  *checkpoint is inside* the compiled function, dynamo refuses side effects unless told not to replay them, which is
  what is wanted: ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True``;
- ``copy.deepcopy`` and pickling drop the terms (a tensor inside a graph can be neither); buffers are copied;
- ``torch.export`` and tracing record nothing: what leaves them is the mathematics alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moefx.routing.losses import entropy, load_counts, mean_over_tokens, switch_balance, z_loss
from moefx.routing.normalise import probabilities
from moefx.routing.precision import KeepFloat32


class RoutingRecord(KeepFloat32):
    """Statistics of the last call of a router over E experts (or tied groups).

    Args:
        num_experts: E.
        device: device of the buffers.
        coefficients: what `moefx.training.aux_loss` multiplies each term with unless told otherwise; a term without
            one is not part of the loss. By default ``balance`` has 0.01.

    Attributes:
        load: f ``[E]``, fraction of all assignments per expert, Σ f = 1.
        probability: P ``[E]``, mean router probability.
        entropy: ``[]``, mean entropy of the router's distribution in nats.
        assigned: ``[E]``, number of assignments since it was last set to zero (see `moefx.training.update_biases`).
        terms: scalars of the last call with their graph, by name; empty before the first.
        keeps: set it, and the router's distribution of the last call stays in ``kept``.
        kept: ``[T, E]`` probabilities of the last call with their graph, for losses that span layers.
    """

    load: Tensor
    probability: Tensor
    entropy: Tensor
    assigned: Tensor

    def __init__(
        self,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        coefficients: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        vectors = dict.fromkeys(("load", "probability", "assigned"), (num_experts,))
        for name, shape in {**vectors, "entropy": ()}.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32, device=device), persistent=False)
        self.coefficients: dict[str, float] = dict({"balance": 0.01} if coefficients is None else coefficients)
        self.terms: dict[str, Tensor] = {}
        self.keeps = False
        self.kept: Tensor | None = None

    def update(self, logits: Tensor, experts: Tensor, mode: str) -> None:
        """Record one routing decision: logits ``[T, E]`` (float32) and selected experts ``[T, K]``.

        An index outside [0, E) is a slot without an expert and counts nowhere. Terms of an earlier call are dropped.
        """
        if _only_mathematics(logits):
            return
        p = probabilities(logits, mode)
        counts, mean_p = load_counts(experts, self.num_experts), mean_over_tokens(p)
        fractions = counts / counts.sum().clamp(min=1)
        terms = {"balance": switch_balance(fractions, mean_p), "z": z_loss(logits)}
        if _recomputing():  # only now: a recomputation has to save the same tensors as the first pass
            return
        if self.load.is_meta and not fractions.is_meta:
            self._materialise(fractions.device)
        self.load.copy_(fractions)
        self.probability.copy_(mean_p.detach())
        self.entropy.copy_(entropy(p.detach()))
        self.assigned.add_(counts)
        self.terms = terms
        self.kept = p if self.keeps else None

    def add(self, name: str, term: Tensor) -> None:
        """Add a scalar of this call to the terms, after `update` if there is one; it replaces one of that name."""
        if not (_only_mathematics(term) or _recomputing()):
            self.terms = {**self.terms, name: term}

    def _materialise(self, device: torch.device) -> None:
        """Allocate the buffers: a model built on meta and loaded by assignment has no non-persistent ones."""
        for name, buffer in self.named_buffers():
            setattr(self, name, torch.zeros_like(buffer, device=device))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"terms": {}, "kept": None}


def _only_mathematics(logits: Tensor) -> bool:
    """Is this an export, or a trace by proxies (which may call themselves tensors to isinstance)?"""
    return torch.compiler.is_exporting() or not issubclass(type(logits), Tensor)


def _recomputing() -> bool:
    """Is a checkpoint recomputing, that is, is this forward pass inside a backward pass?"""
    return not torch.compiler.is_compiling() and int(torch._C._current_graph_task_id()) != -1
