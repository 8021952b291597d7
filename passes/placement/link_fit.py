"""Models of the time of exchanges, fitted by least squares to measured ones, from one price for all to one per link.

* ``bus``: everything shares one wire, ``t = α + β Σ bytes``;
* ``switch``: each rank has one way out and one way in, all alike, and the busiest decides;
* ``ways``: the same with a price for each way;
* ``links``: one wire again, but a byte has its own price for each pair of ranks.

Errors count relative to the time. Models with more prices fit better what they were fitted to: they are compared on
exchanges that were held out.

Legend: M exchanges, G ranks, P prices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Array = NDArray[np.float64]
_ROUNDS, _FOLDS = 40, 4
# A model with more prices must be better by so much, on exchanges it has not seen.
_WORTH = 0.9
_NO_ERROR = 1e-9


@dataclass(frozen=True)
class LinkFit:
    """A fitted model.

    Args:
        model: its name.
        alpha_s: latency of one exchange.
        out_s_per_byte: seconds per byte of each rank's way out ``[G]``; not used by ``bus`` and ``links``.
        in_s_per_byte: of each way in ``[G]``.
        link_s_per_byte: seconds per byte from each rank to each other ``[G, G]``.
        error: mean relative error, on exchanges held out.
    """

    model: str
    alpha_s: float
    out_s_per_byte: Array
    in_s_per_byte: Array
    link_s_per_byte: Array
    error: float = 0.0

    def seconds(self, bytes_MGG: Array) -> Array:
        """Return the modelled times ``[M]``."""
        if self.model in ("bus", "links"):
            return np.asarray(self.alpha_s + (bytes_MGG * self.link_s_per_byte).sum(axis=(1, 2)))
        return np.asarray(
            self.alpha_s + (_ways(bytes_MGG) * np.concatenate([self.out_s_per_byte, self.in_s_per_byte])).max(axis=1)
        )


def fit_links(bytes_MGG: Array, seconds_M: Array) -> list[LinkFit]:
    """Return all models that the exchanges suffice for, the one to use first."""
    ranks = bytes_MGG.shape[1]
    enough = {"bus": 2, "switch": 2, "ways": 2 * ranks + 1, "links": ranks * (ranks - 1) + 1}
    fits = [_held_out(name, bytes_MGG, seconds_M) for name, prices in enough.items() if 2 * prices <= len(seconds_M)]
    best, *_ = sorted(fits[:2], key=lambda f: f.error)
    for richer in fits[2:]:
        if best.error > _NO_ERROR and richer.error < _WORTH * best.error:
            best = richer
    return [best, *(f for f in fits if f is not best)]


def _held_out(name: str, bytes_MGG: Array, seconds_M: Array) -> LinkFit:
    """Return the model fitted to all exchanges, with its error on parts left out in turn."""
    fold_M, errors = np.arange(len(seconds_M)) % _FOLDS, []
    for fold in range(_FOLDS):
        seen = fold_M != fold
        found = _FITS[name](bytes_MGG[seen], seconds_M[seen])
        errors.append(np.abs(found.seconds(bytes_MGG[~seen]) / seconds_M[~seen] - 1))
    whole = _FITS[name](bytes_MGG, seconds_M)
    return LinkFit(
        whole.model,
        whole.alpha_s,
        whole.out_s_per_byte,
        whole.in_s_per_byte,
        whole.link_s_per_byte,
        float(np.concatenate(errors).mean()),
    )


def _bus(bytes_MGG: Array, seconds_M: Array) -> LinkFit:
    alpha, beta = _least_squares(bytes_MGG.sum(axis=(1, 2))[:, None], seconds_M)
    return _alike("bus", alpha, float(beta[0]), bytes_MGG.shape[1])


def _switch(bytes_MGG: Array, seconds_M: Array) -> LinkFit:
    alpha, beta = _least_squares(_ways(bytes_MGG).max(axis=1)[:, None], seconds_M)
    return _alike("switch", alpha, float(beta[0]), bytes_MGG.shape[1])


def _all_ways(bytes_MGG: Array, seconds_M: Array) -> LinkFit:
    """Fit prices to the way that is the busiest of each exchange, find out again which one is, and so on."""
    ranks, work_MP, best = bytes_MGG.shape[1], _ways(bytes_MGG), None
    start = _switch(bytes_MGG, seconds_M)
    alpha, beta_P = start.alpha_s, np.concatenate([start.out_s_per_byte, start.in_s_per_byte])
    before = None
    for _ in range(_ROUNDS):
        busiest_M = (work_MP * beta_P).argmax(axis=1)
        found = LinkFit("ways", alpha, beta_P[:ranks], beta_P[ranks:], _per_link(beta_P, ranks))
        error = float(np.abs(found.seconds(bytes_MGG) / seconds_M - 1).mean())
        if best is None or error < best[0]:
            best = error, found
        if before is not None and (busiest_M == before).all():
            break
        before = busiest_M
        active_MP = np.where(np.arange(2 * ranks) == busiest_M[:, None], work_MP, 0.0)
        seen_P = active_MP.any(axis=0)
        alpha, fitted = _least_squares(active_MP[:, seen_P], seconds_M)
        beta_P = beta_P.copy()
        beta_P[seen_P] = fitted
    assert best is not None
    return best[1]


def _links(bytes_MGG: Array, seconds_M: Array) -> LinkFit:
    ranks = bytes_MGG.shape[1]
    apart = ~np.eye(ranks, dtype=np.bool_)
    alpha, beta = _least_squares(bytes_MGG[:, apart], seconds_M)
    link_s_per_byte = np.zeros((ranks, ranks))
    link_s_per_byte[apart] = beta
    return LinkFit("links", alpha, link_s_per_byte.max(axis=1), link_s_per_byte.max(axis=0), link_s_per_byte)


_FITS: dict[str, Callable[[Array, Array], LinkFit]] = {
    "bus": _bus,
    "switch": _switch,
    "ways": _all_ways,
    "links": _links,
}


def _ways(bytes_MGG: Array) -> Array:
    """Return the bytes on each way out, then on each way in ``[M, 2G]``."""
    return np.concatenate([bytes_MGG.sum(axis=2), bytes_MGG.sum(axis=1)], axis=1)


def _least_squares(work_MP: Array, seconds_M: Array) -> tuple[float, Array]:
    """Return the latency and the prices, none negative."""
    columns = np.concatenate([np.ones((len(seconds_M), 1)), work_MP], axis=1)
    scale_P = np.maximum(columns.max(axis=0), 1e-300)  # so that all columns have one size
    found, _ = nnls(columns / scale_P / seconds_M[:, None], np.ones(len(seconds_M)))
    prices = found / scale_P
    return float(prices[0]), np.asarray(prices[1:])


def _alike(model: str, alpha: float, beta: float, ranks: int) -> LinkFit:
    prices = np.full(ranks, beta)
    return LinkFit(model, alpha, prices, prices, np.full((ranks, ranks), beta) * (1 - np.eye(ranks)))


def _per_link(beta_P: Array, ranks: int) -> Array:
    """Return what a byte costs at the dearer end of each pair."""
    return np.asarray(np.maximum(beta_P[:ranks, None], beta_P[None, ranks:]) * (1 - np.eye(ranks)))
