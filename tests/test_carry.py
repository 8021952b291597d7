"""Values that pass from module to module as further arguments: taps out of sight, states, and who cannot carry them."""

from __future__ import annotations

import contextlib
import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moefx
from moefx.errors import GuardError, NothingMatched, PlanError
from moefx.model.install import apply_changes
from moefx.model.plan import Plan
from moefx.model.realise import realise
from tests.recipe_support import (
    DIT,
    MARKS,
    SD3,
    UNET,
    check_equal,
    check_learns,
    check_saves,
    dense,
    inputs,
    layers,
    realised,
)
from tests.trace_support import call, error, gradients

pytestmark = MARKS
HUNYUAN = "HunyuanDiT2DModel"


def heard(model: nn.Module, name: str, path: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return what the routed layers get as their tap, and the model's timestep or what the module at ``path`` gives."""
    taps: list[Tensor] = []
    said: list[Tensor] = [inputs(name)["timestep"]]
    handles = [m.register_forward_pre_hook(lambda _, args: taps.append(args[1])) for m in layers(model).values()]
    if path:
        handles.append(model.get_submodule(path).register_forward_hook(lambda *args: said.append(args[-1])))
    call(model, inputs(name))
    for handle in handles:
        handle.remove()
    return taps, said


@pytest.mark.parametrize(("name", "origin"), [(UNET, "time_embedding"), (HUNYUAN, "")])
def test_a_timestep_out_of_sight_is_passed_down(name: str, origin: str, tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in dense(name).state_dict().items()}
    model = realised("sparse-upcycling", name, experts=4, router_input="timestep+token")
    plan = model.moefx.report.plan
    assert plan.carried
    assert {v.name for v in plan.carried} == {"moefx_timestep"}
    assert Plan.from_json(plan.to_json()) == plan
    taps, said = heard(model, name, origin)
    assert len(taps) == len(plan.sites)
    assert all(torch.equal(tap, said[-1]) for tap in taps)
    check_equal(model, name)
    if name == HUNYUAN:
        check_saves(model, name, tmp_path)
    check_learns(model, name, training=True)
    moefx.untransform(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert error(call(model, inputs(name)), call(dense(name), inputs(name))) == 0


def test_intervals_get_the_raw_timestep_of_the_whole_model() -> None:
    """The blocks of a U-net see an embedding; only the model itself sees the number."""
    model = realised("sparse-upcycling", UNET, experts=4, top_k=1, selector="interval", intervals=[4])
    (value,) = model.moefx.report.plan.carried
    assert (value.source, value.node) == ("", "timestep")
    taps, _ = heard(model, UNET, "")
    assert all(torch.equal(tap, inputs(UNET)["timestep"]) for tap in taps)
    loads = [tuple(record.load.tolist()) for record in model.moefx.routing.values()]
    assert set(loads) == {(0.5, 0.0, 0.0, 0.5)}  # timesteps 50 and 950


@pytest.fixture(scope="module")
def rmoe() -> Any:
    return realised("rmoe", DIT, experts=4, state_width=8)


@pytest.mark.parametrize("name", [DIT, SD3])
def test_state_under_gradient_checkpointing(name: str) -> None:
    model = realised("sparse-upcycling", name, experts=4, state="recurrent", state_width=8, noise=0.1)
    model.train()
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    wanted = gradients(model, model, inputs(name))
    ran: list[str] = []
    for path, layer in layers(model).items():
        layer.register_forward_pre_hook(lambda _, args, path=path: ran.append(path))
    model.enable_gradient_checkpointing()
    found = gradients(model, model, inputs(name))
    assert sorted(ran) == sorted(2 * list(layers(model)))  # once more in the backward pass
    assert wanted.keys() == found.keys()
    assert max(error(found[key], wanted[key]) for key in wanted if "router" in key) < 1e-5


def test_two_calls_at_a_time_know_nothing_of_each_other(rmoe: Any) -> None:
    """States are values of one call, so another call in between, or a second backward pass, changes nothing."""
    one, two = inputs(DIT, 2), inputs(DIT, 3)
    alone = gradients(rmoe, rmoe, one)
    first, second = call(rmoe, one, grad=True).sample, call(rmoe, two, grad=True).sample
    second.sum().backward()
    rmoe.zero_grad(set_to_none=True)
    draws = torch.Generator().manual_seed(5)
    (first * torch.randn(first.shape, generator=draws, dtype=torch.float64).to(first)).sum().backward()
    for name, parameter in rmoe.named_parameters():
        assert (parameter.grad is None) == (name not in alone)
        assert parameter.grad is None or torch.equal(parameter.grad, alone[name])
    rmoe.zero_grad(set_to_none=True)


def test_one_cell_for_all_layers_survives_a_second_transform_and_a_save(tmp_path: Path) -> None:
    """The second transform writes blocks anew that hand a state on already."""
    model = realised("sparse-upcycling", DIT, experts=4, state="recurrent", state_width=8)
    moefx.transform(model, recipe="mixture-of-heads", inputs=inputs(DIT))
    check_equal(model, DIT)
    moefx.save(model, tmp_path / "model")
    again = moefx.load(tmp_path / "model")
    assert error(call(again, inputs(DIT)), call(model, inputs(DIT))) == 0
    cells = [block.ff.router.scorer.cell for block in again.transformer_blocks]  # type: ignore[union-attr]
    assert all(cell.w_input is cells[0].w_input for cell in cells)
    moefx.untransform(model)
    assert error(call(model, inputs(DIT)), call(dense(DIT), inputs(DIT))) == 0


def test_blocks_sharded_one_by_one(tmp_path: Path) -> None:
    """A parameter of several blocks belongs to none of them: under FSDP2 the cell is wrapped first."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = realised("sparse-upcycling", SD3, experts=4, state="recurrent", state_width=8)
    output, wanted = call(model, inputs(SD3)), gradients(model, model, inputs(SD3))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in [m for m in model.modules() if type(m).__name__ == "GRUCell"]:
            fully_shard(module, mesh=mesh)
        for block in model.transformer_blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert error(call(model, inputs(SD3)), output) < 1e-6
        found = gradients(model, model, inputs(SD3))
        assert found.keys() == wanted.keys()
        shards: list[tuple[str, Any]] = [(name, value) for name, value in found.items() if "cell" in name]
        assert shards
        assert all(error(value.full_tensor(), wanted[name]) < 1e-5 for name, value in shards)
    finally:
        torch.distributed.destroy_process_group()


def test_a_cache_that_answers_for_a_block_is_refused(rmoe: Any) -> None:
    model = copy.deepcopy(rmoe)
    plain = model.transformer_blocks[0]
    plain.register_forward_hook(lambda *args: args[-1].output)
    with pytest.raises(GuardError, match="a cache or a hook answered in its place"):
        call(model, inputs(DIT))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(self.norm(x))
        return x + y


class Stack(nn.Module):
    """Blocks in a loop, ``again`` times each; in an autocast block if asked for."""

    def __init__(self, again: int = 1, autocast: bool = False) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block() for _ in range(3)]), nn.Linear(8, 8)
        self.again, self.autocast = again, autocast

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            for _ in range(self.again):
                x = block(x)
        with torch.autocast("cpu", dtype=torch.bfloat16) if self.autocast else contextlib.nullcontext():
            y: Tensor = self.head(x)
            return y


def transformed(model: nn.Module, **options: Any) -> nn.Module:
    return moefx.transform(model, recipe="sparse-upcycling", inputs=(torch.randn(2, 5, 8),), experts=4, **options)


def test_a_model_of_ones_own_carries_a_state() -> None:
    model = Stack()
    x = torch.randn(3, 7, 8)
    wanted = model(x)
    routed = transformed(model, state="shared")
    assert error(routed(x), wanted) < 1e-5
    assert sum(p.numel() for n, p in routed.named_parameters() if "router" in n) == 8 * 4
    loads = [block.mlp.record.load for block in routed.blocks]  # type: ignore[union-attr]
    assert all(torch.equal(load, loads[0]) for load in loads)


def test_a_plan_that_lost_sites_passes_on_what_is_still_read() -> None:
    model, x = Stack(), torch.randn(2, 5, 8)
    plan = moefx.plan(model, recipe="sparse-upcycling", inputs=(x,), experts=4, state="residual")
    wanted = model(x)
    changes, _ = realise(model, plan.model_copy(update={"sites": plan.sites[1:]}))
    apply_changes(model, changes)
    assert error(model(x), wanted) < 1e-5
    takes = ["moefx_state" in inspect.signature(block.forward).parameters for block in model.blocks]
    assert takes == [False, True, True]


@pytest.mark.parametrize(
    ("model", "found"),
    [(Stack(again=2), "called 2 times in one forward"), (Stack(autocast=True), "an autocast or no_grad block")],
)
def test_a_model_that_cannot_carry_a_state_is_refused_and_left_alone(model: nn.Module, found: str) -> None:
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises((PlanError, NothingMatched), match=found) as refusal:
        transformed(model, state="recurrent")
    assert "state" in str(refusal.value)
    assert {name: type(module) for name, module in model.named_modules()} == before
