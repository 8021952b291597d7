"""Run the experts of a small diffusion transformer on several processes and compare with one; see ``--help``.

torchrun --nproc_per_node 2 examples/expert_parallel.py
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `examples` is found from anywhere

import moefx
from examples.dit import DiT
from examples.randomise import randomise_zeros
from moefx.parallel import average_gradients, gather_experts, parallel_layers, parallelize
from moefx.passes.placement import ModelDims, Placement, Topology, TraceCollector, place, strategies

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
TIMESTEPS = (950.0, 800.0, 650.0, 500.0, 350.0, 200.0, 50.0)
Batch = tuple[Tensor, Tensor, Tensor]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, default=8, help="experts per layer (default: 8)")
    parser.add_argument("--samples", type=int, default=4, help="images per process (default: 4)")
    parser.add_argument("--strategy", choices=[s.name for s in strategies()], default="minimax_time", help="placement")
    parser.add_argument(
        "--chunks", type=int, default=1, help="parts of the tokens that travel while others are computed"
    )
    parser.add_argument("--once", action="store_true", help="send a token to each process at most once")
    parser.add_argument("--single", action="store_true", help="float32 instead of float64")
    return parser.parse_args(arguments)


def start() -> torch.device:
    """Join the processes that torchrun started; on its own the script is a job of one."""
    if "RANK" not in os.environ:
        os.environ |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
            "LOCAL_RANK": "0",
        }
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=2))
    return device


def build(experts: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return the same routed model on every process. Noise makes the experts differ: copies need no parallel test."""
    torch.manual_seed(0)
    model = randomise_zeros(DiT(depth=3, width=32, label_dropout=0.0)).to(dtype)
    inputs = batch(2, device=torch.device("cpu"), dtype=dtype)
    moefx.transform(model, inputs, experts=experts, top_k=2, noise=0.2, router_std=0.5)
    return model.to(device, dtype)  # routers start in float32


def batch(samples: int, *, device: torch.device, dtype: torch.dtype, t: float | None = None, seed: int = 1) -> Batch:
    """Return images, timesteps and labels."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 1, 8, 8, generator=draws, dtype=torch.float64).to(device, dtype)
    times = torch.rand(samples, generator=draws) * 1000 if t is None else torch.full((samples,), t)
    return x, times.to(device), torch.randint(10, (samples,), generator=draws).to(device)


@torch.no_grad()
def plan(model: nn.Module, strategy: str, device: torch.device, dtype: torch.dtype) -> Placement:
    """Measure the routing at several noise levels and place the experts."""
    with TraceCollector(model) as collector:
        for t in TIMESTEPS:
            with collector.at(t / 1000):
                model(*batch(8, device=device, dtype=dtype, t=t, seed=2))
    topology = Topology.processes(dist.get_world_size())
    return place(collector.trace(), topology, ModelDims.of(model), strategy)


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the relative error."""
    return float((found - wanted).detach().norm() / wanted.detach().norm().clamp_min(1e-30))


def compare(whole: nn.Module, parallel: nn.Module, data: Batch, samples: int) -> tuple[float, float]:
    """Return the errors of this process's output and of all gradients, against the whole model on the whole batch."""
    mine = slice(dist.get_rank() * samples, (dist.get_rank() + 1) * samples)
    wanted = whole(*data)
    wanted.square().mean().backward()
    out = parallel(*(tensor[mine] for tensor in data))
    out.square().mean().backward()
    average_gradients(parallel)
    layers, worst = parallel_layers(parallel), 0.0
    reference = dict(whole.named_parameters())
    for name, parameter in parallel.named_parameters():
        if parameter.grad is None:
            continue
        prefix, _, leaf = name.rpartition(".")
        cut = prefix in layers and leaf in layers[prefix].stacked_names
        grad = gather_experts(layers[prefix], parameter.grad) if cut else parameter.grad
        other = reference[name].grad
        assert other is not None
        worst = max(worst, error(grad, other))
    errors = torch.tensor([error(out, wanted[mine]), worst], dtype=torch.float64, device=out.device)
    dist.all_reduce(errors, op=dist.ReduceOp.MAX)
    return float(errors[0]), float(errors[1])


def run(options: argparse.Namespace, device: torch.device) -> bool:
    """Build, place, parallelize, compare; return whether they are equal."""
    dtype = torch.float32 if options.single else torch.float64
    model = build(options.experts, device, dtype)
    whole = copy.deepcopy(model)
    placement = plan(model, options.strategy, device, dtype)
    parallelize(model, None, placement, chunks=options.chunks, once=options.once)
    held = torch.tensor([float(sum(p.nbytes for p in model.parameters()))], device=device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    data = batch(options.samples * dist.get_world_size(), device=device, dtype=dtype)
    forward, backward = compare(whole, model, data, options.samples)
    equal = max(forward, backward) <= TOLERANCE[dtype]
    if dist.get_rank() == 0:
        total = sum(p.nbytes for p in whole.parameters())
        print(placement)
        print(f"weights per process: at most {held.item():,.0f} of {total:,} bytes")
        verdict = f"{dist.get_world_size()} processes {'equal' if equal else 'DIFFER FROM'} one process"
        print(f"{verdict}: output within {forward:.1e}, gradients within {backward:.1e} (relative)")
    return equal


def main(arguments: list[str] | None = None) -> int:
    """Run the example and return the exit code."""
    options = parse(arguments)
    torch.set_num_threads(1)
    device = start()
    try:
        return 0 if run(options, device) else 1
    except moefx.MoefxError as problem:
        print(f"rank {dist.get_rank()}: {problem}", file=sys.stderr)
        return problem.exit_code
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
