"""One process of a calibration that is shared: it measures its part of the data and writes down the whole."""

import torch
import torch.distributed as dist

import moefx
from tests.split_support import batch, small_dit


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    part = moefx.calibrate(
        small_dit(), [batch(i) for i in range(rank, 4, world)], buckets=2, samples=30, seed=rank, progress=False
    )
    part.gathered().save(f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()
