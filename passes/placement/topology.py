"""Where experts can live: devices, the links between them, and what the links share.

A topology is a directed networkx graph. A node of kind ``device`` computes and holds weights; one of kind ``memory`` is
a slower tier from which the devices linked to it can stream weights (host memory, a disk); any other only forwards (a
switch, a host bridge). A link costs ``alpha_s + bytes * beta_s_per_byte``; links with the same ``resource`` share one
bandwidth, so their bytes add up. Routes are fixed shortest paths by ``beta``, never through a memory.

Legend: G devices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from moefx.errors import InputError, UnsafeInputError

DEVICE, MEMORY = "device", "memory"
GIB = 2**30

# Measured for gloo over loopback with two processes: 0.29 ms and 2.1 GB/s, all pairs sharing one bus.
_LOOPBACK_ALPHA_S, _LOOPBACK_BETA_S_PER_BYTE = 290e-6, 1 / 2.1e9
# Fourth-generation NVLink: 450 GB/s per direction and device, as its maker states it.
_NVLINK_ALPHA_S, _NVLINK_BETA_S_PER_BYTE = 10e-6, 1 / 450e9


class Topology:
    """Devices in rank order and the links between them; device i of a placement is rank i of the mesh.

    Args:
        graph: nodes with ``kind`` (``"device"`` by default), ``memory_bytes`` and ``speed`` (relative, 1 by default);
            edges with ``alpha_s``, ``beta_s_per_byte`` and ``resource`` (the edge itself by default).

    Raises:
        InputError: no device, a number that is not finite and positive, or two devices without a path.
    """

    def __init__(self, graph: nx.DiGraph) -> None:
        self.graph = graph
        self.devices = tuple(str(n) for n, a in graph.nodes(data=True) if a.get("kind", DEVICE) == DEVICE)
        if not self.devices:
            raise InputError("build a topology", found="no node of kind 'device'", do="add at least one")
        for name in self.devices:
            for key in ("memory_bytes", "speed"):
                self._positive(
                    f"device {name}", key, graph.nodes[name].setdefault(key, math.inf if key[0] == "m" else 1.0)
                )
        for source, target, link in graph.edges(data=True):
            link.setdefault("resource", f"{source}->{target}")
            for key in ("alpha_s", "beta_s_per_byte"):
                self._positive(f"link {source}->{target}", key, link.get(key, math.nan), zero=True)
        self._routes = self._all_routes()

    def __len__(self) -> int:
        return len(self.devices)

    @classmethod
    def processes(cls, count: int, *, memory_bytes: float = math.inf) -> Topology:
        """Return ``count`` processes of one machine that talk over loopback, which is one shared bus."""
        link = {"alpha_s": _LOOPBACK_ALPHA_S, "beta_s_per_byte": _LOOPBACK_BETA_S_PER_BYTE, "resource": "loopback"}
        return cls._complete([f"process{i}" for i in range(count)], memory_bytes, link)

    @classmethod
    def node(cls, gpus: int = 8, *, memory_bytes: float = 80 * GIB) -> Topology:
        """Return one server of GPUs behind an NVLink switch; each has one way in and one way out."""
        graph = nx.DiGraph()
        link = {"alpha_s": _NVLINK_ALPHA_S / 2, "beta_s_per_byte": _NVLINK_BETA_S_PER_BYTE}
        graph.add_node("switch", kind="switch")
        for i in range(gpus):
            graph.add_node(f"gpu{i}", memory_bytes=memory_bytes)
            graph.add_edge(f"gpu{i}", "switch", **link)
            graph.add_edge("switch", f"gpu{i}", **link)
        return cls(graph)

    @classmethod
    def _complete(cls, names: list[str], memory_bytes: float, link: Mapping[str, Any]) -> Topology:
        graph = nx.DiGraph()
        graph.add_nodes_from(names, memory_bytes=memory_bytes)
        graph.add_edges_from((a, b, dict(link)) for a in names for b in names if a != b)
        return cls(graph)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Topology:
        """Read ``{"devices": [{"name": ...}], "links": [{"from": ..., "to": ...}]}`` with the attributes of the class.

        Raises:
            InputError: a key is missing, or a link names an unknown device.
        """
        graph = nx.DiGraph()
        try:
            for device in data["devices"]:
                graph.add_node(device["name"], **{k: v for k, v in device.items() if k != "name"})
            for link in data["links"]:
                if not {link["from"], link["to"]} <= set(graph):
                    raise InputError(
                        "read a topology", found=f"a link {link['from']} -> {link['to']}", do="list both under devices"
                    )
                graph.add_edge(link["from"], link["to"], **{k: v for k, v in link.items() if k not in ("from", "to")})
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                "read a topology",
                found=f"{type(error).__name__}: {error}",
                do="give devices (name) and links (from, to)",
            ) from error
        return cls(graph)

    def to_dict(self) -> dict[str, Any]:
        """Return what :meth:`from_dict` reads; unlimited memory is left out, so that it is valid JSON."""

        def finite(attributes: Mapping[str, Any]) -> dict[str, Any]:
            return {k: v for k, v in attributes.items() if not (isinstance(v, float) and math.isinf(v))}

        return {
            "devices": [{"name": name, **finite(a)} for name, a in self.graph.nodes(data=True)],
            "links": [{"from": a, "to": b, **finite(link)} for a, b, link in self.graph.edges(data=True)],
        }

    @classmethod
    def load(cls, path: str | Path) -> Topology:
        """Read a JSON file.

        Raises:
            UnsafeInputError: the file is missing or no JSON.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UnsafeInputError(f"read the topology {path}", found=str(error), do="pass a JSON file") from error
        return cls.from_dict(data)

    @property
    def memory_bytes(self) -> NDArray[np.float64]:
        """Memory of each device ``[G]``, infinite where it is not stated."""
        return np.array([self.graph.nodes[name]["memory_bytes"] for name in self.devices], dtype=np.float64)

    @property
    def speeds(self) -> NDArray[np.float64]:
        """Relative speed of each device ``[G]``."""
        return np.array([self.graph.nodes[name]["speed"] for name in self.devices], dtype=np.float64)

    @property
    def tier_names(self) -> set[str]:
        """Names of the memory tiers below the devices' own."""
        return {a.get("tier", str(n)) for n, a in self.graph.nodes(data=True) if a.get("kind") == MEMORY}

    def exchange_seconds(self, bytes_GG: NDArray[np.float64]) -> float:
        """Return the predicted time of one all-to-all that sends ``bytes[i, j]`` from device i to device j.

        The largest latency of a used route plus the time of the busiest resource.
        """
        busy: dict[str, float] = {}
        latency = 0.0
        for (i, j), route in self._routes.items():
            if bytes_GG[i, j] == 0:
                continue
            links = [self.graph.edges[hop] for hop in pairwise(route)]
            latency = max(latency, sum(link["alpha_s"] for link in links))
            for link in links:
                seconds = float(bytes_GG[i, j]) * link["beta_s_per_byte"]
                busy[link["resource"]] = busy.get(link["resource"], 0.0) + seconds
        return latency + max(busy.values(), default=0.0)

    def _all_routes(self) -> dict[tuple[int, int], list[str]]:
        routes = {}
        for i, source in enumerate(self.devices):
            paths = nx.single_source_dijkstra_path(self.graph, source, weight="beta_s_per_byte")
            for j, target in enumerate(self.devices):
                if target not in paths:
                    raise InputError(
                        "build a topology", found=f"no path from {source} to {target}", do="add links between them"
                    )
                if i != j:
                    routes[i, j] = paths[target]
        return routes

    @staticmethod
    def _positive(owner: str, key: str, value: object, *, zero: bool = False) -> None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not (value > 0 or (zero and value == 0)):  # type: ignore[operator]
            raise InputError("build a topology", found=f"{owner}: {key} = {value!r}", do=f"give a positive {key}")
