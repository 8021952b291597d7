"""Scenarios of tokens that stay where their experts are, and of bytes on the wire, on two or more ranks."""

import copy
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moefx.errors import MoefxError
from moefx.parallel import average_gradients, count_wire_bytes, parallelize
from moefx.passes.placement import ModelDims, Placement, wire_bytes
from moefx.routing import DenseFFN, Experts, LinearRouter, RoutedFFN, random_weights
from tests.parallel_kinds import gradient_error
from tests.placement_worker import EXPERTS, WIDTH, Numbers, error

HOMES = ((0, 1, 1, 0, 1, 0), (1, 0, 1, 1, 1, 0), (0, 0, 1, 0, 1, 1))
TOKENS = (9, 14, 4, 7)


class Part(nn.Module):
    """Three routed FFNs behind norms, each with a residual around it; one has a shared expert."""

    def __init__(self, top_k: int, *, mixes: bool = False) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(1)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in HOMES)
        self.ffns, self.mixes = nn.ModuleList(), mixes
        for i in range(len(HOMES)):
            weights = random_weights(WIDTH, 20, num_experts=EXPERTS, generator=draws)
            shared = DenseFFN(random_weights(WIDTH, 8, generator=draws), nn.functional.gelu) if i == 1 else None
            router = LinearRouter(WIDTH, EXPERTS, std=0.5, generator=draws)
            self.ffns.append(RoutedFFN(router, Experts(weights, nn.functional.gelu), top_k=top_k, shared=shared))

    def forward(self, x: Tensor) -> Tensor:
        for norm, ffn in zip(self.norms, self.ffns, strict=True):
            x = x + ffn(norm(x))
        return x - x.mean(1, keepdim=True) if self.mixes else x


class Denoiser(nn.Module):
    """A part that works token by token between maps that do not."""

    def __init__(self, top_k: int, *, mixes: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.part = Part(top_k, mixes=mixes)
        draws = torch.Generator().manual_seed(5)
        for parameter in self.embed.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=draws) / 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return y.cumsum(1) + self.part(y)


def plan(devices: int) -> Placement:
    homes = tuple(
        tuple((g + (e % devices if devices > 2 else 0)) % devices for e, g in enumerate(row)) for row in HOMES
    )
    names = tuple(f"process{i}" for i in range(devices))
    layers = tuple(f"part.ffns.{i}" for i in range(len(HOMES)))
    scores: dict[str, Any] = {"objective": 1.0, "bound": 1.0, "balanced": 1.0}
    return Placement(strategy="by hand", devices=names, layers=layers, primary=homes, **scores)


def tokens(rank: int) -> Tensor:
    draws = torch.Generator().manual_seed(2 + rank)
    return torch.randn(1, TOKENS[rank], WIDTH, generator=draws, dtype=torch.float64)


def choices(whole: Denoiser, ranks: int) -> list[np.ndarray]:
    """Return what the tokens of each rank choose, ``[T, L, K]``."""
    found = []
    for rank in range(ranks):
        seen: list[np.ndarray] = []
        hooks = [
            ffn.experts.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[1].numpy().copy()))
            for ffn in whole.part.ffns
        ]
        with torch.no_grad():
            whole(tokens(rank))
        for hook in hooks:
            hook.remove()
        found.append(np.stack(seen, axis=1))
    return found


def tokens_float() -> Numbers:
    """Tokens that change place give the sums and gradients of one process, with one expert per token and with two."""
    rank, ranks, found = dist.get_rank(), dist.get_world_size(), {}
    for top_k in (1, 2):
        model = Denoiser(top_k)
        whole, x = copy.deepcopy(model), tokens(rank)
        names = list(model.state_dict())
        parallelize(model, None, plan(ranks), floating=["part"])
        assert list(model.state_dict()) == names
        outputs = [whole(tokens(r)) for r in range(ranks)]
        (sum((out**2).sum() for out in outputs) / ranks).backward()
        out = model(x)
        (out**2).sum().backward()
        average_gradients(model)
        found[f"output {top_k}"] = error(out, outputs[rank])
        found[f"gradients {top_k}"] = gradient_error(model, whole)
    return dict(found)


def bytes_equal_the_prediction() -> Numbers:
    """For each way of rows, what is counted on the wire is what the choices and the placement say, pair by pair."""
    rank, ranks, found = dist.get_rank(), dist.get_world_size(), {}
    ways: dict[str, dict[str, Any]] = {"home": {}, "once": {"once": True}, "floating": {"floating": ["part"]}}
    for top_k in (1, 2):
        whole, where = Denoiser(top_k), plan(ranks)
        dims, chosen = ModelDims.of(whole), choices(whole, ranks)
        for way, options in ways.items():
            model = parallelize(Denoiser(top_k), None, where, **options)
            with torch.no_grad(), count_wire_bytes(ranks) as sent_G:
                model(tokens(rank))
            # A token takes along what the layer reads, and the residual.
            carried = [2 * WIDTH * 8] * len(HOMES) + [WIDTH * 8] if way == "floating" else None
            wanted_GG = wire_bytes(chosen, where, dims, way, gate_bytes=8, carried=carried)
            sent_G[rank] = 0
            assert wanted_GG[rank].sum() > 0
            found[f"{way} {top_k}"] = float(np.abs(wanted_GG[rank] - sent_G).max())
    return dict(found)


def parts_that_mix_tokens_are_refused() -> Numbers:
    missed = 0
    for model, name, says in (
        (Denoiser(1, mixes=True), "part", "depend on others"),
        (Denoiser(1), "parts", "floating part 'parts'"),
        (Denoiser(1), "embed", "0 routed layers"),
    ):
        try:
            parallelize(model, None, plan(dist.get_world_size()), floating=[name])
            missed += 1
        except MoefxError as refused:
            missed += says not in str(refused)
    return {"missed": float(missed)}
