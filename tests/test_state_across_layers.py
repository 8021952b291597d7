"""Routers that know what the layer before decided: the equations over three layers, and what carries the state."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moefx
from moefx import zoo
from tests.recipe_support import (
    DIT,
    FLUX,
    MARKS,
    SD3,
    UNET,
    WAN,
    check_equal,
    check_runs,
    dense,
    inputs,
    layers,
    realised,
)
from tests.trace_support import call, error, gradients

pytestmark = MARKS
PIXART = "PixArtTransformer2DModel"
DRAWS = torch.Generator().manual_seed(11)


def three_layers(**options: Any) -> tuple[Any, Any]:
    """Return a DiT of three blocks in float64, dense and routed, and random numbers in all that starts at zero."""
    plain = zoo.tiny(DIT, num_layers=3)
    routed = moefx.transform(copy.deepcopy(plain), inputs=inputs(DIT), verify=False, **options)
    with torch.no_grad():
        for name, parameter in routed.named_parameters():
            if "router" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=DRAWS, dtype=torch.float64))
    return plain.double(), routed.double()


class Memory:
    """What the oracle's layers share within one forward."""

    def __init__(self) -> None:
        self.state: Tensor | None = None


class Oracle(nn.Module):
    """One routed layer written down: logits by ``score(layer, x, state)``, expert e by ``expert(layer, e, x)``."""

    layer: Any

    def __init__(
        self, layer: nn.Module, memory: Memory, score: Callable[..., Any], expert: Callable[..., Tensor]
    ) -> None:
        super().__init__()
        self.layer, self.memory, self.score, self.expert = layer, memory, score, expert

    def forward(self, x: Tensor) -> Tensor:
        logits, self.memory.state = self.score(self.layer, x, self.memory.state)
        p = logits.softmax(-1)
        chosen = [p[..., e] >= p.topk(2).values[..., 1] for e in range(p.shape[-1])]
        gates = [torch.where(c, p[..., e], 0) for e, c in enumerate(chosen)]
        zero = self.layer.experts.zero if hasattr(self.layer.experts, "zero") else 0
        first = self.layer.experts.experts.num_experts if zero else len(gates)
        gates = [torch.zeros_like(g) if first <= e < first + zero else g for e, g in enumerate(gates)]
        ffns = self.layer.experts.experts if zero else self.layer.experts
        total = sum(gates).clamp_min(1e-300)  # type: ignore[union-attr]
        parts = [(g / total).unsqueeze(-1) * self.expert(self.layer, e, x) for e, g in enumerate(gates)]
        y: Tensor = torch.stack(parts).sum(0) + ffns.b_out
        return y


def ffn(experts: Any, e: int, x: Tensor) -> Tensor:
    """The dense network of DiT with the weights of expert e; its output bias is common to all."""
    hidden = F.gelu(x @ experts.w_in[e].T + experts.b_in[e], approximate="tanh")
    y: Tensor = hidden @ experts.w_out[e].T
    return y


def moe_pp_score(layer: Any, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    s = layer.router.scorer.scorer
    z = torch.tanh(x @ s.w_in.T + s.b_in) @ s.w_out.T + s.b_out
    if state is not None:
        z = z + state @ layer.router.scorer.w_residual.T
    return z, z


def moe_pp_expert(layer: Any, e: int, x: Tensor) -> Tensor:
    mine = layer.experts
    count = mine.experts.num_experts
    if e < count:
        return ffn(mine.experts, e, x)
    if e == count:
        return torch.zeros_like(x)
    if e == count + 1:
        return x
    a = (x @ mine.w_mix[e - count - 2].T).softmax(-1)
    y: Tensor = a[..., :1] * x + a[..., 1:] * mine.value[e - count - 2]
    return y


def rmoe_score(layer: Any, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    s, c = layer.router.scorer, layer.router.scorer.cell
    v = x @ s.w_in.T
    before = torch.zeros_like(v) if state is None else state
    gi, gh = (v @ c.w_input.T + c.b_input).chunk(3, -1), (before @ c.w_state.T + c.b_state).chunk(3, -1)
    r, z = torch.sigmoid(gi[0] + gh[0]), torch.sigmoid(gi[1] + gh[1])
    new = (1 - z) * torch.tanh(gi[2] + r * gh[2]) + z * before
    return new @ s.w_out.T, new


ORACLES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "moe++": ({"scorer_hidden": 12}, moe_pp_score, moe_pp_expert),
    "rmoe": ({"experts": 5, "state_width": 6}, rmoe_score, lambda layer, e, x: ffn(layer.experts, e, x)),
}


@pytest.mark.parametrize("recipe", ORACLES)
def test_equations_over_three_layers(recipe: str) -> None:
    options, score, expert = ORACLES[recipe]
    plain, routed = three_layers(recipe=recipe, **options)
    memory = Memory()
    for ours, theirs in zip(routed.transformer_blocks, plain.transformer_blocks, strict=True):
        theirs.ff = Oracle(copy.deepcopy(ours.ff), memory, score, expert)
    if recipe == "rmoe":  # one cell for all
        for block in plain.transformer_blocks:
            block.ff.layer.router.scorer.cell = plain.transformer_blocks[0].ff.layer.router.scorer.cell
    x = inputs(DIT)
    if recipe == "rmoe":  # at another image size and batch than the planned ones
        x = inputs(DIT, 3) | {"hidden_states": torch.randn(3, 4, 14, 14, generator=DRAWS)}
    given = {k: v.double() if v.is_floating_point() else v for k, v in x.items() if isinstance(v, Tensor)}
    wanted = gradients(plain, plain, given)
    memory.state = None
    found = gradients(routed, routed, given)
    memory.state = None
    assert error(call(routed, given), call(plain, given)) < 1e-10
    assert {k.replace("ff.layer.", "ff.") for k in wanted} == set(found)
    for name, value in wanted.items():
        # Some gradients, such as those of the keys' biases, are zero but for rounding.
        difference = found[name.replace("ff.layer.", "ff.")] - value
        assert float(difference.norm()) < 1e-10 * max(1.0, float(value.norm())), name
    first = "transformer_blocks.0.ff.router"
    assert any(k.startswith(first) and bool((v != 0).any()) for k, v in found.items())


def test_the_first_layer_has_no_residual_and_the_option_leaves_all_out() -> None:
    _, routed = three_layers(recipe="moe++", scorer_hidden=12)
    names = {name for name, _ in routed.named_parameters() if "w_residual" in name}
    assert names == {f"transformer_blocks.{i}.ff.router.scorer.w_residual" for i in (1, 2)}
    _, without = three_layers(recipe="moe++", scorer_hidden=12, state="none")
    assert not any("w_residual" in name for name, _ in without.named_parameters())
    assert without.moefx.report.plan.carried == ()
    plan = routed.moefx.report.plan
    assert plan.cost.parameters_after == sum(p.numel() for p in routed.parameters())


CASES = [(name, "recurrent") for name in (UNET, FLUX, PIXART)] + [(SD3, "residual"), (WAN, "shared")]


@pytest.mark.parametrize(("name", "state"), CASES)
def test_models_carry_the_state(name: str, state: str) -> None:
    dense_state = {k: v.clone() for k, v in dense(name).state_dict().items()}
    model = realised("sparse-upcycling", name, experts=4, state=state, state_width=8)
    plan = model.moefx.report.plan
    assert all(site.state for site in plan.sites)
    assert plan.cost.parameters_after == sum(p.numel() for p in model.parameters())
    check_equal(model, name)
    check_runs(model, name)
    assert _states_arrive(model, name) == sum(site.layer > 0 for site in plan.sites)
    moefx.untransform(model)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in dense_state.items()}
    assert all(torch.equal(v, dense_state[k]) for k, v in model.state_dict().items())
    assert error(call(model, inputs(name)), call(dense(name), inputs(name))) == 0


@pytest.mark.parametrize("state", ["residual", "shared"])
def test_the_state_passes_from_two_streams_to_one(state: str) -> None:
    """FLUX's single blocks see text and image in one sequence, and go on from the states of both."""
    model = realised("sparse-upcycling", FLUX, experts=4, state=state, verify=False)
    first = next(s for s in model.moefx.report.plan.sites if s.name.startswith("single_transformer_blocks.0"))
    assert first.layer == len(model.transformer_blocks)
    seen: dict[str, tuple[Any, Tensor]] = {}
    for path, layer in layers(model).items():
        layer.register_forward_hook(lambda _, a, y, path=path: seen.update({path: (a[-1], y[1])}))
    call(model, inputs(FLUX))
    single = next(path for path in seen if path.startswith("single_transformer_blocks.0"))
    last = f"transformer_blocks.{len(model.transformer_blocks) - 1}."
    words, image = (seen[last + name][1] for name in ("ff_context", "ff"))
    assert torch.equal(seen[single][0], torch.cat((words, image), dim=1))
    if state == "residual":
        assert any("w_residual" in name for name, _ in model.get_submodule(single).named_parameters())
    check_equal(model, FLUX)


def _states_arrive(model: nn.Module, name: str) -> int:
    """Return how many layers get as state what a layer before returned, or two of them for text and image together."""
    returned: list[Tensor] = []
    arrived: list[bool] = []

    def look(_: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        joined = (torch.cat(pair, dim=1) for pair in itertools.permutations(returned[-2:], 2))
        both = args[-1] is not None and any(torch.equal(args[-1], one) for one in joined)
        arrived.append(both or any(args[-1] is one for one in returned))
        assert (args[-1] is None) or arrived[-1]
        returned.append(output[1])

    handles = [layer.register_forward_hook(look) for layer in layers(model).values()]
    call(model, inputs(name))
    for handle in handles:
        handle.remove()
    return sum(arrived)
