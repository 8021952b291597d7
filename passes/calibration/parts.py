"""What the heads of an attention, and the tokens of a block, contribute: the statistics by which a budget chooses.

A part's ``energy`` is the squared length of what it adds, its ``fisher`` the square of what the loss would change to
first order if it were left out, (∂L/∂y · c)² for the contribution c to y. Squares of independent contributions add up,
so the sum over the parts that are left out estimates the whole (the empirical Fisher information of a mask: Theis et
al., arXiv 1801.05787).

Legend: B samples, T tokens, N = B·T, D width, H heads, d head width, P parts, G groups: branches and noise levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moefx.errors import InputError
from moefx.passes.calibration.moments import Moments

LEVELS = 16  # parts of a block: sixteenths of its tokens
PartUnit = Literal["heads", "tokens"]
STATISTICS = ("energy", "fisher", "whole")


@dataclass(frozen=True)
class PartStatistics:
    """What the parts of one site contribute.

    Attributes:
        name: of the site.
        unit: ``heads``, each a part; or ``tokens``, where part i is the i-th sixteenth of a sample's tokens, those to
            which the block adds most first.
        energy: moments ``[G, P]``, per token; the parts of tokens add up to the mean over all tokens.
        fisher: likewise; count 0 without a loss.
        whole: moments ``[G, 1]`` of the energy of all parts together.
    """

    name: str
    unit: PartUnit
    energy: Moments
    fisher: Moments
    whole: Moments

    @staticmethod
    def empty(name: str, unit: PartUnit, groups: int, parts: int) -> PartStatistics:
        """Return the statistics of nothing."""
        widths = {"energy": parts, "fisher": parts, "whole": 1}
        return PartStatistics(name, unit, **{key: Moments.empty(groups, width) for key, width in widths.items()})

    @property
    def parts(self) -> int:
        """P."""
        return self.energy.mean.shape[1]

    @property
    def learnt(self) -> bool:
        """Whether there was a loss."""
        return bool(self.fisher.count.any())

    def merged(self, other: PartStatistics) -> PartStatistics:
        """Return the statistics of both parts' data.

        Raises:
            InputError: they are of different sites.
        """
        if (self.name, self.unit, self.parts) != (other.name, other.unit, other.parts):
            found = f"{other.parts} {other.unit} of {other.name}"
            raise InputError(
                f"merge statistics of {self.parts} {self.unit} of {self.name}", found=found, do="merge like"
            )
        return PartStatistics(
            self.name, self.unit, *(getattr(self, key).merged(getattr(other, key)) for key in STATISTICS)
        )

    def add_heads(self, pre_ND: Tensor, w_out: Tensor, group_N: Tensor, gradient_NO: Tensor | None) -> PartStatistics:
        """Return the statistics with the heads of some tokens added.

        Args:
            pre_ND: what enters the output projection, ``[N, H·d]``.
            w_out: its weight ``[D, H·d]``.
            group_N: group of each token.
            gradient_NO: ∂L/∂ of what leaves it ``[N, D]``, if there is a loss.
        """
        pre, weight = wide(pre_ND), wide(w_out)
        o_NHd, w_DHd = (x.reshape(len(x), self.parts, -1) for x in (pre, weight))
        gram = torch.einsum("dhi,dhj->hij", w_DHd, w_DHd)
        energy = torch.einsum("nhi,hij,nhj->nh", o_NHd, gram, o_NHd)
        whole = (pre @ weight.mT).square().sum(-1, keepdim=True)
        fisher = None
        if gradient_NO is not None:
            fisher = ((wide(gradient_NO) @ weight).view_as(o_NHd) * o_NHd).sum(-1).square()
        return self._added(group_N, energy, fisher, whole)

    def add_tokens(self, update_BTD: Tensor, group_B: Tensor, gradient_BTD: Tensor | None) -> PartStatistics:
        """Return the statistics with the tokens of some samples added.

        Args:
            update_BTD: what the block adds to each token.
            group_B: group of each sample.
            gradient_BTD: ∂L/∂ of what leaves the block, if there is a loss.
        """
        update = wide(update_BTD)
        energy = update.square().sum(-1)
        order = energy.argsort(dim=-1, descending=True, stable=True)
        fisher = None
        if gradient_BTD is not None:
            fisher = _by_rank((wide(gradient_BTD) * update).sum(-1).square(), order, self.parts)
        by_rank = _by_rank(energy, order, self.parts)
        return self._added(group_B, by_rank, fisher, by_rank.sum(-1, keepdim=True))

    def _added(self, group: Tensor, energy: Tensor, fisher: Tensor | None, whole: Tensor) -> PartStatistics:
        groups = len(self.energy.count)
        rows = {"energy": energy, "fisher": fisher, "whole": whole}
        made = {
            key: getattr(self, key) if values is None else getattr(self, key).merged(Moments.of(values, group, groups))
            for key, values in rows.items()
        }
        return PartStatistics(self.name, self.unit, **made)

    def losses(self) -> Tensor:
        """Return what is expected to be lost per token without each part ``[P]``: of the loss, else of the energy."""
        if self.learnt:
            return _mean(self.fisher)
        return _mean(self.energy) / _mean(self.whole).clamp_min(1e-30)


def wide(values: Tensor) -> Tensor:
    """Return values in at least float32, without their history."""
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def _by_rank(values_BT: Tensor, order_BT: Tensor, parts: int) -> Tensor:
    """Return, per part of the tokens in this order, the sum of their values over T ``[B, P]``; tokens may be shared."""
    total = values_BT.shape[1]
    sums = torch.nn.functional.pad(values_BT.gather(1, order_BT).double().cumsum(1), (1, 0)) / total
    edges = torch.arange(parts + 1, device=sums.device) * total / parts
    low = edges.floor().long()
    high = (low + 1).clamp(max=total)
    at_edges = sums[:, low].lerp(sums[:, high], (edges - low).to(sums.dtype))
    return at_edges.diff(dim=1)


def _mean(moments: Moments) -> Tensor:
    return (moments.mean * moments.count.unsqueeze(1)).sum(0) / moments.count.sum().clamp(min=1)
