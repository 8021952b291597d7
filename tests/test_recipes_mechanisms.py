"""Local, coarse and routed attention against attention written out, alone and in models."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import moefx
from examples.dit import DiT
from examples.randomise import randomise_zeros
from moefx import zoo
from moefx.errors import InputError, NothingMatched, OptionError
from moefx.graph.inputs import synthesise
from moefx.routing.attention_masks import TokenGrid, box, disc, with_others
from moefx.routing.attention_mechanisms import Attend, AttendCoarsely, AttendLocally, RoutedAttention
from moefx.routing.attention_tiles import Tiling, attend_by_tiles
from moefx.routing.router import LinearRouter, sinusoidal
from tests.recipe_support import check_agree

FLUX = "FluxTransformer2DModel"
NAMES = [
    "DiTTransformer2DModel",
    "SD3Transformer2DModel",
    FLUX,
    "UNet2DConditionModel",
    "WanTransformer3DModel",
    "CogVideoXTransformer3DModel",
]
sizes_of_grids = st.lists(st.integers(1, 4), min_size=2, max_size=3)


def qkv(tokens: int, heads: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, heads, tokens, 8, dtype=torch.float64) for _ in range(3))  # type: ignore[return-value]


def places(sizes: list[int]) -> list[tuple[int, ...]]:
    return [tuple(int(i) for i in index) for index in torch.ones(sizes).nonzero()]


@given(sizes_of_grids, st.floats(0.5, 6))
@settings(deadline=None, max_examples=40)
def test_masks_say_who_is_near(sizes: list[int], radius: float) -> None:
    where = places(sizes)
    squares = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in where] for p in where]
    assert disc(sizes, radius).tolist() == [[s < radius * radius for s in row] for row in squares]
    reach = [int(radius)] * len(sizes)
    far = [[max(abs(a - b) for a, b in zip(p, q, strict=True)) for q in where] for p in where]
    assert box(sizes, reach).tolist() == [[d <= int(radius) for d in row] for row in far]


def test_text_sees_and_is_seen() -> None:
    mask = with_others(torch.eye(3, dtype=torch.bool), 2, 1)
    assert mask.shape == (6, 6)
    assert mask[:2].all()
    assert mask[5].all()
    assert mask[:, [0, 1, 5]].all()
    assert torch.equal(mask[2:5, 2:5], torch.eye(3, dtype=torch.bool))


def test_grids_follow_the_resolution_but_not_the_text() -> None:
    assert TokenGrid(0, 0, (4, 6)).for_tokens(24) == TokenGrid(0, 0, (4, 6))
    assert TokenGrid(0, 0, (4, 6)).for_tokens(96) == TokenGrid(0, 0, (8, 12))
    assert TokenGrid(0, 0, (3, 4, 6)).for_tokens(18) == TokenGrid(0, 0, (3, 2, 3))
    assert TokenGrid(7, 0, (4, 6)).for_tokens(31) == TokenGrid(7, 0, (4, 6))
    for grid, tokens in ((TokenGrid(0, 0, (4, 6)), 25), (TokenGrid(7, 0, (4, 6)), 32)):
        with pytest.raises(InputError, match="planned for"):
            grid.for_tokens(tokens)


@pytest.mark.parametrize("round_", [True, False])
@pytest.mark.parametrize("radius", [1.0, 1.5, 2.0, 2.5, 3.0])
def test_local_attention_token_by_token(radius: float, round_: bool) -> None:
    grid = TokenGrid(2, 1, (3, 4))
    q, k, v = qkv(15)
    where = places([3, 4])
    found = AttendLocally(grid, radius, round_=round_)(q, k, v)
    for i in range(15):
        if 2 <= i < 14:
            y, x = where[i - 2]
            near = [
                math.hypot(y - a, x - b) < radius if round_ else max(abs(y - a), abs(x - b)) < radius for a, b in where
            ]
            seen = [0, 1, *(2 + j for j, yes in enumerate(near) if yes), 14]
        else:
            seen = list(range(15))
        scores = (q[:, :, i : i + 1] @ k[:, :, seen].transpose(-1, -2) / math.sqrt(8)).softmax(-1)
        torch.testing.assert_close(found[:, :, i : i + 1], scores @ v[:, :, seen], rtol=1e-10, atol=1e-12)


@given(
    st.lists(st.integers(1, 7), min_size=2, max_size=3),
    st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0]),
    st.booleans(),
    st.integers(1, 4),
    st.sampled_from([(0, 0), (2, 1), (0, 3)]),
)
@settings(deadline=None, max_examples=40)
def test_tiles_attend_as_the_mask_says(
    sizes: list[int], radius: float, round_: bool, edge: int, others: tuple[int, int]
) -> None:
    grid = TokenGrid(*others, tuple(sizes))
    total = math.prod(sizes) + sum(others)
    q, k, v = (x.requires_grad_() for x in qkv(total))
    layer = AttendLocally(grid, radius, round_=round_, edge=edge)
    tiling = Tiling(grid.sizes, edge, math.ceil(radius) - 1)
    found = attend_by_tiles(q, k, v, tiling, layer.seen(tiling, q.device), grid.before, None)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=layer.mask(total, q.device))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    seed = torch.randn_like(found)
    gradients = (torch.autograd.grad((y * seed).sum(), (q, k, v)) for y in (found, wanted))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_tiles_are_taken_where_they_save() -> None:
    near, far = AttendLocally(TokenGrid(0, 0, (16, 16)), 2.0), AttendLocally(TokenGrid(0, 0, (16, 16)), 8.0)
    q, k, v = qkv(256)
    assert far.tiling(256) is None
    tiling = near.tiling(256)
    assert tiling is not None
    assert tiling.pairs == tiling.queries(q.device).numel() * tiling.keys(q.device).shape[1] == 256 * 10 * 10
    for layer in (near, torch.compile(near, fullgraph=True, backend="aot_eager")):
        found = layer(q, k, v)
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=near.mask(256, q.device))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    shared = AttendLocally(TokenGrid(0, 0, (16, 16)), 2.0, grouped=True)(q, k[:, :1], v[:, :1])
    torch.testing.assert_close(shared, near(q, k[:, :1].expand_as(q), v[:, :1].expand_as(q)))


@given(sizes_of_grids, st.integers(1, 3), st.integers(0, 2))
@settings(deadline=None, max_examples=30)
def test_coarse_attention_bucket_by_bucket(sizes: list[int], bucket: int, text: int) -> None:
    total = math.prod(sizes) + text
    q, k, v = qkv(total)
    found = AttendCoarsely(TokenGrid(text, 0, tuple(sizes)), bucket)(q, k, v)
    members: dict[Any, list[int]] = {("text", i): [i] for i in range(text)}
    for i, place in enumerate(places(sizes)):
        members.setdefault(tuple(p // bucket for p in place), []).append(text + i)
    means = [torch.stack([x[:, :, m].mean(2) for m in members.values()], dim=2) for x in (q, k, v)]
    coarse = (means[0] @ means[1].transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ means[2]
    for row, inside in enumerate(members.values()):
        for i in inside:
            torch.testing.assert_close(found[:, :, i], coarse[:, :, row], rtol=1e-10, atol=1e-12)
    if bucket == 1:
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v), rtol=1e-10, atol=1e-12)


def routed(threshold: float = 0.0) -> RoutedAttention:
    grid = TokenGrid(0, 0, (3, 4))
    router = LinearRouter(0, 6, tap_dim=16, embed_timestep=True, bias=True)
    torch.nn.init.normal_(router.tap_weight, std=1.0, generator=torch.Generator().manual_seed(0))
    mechanisms = [Attend(), AttendLocally(grid, 1.5), AttendCoarsely(grid, 2)]
    return RoutedAttention(router, mechanisms, 2, threshold=threshold).double()


def test_routed_attention_soft_and_hard() -> None:
    layer = routed(threshold=0.6)
    q, k, v = qkv(12)
    t = torch.tensor([10.0, 700.0]).double()
    z = (sinusoidal(t, 16).double() @ layer.router.tap_weight.T + layer.router.bias).reshape(2, 2, 3)
    p = z.softmax(-1)
    parts = torch.stack([m(q, k, v) for m in layer.mechanisms], dim=-1)
    soft = (parts * p[:, :, None, None, :]).sum(-1)
    torch.testing.assert_close(layer.train()(q, k, v, t), soft, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.record.terms["full"], p[..., 0].square().mean())
    picked = torch.where(p.max(-1).values < 0.6, 0, p.argmax(-1))
    assert len(picked.unique()) > 1
    assert (p.max(-1).values < 0.6).any()
    hard = torch.stack([torch.stack([parts[b, h, ..., picked[b, h]] for h in range(2)]) for b in range(2)])
    found = layer.eval()(q, k, v, t)
    torch.testing.assert_close(found, hard, rtol=1e-10, atol=1e-12)
    with torch.no_grad():  # each mechanism for those that picked it
        torch.testing.assert_close(layer(q, k, v, t), hard, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer(q[:1], k[:1], v[:1], t[:1]), hard[:1], rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(found)
    gradient = torch.autograd.grad((found * weights).sum(), layer.router.bias)[0]
    expected = torch.autograd.grad((soft * weights).sum(), layer.router.bias)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)  # straight through: that of the soft sum


def test_a_sample_is_routed_by_its_own_timestep() -> None:
    layer = routed().eval()
    q, k, v = qkv(12)
    t = torch.tensor([10.0, 700.0]).double()
    whole = layer(q, k, v, t)
    for i in range(2):
        part = slice(i, i + 1)
        torch.testing.assert_close(layer(q[part], k[part], v[part], t[part]), whole[part], rtol=1e-10, atol=1e-12)


def test_known_timesteps_leave_out_what_no_head_picks() -> None:
    torch.manual_seed(0)
    model = randomise_zeros(DiT()).double().eval()
    t = torch.tensor([900.0, 900.0]).double()
    inputs = (torch.randn(2, 1, 8, 8).double(), t, torch.tensor([3, 7]))
    moefx.transform(model, inputs, recipe="vorta", radius=1.5, threshold=0.0)
    for module in model.modules():
        if isinstance(module, RoutedAttention):
            torch.nn.init.normal_(module.router.bias, generator=torch.Generator().manual_seed(5))
            torch.nn.init.zeros_(module.router.tap_weight)
    attend = model.blocks[0].attn.attend if hasattr(model.blocks[0].attn, "attend") else model.blocks[0].attend
    q, k, v = qkv(16, heads=4)
    c = torch.randn(1, 64).double()
    picked, static = attend.fold((c,), {})
    assert len(set(picked)) > 1
    torch.testing.assert_close(static(q, k, v, c), attend(q, k, v, c), rtol=1e-12, atol=1e-12)
    assert len(static.mechanisms) == len(set(picked))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", ["vorta", "clear"])
def test_the_start_is_the_dense_model(name: str, recipe: str) -> None:
    model = zoo.tiny(name).eval()
    dense = copy.deepcopy(model)
    options: dict[str, Any] = {"grid": [4, 6]} if name == FLUX else {}
    moefx.transform(model, recipe=recipe, **options | ({"radius": 20.0} if recipe == "clear" else {}))
    inputs = synthesise(dense, batch=3, seed=9)
    output = model(**inputs)[0]
    torch.testing.assert_close(output, dense(**inputs)[0], rtol=1e-5, atol=1e-6)
    output.square().mean().backward()
    routers = [p for n, p in model.named_parameters() if "attend" in n and ".router." in n]
    assert bool(routers) == (recipe == "vorta")
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in routers)


def test_the_image_is_found_among_the_tokens() -> None:
    wanted = {
        "SD3Transformer2DModel": {(0, 7, 4, 6), (0, 0, 4, 6)},
        "UNet2DConditionModel": {(0, 0, 4, 6), (0, 0, 2, 3)},
        "WanTransformer3DModel": {(0, 0, 3, 4, 6)},
    }
    for name, layouts in wanted.items():
        made = moefx.plan(zoo.tiny(name), recipe="clear", max_error=9.0)
        assert {tuple(layout) for layout in made.passes[0].options["layouts"].values()} == layouts
    plan = moefx.plan(zoo.tiny(FLUX), recipe="clear", grid=[4, 6])
    assert set(map(tuple, plan.passes[0].options["layouts"].values())) == {(7, 0, 4, 6)}
    assert len(plan.sites) == 4
    with pytest.raises(NothingMatched, match="pass grid"):
        moefx.plan(zoo.tiny(FLUX), recipe="clear")


def test_local_attention_in_a_model_follows_the_equation() -> None:
    torch.manual_seed(0)
    model = randomise_zeros(DiT()).double().eval()
    inputs = (torch.randn(2, 1, 8, 8).double(), torch.tensor([0.2, 0.9]).double(), torch.tensor([3, 7]))
    moefx.transform(model, inputs, recipe="clear", radius=1.5)
    attention, x = model.blocks[1].attn, torch.randn(2, 16, 64).double().requires_grad_()
    q, k, v = attention.qkv(x).reshape(2, 16, 3, 4, 16).permute(2, 0, 3, 1, 4)
    where = places([4, 4])
    near = torch.tensor([[math.dist(a, b) < 1.5 for b in where] for a in where])
    scores = (q @ k.transpose(-1, -2) / 4).masked_fill(~near, -math.inf).softmax(-1)
    wanted = attention.proj((scores @ v).transpose(1, 2).reshape(2, 16, 64))
    check_agree(attention(x), wanted, [x, attention.qkv.weight, attention.proj.weight])


def test_specialised_for_a_sampler() -> None:
    model = zoo.tiny("DiTTransformer2DModel")
    inputs = synthesise(model)
    moefx.transform(model, recipe="vorta", radius=2.0, threshold=0.0)
    draws = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".router." in name:
            torch.nn.init.normal_(parameter, generator=draws)
    special = moefx.specialise(model, timesteps=[999.0, 500.0, 1.0], inputs=inputs)
    assert not any(isinstance(m, RoutedAttention) for v in special.variants for m in v.modules())
    with torch.no_grad():
        for time in (999.0, 500.0, 1.0):
            at = {**inputs, "timestep": torch.full_like(inputs["timestep"], time)}
            torch.testing.assert_close(special(**at)[0], model(**at)[0], rtol=1e-5, atol=1e-6)
    assert special.fallbacks == 0


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = zoo.tiny(FLUX)
    inputs = synthesise(model)
    moefx.transform(model, recipe="vorta", grid=[4, 6], radius=2.0, threshold=0.0)
    for name, parameter in model.named_parameters():
        if ".router." in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    assert torch.equal(moefx.load(tmp_path)(**inputs)[0], model(**inputs)[0])


def test_nonsense_is_refused() -> None:
    with pytest.raises(OptionError, match="fall back"):
        moefx.plan(zoo.tiny("DiTTransformer2DModel"), recipe="vorta", mechanisms=["window", "full"])
    with pytest.raises(OptionError, match="positive"):
        AttendLocally(TokenGrid(0, 0, (2, 2)), 0.0)
    with pytest.raises(OptionError, match="at least 1"):
        AttendCoarsely(TokenGrid(0, 0, (2, 2)), 0)
