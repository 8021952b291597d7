"""What one rank of the tests of parallel execution does; started by test_parallel_jobs.py.

Each scenario of a group returns numbers, and rank 0 writes the worst over all ranks to a file in the folder.
"""

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import parallel_checkpoints as checkpoints
from tests import parallel_copies as copies
from tests import parallel_denoisers as denoisers
from tests import parallel_floating as floating
from tests import parallel_guidance as guidance
from tests import parallel_kinds as kinds
from tests import parallel_layouts as layouts
from tests import parallel_meshes as meshes
from tests import parallel_refusals as refusals
from tests import parallel_tiers as tiers
from tests import parallel_travel as travel
from tests.placement_worker import Numbers

# A scenario that takes an argument gets the folder.
GROUPS: dict[str, tuple[Callable[..., Numbers], ...]] = {
    "two": (
        copies.copies_by_share,
        copies.copies_local_first,
        copies.copies_follow_training_and_loading,
        travel.chunks_overlap,
        travel.shared_experts_overlap,
        travel.once_per_rank,
        travel.once_saves_bytes,
        travel.random_schedules_end,
        travel.bytes_on_the_wire,
        layouts.windows_switch_without_losing_optimizer_state,
        layouts.switch_refusals,
    ),
    "cfg": (guidance.branches_on_different_ranks, guidance.gradients_are_refused),
    "floating": (
        floating.tokens_float,
        floating.bytes_equal_the_prediction,
        floating.parts_that_mix_tokens_are_refused,
    ),
    "tiers": (tiers.small_devices_stream, tiers.too_little_memory_is_refused),
    "bad": (refusals.bad_input_is_an_error_on_every_rank,),
    "kinds": (kinds.every_kind, kinds.foreign_experts_are_named),
    "flux": (denoisers.flux,),
    "four": (meshes.a_mesh_refuses_as_one, meshes.experts_times_data, meshes.under_ddp, meshes.under_fsdp),
    "dit": (denoisers.dit,),
    "save": (checkpoints.save_half_way, checkpoints.save_divided),
    "resume": (checkpoints.resume, checkpoints.resume_divided),
    "damaged": (checkpoints.damaged_checkpoint,),
    "lost": (checkpoints.lose_a_rank,),
}


def main(names: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120 if "lost" not in names else 30))
    results: dict[str, Any] = {}
    for run in (run for name in names.split("+") for run in GROUPS[name]):
        everyone: list[Numbers] = [{} for _ in range(dist.get_world_size())]
        numbers = run(folder) if run.__code__.co_argcount else run()
        dist.all_gather_object(everyone, numbers)
        results[run.__name__] = {key: max(part[key] for part in everyone) for key in everyone[0]}
    if dist.get_rank() == 0:
        (folder / f"{names}-{dist.get_world_size()}.json").write_text(json.dumps(results, indent=1))
    dist.destroy_process_group()
