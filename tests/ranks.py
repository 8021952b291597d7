"""Jobs of several ranks as forks of one process that has imported everything: N ranks do not pay for N imports."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

from torch.multiprocessing import start_processes

# The last three are imported when a model is first divided, compiled or built: by the parent instead of by every rank.
PRELOAD = [
    "tests.parallel_worker",
    "tests.schedule_worker",
    "tests.calibration_worker",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "diffusers.models.transformers.transformer_flux",
]


def run(work: Callable[..., None], ranks: int, *arguments: Any, grace_s: float | None = None) -> None:
    """Call ``work(*arguments)`` on every rank, in the environment that torchrun would give it.

    Args:
        work: a function of a module.
        ranks: how many.
        grace_s: seconds that the other ranks have to end by themselves after one has failed.

    Raises:
        ProcessRaisedException, ProcessExitedException: of the first rank that failed, with its traceback.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    job = start_processes(
        _rank, (work, _free_port(), ranks, arguments), nprocs=ranks, join=False, start_method="forkserver"
    )
    assert job is not None
    while not job.join(grace_period=grace_s):
        pass


def _rank(rank: int, work: Callable[..., None], port: int, ranks: int, arguments: tuple[Any, ...]) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in here.items()}}
    work(*arguments)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
