"""The schedule of one denoising step: dense part, dispatch, experts, combine of each layer, in chunks of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from moefx.errors import OptionError
from moefx.passes.schedule.cost import LayerCost
from moefx.passes.schedule.task import COMM, COMPUTE, Task


def step_schedule(layers: Sequence[LayerCost], *, chunks: int = 1, overlap_shared: bool = True) -> list[Task]:
    """Return the tasks of one step in a valid order; see :func:`in_best_order` for the best one.

    With r chunks, the experts of one chunk run while the next is exchanged; each exchange pays its latency r times.

    Args:
        layers: what each layer costs.
        chunks: r, parts of the tokens of each layer.
        overlap_shared: let the shared experts run while rows travel, instead of after the routed ones.

    Raises:
        OptionError: there is no chunk.
    """
    if chunks < 1:
        raise OptionError("build a schedule", found=f"{chunks} chunks", do="use at least one")
    tasks: list[Task] = []
    done: tuple[str, ...] = ()
    for i, cost in enumerate(layers):
        dense = Task(f"dense{i}", "dense", COMPUTE, cost.dense_s, done, layer=i)
        routed = [task for c in range(chunks) for task in _chunk(i, c, chunks, cost, dense.name)]
        by_role = {role: [t for t in routed if t.role == role] for role in ("dispatch", "expert", "combine")}
        combined = tuple(t.name for t in by_role["combine"])
        waits = () if overlap_shared else combined
        shared = Task(f"shared{i}", "shared", COMPUTE, cost.shared_s, (dense.name, *waits), layer=i)
        in_between = [shared] if overlap_shared else []
        after = [] if overlap_shared else [shared]
        tasks += [dense, *by_role["dispatch"], *in_between, *by_role["expert"], *by_role["combine"], *after]
        done = (*combined, shared.name)
    return tasks


def _chunk(layer: int, chunk: int, chunks: int, cost: LayerCost, ready: str) -> list[Task]:
    def name(role: str) -> str:
        return f"{role}{layer}.{chunk}"

    held = cost.buffer_bytes / chunks
    return [
        Task(
            name("dispatch"),
            "dispatch",
            COMM,
            cost.latency_s + cost.dispatch_s / chunks,
            (ready,),
            True,
            layer,
            chunk,
            cost.wire_bytes / chunks,
            held,
        ),
        Task(
            name("expert"),
            "expert",
            COMPUTE,
            cost.expert_s / chunks,
            (name("dispatch"),),
            layer=layer,
            chunk=chunk,
            holds_bytes=held,
        ),
        Task(
            name("combine"),
            "combine",
            COMM,
            cost.latency_s + cost.combine_s / chunks,
            (name("expert"),),
            True,
            layer,
            chunk,
            cost.wire_bytes / chunks,
        ),
    ]
