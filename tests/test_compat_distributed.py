"""Routed models over two processes: data-parallel and fully sharded gradients equal those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from save_support import Plain, gradients, routed_plain
from torch import Tensor, nn

import moefx
from tests.ranks import run

WORLD = 2


def _batch() -> Tensor:
    return torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(3))


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def _worker(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    try:
        x = _batch().chunk(WORLD)[rank]
        found = {"ddp": _data_parallel(x), "fsdp": _fully_sharded(x, Path(folder), rank)}
        if rank == 0:
            torch.save(found, Path(folder) / "gradients.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _data_parallel(x: Tensor) -> dict[str, Tensor]:
    model = nn.parallel.DistributedDataParallel(routed_plain())
    _loss(model, x).backward()
    return gradients(model.module)


def _fully_sharded(x: Tensor, folder: Path, rank: int) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model: Any = routed_plain()
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _loss(model, x).backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    with pytest.raises(moefx.MoefxError, match="split over processes"):
        moefx.save(model, folder / "refused")
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        moefx.save(model, folder / "saved", state_dict=whole)
    return found


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    model = routed_plain()
    _loss(model, _batch()).backward()
    wanted = gradients(model)
    run(_worker, WORLD, str(tmp_path))
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for way in ("ddp", "fsdp"):
        assert found[way].keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[way][name], value, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    saved = moefx.load(tmp_path / "saved", Plain())
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in saved.state_dict().items())
