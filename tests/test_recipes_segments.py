"""Recipes over several blocks, against plain implementations on the dense blocks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.dit import DiT
from examples.randomise import randomise_zeros
from moefx import aux_loss, zoo
from moefx.api import plan, transform, untransform
from moefx.errors import NothingMatched, OptionError
from moefx.graph.inputs import synthesise
from tests.recipe_support import check_agree

Inputs = tuple[Tensor, ...]


def _dit(depth: int = 6) -> tuple[DiT, Inputs]:
    model = randomise_zeros(DiT(depth=depth, width=32)).double().eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 8, 8, generator=generator).double()
    return model, (x, torch.tensor([0.2, 0.9, 0.5]).double(), torch.tensor([3, 7, 1]))


def _dense(model: DiT, inputs: Inputs, blocks: Any) -> Tensor:
    """Return the model's output with ``blocks(x, c)`` in the place of its blocks."""
    x, t, y = inputs
    c = model.t_embedder(t) + model.y_embedder(y)
    return model.unpatchify(model.final_layer(blocks(model.x_embedder(x) + model.pos_embed, c), c))


def test_tread_is_the_dense_model_at_inference() -> None:
    model, inputs = _dit()
    wanted = model(*inputs)
    transform(model, inputs, recipe="tread")
    assert torch.equal(model(*inputs), wanted)
    untransform(model)
    assert torch.equal(model(*inputs), wanted)


def test_tread_drops_and_reinserts_tokens_in_training() -> None:
    model, inputs = _dit()
    transform(model, inputs, recipe="tread", start=0.2, end=0.7, capacity=0.25, verify=False)
    model.train()
    model.y_embedder.eval()
    blocks = list(model.blocks)

    def plain(x: Tensor, c: Tensor) -> Tensor:
        x = blocks[0](x, c)
        index = model.token_drop(x)
        assert index.shape == (3, 4)
        assert (index.diff(dim=1) > 0).all()
        out = x.clone()
        for b in range(3):
            part = x[b : b + 1, index[b]]
            for block in blocks[1:4]:
                part = block(part, c[b : b + 1])
            out[b, index[b]] = part[0]
        return blocks[5](blocks[4](out, c), c)

    torch.manual_seed(1)
    wanted = _dense(model, inputs, plain)
    torch.manual_seed(1)
    found = model(*inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    (ours,) = torch.autograd.grad(found.square().sum(), [blocks[2].mlp.fc1.weight])
    torch.manual_seed(1)
    (theirs,) = torch.autograd.grad(_dense(model, inputs, plain).square().sum(), [blocks[2].mlp.fc1.weight])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_sparsedit_runs_the_middle_on_pooled_tokens() -> None:
    model, inputs = _dit()
    transform(model, inputs, recipe="sparsedit", side=2, dense_first=1, dense_last=1, max_error=10.0)
    sparse, blocks = model.sparse_tokens, list(model.blocks)

    def plain(x: Tensor, c: Tensor) -> Tensor:
        x = blocks[0](x, c)
        grid = x.reshape(3, 4, 4, 32)
        s = torch.stack([grid[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2)) for i in (0, 1) for j in (0, 1)], 1)
        for block in blocks[1:5]:
            s = block(s, c)
        up = s.reshape(3, 2, 2, 32).repeat_interleave(2, 1).repeat_interleave(2, 2).reshape(3, 16, 32)
        x = up @ sparse.from_sparse.weight.T + sparse.from_sparse.bias + x @ sparse.from_full.weight.T
        return blocks[5](x, c)

    start = _dense(model, inputs, lambda x, c: blocks[5](blocks[0](x, c), c))
    torch.testing.assert_close(model(*inputs), start, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = [*sparse.parameters(), blocks[2].mlp.fc1.weight, model.x_embedder.proj.weight]
    check_agree(model(*inputs), _dense(model, inputs, plain), weights)


def test_sparsedit_needs_a_grid() -> None:
    model, inputs = _dit()
    with pytest.raises(NothingMatched, match="square grid"):
        plan(model, inputs, recipe="sparsedit", side=5, dense_first=1, dense_last=1)


def test_mixture_of_blocks_runs_adjacent_blocks_per_sample() -> None:
    model, inputs = _dit()
    transform(model, inputs, recipe="mixture-of-blocks", router_std=1.0, max_error=10.0)
    blocks, routers = list(model.blocks), [m for n, m in model.named_children() if n.startswith("block_choice")]
    assert len(routers) == 2

    def gates(router: Any, x: Tensor, c: Tensor) -> tuple[list[int], Tensor]:
        scores = 0.5 * F.linear(x.mean(1), router.weight.double())
        scores = scores + 0.5 * F.linear(c, router.condition_weight.double())
        return scores.argmax(-1).tolist(), scores.softmax(-1)

    chosen: list[int] = []

    def plain(x: Tensor, c: Tensor) -> Tensor:
        for group, router in enumerate(routers):
            starts, p = gates(router, x, c)
            chosen.extend(starts)
            contains = [p[:, 0], p[:, 0] + p[:, 1], p[:, 1]]
            for j in range(3):
                hard = torch.tensor([float(s <= j < s + 2) for s in starts]).double()
                g = (hard + contains[j] - contains[j].detach()).reshape(3, 1, 1)
                x = x + g * (blocks[3 * group + j](x, c) - x)
        return x

    found, wanted = model(*inputs), _dense(model, inputs, plain)
    assert len(set(chosen)) == 2, "both windows are seen"
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    weights = [routers[0].weight, routers[1].condition_weight, blocks[0].mlp.fc1.weight]
    ours = torch.autograd.grad(found.square().sum(), weights)
    theirs = torch.autograd.grad(wanted.square().sum(), weights)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert ours[0].abs().sum() > 0
    torch.testing.assert_close(model(*(v[:1] for v in inputs)), found[:1], rtol=1e-10, atol=1e-10)
    assert aux_loss(model).requires_grad


@torch.no_grad()
def test_blocks_that_no_sample_takes_do_not_run() -> None:
    model, inputs = _dit()
    transform(model, inputs, recipe="mixture-of-blocks", router_std=1.0, max_error=10.0)
    runs = [0] * 6
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    for sample in range(3):
        one = tuple(v[sample : sample + 1] for v in inputs)
        with torch.enable_grad():
            everything = model(*one)
        assert runs == [1] * 6, "with gradients all blocks run"
        runs[:] = [0] * 6
        torch.testing.assert_close(model(*one), everything.detach(), rtol=1e-12, atol=1e-12)
        assert [sum(runs[:3]), sum(runs[3:])] == [2, 2]
        assert runs[1] == runs[4] == 1, "adjacent blocks"
        runs[:] = [0] * 6


@torch.no_grad()
def test_blocks_run_on_the_samples_that_take_them() -> None:
    model, inputs = _dit()
    transform(model, inputs, recipe="mixture-of-blocks", router_std=1.0, max_error=10.0)
    report = model.moefx.report.plan
    assert 0.6 < report.cost.flops_ratio < 0.72, "two of three blocks, and what is around them"
    c = F.normalize(model.t_embedder(inputs[1]) + model.y_embedder(inputs[2]), dim=-1)
    for router in [m for n, m in model.named_children() if n.startswith("block_choice")]:
        router.weight.zero_()  # the first sample takes the first window, the second the other
        router.condition_weight.copy_(torch.stack([c[0] - c[1], c[1] - c[0]]))
    rows = [0] * 6
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _, args, i=i: rows.__setitem__(i, len(args[0])))
    with torch.enable_grad():
        everything = model(*inputs).detach()
    assert rows == [3] * 6, "with gradients all blocks run on all samples"
    rows[:] = [0] * 6
    torch.testing.assert_close(model(*inputs), everything, rtol=1e-12, atol=1e-12)
    for first, middle, last in (rows[:3], rows[3:]):
        assert middle == first + last == 3
    assert set(rows) - {0, 3}, "some block ran on some of the samples"


def test_a_capacity_fixes_how_many_samples_a_block_takes() -> None:
    model, inputs = _dit(3)
    transform(model, inputs, recipe="mixture-of-blocks", router_std=1.0, max_error=10.0, capacity=0.5)
    router = next(m for n, m in model.named_children() if n.startswith("block_choice"))
    blocks = list(model.blocks)

    def plain(x: Tensor, c: Tensor) -> Tensor:
        scores = 0.5 * F.linear(x.mean(1), router.weight.double())
        scores = scores + 0.5 * F.linear(c, router.condition_weight.double())
        p, starts = scores.softmax(-1), scores.argmax(-1).tolist()
        contains = [p[:, 0], p[:, 0] + p[:, 1], p[:, 1]]
        for j in range(3):
            wanting = [b for b in range(3) if starts[b] <= j < starts[b] + 2]
            taken = sorted(wanting, key=lambda b, j=j: (-contains[j][b].item(), b))[:2]  # two of three samples
            rows = [x[b] for b in range(3)]
            for b in taken:
                g = 1 + contains[j][b] - contains[j][b].detach()
                rows[b] = x[b] + g * (blocks[j](x[b : b + 1], c[b : b + 1])[0] - x[b])
            x = torch.stack(rows)
        return x

    runs: list[int] = []
    handles = [b.register_forward_pre_hook(lambda _, args: runs.append(len(args[0]))) for b in blocks]
    found = model(*inputs)
    assert runs == [2, 2, 2]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, _dense(model, inputs, plain), rtol=1e-10, atol=1e-10)
    (moved,) = torch.autograd.grad(found.square().sum(), [router.weight])
    assert bool(moved.any())


@torch.no_grad()
@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_several_streams_run_on_the_samples_that_take_them(name: str) -> None:
    model = zoo.tiny(name).eval()
    transform(model, recipe="mixture-of-blocks", group=2, active=1, router_std=5.0, max_error=100.0, verify=False)
    rows: set[int] = set()
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(lambda _, a, k: rows.add(len(k["hidden_states"])), with_kwargs=True)
    for seed in range(3):
        inputs = synthesise(model, batch=4, seed=seed)
        with torch.enable_grad():
            everything = model(**inputs)[0].detach()
        torch.testing.assert_close(model(**inputs)[0], everything, rtol=1e-5, atol=1e-5)
    assert rows & {1, 2, 3}


@torch.no_grad()
@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_blocks_of_several_streams_hand_all_of_them_on(name: str) -> None:
    model = zoo.tiny(name).eval()
    transform(model, recipe="mixture-of-blocks", group=2, active=1, router_std=1.0, max_error=100.0, verify=False)
    runs: list[bool] = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    for seed in (1, 2):
        inputs = synthesise(model, batch=1, seed=seed)
        with torch.enable_grad():
            everything = model(**inputs)[0].detach()
        torch.testing.assert_close(model(**inputs)[0], everything, rtol=1e-5, atol=1e-6)
    assert 0 < runs.count(False) < runs.count(True), "fewer blocks run without gradients"


def test_all_blocks_of_a_group_are_the_dense_model() -> None:
    model, inputs = _dit()
    wanted = model(*inputs)
    transform(model, inputs, recipe="mixture-of-blocks", active=3)
    assert torch.equal(model(*inputs), wanted)


@torch.no_grad()
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("mixture-of-blocks", {"capacity": 0.7}),
        ("sparsedit", {"side": 2, "dense_first": 1, "dense_last": 1}),
    ],
)
def test_compiles_whole_for_two_batch_sizes(recipe: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model, inputs = _dit(3)
    transform(model, inputs, recipe=recipe, verify=False, **options)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for batch in (3, 2):
        part = tuple(v[:batch].clone() for v in inputs)  # a view would be guarded against its base
        with torch._dynamo.config.patch(error_on_recompile=batch == 2):
            torch.testing.assert_close(compiled(*part), model(*part))


def test_impossible_segments_are_refused() -> None:
    model, inputs = _dit(3)
    with pytest.raises(OptionError, match="not before"):
        plan(model, inputs, recipe="tread", start=0.7, end=0.5)
    with pytest.raises(OptionError, match="of only"):
        plan(model, inputs, recipe="mixture-of-blocks", group=2, active=3)
    with pytest.raises(NothingMatched, match="no segment"):
        plan(model, inputs, recipe="mixture-of-blocks", group=5)
