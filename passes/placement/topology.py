"""Where experts can live: devices, the links between them, and what the links share.

A topology is a directed networkx graph. A node of kind ``device`` computes and holds weights; one of kind ``memory`` is
a slower tier from which the devices linked to it can stream weights (host memory, a disk); any other only forwards (a
switch, a host bridge). A link costs ``alpha_s + bytes * beta_s_per_byte``; links with the same ``resource`` share one
bandwidth, so their bytes add up. Routes are fixed: the direct link, or else the shortest path by ``beta``, and never
through a memory.

Legend: G devices.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from moefx.errors import InputError, UnsafeInputError

DEVICE, MEMORY = "device", "memory"
GIB = 2**30

# Measured for gloo over loopback with two processes: 0.29 ms and 2.1 GB/s, all pairs sharing one bus.
_LOOPBACK_ALPHA_S, _LOOPBACK_BETA_S_PER_BYTE = 290e-6, 1 / 2.1e9
# Rates of links and devices are those their makers state; latencies are round numbers of the right order. Measure a
# real machine instead where there is one.
# Fourth-generation NVLink, per direction and device; InfiniBand NDR per port; PCIe 4.0 x16; an NVMe disk on PCIe 4.0.
_NVLINK_ALPHA_S, _NVLINK_BETA_S_PER_BYTE = 10e-6, 1 / 450e9
_INFINIBAND_ALPHA_S, _INFINIBAND_BETA_S_PER_BYTE = 20e-6, 1 / 50e9
_PCIE_ALPHA_S, _PCIE_BETA_S_PER_BYTE = 20e-6, 1 / 32e9
_DISK_ALPHA_S, _DISK_BETA_S_PER_BYTE = 100e-6, 1 / 7e9
# H100 SXM and RTX 4090 with dense bfloat16 tensor cores; a desktop processor: 16 cores, AVX-512 float32, two channels.
_SERVER_GPU = {"flops_per_s": 989e12, "memory_bytes_per_s": 3.35e12}
_EDGE_GPU = {"flops_per_s": 165e12, "memory_bytes_per_s": 1.008e12}
_EDGE_CPU = {"flops_per_s": 2e12, "memory_bytes_per_s": 83e9, "speed": 2 / 165}


_DEVICE_NUMBERS = {
    "memory_bytes": math.inf,
    "speed": 1.0,
    "flops_per_s": math.inf,
    "memory_bytes_per_s": math.inf,
}


class _Tables(NamedTuple):
    """Of K links, G devices, R resources: which route [G·G] crosses which link, which links share a resource [R, K]."""

    crossed: Any
    shared: Any
    beta: NDArray[np.float64]
    latency: NDArray[np.float64]


class Topology:
    """Devices in rank order and the links between them; device i of a placement is rank i of the mesh.

    Args:
        graph: nodes with ``kind`` (``"device"`` by default), ``memory_bytes``, ``speed`` (relative, 1 by default),
            ``flops_per_s`` and ``memory_bytes_per_s`` (unlimited by default) and, for memories, ``tier``; edges with
            ``alpha_s``, ``beta_s_per_byte`` and ``resource`` (the edge itself by default).

    Raises:
        InputError: no device, a number that is not finite and positive, or two devices without a path.
    """

    def __init__(self, graph: nx.DiGraph) -> None:
        self.graph = graph
        self.devices = tuple(str(n) for n, a in graph.nodes(data=True) if a.get("kind", DEVICE) == DEVICE)
        if not self.devices:
            raise InputError("build a topology", found="no node of kind 'device'", do="add at least one")
        for name in self.devices:
            for key, default in _DEVICE_NUMBERS.items():
                self._positive(f"device {name}", key, graph.nodes[name].setdefault(key, default))
        for source, target, link in graph.edges(data=True):
            link.setdefault("resource", f"{source}->{target}")
            for key in ("alpha_s", "beta_s_per_byte"):
                self._positive(f"link {source}->{target}", key, link.get(key, math.nan), zero=True)
        memories = [n for n, a in graph.nodes(data=True) if a.get("kind") == MEMORY]
        self._between = nx.restricted_view(graph, memories, [])
        self._known_paths: dict[int, dict[str, list[str]]] = {}
        self._check_connected()

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
        _add_server(graph, "", gpus, memory_bytes)
        return cls(graph)

    @classmethod
    def cluster(cls, nodes: int = 2, gpus: int = 8, *, memory_bytes: float = 80 * GIB) -> Topology:
        """Return servers as :meth:`node`, joined by InfiniBand with one adapter per GPU."""
        graph = nx.DiGraph()
        graph.add_node("fabric", kind="switch")
        for n in range(nodes):
            for gpu in _add_server(graph, f"node{n}.", gpus, memory_bytes):
                _add_both_ways(graph, gpu, "fabric", _INFINIBAND_ALPHA_S / 2, _INFINIBAND_BETA_S_PER_BYTE)
        return cls(graph)

    @classmethod
    def edge(cls, *, memory_bytes: float = 24 * GIB, host_bytes: float = 64 * GIB) -> Topology:
        """Return one consumer GPU and its host's processor, with host memory and a disk to stream weights from.

        The processor computes slowly but next to the host memory; both ways over the bus share nothing.
        """
        graph = nx.DiGraph()
        graph.add_node("gpu", memory_bytes=memory_bytes, **_EDGE_GPU)
        graph.add_node("cpu", memory_bytes=host_bytes, **_EDGE_CPU)
        graph.add_node("host", kind=MEMORY, tier="host", memory_bytes=host_bytes)
        graph.add_node("disk", kind=MEMORY, tier="disk")
        _add_both_ways(graph, "gpu", "cpu", _PCIE_ALPHA_S, _PCIE_BETA_S_PER_BYTE, resources=("bus up", "bus down"))
        bus = {"alpha_s": _PCIE_ALPHA_S, "beta_s_per_byte": _PCIE_BETA_S_PER_BYTE, "resource": "bus down"}
        disk = {"alpha_s": _DISK_ALPHA_S, "beta_s_per_byte": _DISK_BETA_S_PER_BYTE, "resource": "disk"}
        graph.add_edge("host", "gpu", **bus)
        graph.add_edges_from([("disk", "gpu", dict(disk)), ("disk", "cpu", dict(disk))])
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
        """Read a JSON file, or a YAML file by its name if PyYAML is installed.

        Raises:
            UnsafeInputError: the file is missing or cannot be parsed.
        """
        asked = f"read the topology {path}"
        try:
            text = Path(path).read_text(encoding="utf-8")
            data = _parse_yaml(text, asked) if Path(path).suffix in (".yaml", ".yml") else json.loads(text)
        except (OSError, ValueError) as error:
            raise UnsafeInputError(asked, found=str(error), do="pass a JSON or YAML file") from error
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

    @property
    def flops_per_s(self) -> NDArray[np.float64]:
        """Floating-point operations per second of each device ``[G]``, infinite where it is not stated."""
        return self._rates("flops_per_s")

    @property
    def memory_bytes_per_s(self) -> NDArray[np.float64]:
        """Bytes per second between each device and its own memory ``[G]``, infinite where it is not stated."""
        return self._rates("memory_bytes_per_s")

    def _rates(self, key: str) -> NDArray[np.float64]:
        return np.array([self.graph.nodes[name].get(key, math.inf) for name in self.devices], dtype=np.float64)

    def route(self, source: int, target: int) -> list[str]:
        """Return the nodes from one device to another, both included."""
        return self._paths(source)[self.devices[target]]

    def tiers(self, device: int) -> dict[str, Mapping[str, Any]]:
        """Return the link from each memory tier to a device, by name of the tier, fastest first."""
        name = self.devices[device]
        links = {
            str(self.graph.nodes[node].get("tier", node)): link
            for node, _, link in self.graph.in_edges(name, data=True)
            if self.graph.nodes[node].get("kind") == MEMORY
        }
        return dict(sorted(links.items(), key=lambda item: item[1]["beta_s_per_byte"]))

    @cached_property
    def link_names(self) -> tuple[str, ...]:
        """Names of all links, ``source->target``."""
        return tuple(f"{source}->{target}" for source, target in self.graph.edges)

    def link_bytes(self, bytes_GG: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the bytes on each link of :attr:`link_names` if ``bytes[i, j]`` go from device i to device j."""
        return np.asarray(self._tables.crossed @ np.asarray(bytes_GG, dtype=np.float64).reshape(-1))

    def exchange_seconds(self, bytes_GG: NDArray[np.float64]) -> float:
        """Return the predicted time of one all-to-all that sends ``bytes[i, j]`` from device i to device j.

        The largest latency of a used route plus the time of the busiest resource.
        """
        used_GG = np.asarray(bytes_GG) > 0
        busy = self._tables.shared @ (self._tables.beta * self.link_bytes(bytes_GG))
        return float(self._tables.latency[used_GG].max(initial=0.0) + busy.max(initial=0.0))

    @cached_property
    def pair_seconds_per_byte(self) -> NDArray[np.float64]:
        """Seconds per byte of each route ``[G, G]``, zero on the diagonal."""
        return np.asarray(self._tables.beta @ self._tables.crossed).reshape(len(self), len(self))

    @property
    def interchangeable(self) -> bool:
        """Are all devices and all pairs alike, so that any relabelling of devices costs the same?"""
        apart = self.pair_seconds_per_byte[~np.eye(len(self), dtype=np.bool_)]
        rates = (self.speeds, self.memory_bytes, self.flops_per_s, self.memory_bytes_per_s)
        return (
            bool(np.ptp(apart) <= 1e-12 * apart.max()) and all(len(np.unique(r)) == 1 for r in rates)
            if len(apart)
            else True
        )

    @cached_property
    def _tables(self) -> _Tables:
        """Which routes cross which links, and which links share a resource, as sparse matrices."""
        number = {edge: k for k, edge in enumerate(self.graph.edges)}
        resource: dict[str, int] = {}
        beta_K, shares = np.zeros(len(number)), []
        for edge, k in number.items():
            link = self.graph.edges[edge]
            beta_K[k] = link["beta_s_per_byte"]
            shares.append(resource.setdefault(link["resource"], len(resource)))
        latency_GG, links, pairs = np.zeros((len(self), len(self))), [], []
        for i, j in itertools.permutations(range(len(self)), 2):
            for hop in itertools.pairwise(self.route(i, j)):
                latency_GG[i, j] += self.graph.edges[hop]["alpha_s"]
                links.append(number[hop])
                pairs.append(i * len(self) + j)
        crossed = csr_matrix((np.ones(len(links)), (links, pairs)), shape=(len(number), len(self) ** 2))
        shared = csr_matrix((np.ones(len(number)), (shares, range(len(number)))), shape=(len(resource), len(number)))
        return _Tables(crossed, shared, beta_K, latency_GG)

    def _paths(self, source: int) -> dict[str, list[str]]:
        if source not in self._known_paths:
            found = nx.single_source_dijkstra_path(self._between, self.devices[source], weight="beta_s_per_byte")
            name = self.devices[source]
            found |= {other: [name, other] for other in self._between.successors(name)}
            self._known_paths[source] = found
        return self._known_paths[source]

    def _check_connected(self) -> None:
        part = {node: i for i, nodes in enumerate(nx.strongly_connected_components(self._between)) for node in nodes}
        first = self.devices[0]
        for other in self.devices:
            if part[other] != part[first]:
                ends = (first, other) if not nx.has_path(self._between, first, other) else (other, first)
                raise InputError(
                    "build a topology", found=f"no path from {ends[0]} to {ends[1]}", do="add links between them"
                )

    @staticmethod
    def _positive(owner: str, key: str, value: object, *, zero: bool = False) -> None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not (value > 0 or (zero and value == 0)):  # type: ignore[operator]
            raise InputError("build a topology", found=f"{owner}: {key} = {value!r}", do=f"give a positive {key}")


def _add_server(graph: nx.DiGraph, prefix: str, gpus: int, memory_bytes: float) -> list[str]:
    """Add GPUs and their switch, and return the names of the GPUs."""
    switch, names = f"{prefix}switch", [f"{prefix}gpu{i}" for i in range(gpus)]
    graph.add_node(switch, kind="switch")
    for name in names:
        graph.add_node(name, memory_bytes=memory_bytes, **_SERVER_GPU)
        _add_both_ways(graph, name, switch, _NVLINK_ALPHA_S / 2, _NVLINK_BETA_S_PER_BYTE)
    return names


def _add_both_ways(
    graph: nx.DiGraph, a: str, b: str, alpha_s: float, beta: float, resources: tuple[str, str] | None = None
) -> None:
    for i, (source, target) in enumerate(((a, b), (b, a))):
        shared = {"resource": resources[i]} if resources else {}
        graph.add_edge(source, target, alpha_s=alpha_s, beta_s_per_byte=beta, **shared)


def _parse_yaml(text: str, asked: str) -> Any:
    try:
        yaml: Any = import_module("yaml")
    except ModuleNotFoundError as error:
        raise InputError(asked, found="PyYAML is not installed", do="pip install pyyaml, or write JSON") from error
    try:
        return _with_numbers(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise UnsafeInputError(asked, found=str(error), do="pass a JSON or YAML file") from error


def _with_numbers(data: Any) -> Any:
    """Return parsed YAML with ``1e-5`` as a number: YAML 1.1 takes it for text unless there is a point in it."""
    if isinstance(data, dict):
        return {key: _with_numbers(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_with_numbers(value) for value in data]
    if isinstance(data, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", data, flags=re.IGNORECASE):
        return float(data)
    return data
