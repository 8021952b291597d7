"""Modules of one model captured alone: what planning saw of them, rewriting takes over."""

from __future__ import annotations

import json
from collections.abc import Collection

from torch import nn

from moefx.graph import Graph
from moefx.model.local import JSON, local_graph

_Asked = tuple[str, str, tuple[str, ...]]


class Captures:
    """Local graphs of a model's modules by path, inputs and written-out children, each captured once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._graphs: dict[_Asked, Graph] = {}

    @classmethod
    def of(cls, graph: Graph) -> Captures:
        """Return those of the model that ``graph`` was traced from."""
        found: Captures = graph.facts.setdefault("captures", cls(graph.root))
        return found

    def see(self, path: str, inputs: JSON, expand: Collection[str] = ()) -> Graph:
        """Return the graph of the module at ``path``, for reading.

        Raises:
            CaptureError: it cannot be captured alone.
        """
        asked = _asked(path, inputs, expand)
        if asked not in self._graphs:
            self._graphs[asked] = local_graph(self._model.get_submodule(path), inputs, "children", expand)
        return self._graphs[asked]

    def take(self, path: str, inputs: JSON, expand: Collection[str] = ()) -> Graph:
        """Return the graph of the module at ``path`` for good: its new owner may change it.

        Raises:
            CaptureError: it cannot be captured alone.
        """
        graph = self.see(path, inputs, expand)
        del self._graphs[_asked(path, inputs, expand)]
        return graph


def _asked(path: str, inputs: JSON, expand: Collection[str]) -> _Asked:
    return path, json.dumps(inputs, sort_keys=True), tuple(sorted(expand))
