"""Tracing, provenance, guards, op kinds, rewriting: everything about one graph."""

from moefx.graph.graph import Graph
from moefx.graph.guards import Guard
from moefx.graph.origin import ModuleCall, Origin, origin_of
from moefx.graph.trace import trace

__all__ = ["Graph", "Guard", "ModuleCall", "Origin", "origin_of", "trace"]
