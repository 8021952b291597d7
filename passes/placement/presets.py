"""Topologies by a short name, or by the name of a file: what the command line takes.

``processes:4``, ``node:8``, ``cluster:2x8`` (servers by GPUs each), ``edge``.
"""

from __future__ import annotations

import re
from pathlib import Path

from moefx.errors import InputError
from moefx.passes.placement.topology import Topology

NAMES = ("processes:4", "node:8", "cluster:2x8", "edge")


def topology_from(name: str) -> Topology:
    """Return the topology called ``name``, or the one in the file of that name.

    Raises:
        InputError: it is neither a preset nor a file name.
        UnsafeInputError: the file is missing or cannot be parsed.
    """
    if Path(name).suffix in (".json", ".yaml", ".yml"):
        return Topology.load(name)
    kind, _, sizes = name.partition(":")
    numbers = [int(n) for n in sizes.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", sizes) else []
    if (kind, len(numbers)) == ("processes", 1):
        return Topology.processes(numbers[0])
    if (kind, len(numbers)) == ("node", 1):
        return Topology.node(numbers[0])
    if (kind, len(numbers)) == ("cluster", 2):
        return Topology.cluster(numbers[0], numbers[1])
    if name == "edge":
        return Topology.edge()
    raise InputError(
        f"use the topology {name!r}",
        found="neither a preset nor a JSON or YAML file",
        do=f"write {', '.join(NAMES)} with your numbers, or the name of a file",
    )
