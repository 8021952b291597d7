"""Switch-DiT's diffusion prior as a loss: neighbouring timesteps share experts, distant ones do not (arXiv 2403.09176).

Legend: B samples, L masked blocks, N experts of a block, U = L·N units, T levels of the timestep.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from moefx.errors import InputError, OptionError
from moefx.routing.masks import StreamMask
from moefx.routing.prior import match_units, prior_loss, prior_map
from moefx.routing.record import RoutingRecord


class DiffusionPrior(nn.Module):
    """The loss that stands in place of a balance loss: Jensen–Shannon divergence of routing and prior, weight 1.

    A module, because which unit stands for which column of the prior is state: put it into the checkpoint. ::

        prior = moefx.training.DiffusionPrior(model, last_timestep=999)
        loss = mse(model(x, t, y), target) + prior(t)

    The released code runs all T timesteps through the routers and matches units with columns at every step, on the
    host. Here what the routers chose is remembered by timestep as training visits it, and matched every ``rematch``
    steps over the visited levels; under ``torch.distributed`` over what all ranks have seen.

    Args:
        model: a model with masked blocks (recipe ``switch-dit``).
        last_timestep: the largest timestep in the units of the model's argument: 999, or 1 for σ.
        levels: T.
        power: of the prior's offset, see `moefx.routing.prior.prior_map`.
        rematch: steps between two matchings.

    Raises:
        OptionError: the model has no masked block, or its blocks differ in their number of experts.
    """

    chosen: Tensor
    visited: Tensor
    columns: Tensor
    steps: Tensor
    columns_at: Tensor

    def __init__(
        self, model: nn.Module, *, last_timestep: float, levels: int = 1000, power: float = 4.0, rematch: int = 100
    ) -> None:
        super().__init__()
        masks = [module.routed for module in model.modules() if isinstance(module, StreamMask)]
        shapes = {(routed.record.num_experts, routed.top_k) for routed in masks}
        if len(shapes) != 1 or rematch < 1 or last_timestep <= 0:
            raise OptionError(
                f"a diffusion prior, matched every {rematch} steps, up to timestep {last_timestep}",
                found=f"{len(masks)} masked blocks with (experts, top-k) {sorted(shapes)}",
                do="transform the model with recipe='switch-dit'; same experts and top_k everywhere",
            )
        ((experts, self.top_k),) = shapes
        self.last_timestep, self.rematch = last_timestep, rematch
        self._records: list[RoutingRecord] = [routed.record for routed in masks]
        for record in self._records:
            record.keeps = True
        units = len(masks) * experts
        device = next(model.parameters()).device
        self.register_buffer(
            "columns_at", prior_map(levels, len(masks), experts, self.top_k, power=power).to(device), False
        )
        self.register_buffer("chosen", torch.zeros(levels, units, device=device))
        self.register_buffer("visited", torch.zeros(levels, device=device))
        self.register_buffer("columns", torch.arange(units, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, timestep: Tensor) -> Tensor:
        """Return the loss of the model's last call, whose timesteps were ``[B]`` or one for all.

        Raises:
            InputError: the model was not called in training mode since this object was made.
        """
        kept = [record.kept for record in self._records]
        probabilities = [p for p in kept if p is not None]
        if len(probabilities) < len(kept):
            raise InputError(
                "the diffusion prior",
                found=f"{len(kept) - len(probabilities)} of {len(kept)} masked blocks were not called",
                do="call the model, then ask for the loss",
            )
        at = timestep.detach().to(self.columns_at.device, torch.float32).reshape(-1) / self.last_timestep
        level = (at * (len(self.columns_at) - 1)).round().long().clamp(0, len(self.columns_at) - 1)
        level = level.expand(len(probabilities[0]))
        self._remember(level, probabilities)
        return prior_loss(probabilities, self.columns_at[level][:, self.columns])

    @torch.no_grad()
    def _remember(self, level: Tensor, probabilities: list[Tensor]) -> None:
        hard = [torch.zeros_like(p).scatter_(-1, p.topk(self.top_k, -1).indices, 1.0) for p in probabilities]
        self.chosen[level] = torch.cat(hard, -1).to(self.chosen)
        self.visited[level] = 1.0
        if int(self.steps) % self.rematch == 0:
            self.columns.copy_(torch.from_numpy(self._matched()))
        self.steps += 1

    def _matched(self) -> NDArray[np.int64]:
        chosen, visited = self.chosen * self.visited.unsqueeze(1), self.visited.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(chosen)
            dist.all_reduce(visited)
        seen = visited > 0
        return match_units(chosen[seen] / visited[seen].unsqueeze(1), self.columns_at[seen])
