"""Gates that a learned threshold switches on and off, and the budget that keeps them from all staying on.

Legend: B samples, T tokens (1 where a router reads the sample only), G gated groups: attention heads, channels.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from moefx.errors import InputError, OptionError
from moefx.routing.losses import mean_over_tokens
from moefx.routing.precision import KeepFloat32, at_least_float32
from moefx.routing.record import RoutingRecord
from moefx.routing.static import ConstantGates, reads_tokens


class ThresholdGate(KeepFloat32):
    """Hard gates ``[B, T, G]``, 1 or 0, with a straight-through gradient (DyDiT, arXiv 2410.03456)::

        y = sigmoid((z + n) / τ)      n logistic noise in training (the difference of two Gumbels), 0 otherwise
        g = 1[y > ½] + y − stopgrad(y)

    The first ``keep`` groups are always on. z comes from the router; a bias of +15 at its start switches every group
    on, in training too: noise beyond 15 has probability 3·10⁻⁷. The gradient of y stays in evaluation mode, so that a
    router trains under ``model.eval()`` as well (the released code has none there).

    The *budget* is ``(share − λ)²`` with the share of groups that are on, a mean over the batch, and the target λ. It
    is a term of the layer's record; `budget_loss` gives that of the whole model, which is the paper's.

    Args:
        router: maps ``(x, *taps)`` to z ``[B, T, G − keep]``.
        num_groups: G.
        keep: groups that are always on, the first ones; at least one.
        temperature: τ.
        target: λ, or None for no budget.
        warmup: fraction of the training over which λ falls from 1, see `set_progress`.
        cost: multiply-adds that all groups together cost; a weight in `budget_loss`.
        coefficient: of the budget in `moefx.training.aux_loss`.
        device: as for any module.

    Attributes:
        record: statistics over the G − keep groups that may be off; terms ``share`` and ``budget``.
    """

    target: Tensor

    def __init__(
        self,
        router: nn.Module,
        num_groups: int,
        *,
        keep: int = 1,
        temperature: float = 5.0,
        target: float | None = None,
        warmup: float = 0.0,
        cost: float = 1.0,
        coefficient: float = 2.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= keep < num_groups:
            raise OptionError(
                f"gate {num_groups} groups and keep {keep}", found="no group to switch", do="1 <= keep < groups"
            )
        self.router, self.num_groups, self.keep, self.temperature = router, num_groups, keep, temperature
        self.budget, self.warmup, self.cost = target, warmup, cost
        self.register_buffer("target", torch.tensor(1.0 if target is None else target, device=device))
        self.record = RoutingRecord(num_groups - keep, device=device, coefficients={"budget": coefficient})

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the extra tensors the router reads."""
        return tuple(getattr(self.router, "taps", ()))

    def set_progress(self, progress: float) -> None:
        """Let λ fall linearly from 1 to its target over the first ``warmup`` of the training."""
        if self.budget is not None:
            done = 1.0 if self.warmup == 0 else min(progress / self.warmup, 1.0)
            self.target.fill_(1 + (self.budget - 1) * done)

    def forward(self, x: Tensor, *taps: Tensor) -> Tensor:
        """Return g ``[B, T, G]`` (float32; float64 for float64 logits)."""
        z = self.router(x, *taps)
        z = z.to(at_least_float32(z))
        noisy = z + _logistic(z) if self.training else z
        y = torch.sigmoid(noisy / self.temperature)
        gates = (y.detach() > 0.5).to(y.dtype) + (y - y.detach())
        self._remember(z, gates)
        return torch.cat([gates.new_ones((*gates.shape[:-1], self.keep)), gates], dim=-1)

    @property
    def deciding(self) -> tuple[int, ...]:
        """Positions of the taps, if the router reads nothing else; see `moefx.routing.static`."""
        return () if reads_tokens(self.router) else tuple(range(1, 1 + len(self.taps)))

    @torch.no_grad()
    def fold(self, values: tuple[Tensor, ...], shared: dict[Hashable, Any]) -> tuple[Hashable, nn.Module]:
        """Return the groups that are on for these values of the taps, and their gates as constants."""
        gates = self(values[0].new_zeros((1, 1, 1)), *values).reshape(-1)
        groups = tuple(torch.nonzero(gates).flatten().tolist())
        return groups, shared.setdefault(groups, ConstantGates(gates))

    def _remember(self, z: Tensor, gates: Tensor) -> None:
        groups = self.num_groups - self.keep
        index = torch.arange(groups, device=gates.device).expand(gates.shape)
        on = torch.where(gates.detach() > 0.5, index, groups)
        self.record.update(z.reshape(-1, groups), on.reshape(-1, groups), "sigmoid_topk")
        share = (self.keep + mean_over_tokens(gates.sum(-1).flatten())) / self.num_groups
        self.record.add("share", share)
        if self.budget is not None:
            self.record.add("budget", (share - self.target.to(share.dtype)).square())

    def extra_repr(self) -> str:
        """Describe the gate in ``print(model)``."""
        return f"groups={self.num_groups}, keep={self.keep}, temperature={self.temperature}, target={self.budget}"


def _logistic(z: Tensor) -> Tensor:
    """Draw standard logistic noise: the difference of two independent Gumbel variables."""
    u = torch.rand_like(z).clamp(torch.finfo(z.dtype).tiny, 1 - torch.finfo(z.dtype).eps)
    return u.log() - torch.log1p(-u)


def budget_loss(model: nn.Module, target: float) -> Tensor:
    """Return ``(Σ_l c_l s_l / Σ_l c_l − λ)²`` over the threshold gates l of the last forward pass.

    s_l is the share of a gate's groups that are on, c_l what all of them cost: the budget of the whole model, which may
    spend more in one layer and less in another. Use it in place of the layers' own budgets::

        loss = mse + moefx.aux_loss(model, budget=0) + 2 * budget_loss(model, 0.5)

    Raises:
        InputError: the model has no such gate, or none was called.
    """
    gates = [m for m in model.modules() if isinstance(m, ThresholdGate) and "share" in m.record.terms]
    if not gates:
        raise InputError(
            "the budget loss", found="no threshold gate was called", do="transform the model, call it, then ask"
        )
    device = gates[0].record.terms["share"].device
    spent = torch.stack([gate.cost * gate.record.terms["share"].to(device) for gate in gates]).sum()
    return (spent / sum(gate.cost for gate in gates) - target).square()
