"""What calibration makes of one network: the slices, the router that foresees them, thresholds, and corrections.

Legend: S sampled tokens, D width, F hidden width, E routed slices of m neurons, D_o output width, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moefx.errors import InputError
from moefx.passes.calibration.layer import LayerStatistics, hidden, markers
from moefx.routing import fit
from moefx.routing.experts import DenseFFN, Experts
from moefx.routing.initialise import normal_rows
from moefx.routing.moe import RoutedFFN
from moefx.routing.partition import around, balanced_clusters, claimed, coactive, contiguous, dealt, ranked, shuffled
from moefx.routing.precision import at_least_float32
from moefx.routing.router import LinearRouter
from moefx.routing.scorers import MLPScorer, Router
from moefx.routing.selectors import Selector, TopK
from moefx.routing.slices import (
    AbsoluteMLPScorer,
    NeuronScorer,
    OffsetExperts,
    RelativeThreshold,
    TimestepThreshold,
    UnitMLPScorer,
    cut,
    mean_row_weights,
)
from moefx.routing.weights import FFNWeights

if TYPE_CHECKING:
    from moefx.passes.rewrite.split import SplitOptions

Draws = Callable[[str], torch.Generator]
CHANNEL_RANGE = (0.25, 4.0)


@dataclass
class Slicing:
    """One network to be split, and what is known of it.

    ``tokens [S, D]`` and ``bucket [S]`` are the calibration sample, None while a saved model is loaded; ``rows`` is the
    number of thresholds that the timestep chooses from.
    """

    options: SplitOptions
    dense: FFNWeights
    act: Callable[..., Any]
    draws: Draws
    rows: int = 1
    statistics: LayerStatistics | None = None
    tokens: Tensor | None = None
    bucket: Tensor | None = None

    def build(self) -> RoutedFFN:
        """Return the split network; without calibration data only its structure is right."""
        o = self.options
        order = self.order()
        shared, slices = cut(self.dense, order, o.shared, o.experts)
        router = self.router(slices, order)
        selector = self.selector(slices, router)
        experts: nn.Module = Experts(slices, self.act)
        if o.compensation == "mean":
            experts = OffsetExperts(experts, torch.zeros(o.experts, self.dense.out_dim))  # type: ignore[arg-type]
        layer = RoutedFFN(
            router,
            experts,
            selector=selector,
            mode=o.mode,
            scale=o.scale,
            shared=None if shared is None else DenseFFN(shared, self.act),
            selection_bias=o.selection_bias,
            coefficients={"balance": o.balance} if o.balance else {},
        )
        layer.register_buffer("neurons", order)
        layer = layer.to(self.dense.w_in.device)
        if self.tokens is not None:
            with torch.no_grad():
                self._correct(layer.eval(), slices, shared)
        return layer

    # -- which neurons -------------------------------------------------------------------------------------------------

    def order(self) -> Tensor:
        """Return the neurons of the shared network, then slice by slice."""
        o, neurons = self.options, self.dense.hidden
        if self.dense.w_in.is_meta or (self.tokens is None and o.measured):
            return torch.arange(neurons)
        first = neurons * o.shared // o.slices
        best = ranked(self.importance()) if first else torch.arange(neurons)
        rest = best[first:].sort().values
        labels = self._labels(rest, best[first:])
        return torch.cat([best[:first], *(rest[labels == e] for e in range(o.experts))])

    def importance(self) -> Tensor:
        """Return how much each neuron matters ``[F]``."""
        o, layer = self.options, self.statistics
        assert layer is not None
        moments = layer.hidden if o.importance == "variance" else getattr(layer, o.importance)
        if not moments.count.any():
            raise InputError(
                f"rank the neurons of {layer.name} by {o.importance}",
                found="a calibration without gradients",
                do="pass loss= to moefx.calibrate",
            )
        values = moments.variance if o.importance == "variance" else moments.mean
        seen = moments.count > 0
        value = values[seen].max(0).values if o.over == "max" else _mean(values, moments.count)
        if o.importance == "variance":
            value = value * self.dense.w_out.double().cpu().square().sum(0)
        return value

    def _labels(self, rest: Tensor, by_rank: Tensor) -> Tensor:
        o, kind = self.options, self.options.partition
        if kind == "contiguous":
            return contiguous(len(rest), o.experts)
        if kind == "random":
            return shuffled(len(rest), o.experts, self.draws("partition"))
        if kind == "dealt":
            return dealt(self.importance()[rest], o.experts)
        if kind == "clusters":
            return balanced_clusters(self._features(rest), o.experts, self.draws("partition"))
        if kind == "coactivation":
            h = self._hidden()[:, rest].clamp_min(0).double()
            h = h / h.norm(dim=0).clamp_min(1e-30)
            return coactive(h.mT @ h, o.experts, self.draws("partition"))
        if kind == "markers":
            columns = markers(self._hidden(), self._statistics.active).mT
            return around(columns[rest], columns[by_rank[: o.experts]], metric="manhattan")
        scores = self._statistics.taylor.mean[:, rest]
        if len(scores) != o.experts:
            raise InputError(
                "let every data cluster claim its neurons",
                found=f"{len(scores)} groups of calibration data for {o.experts} slices",
                do="calibrate with as many buckets (times branches) as slices, and loss=",
            )
        return claimed(scores)

    def _features(self, rest: Tensor) -> Tensor:
        """Return what clusters compare neurons by: weight rows, or centred activations on the sample."""
        if self.options.features == "activations":
            h = self._hidden()[:, rest].double()
            return (h - h.mean(0)).mT
        rows = self.dense.w_in if self.dense.w_gate is None else self.dense.w_gate
        return rows[rest.to(rows.device)]

    @property
    def _statistics(self) -> LayerStatistics:
        assert self.statistics is not None
        return self.statistics

    def _hidden(self) -> Tensor:
        assert self.tokens is not None
        return hidden(self.dense, self.act, self.tokens)[1].cpu()

    # -- which slices --------------------------------------------------------------------------------------------------

    def targets(self, slices: FFNWeights) -> Tensor:
        """Return what the router shall foresee ``[S, E]``."""
        o = self.options
        assert self.tokens is not None
        if o.target == "mass":
            h = hidden(self._flat(slices), self.act, self.tokens)[1]
            mass = h.reshape(len(h), o.experts, -1).clamp_min(0).sum(-1)
            found: Tensor = mass / mass.max().clamp_min(1e-30)
            return found
        norms = []
        for y in fit.slice_outputs(slices, self.act, self.tokens):
            norms.append((y - y.mean(0) if o.compensation == "mean" else y).norm(dim=-1))
        z = torch.stack(norms, -1)
        return z.clamp_min(1e-6 * float(z.mean())).log() if o.target == "log" else z

    @staticmethod
    def _flat(slices: FFNWeights) -> FFNWeights:
        return slices.neurons(lambda t, axis: torch.cat(list(t.unbind(0)), dim=axis))

    def router(self, slices: FFNWeights, order: Tensor) -> nn.Module:
        """Return the router, fitted to the sample if there is one."""
        o, dim = self.options, self.dense.dim
        if o.router == "neurons":
            return Router(NeuronScorer(self.act, self._representatives(order)))
        if o.router in ("normal", "ridge", "logistic"):
            return self._linear_router(slices)
        draws = self.draws("router")
        if o.router == "mlp":
            kind = MLPScorer if o.target == "log" else AbsoluteMLPScorer
            scorer = kind(dim, o.experts, hidden=o.router_hidden, act="relu", std=dim**-0.5, generator=draws)
        else:
            scorer = UnitMLPScorer(dim, o.experts, hidden=o.experts, act="tanh", bias=False, generator=draws)
        if self.tokens is not None:
            self._train(scorer, slices, draws)
        return Router(scorer)

    def _linear_router(self, slices: FFNWeights) -> LinearRouter:
        o, dim = self.options, self.dense.dim
        router = LinearRouter(dim, o.experts, bias=o.router != "normal", std=0.0)
        assert router.weight is not None
        with torch.no_grad():
            if o.router == "normal":
                router.weight.copy_(normal_rows(o.experts, dim, self.draws("router"), std=o.router_std))
            elif self.tokens is not None:
                z = self.targets(slices)
                if o.router == "logistic":
                    chosen = z.sort(dim=-1, descending=True, stable=True).indices[:, : o.top_k]
                    z = torch.zeros_like(z).scatter(-1, chosen, 1.0)
                solve = fit.ridge if o.router == "ridge" else fit.logistic
                weight, bias = solve(self.tokens, z)
                router.weight.copy_(weight)
                assert router.bias is not None
                router.bias.copy_(bias)
        return router

    def _train(self, scorer: MLPScorer, slices: FFNWeights, draws: torch.Generator) -> None:
        o = self.options
        assert self.tokens is not None
        x, z = self.tokens.float(), self.targets(slices).float()
        scorer.to(x.device)
        if o.router == "tanh":
            # MoEfication starts from the mean rows.
            with torch.no_grad():
                scorer.w_in.copy_(mean_row_weights(slices.w_in))
                scorer.w_out.copy_(torch.eye(o.experts))
            fit.train_scorer(scorer, x, z, draws, loss="bce", steps=o.router_steps)
            return
        scale = z.std().clamp_min(1e-30) if o.target == "norm" else torch.ones(())
        fit.train_scorer(scorer, x, z / scale, draws, steps=o.router_steps, rate=3e-3)
        with torch.no_grad():
            scorer.w_out.mul_(scale)
            if scorer.b_out is not None:
                scorer.b_out.mul_(scale)

    def _representatives(self, order: Tensor) -> FFNWeights:
        """Return, per slice, the neuron whose markers are closest to the slice's mean markers (CMoE)."""
        o = self.options
        routed = order[self.dense.hidden * o.shared // o.slices :].view(o.experts, -1)
        chosen = routed[:, 0]
        if self.tokens is not None:
            columns = markers(self._hidden(), self._statistics.active).mT[routed]  # [E, m, S]
            gap = (columns - columns.mean(1, keepdim=True)).abs().sum(-1)
            chosen = routed.gather(1, gap.argmin(1, keepdim=True)).squeeze(1)
        return replace(self.dense, b_out=None).neurons(lambda t, axis: t.index_select(axis, chosen.to(t.device)))

    def selector(self, slices: FFNWeights, router: nn.Module) -> Selector:
        """Return the selector, its threshold set so that a token gets ``top_k`` slices on average."""
        o = self.options
        if o.selector == "top-k":
            return TopK(o.top_k)
        share, fixed = o.top_k / o.experts, o.tau
        relative = o.selector == "relative"
        value = torch.full((self.rows,), 0.0 if fixed is None else fixed)
        if self.tokens is not None and fixed is None:
            with torch.no_grad():
                scores = router.to(self.tokens.device)(self.tokens.unsqueeze(1)).squeeze(1)
            value = self._cuts(scores, share, relative, slices)
        if relative:
            return RelativeThreshold(value, steps=o.timestep_steps, width=o.width)
        return TimestepThreshold(
            value.unsqueeze(1).expand(-1, o.experts).clone(), steps=o.timestep_steps, width=o.width
        )

    def _cuts(self, scores: Tensor, share: float, relative: bool, slices: FFNWeights) -> Tensor:
        one = fit.relative_cut if relative else fit.share_cut
        if self.rows == 1:
            return torch.tensor([one(scores, share)])
        assert self.bucket is not None
        z = self.targets(slices)
        lost = (z.exp() if self.options.target == "log" else z).square()
        parts = [torch.nonzero(self.bucket == b).flatten() for b in range(self.rows)]
        shares = fit.equal_loss_shares([scores[p] for p in parts], [lost[p] for p in parts], share)
        return torch.tensor([one(scores[p] if len(p) else scores, s) for p, s in zip(parts, shares, strict=True)])

    # -- corrections ---------------------------------------------------------------------------------------------------

    def _correct(self, layer: RoutedFFN, slices: FFNWeights, shared: FFNWeights | None) -> None:
        """Set the constants that stand in for slices left out, then calibrate the channels of the output."""
        o, x = self.options, self.tokens
        assert x is not None
        taps = [self._times()] if layer.taps else []
        experts = layer.experts.experts if isinstance(layer.experts, OffsetExperts) else layer.experts
        assert isinstance(experts, Experts)
        total = torch.zeros(len(x), self.dense.out_dim, dtype=at_least_float32(x), device=x.device)
        routing = layer.route(x.unsqueeze(1), *taps)
        taken = torch.zeros(len(x), o.experts + 1, dtype=torch.bool, device=x.device)
        taken.scatter_(1, routing.experts.clamp(max=o.experts), True)
        for e, y in enumerate(fit.slice_outputs(slices, self.act, x)):
            total += y
            if isinstance(layer.experts, OffsetExperts):
                left = ~taken[:, e]
                mean = y[left].mean(0) if left.any() else y.mean(0)
                layer.experts.offset[e] = -mean
                assert experts.b_out is not None
                experts.b_out.add_(mean.to(experts.b_out))
        if o.channels == "none":
            return
        if shared is not None:
            total += DenseFFN(shared, self.act)(x.to(shared.w_in.dtype)).to(total)
        assert experts.b_out is not None
        before = torch.zeros_like(experts.b_out) if self.dense.b_out is None else self.dense.b_out
        found = layer(x.unsqueeze(1).to(self.dense.w_in.dtype), *taps).squeeze(1).to(total) - before.to(total)
        scale, shift = _channels(found.double(), total.double(), o.channels)
        experts.b_out.copy_((scale * (experts.b_out - before).double() + shift + before).to(experts.b_out))
        experts.w_out.mul_(scale.unsqueeze(1).to(experts.w_out))
        if isinstance(layer.shared, DenseFFN):
            layer.shared.w_out.mul_(scale.unsqueeze(1).to(layer.shared.w_out))
        if isinstance(layer.experts, OffsetExperts):
            layer.experts.offset.mul_(scale.to(layer.experts.offset))

    def _times(self) -> Tensor:
        """Return a timestep in the middle of every token's bucket."""
        assert self.bucket is not None
        return (self.bucket + 0.5) * (self.options.timestep_steps / self.rows)


def _channels(found: Tensor, wanted: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return a and b per channel: least squares of wanted on found, or equal mean and variance (LLaMA-MoE-v2)."""
    mean, target = found.mean(0), wanted.mean(0)
    spread = (found - mean).square().mean(0).clamp_min(1e-30)
    if kind == "affine":
        scale = ((found - mean) * (wanted - target)).mean(0) / spread
    else:
        scale = ((wanted - target).square().mean(0) / spread).sqrt()
    scale = scale.clamp(*CHANNEL_RANGE)
    return scale, target - scale * mean


def _mean(values_GF: Tensor, count_G: Tensor) -> Tensor:
    """Return the mean over groups, each as often as it was seen."""
    return (values_GF * count_G.unsqueeze(1)).sum(0) / count_G.sum()
