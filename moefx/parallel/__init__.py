"""Parallel execution: a placement carried out with torch.distributed, gloo on CPU and NCCL on GPU.

``parallelize`` the entry, ``experts`` what replaces the experts of a layer, ``exchange`` rows between processes with
gradients, ``agree`` errors on every rank, ``state`` gradients and state as one process would have them.
"""

from moefx.parallel.experts import ParallelExperts
from moefx.parallel.parallelize import expert_parameters, parallel_layers, parallelize
from moefx.parallel.state import average_gradients, gather_experts, gather_state_dict

__all__ = [
    "ParallelExperts",
    "average_gradients",
    "expert_parameters",
    "gather_experts",
    "gather_state_dict",
    "parallel_layers",
    "parallelize",
]
