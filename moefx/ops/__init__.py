"""The dialect: what a routed layer needs and torch cannot say with static shapes.

Five operators, each a ``torch.library.custom_op`` with a fake rule, a gradient, a fast CPU kernel and a kernel for
other devices that never waits for them. They trace under ``torch.fx``, ``make_fx``, ``torch.export`` and
``torch.compile``; no shape depends on what a router decided. A routed FFN is::

    order, offsets = group(experts_TK, E)
    hidden = activate(act, grouped_linear(x_TD, w_in_EFD, b_in_EF, order, offsets, K))
    y_TD = combine(grouped_linear(hidden, w_out_EDF, b_out_ED, None, offsets, 1), order, weights_TK)

``activate`` is no operator but a call of a pointwise function that spares an eager forward pass its memory traffic;
nor is ``grouped_ffn``, which stands for the two products and what is between them and spares training even more. And
where experts choose tokens, so that a token has any number of rows, ``scatter`` stands for ``combine``.
``head_attention`` is attention in which queries choose their heads.

Shapes: ``T`` tokens, ``K`` slots per token, ``R = T*K`` routed rows, ``E`` experts, ``I`` input and ``N`` output width.
Second derivatives are not defined and raise :class:`moefx.errors.MoefxError`.
"""

from __future__ import annotations

from moefx.ops.activate import activate, unseen
from moefx.ops.combine import combine
from moefx.ops.group import group
from moefx.ops.grouped_ffn import FFNStack, grouped_ffn
from moefx.ops.grouped_linear import grouped_linear
from moefx.ops.head_attention import head_attention
from moefx.ops.scatter import scatter

__all__ = [
    "FFNStack",
    "activate",
    "combine",
    "group",
    "grouped_ffn",
    "grouped_linear",
    "head_attention",
    "scatter",
    "unseen",
]
