"""Scenarios of every kind of experts that moefx makes, on two ranks."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moefx.errors import MoefxError
from moefx.parallel import average_gradients, gather_experts, gather_state_dict, parallel_layers, parallelize, switch
from moefx.passes.placement import ModelDims, Placement
from moefx.passes.placement.stacks import expert_count
from moefx.routing import Experts, LinearRouter, RoutedFFN, random_weights
from moefx.routing.cheap import CheapExperts
from moefx.routing.low_rank import LowRankExperts
from moefx.routing.masks import LinearExperts
from moefx.routing.samples import ModuleExperts, RoutedSamples
from moefx.routing.slices import OffsetExperts
from tests.parallel_training import HOMES, OTHERS
from tests.placement_worker import EXPERTS, TOP_K, WIDTH, Numbers, error, placement

HIDDEN, SIDE = 20, 4
Make = Callable[[torch.Generator], nn.Module]


def stack(draws: torch.Generator) -> Experts:
    return Experts(random_weights(WIDTH, HIDDEN, num_experts=EXPERTS, generator=draws), nn.functional.gelu)


def offset(draws: torch.Generator) -> nn.Module:
    return OffsetExperts(stack(draws), torch.randn(EXPERTS, WIDTH, generator=draws))


def cheap(draws: torch.Generator) -> nn.Module:
    return CheapExperts(stack(draws), WIDTH, generator=draws)


def linear(draws: torch.Generator) -> nn.Module:
    experts = LinearExperts(WIDTH, EXPERTS, like=torch.zeros(()))
    return drawn(experts, draws)


def drawn(experts: nn.Module, draws: torch.Generator) -> nn.Module:
    for parameter in experts.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draws) / 3)
    return experts


def low_rank(*targets: str, gated: bool = False) -> Make:
    def make(draws: torch.Generator) -> nn.Module:
        act = (lambda up, gate: up * nn.functional.silu(gate)) if gated else nn.functional.gelu
        weights = random_weights(WIDTH, HIDDEN, gated=gated, generator=draws)
        options: dict[str, Any] = {"num_experts": EXPERTS, "rank": 3, "alpha": 6.0, "ungated": 2}
        return drawn(LowRankExperts(weights, act, targets=targets, **options), draws)

    return make


class Convolutions(nn.Module):
    """An FFN that mixes neighbours, as a convolutional network has it, with a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.GELU())
        self.out = nn.Conv2d(WIDTH, WIDTH, 1)
        self.scale = nn.Parameter(torch.ones(WIDTH, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale * self.out(self.mix(x))
        return y


class Layers(nn.Module):
    """Two routed layers of one kind with residuals; images ``[B, D, H, W]`` for whole modules, else tokens."""

    def __init__(self, make: Make | None) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(1)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.images = make is None
        self.ffns = nn.ModuleList(self._layer(make, draws) for _ in HOMES)
        self.embed.weight.data.copy_(torch.randn(WIDTH, WIDTH, generator=draws) / 3)
        self.embed.bias.data.zero_()
        self.double()

    def _layer(self, make: Make | None, draws: torch.Generator) -> nn.Module:
        if make is None:
            experts = drawn(ModuleExperts(Convolutions(), EXPERTS), draws)
            router = LinearRouter(WIDTH, EXPERTS, std=0.5, generator=draws)
            return RoutedSamples(router, experts, axis=1, top_k=TOP_K)  # type: ignore[arg-type]
        experts = make(draws)
        count = int(experts.num_experts)  # type: ignore[arg-type]
        return RoutedFFN(LinearRouter(WIDTH, count, std=0.5, generator=draws), experts, top_k=TOP_K)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.images:
            x = x.movedim(-1, 1)
        for ffn in self.ffns:
            x = x + ffn(x)
        return x


def inputs(model: Layers, rank: int) -> Tensor:
    """Rank 1 has fewer tokens, or samples, than rank 0; the last rank none."""
    draws, count = torch.Generator().manual_seed(2 + rank), (7, 3, 2, 0)[rank]
    shape = (count, SIDE, SIDE, WIDTH) if model.images else (1, count, WIDTH)
    return torch.randn(shape, generator=draws, dtype=torch.float64)


def kind_error(make: Make | None, where: Placement, **options: Any) -> float:
    """Return the worst error of output and gradients, before and after a change of layout."""
    rank, ranks, model = dist.get_rank(), dist.get_world_size(), Layers(make)
    whole, state = copy.deepcopy(model), {name: t.clone() for name, t in model.state_dict().items()}
    where.check(ModelDims.of(model))
    counts = [expert_count(layer) for layer in model.ffns]
    parallelize(model, None, where, **options)
    outputs = [whole(inputs(model, r)) for r in range(ranks)]
    (sum((out**2).sum() for out in outputs) / ranks).backward()
    worst = 0.0
    for layout in (where, placement(*OTHERS)):
        switch(model, layout)
        out = model(inputs(model, rank))
        (out**2).sum().backward()
        average_gradients(model)
        worst = max(worst, error(out, outputs[rank]), gradient_error(model, whole))
        model.zero_grad(set_to_none=True)
    gathered = gather_state_dict(model)
    assert list(gathered) == list(state)
    assert all(torch.equal(gathered[name], state[name]) for name in state)
    assert counts == [expert_count(layer) for layer in model.ffns] == [EXPERTS] * len(counts)
    return worst


def gradient_error(model: nn.Module, whole: nn.Module) -> float:
    """Return the worst error of all gradients, the experts' gathered from all ranks."""
    layers, worst = parallel_layers(model), 0.0
    cut = {f"{prefix}.{name}": prefix for prefix, layer in layers.items() for name in layer.stacked_names}
    for (name, parameter), wanted in zip(model.named_parameters(), whole.parameters(), strict=True):
        if wanted.grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        worst = max(worst, error(gather_experts(layers[cut[name]], grad) if name in cut else grad, wanted.grad))
    return worst


def every_kind() -> Numbers:
    """Each kind of experts gives the sums and gradients of one process, and moves as a whole."""
    kinds: dict[str, Make | None] = {
        "offset": offset,
        "cheap": cheap,
        "linear": linear,
        "low rank": low_rank("in", "gate", "out", gated=True),
        "low rank, first": low_rank("in"),
        "low rank, last": low_rank("out"),
        "modules": None,
    }
    found: Numbers = {name: kind_error(make, placement(*HOMES)) for name, make in kinds.items()}
    empty = placement((0,) * EXPERTS, (1,) * EXPERTS)  # a rank without experts
    for name in ("linear", "low rank", "modules"):
        found[f"{name}, empty"] = kind_error(kinds[name], empty)
        found[f"{name}, once"] = kind_error(kinds[name], placement(*HOMES), once=True)
        found[f"{name}, chunks"] = kind_error(kinds[name], placement(*HOMES), chunks=2)
    return found


class Foreign(nn.Module):
    """Experts of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.maps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))


def foreign_experts_are_named() -> Numbers:
    model = Layers(linear)
    model.ffns[1].experts = Foreign().double()
    try:
        parallelize(model, None, placement(*HOMES))
    except MoefxError as refused:
        return {"missed": float("ffns.1: experts of class Foreign" not in str(refused))}
    return {"missed": 1.0}
