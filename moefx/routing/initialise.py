"""Starts of experts and routers from dense weights: pure functions of tensors, deterministic in the seed.

They work in any floating dtype (draws and sums in float32, one rounding at the end; draws come from a CPU generator, so
that a seed means the same on every device) and on ``meta`` (shapes only).

Which start is exact, that is, gives the dense FFN at step 0:

============================================  ====================================================================
start                                         exact for
============================================  ====================================================================
`copies`                                      every router, modes with Σ w = 1 (T1); ``ste``, ``unit`` with K = 1
`granular_copies`, ``granularity=G``          the same, K a multiple of G (T8)
`granular_copies`, `tied_rows`, ``scale=G``   the same while the rows stay tied (T8)
`shards` alone                                only all E at weight 1: ``unit`` with K = E (T9)
`arrange_shared`: a · shared + (1 − a) · …    as the routed part alone, any a (T10)
`zero_output` next to a full shared FFN       every router and mode, also Σ w ≠ 1 (T10, T17)
`add_noise`, `partially_reinitialise`         never; expected errors in their docstrings (T15, T16)
============================================  ====================================================================

Legend: F hidden width, N copies, G granularity (shards per copy), E =
N·G.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moefx.errors import OptionError
from moefx.routing.precision import at_least_float32
from moefx.routing.weights import FFNWeights

Seed = int | torch.Generator


def generator(seed: Seed) -> torch.Generator:
    """Return a CPU generator; one that is given is used, and advanced, as it is."""
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)


def copies(dense: FFNWeights, n: int) -> FFNWeights:
    """Return n identical experts (sparse upcycling, arXiv 2212.05055); ``b_out`` stays one vector behind them."""
    return dense.neurons(lambda tensor, _: torch.stack([tensor.detach()] * n))


def shards(dense: FFNWeights, parts: int, labels: Tensor | None = None) -> FFNWeights:
    """Return the FFN cut into experts of m = F/parts neurons; together, at weight 1, they are the dense FFN.

    Args:
        dense: dense weights. A width that ``parts`` does not divide must be padded first, see `pad_hidden`.
        parts: number of shards.
        labels: shard of each neuron ``[F]``, every shard equally often; None cuts contiguously.

    Raises:
        OptionError: shards of unequal size.
    """
    if dense.hidden % parts:
        raise OptionError(
            f"cut {dense.hidden} neurons into {parts}", found="unequal shards", do="pad_hidden to a multiple first"
        )
    order = None
    if labels is not None:
        counts = torch.bincount(labels, minlength=parts)
        if labels.shape != (dense.hidden,) or counts.shape != (parts,) or int(counts.max()) != dense.hidden // parts:
            raise OptionError(
                f"cut into {parts} by label", found=f"counts {counts.tolist()}", do="give every shard equally many"
            )
        order = labels.sort(stable=True).indices

    def cut(tensor: Tensor, axis: int) -> Tensor:
        tensor = tensor.detach()
        if order is not None:
            tensor = tensor.index_select(axis, order.to(tensor.device))
        return torch.stack(tensor.chunk(parts, dim=axis))

    return dense.neurons(cut)


def granular_copies(dense: FFNWeights, n: int, granularity: int) -> FFNWeights:
    """Return E = n·G experts, expert a·G + g = shard g of copy a: virtual groups without scaling.

    The scaling-free form of arXiv 2410.07524. With ``RoutedFFN(granularity=G)`` the G members of a selected group share
    its gate, and their sum is the whole FFN: nothing is multiplied by G, √G or ∛G as in the release, which is off by
    11–14 % for SwiGLU and GELU.
    """
    if granularity == 1:
        return copies(dense, n)
    cut = shards(dense, granularity)
    return cut.neurons(lambda tensor, _: tensor.repeat(n, *[1] * (tensor.ndim - 1)))


def pad_hidden(weights: FFNWeights, multiple: int) -> FFNWeights:
    """Return the weights with zero neurons up to a multiple; exact (T14).

    Rows *and* columns are zero, so it does not matter what the activation makes of zero.
    """
    missing = -weights.hidden % multiple

    def pad(tensor: Tensor, axis: int) -> Tensor:
        shape = list(tensor.shape)
        shape[axis] = missing
        return torch.cat([tensor.detach(), tensor.new_zeros(shape)], dim=axis)

    return weights.neurons(pad) if missing else weights


def add_noise(experts: FFNWeights, seed: Seed, *, sigma: float = 1e-3, fraction: float = 1.0) -> FFNWeights:
    """Return the experts with normal noise on a fraction of their neurons, the same neurons in all matrices of one.

    ``sigma`` is relative to the standard deviation of each matrix; 1e-3 is below bf16 rounding, enough to break the
    symmetry of copies. Not exact: the error grows like sigma. Biases are left alone.
    """
    draws = generator(seed)
    chosen = _neurons_per_expert(experts, fraction, draws)

    def noisy(tensor: Tensor, axis: int) -> Tensor:
        old = tensor.detach()
        if old.ndim < 3:
            return old
        wide = old.to(at_least_float32(old))
        changed = wide + _normal(wide, draws) * (sigma * wide.std())
        return torch.where(_along(chosen, axis).to(old.device), changed.to(old.dtype), old)

    return experts.neurons(noisy)


def partially_reinitialise(
    experts: FFNWeights, seed: Seed, *, r: float = 0.5, independent_sets: bool = False
) -> FFNWeights:
    """Return the experts with a fraction r of the neurons of each drawn anew (Drop-Upcycling, arXiv 2502.19261).

    Per expert ⌊r·F⌋ neurons are drawn; their rows of ``w_in`` and ``w_gate`` and columns of ``w_out`` are replaced by
    N(μ, σ²) with the mean and standard deviation of what they replace. Biases are kept (the paper has none).
    Expected relative output error at step 0, with K equal gates: √(r² + r(2 − r)/K), for r = ½, K = 2: 0.79 (T15).

    Args:
        experts: stacked weights.
        seed: seed or generator.
        r: fraction of neurons.
        independent_sets: draw the neurons anew for each matrix, as the released code does; a neuron of a gated FFN then
            survives in all three with probability (1 − r)³ only, which is as if r were larger.
    """
    draws = generator(seed)
    one_set = None if independent_sets else _neurons_per_expert(experts, r, draws)

    def replaced(tensor: Tensor, axis: int) -> Tensor:
        old = tensor.detach()
        if old.ndim < 3:
            return old
        chosen = _neurons_per_expert(experts, r, draws) if one_set is None else one_set
        mask = _along(chosen, axis).to(old.device)
        wide = old.to(at_least_float32(old))
        count = mask.expand_as(wide).sum((-2, -1), keepdim=True).clamp(min=2)
        mean = (wide * mask).sum((-2, -1), keepdim=True) / count
        std = (((wide - mean) * mask).square().sum((-2, -1), keepdim=True) / (count - 1)).sqrt()
        return torch.where(mask, (_normal(wide, draws) * std + mean).to(old.dtype), old)

    return experts.neurons(replaced)


def zero_output(experts: FFNWeights) -> FFNWeights:
    """Return the experts with ``w_out`` zero and no output bias: they add nothing until trained.

    Next to a full shared FFN (``shared_scale=1``) this is exact for every router, mode and drop; the routed part learns
    a delta.
    """
    return replace(experts, w_out=torch.zeros_like(experts.w_out.detach()), b_out=None)


def arrange_shared(
    dense: FFNWeights, routed: FFNWeights, n: int = 1, *, a: float = 0.5
) -> tuple[FFNWeights, FFNWeights, float, float]:
    """Return (shared weights, routed weights, shared scale, routed scale) for n full shared copies of the dense FFN.

    ``y = (a/n)·Σ_n FFN(x) + (1 − a)·Σ_e w_e FFN_e(x) + b_out`` is the dense FFN for any a
    if the routed part alone is and Σ w = 1. An unscaled shared copy would double the layer. The n copies form one FFN
    of width n·F; ``b_out`` stays with the routed part, once. a = ½ is exact in every binary format. Pass the scales as
    ``RoutedFFN(shared_scale=, scale=)``.
    """
    if n < 1 or not 0 <= a <= 1:
        raise OptionError(f"{n} shared experts at weight {a}", found="out of range", do="n >= 1 and 0 <= a <= 1")
    wide = dense.neurons(lambda tensor, axis: torch.cat([tensor.detach()] * n, dim=axis))
    return replace(wide, b_out=None), replace(routed, b_out=dense.b_out), a / n, 1 - a


def normal_rows(
    experts: int, dim: int, seed: Seed, *, std: float = 0.02, device: torch.device | str | None = None
) -> Tensor:
    """Return router rows ``[E, D]`` from N(0, std²), float32. Published starts: 0.02, or 1/√D."""
    return (torch.randn(experts, dim, generator=generator(seed)) * std).to(device)


def tied_rows(experts: int, dim: int, seed: Seed, *, granularity: int, std: float = 0.02) -> Tensor:
    """Return router rows ``[E, D]`` in which each G consecutive rows are equal: tied groups, spelled out.

    For a router that shall be able to part the members of a group; `RoutedFFN` with ``granularity`` needs the E/G rows
    only.
    """
    return untie(normal_rows(experts // granularity, dim, seed, std=std), granularity)


def untie(rows: Tensor, granularity: int) -> Tensor:
    """Return E = N·G rows from N tied ones, so that training may part them.

    Under a renormalised mode the G members of a group then share the gate mass that the group had: multiply by
    ``scale=G`` and drop ``granularity`` to stay exact.
    """
    return rows.repeat_interleave(granularity, dim=0)


def _neurons_per_expert(experts: FFNWeights, fraction: float, draws: torch.Generator) -> Tensor:
    """Return a mask ``[E, m]`` with ⌊fraction·m⌋ neurons of each expert."""
    if not 0 <= fraction <= 1 or experts.num_experts is None:
        raise OptionError(
            f"change a fraction {fraction} of each expert",
            found="out of range, or dense weights",
            do="0 <= fraction <= 1",
        )
    count = int(fraction * experts.hidden + 1e-9)
    ranks = torch.stack([torch.randperm(experts.hidden, generator=draws) for _ in range(experts.num_experts)])
    return ranks < count


def _along(mask: Tensor, axis: int) -> Tensor:
    return mask.unsqueeze(-1) if axis == -2 else mask.unsqueeze(-2)


def _normal(like: Tensor, draws: torch.Generator) -> Tensor:
    """Return N(0, 1) in the shape, dtype and device of ``like``, drawn in float32 on the generator's device."""
    if like.is_meta:
        return torch.empty_like(like)
    return torch.randn(like.shape, generator=draws, device=draws.device).to(like)
