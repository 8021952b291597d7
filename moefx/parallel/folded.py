"""Specialised models on many ranks: layers that the timestep decides are dense there, and need no exchange.

Legend: L layers.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from moefx.errors import MoefxError
from moefx.graph.signature import Inputs
from moefx.model.specialised import Specialised
from moefx.parallel.parallelize import agree_everywhere, find_groups, parallelize
from moefx.parallel.program import DEGREES, EXACT, Maker, Program
from moefx.parallel.writer import Plan
from moefx.passes.placement import Placement, Topology, routed_layers
from moefx.passes.placement.placement import Layout
from moefx.passes.placement.stacks import stack_of
from moefx.routing import RoutedFFN


def schedule_specialised(
    specialised: Specialised,
    mesh: DeviceMesh | None,
    placement: Placement,
    inputs: Inputs = None,
    *,
    topology: Topology | None = None,
    chunks: int | None = None,
    verify: bool = True,
) -> Specialised:
    """Divide the experts of a specialised model and write each of its variants as a graph, in place.

    In a variant, layers whose routers read the timestep alone are dense networks of the chosen experts, held by every
    rank: no router, no counts, no exchange. The other routed layers are divided as by :func:`schedule`; a variant
    without any runs as it is. Timesteps outside the list run the routed model, divided as by :func:`parallelize`.

    Args:
        specialised: from :func:`moefx.specialise`.
        mesh: see :func:`parallelize`.
        placement: where the experts of the routed model live.
        inputs: an example of what each rank will get.
        topology: the devices, for the clock.
        chunks: see :func:`schedule`.
        verify: see :func:`parallelize`.

    Raises:
        PlanError: see :func:`schedule`.
    """
    asked = f"schedule a specialised {type(specialised.routed).__name__}"
    group, data = find_groups(mesh, asked)
    problem: MoefxError | None = None
    makers: dict[int, Maker] = {}
    try:
        for i, variant in enumerate(specialised.variants):
            if any(isinstance(module, RoutedFFN) for module in variant.modules()):
                makers[i] = Maker.of(variant, inputs, topology or Topology.processes(len(placement.devices)), None)
    except MoefxError as error:
        problem = error
    agree_everywhere(asked, {}, problem, [group, data])
    parallelize(specialised.routed, mesh, placement, verify=verify)
    for i, maker in makers.items():
        variant = specialised.variants[i]
        for name, layer in routed_layers(variant).items():
            stack_of(layer).owner.experts = stack_of(specialised.routed.get_submodule(name)).experts
        program = Program(variant, layers_of(placement, tuple(routed_layers(variant))), maker, None)
        program.add(EXACT, Plan(), DEGREES if chunks is None else (chunks,))
        specialised.variants[i] = program
    return specialised


def layers_of(placement: Placement, names: tuple[str, ...]) -> Placement:
    """Return a placement of some of the layers."""
    kept = [placement.layers.index(name) for name in names]

    def cut(layout: Layout) -> dict[str, Any]:
        return {
            "primary": tuple(layout.primary[i] for i in kept),
            "replicas": tuple(
                r.model_copy(update={"layer": kept.index(r.layer)}) for r in layout.replicas if r.layer in kept
            ),
            "tiers": tuple(layout.tiers[i] for i in kept) if layout.tiers else (),
        }

    windows = tuple(window.model_copy(update=cut(window)) for window in placement.windows)
    return placement.model_copy(update=cut(placement) | {"layers": names, "windows": windows})
