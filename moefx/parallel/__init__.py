"""Parallel execution: a placement carried out with torch.distributed, gloo on CPU and NCCL on GPU.

``parallelize`` the entry, ``roster`` who holds what, ``divided`` and ``experts`` what replaces the experts of a layer,
``exchange`` rows between processes with gradients, ``dispatch`` other ways to send them, ``overlap`` of shared experts,
``floating`` tokens that stay where their experts are, ``tiers`` experts that are streamed, ``guidance`` branches on
different ranks, ``switch`` from one layout to another, ``agree`` errors on every rank, ``state`` gradients and state
as one process would have them, ``shards`` checkpoints.

As a graph: ``program`` the entry (:func:`schedule`), ``regions`` where a captured model runs experts, ``lower`` what
stands there on one rank, ``steps`` what its nodes call.
"""

from moefx.parallel.approximate import approximate
from moefx.parallel.exchange import LostRankError, count_wire_bytes
from moefx.parallel.experts import ParallelExperts
from moefx.parallel.folded import schedule_specialised
from moefx.parallel.guidance import GuidanceSplit, split_guidance
from moefx.parallel.parallelize import expert_parameters, parallel_layers, parallelize
from moefx.parallel.program import Program, preview, schedule
from moefx.parallel.roster import Roster
from moefx.parallel.shards import load_shards, save_shards
from moefx.parallel.state import average_expert_gradients, average_gradients, gather_experts, gather_state_dict
from moefx.parallel.streamed import StreamedProgram, schedule_streamed
from moefx.parallel.switch import switch

__all__ = [
    "GuidanceSplit",
    "LostRankError",
    "ParallelExperts",
    "Program",
    "Roster",
    "StreamedProgram",
    "approximate",
    "average_expert_gradients",
    "average_gradients",
    "count_wire_bytes",
    "expert_parameters",
    "gather_experts",
    "gather_state_dict",
    "load_shards",
    "parallel_layers",
    "parallelize",
    "preview",
    "save_shards",
    "schedule",
    "schedule_specialised",
    "schedule_streamed",
    "split_guidance",
    "switch",
]
