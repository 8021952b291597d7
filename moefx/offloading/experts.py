"""What stands in place of the experts of a layer when not all of them are on the device.

Legend: T tokens, K experts per token, R = T·K rows sorted by expert, A rows of one expert, E experts, D, N widths.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any, Self

import torch
from torch import Tensor, nn

from moefx import ops
from moefx.errors import PlanError
from moefx.offloading.layout import Layout, stacked
from moefx.offloading.store import Store, Weights
from moefx.offloading.stream import Piece, Stream
from moefx.ops import _cpu
from moefx.routing.experts import Experts
from moefx.routing.precision import without_autocast


class OffloadedExperts(nn.Module):
    """The same call and the same bits as :class:`Experts`, for inference; only ``pins`` stay on the device.

    The first projections of all experts come first, then the activation over all rows, then the second projections:
    the order of :class:`Experts`, whose bits depend on it. Each expert's product is made when its weights are there.

    Args:
        experts: all experts; their parameters are emptied by :func:`moefx.offload` once this module has taken over.
        layout: of one expert.
        layer: index in ``store``.
        pins: experts that stay, ascending.
        store: where all of them lie.
        stream: hands out those that are not pinned.
        device: where to compute.
    """

    def __init__(
        self,
        experts: Experts,
        layout: Layout,
        layer: int,
        pins: tuple[int, ...],
        store: Store,
        stream: Stream,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.num_experts, self.act, self.b_out = experts.num_experts, experts.act, experts.b_out
        self.pins, self.device = pins, device
        self._original = (experts,)  # a tuple, so that its parameters are not ours
        self._layer, self._store, self._stream = layer, store, stream
        self._pinned: dict[tuple[int, int], Weights] = {}
        for expert in pins:
            for half, shape in enumerate(layout.halves):
                buffer = torch.empty(shape.nbytes, dtype=torch.uint8, device=device)
                self._pinned[half, expert] = shape.views(buffer, expert)
                store.read(layer, expert, self._pinned[half, expert])
        self.train(experts.training)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts; see :meth:`Experts.forward`."""
        if torch.is_grad_enabled() and (x_TD.requires_grad or gates_TK.requires_grad):
            raise PlanError(
                "compute gradients through offloaded experts",
                found="they are for inference",
                do="run under torch.no_grad() or torch.inference_mode(), or call moefx.onload(model) first",
            )
        kind = x_TD.device.type
        if torch.is_autocast_enabled(kind) and x_TD.dtype != torch.float64:
            x_TD = x_TD.to(torch.get_autocast_dtype(kind))  # as the products of resident experts cast it
        with without_autocast(x_TD):
            order_R, offsets = ops.group(experts_TK, self.num_experts)
            y_TD = ops.combine(self._rows(x_TD, order_R, offsets, experts_TK.shape[1]), order_R, gates_TK)
            return y_TD if self.b_out is None else y_TD + self.b_out.to(y_TD.dtype)

    def _rows(self, x_TD: Tensor, order_R: Tensor, offsets: Tensor, k: int) -> Tensor:
        """Return what each chosen expert makes of its tokens, without gates."""
        bounds = offsets.tolist()  # the one wait for the device: which experts have rows decides what is loaded
        needed = [e for e in range(self.num_experts) if bounds[e] < bounds[e + 1]]
        self._stream.stats.resident += 2 * sum((0, e) in self._pinned for e in needed)
        streamed = [Piece(self._layer, half, e) for half in (0, 1) for e in needed if (half, e) not in self._pinned]
        with closing(self._stream.take(streamed)) as arriving:
            used = [(e, bounds[e], bounds[e + 1]) for e in needed]

            def weights(half: int, expert: int) -> Weights:
                return self._pinned[half, expert] if (half, expert) in self._pinned else next(arriving)

            shapes = {name: t.shape[1] for name, t in self._store.layers[self._layer].items() if t.ndim == 3}
            up = _Product(x_TD, order_R, k, shapes["w_in"])
            gate = _Product(x_TD, order_R, k, shapes["w_gate"]) if "w_gate" in shapes else None
            for expert, begin, end in used:
                first = weights(0, expert)
                up.fill(begin, end, first["w_in"], first.get("b_in"))
                if gate is not None:
                    gate.fill(begin, end, first["w_gate"], first.get("b_gate"))
            h_RN = self.act(up.out) if gate is None else self.act(up.out, gate.out)
            down = _Product(h_RN, None, 1, shapes["w_out"])
            for expert, begin, end in used:
                down.fill(begin, end, weights(1, expert)["w_out"], None)
        return down.out

    def restore(self) -> Experts:
        """Return the original module with all its weights on the device."""
        (experts,) = self._original
        for name, parameter in stacked(experts).items():
            parameter.data = self._store.layers[self._layer][name].to(self.device, copy=True)
        experts.train(self.training)
        return experts

    @property
    def stream(self) -> Stream:
        """What hands out the experts that are not pinned; one for all layers."""
        return self._stream

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Refuse to be moved or cast: the weights in the store would stay as they are."""
        for tensor in self._store.layers[self._layer].values():
            found = fn(torch.empty(0, dtype=tensor.dtype, device=self.device))
            if (found.dtype, found.device.type) != (tensor.dtype, self.device.type):
                raise PlanError(
                    f"turn offloaded experts into {found.dtype} on {found.device}",
                    found=f"{tensor.dtype}, computed on {self.device}",
                    do="call moefx.onload(model), convert it, and offload it again",
                )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: t for name, t in self._store.layers[self._layer].items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        raise PlanError(
            f"load weights into {prefix.rstrip('.')}",
            found="its experts are offloaded",
            do="call moefx.onload(model), load, and offload it again",
        )

    def __deepcopy__(self, memo: object) -> Self:
        raise PlanError(
            "copy a model with offloaded experts", found="one thread and one store", do="call moefx.onload(model) first"
        )

    def extra_repr(self) -> str:
        """Describe the module in ``print(model)``."""
        return f"{len(self.pins)} of {self.num_experts} experts on {self.device}"


class _Product:
    """The result of one grouped product, filled expert by expert with the bits that ``ops.grouped_linear`` gives.

    On CPU that op gathers all rows at once for small results and expert by expert for large ones, which moves operands
    relative to a cache line; the same choice is made here.
    """

    def __init__(self, x: Tensor, order_R: Tensor | None, k: int, width: int) -> None:
        self._x, self._token_R = x, None if order_R is None else order_R // k
        rows = x.shape[0] if order_R is None else order_R.shape[0]
        self.out = x.new_zeros((rows, width))
        self._gathered: Tensor | None = x if order_R is None else None

    def fill(self, begin: int, end: int, weight_ND: Tensor, bias_N: Tensor | None) -> None:
        """Write the rows of one expert."""
        weight_ND = weight_ND.to(self._x.dtype)
        bias_N = None if bias_N is None else bias_N.to(self._x.dtype)
        rows_AD = self._inputs(begin, end, bias_N is None, weight_ND)
        if self._x.is_cpu:
            _cpu.matmul_into(self.out[begin:end], rows_AD, weight_ND.mT, bias_N)
            return
        whole = torch.tensor([0, end - begin]).to(self._x.device, non_blocking=True)
        stacked_bias = None if bias_N is None else bias_N.unsqueeze(0)
        self.out[begin:end] = ops.grouped_linear(rows_AD, weight_ND.unsqueeze(0), stacked_bias, None, whole)

    def _inputs(self, begin: int, end: int, no_bias: bool, weight_ND: Tensor) -> Tensor:
        if self._gathered is not None:
            return self._gathered[begin:end]
        assert self._token_R is not None
        if self._x.is_cpu and no_bias and _cpu._is_small(self.out.numel(), self._x, weight_ND.unsqueeze(0).mT):
            self._gathered = self._x.index_select(0, self._token_R)
            return self._gathered[begin:end]
        return self._x.index_select(0, self._token_R[begin:end])
