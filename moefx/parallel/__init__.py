"""Parallel execution: a placement carried out with torch.distributed, gloo on CPU and NCCL on GPU.

``parallelize`` the entry, ``roster`` who holds what, ``divided`` and ``experts`` what replaces the experts of a layer,
``exchange`` rows between processes with gradients, ``dispatch`` other ways to send them, ``overlap`` of shared experts,
``guidance`` branches on different ranks, ``switch`` from one layout to another, ``agree`` errors on every rank,
``state`` gradients and state as one process would have them, ``shards`` checkpoints.
"""

from moefx.parallel.exchange import LostRankError, count_wire_bytes
from moefx.parallel.experts import ParallelExperts
from moefx.parallel.guidance import GuidanceSplit, split_guidance
from moefx.parallel.parallelize import expert_parameters, parallel_layers, parallelize
from moefx.parallel.roster import Roster
from moefx.parallel.shards import load_shards, save_shards
from moefx.parallel.state import average_expert_gradients, average_gradients, gather_experts, gather_state_dict
from moefx.parallel.switch import switch

__all__ = [
    "GuidanceSplit",
    "LostRankError",
    "ParallelExperts",
    "Roster",
    "average_expert_gradients",
    "average_gradients",
    "count_wire_bytes",
    "expert_parameters",
    "gather_experts",
    "gather_state_dict",
    "load_shards",
    "parallel_layers",
    "parallelize",
    "save_shards",
    "split_guidance",
    "switch",
]
