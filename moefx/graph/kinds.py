"""Normalised operation kinds: one vocabulary for traced graphs, ``torch.export`` graphs and dynamo graphs.

``F.linear``, a leaf ``nn.Linear``, ``aten.linear``, ``aten.addmm`` and ``x @ w + b`` are all ``kind == "linear"`` with
the same named weights; ``chunk`` followed by an item, ``split`` and ``x[..., :h]`` are all ``"slice"`` with one index.
Analyses read kinds only, so they never look at class or module names.

A parameter is not a data-flow input but a :class:`ParamRef`; a size is not data flow at all.
"""

from moefx.graph import _kind_moves, _kind_projections, _kind_readers
from moefx.graph._kind_base import MOVES, POINTWISE, Op, ParamRef, carries_data, number, op, param_ref, shape, value
from moefx.graph._kind_moves import basic_index
from moefx.graph._kind_tables import KINDS, NONLINEAR

__all__ = [
    "KINDS",
    "MOVES",
    "NONLINEAR",
    "POINTWISE",
    "Op",
    "ParamRef",
    "basic_index",
    "carries_data",
    "number",
    "op",
    "param_ref",
    "shape",
    "value",
]

# Importing these modules registers their readers.
_READERS = (_kind_moves, _kind_projections, _kind_readers)
