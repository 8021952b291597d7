"""Routing traces with known structure, to try a strategy or a cluster before there is a model.

Legend: S noise levels, B samples, N tokens, L layers, K experts per token, E experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moefx.errors import OptionError, nearest
from moefx.passes.placement.count import trace_of_choices
from moefx.passes.placement.trace import Array, RoutingTrace

KINDS = ("zipf", "planted", "drifting")
# Scores are drawn with Gumbel noise: top-K of them is sampling without replacement in proportion to the weights.
_PERSISTENT = 0.9


def synthesise(
    kind: str,
    *,
    levels: int = 16,
    layers: int = 4,
    experts: int = 16,
    top_k: int = 2,
    samples: int = 8,
    tokens: int = 64,
    groups: int = 4,
    zipf: float = 0.6,
    seed: int = 0,
) -> RoutingTrace:
    """Return a trace of drawn choices; the same arguments give the same trace.

    Args:
        kind: ``zipf``, popularity falls as rank**-zipf in each layer and nothing else; ``planted``, besides, experts
            form hidden groups between which tokens seldom move from layer to layer; ``drifting``, besides ``zipf``,
            each expert has a noise level at which it is hot.
        levels: S.
        layers: L.
        experts: E.
        top_k: K.
        samples: B, of which the second half is the first under the other guidance condition.
        tokens: N.
        groups: hidden groups of ``planted``.
        zipf: exponent of the popularity.
        seed: of the draws.

    Raises:
        OptionError: the kind is unknown or a number is impossible.
    """
    if kind not in KINDS:
        raise OptionError(f"synthesise a trace of kind {kind!r}", found="no such kind", do=nearest(kind, KINDS))
    if not (1 <= top_k <= experts and 1 <= groups <= experts and levels >= 1 and layers >= 1 and tokens >= 1):
        found = f"top {top_k} of {experts}, {groups} groups, {levels} levels, {layers} layers, {tokens} tokens"
        raise OptionError("synthesise a trace", found=found, do="use positive numbers, no more than there are experts")
    if samples < 2 or samples % 2:
        raise OptionError("synthesise a trace", found=f"{samples} samples", do="use an even number: two branches")
    draws = np.random.default_rng(seed)
    ranks_LE = np.stack([draws.permutation(experts) for _ in range(layers)])
    weight_LE = -zipf * np.log1p(ranks_LE)
    group_LE = np.stack([draws.permutation(experts) % groups for _ in range(layers)])
    phase_LE = draws.random((layers, experts))
    choices = np.empty((levels, samples, tokens, layers, top_k), dtype=np.int64)
    noise_BNLE = _gumbel(draws, (samples, tokens, layers, experts))
    for s in range(levels):
        fresh = np.tile(draws.random((samples // 2, tokens, 1, 1)) > _PERSISTENT, (2, 1, 1, 1))
        noise_BNLE = np.where(fresh, _gumbel(draws, noise_BNLE.shape), noise_BNLE)
        level_LE = weight_LE + (_bump(phase_LE, s / levels) if kind == "drifting" else 0.0)
        choices[s] = _choose(noise_BNLE + level_LE, group_LE if kind == "planted" else None, top_k, groups)
    return trace_of_choices(choices, experts=experts, branches=2)


def _gumbel(draws: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return noise of which the second half of the samples repeats most of the first."""
    noise = draws.gumbel(size=shape)
    half = shape[0] // 2
    repeated = draws.random((half, *shape[1:3], 1)) < _PERSISTENT
    noise[half:] = np.where(repeated, noise[:half], noise[half:])
    return noise


def _bump(phase_LE: Array, at: float) -> Array:
    return 1.5 * np.cos(2 * np.pi * (phase_LE - at))


def _choose(scores_BNLE: Array, group_LE: NDArray[np.int64] | None, top_k: int, groups: int) -> NDArray[np.int64]:
    """Return the top K of each layer; with groups, the one a token is in draws it, and it follows its first choice."""
    chosen = np.empty((*scores_BNLE.shape[:3], top_k), dtype=np.int64)
    home_BN = np.arange(scores_BNLE.shape[1])[None] % groups + np.zeros((scores_BNLE.shape[0], 1), dtype=np.int64)
    for i in range(scores_BNLE.shape[2]):
        scores = scores_BNLE[:, :, i]
        if group_LE is not None:
            scores = scores + np.where(group_LE[i] == home_BN[..., None], np.log(12.0), 0.0)
        chosen[:, :, i] = np.argsort(-scores, axis=-1, kind="stable")[..., :top_k]
        if group_LE is not None:
            home_BN = group_LE[i][chosen[:, :, i, 0]]
    return chosen
