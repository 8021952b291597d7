"""One process of a calibration that is shared: it measures its part of the data and writes down the whole."""

import sys

import torch
import torch.distributed as dist

import moefx
from tests.split_support import batch, small_dit


def main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    part = moefx.calibrate(
        small_dit(), [batch(i) for i in range(rank, 4, world)], buckets=2, samples=30, seed=rank, progress=False
    )
    part.gathered().save(f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
