"""Calibration against plain records of what the models' own projections read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import moefx
from examples.dit import DiT
from moefx import zoo
from moefx.errors import InputError, OptionError, UnsafeInputError
from moefx.graph.inputs import synthesise
from moefx.passes.calibration import Calibration
from moefx.passes.calibration.moments import Moments
from tests import calibration_worker
from tests import split_support as support
from tests.ranks import run
from tests.trace_support import QUIET, call

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

ZOO = (
    "DiTTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "UNet2DConditionModel",
    "WanTransformer3DModel",
)


def small_dit(seed: int = 0, dtype: torch.dtype = torch.float64) -> DiT:
    torch.manual_seed(seed)
    model = DiT(image_size=8, patch=2, in_channels=1, depth=2, width=16, heads=2, classes=4, mlp_ratio=3.0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def digits_batch(seed: int, count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 8, 8, generator=draws, dtype=torch.float64)
    t = torch.rand(count, generator=draws, dtype=torch.float64) * 1000
    return x, t, torch.randint(0, 4, (count,), generator=draws)


def hidden_layers(model: DiT, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What the second projection of every network reads, by hooks: another way than the calibration's."""
    seen: dict[str, Tensor] = {}
    handles = [
        block.mlp.fc2.register_forward_pre_hook(lambda _, args, i=i: seen.update({f"blocks.{i}.mlp": args[0]}))
        for i, block in enumerate(model.blocks)
    ]
    try:
        model(*batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_moments_usage_and_taylor_of_a_dit() -> None:
    model, batches = small_dit(), [digits_batch(i) for i in range(3)]

    def loss(output: Tensor, batch: Any) -> Tensor:
        return (output - batch[0]).square().mean()

    found = moefx.calibrate(model, batches, loss=loss, buckets=4, active=5, progress=False)
    assert list(found.layers) == ["blocks.0.mlp", "blocks.1.mlp"]
    for name, layer in found.layers.items():
        rows, taylor, buckets = [], [], []
        for batch in batches:
            h = hidden_layers(model, batch)[name]
            h.retain_grad()
            handle = model.get_submodule(name).fc2.register_forward_pre_hook(lambda _, args: args[0].retain_grad())
            kept: list[Tensor] = []
            other = model.get_submodule(name).fc2.register_forward_pre_hook(lambda _, args, k=kept: k.append(args[0]))
            loss(model(*batch), batch).backward()
            handle.remove()
            other.remove()
            taylor.append((kept[0] * kept[0].grad).abs().flatten(0, 1))
            rows.append(h.detach().flatten(0, 1))
            buckets.append((batch[1] // 250).long().repeat_interleave(h.shape[1]))
        h, taylor, bucket = torch.cat(rows), torch.cat(taylor), torch.cat(buckets)
        for b in range(4):
            mine = h[bucket == b]
            assert layer.hidden.count[b] == len(mine)
            assert torch.allclose(layer.hidden.mean[b], mine.mean(0), rtol=1e-10)
            assert torch.allclose(layer.hidden.variance[b], mine.var(0, unbiased=False), rtol=1e-10)
            assert torch.allclose(layer.hidden.second[b], mine.square().mean(0), rtol=1e-10)
            assert torch.allclose(layer.magnitude.mean[b], mine.abs().mean(0), rtol=1e-10)
            ranks = mine.abs().argsort(1, descending=True).argsort(1)
            assert torch.allclose(layer.usage.mean[b], (ranks < 5).double().mean(0), rtol=1e-10)
            assert torch.allclose(layer.taylor.mean[b], taylor[bucket == b].mean(0), rtol=1e-8)
            y = mine @ model.get_submodule(name).fc2.weight.T
            assert torch.allclose(layer.output.mean[b], y.mean(0), rtol=1e-8, atol=1e-12)
        assert layer.hidden.pooled().mean[0].allclose(h.mean(0))


def test_heads_and_tokens_of_a_dit() -> None:
    """Energy and first-order change of every head, and of tokens by how much their block adds, one sample at a time."""
    model, batch = small_dit(), digits_batch(0, count=3)

    def loss(output: Tensor, batch: Any) -> Tensor:
        return (output - batch[0]).square().mean()

    found = moefx.calibrate(model, [batch], loss=loss, buckets=1, progress=False)
    assert {n: (p.unit, p.parts) for n, p in found.parts.items()} == {
        "blocks.0.attn": ("heads", 2),
        "blocks.1.attn": ("heads", 2),
        "blocks.0": ("tokens", 16),
        "blocks.1": ("tokens", 16),
    }
    for i, block in enumerate(model.blocks):
        seen: list[tuple[Tensor, Tensor]] = []
        handles = [
            m.register_forward_hook(lambda _, a, y, s=seen: s.append((a[0], y))) for m in (block.attn.proj, block)
        ]
        value = loss(model(*batch), batch)
        for handle in handles:
            handle.remove()
        (pre, out), (before, after) = seen
        grads = torch.autograd.grad(value, [out, after])
        heads = found.part(f"blocks.{i}.attn")
        for h in range(2):
            part = pre[..., 8 * h : 8 * h + 8] @ block.attn.proj.weight[:, 8 * h : 8 * h + 8].T
            assert torch.allclose(heads.energy.mean[0, h], part.square().sum(-1).mean(), rtol=1e-10)
            assert torch.allclose(heads.fisher.mean[0, h], (part * grads[0]).sum(-1).square().mean(), rtol=1e-10)
        assert torch.allclose(heads.whole.mean[0, 0], (out - block.attn.proj.bias).square().sum(-1).mean(), rtol=1e-10)
        energy, fisher = [], []
        for x, y, g in zip(before, after, grads[1], strict=True):  # 16 tokens, so that every part is one of them
            order = (y - x).norm(dim=-1).argsort(descending=True)
            energy.append((y - x)[order].square().sum(-1) / 16)
            fisher.append(((y - x) * g)[order].sum(-1).square() / 16)
        tokens = found.part(f"blocks.{i}")
        assert torch.allclose(tokens.energy.mean[0], torch.stack(energy).mean(0), rtol=1e-10)
        assert torch.allclose(tokens.losses(), torch.stack(fisher).mean(0), rtol=1e-10)
    plain = moefx.calibrate(model, [batch], buckets=1, progress=False).part("blocks.0")
    assert not plain.learnt
    assert torch.allclose(plain.losses().sum(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("name", ZOO)
def test_hidden_layers_of_the_zoo(name: str) -> None:
    """Gated, plain and fused networks: the mean hidden layer is what the second projection reads."""
    model = zoo.tiny(name)
    inputs = synthesise(model, batch=2)
    fingerprint = {n: (type(m), len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()}
    found = moefx.calibrate(model, [inputs], buckets=2, progress=False)
    assert {n: (type(m), len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()} == (
        fingerprint
    )
    sites = {s.name: s for s in moefx.sites(model, inputs) if s.kind == "ffn" and not s.dead}
    assert set(found.layers) | set(found.skipped) == set(sites)
    assert found.layers
    seen: dict[str, list[Tensor]] = {n: [] for n in found.layers}
    handles = []
    for layer in found.layers:
        weight = sites[layer].operands["w_out"]
        columns = weight.cols or slice(None)
        module = model.get_submodule(weight.fqn.removesuffix(".weight"))

        def record(_: nn.Module, args: tuple[Tensor, ...], at: str = layer, columns: Any = columns) -> None:
            seen[at].append(args[0].detach()[..., columns].flatten(0, -2))

        handles.append(module.register_forward_pre_hook(record))
    call(model.eval(), inputs)
    for handle in handles:
        handle.remove()
    for layer, statistics in found.layers.items():
        h = torch.cat(seen[layer]).double()
        mean = statistics.hidden.pooled().mean[0]
        assert statistics.count == len(h)
        assert (mean - h.mean(0)).norm() <= 1e-5 * h.norm() / math.sqrt(len(h))


def test_branches_are_kept_apart_and_named() -> None:
    model = small_dit()
    a, b = digits_batch(0), digits_batch(1)
    both = moefx.calibrate(model, {"conditional": [a], "unconditional": [b]}, buckets=2, progress=False)
    alone = moefx.calibrate(model, [b], buckets=2, progress=False)
    assert both.branches == ("conditional", "unconditional")
    layer = both.layer("blocks.1.mlp")
    assert layer.groups == 4
    assert torch.equal(layer.hidden.mean[2:], alone.layer("blocks.1.mlp").hidden.mean)
    assert set(layer.sample.group.tolist()) <= {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("name", "layer", "first"),
    [
        ("FluxTransformer2DModel", "single_transformer_blocks.0:ffn", True),
        ("HunyuanVideoTransformer3DModel", "single_transformer_blocks.1:ffn", False),
        ("CogVideoXTransformer3DModel", "transformer_blocks.0.ff", True),
    ],
)
def test_text_and_image_tokens_of_a_joint_sequence_are_kept_apart(name: str, layer: str, first: bool) -> None:
    model = zoo.tiny(name).eval()
    inputs = synthesise(model, batch=2)
    found = moefx.calibrate(model, [inputs], buckets=1, samples=10_000, progress=False).layer(layer)
    assert found.modalities == ("main", "text")
    site = next(s for s in moefx.sites(model, inputs) if s.name == layer)
    graph = moefx.trace(model, inputs)
    node = next(n for n in graph.nodes if n.name == site.operands["x"].name)
    arguments = inputs if isinstance(inputs, dict) else {}
    x = graph.values([node], **arguments)[node].detach()
    text = inputs["encoder_hidden_states"].shape[1]
    assert found.hidden.count.tolist() == [2 * (x.shape[1] - text), 2 * text]
    rows = x[:, :text] if first else x[:, -text:]
    kept = found.sample.x[found.sample.group == 1]
    assert (torch.cdist(rows.flatten(0, 1).double(), kept.double()).min(1).values < 1e-5).all()


def test_parts_merge_to_the_whole_and_the_sample_stays_bounded(tmp_path: Path) -> None:
    model, batches = small_dit(), [digits_batch(i) for i in range(4)]
    whole = moefx.calibrate(model, batches, buckets=2, samples=50, progress=False)
    halves = [moefx.calibrate(model, batches[i : i + 2], buckets=2, samples=50, seed=i, progress=False) for i in (0, 2)]
    merged = halves[0].merged(halves[1])
    for name, layer in whole.layers.items():
        other = merged.layer(name)
        assert len(other.sample.x) == len(layer.sample.x) == 50
        assert torch.allclose(layer.hidden.mean, other.hidden.mean, rtol=1e-12)
        assert torch.allclose(layer.hidden.squares, other.hidden.squares, rtol=1e-12)
        for part in whole.parts.values():
            other_part = merged.part(part.name)
            assert torch.allclose(part.energy.squares, other_part.energy.squares, rtol=1e-10)
            assert torch.allclose(part.losses(), other_part.losses(), rtol=1e-10)
        # The merged sample is that of the largest keys of both.
        keys = torch.cat([half.layer(name).sample.key for half in halves]).sort(descending=True).values[:50]
        assert torch.equal(other.sample.key, keys)
    with pytest.raises(InputError, match="other timestep buckets"):
        merged.merged(moefx.calibrate(model, batches[:1], buckets=3, progress=False))


def test_the_sample_is_uniform() -> None:
    """Every token is kept with the same probability, early ones and late ones."""
    model = small_dit(dtype=torch.float32)
    batches = [tuple(v.float() if v.is_floating_point() else v for v in digits_batch(i)) for i in range(8)]
    first = moefx.calibrate(model, batches[:4], samples=10_000, buckets=1, progress=False)
    half = {tuple(row) for row in first.layer("blocks.0.mlp").sample.x.tolist()}
    early = 0
    for seed in range(20):
        found = moefx.calibrate(model, batches, samples=64, buckets=1, seed=seed, progress=False)
        x = found.layer("blocks.0.mlp").sample.x
        early += sum(tuple(row) in half for row in x.tolist())
    # 1280 draws with p = 1/2: four standard deviations are 72.
    assert abs(early - 640) < 72


def test_file_round_trip_and_refusals(tmp_path: Path) -> None:
    model = small_dit()
    made = moefx.calibrate(model, {"a": [digits_batch(0)], "b": [digits_batch(1)]}, buckets=3, progress=False)
    path = tmp_path / "statistics.safetensors"
    made.save(path)
    found = Calibration.load(path)
    assert repr(found) == repr(made)
    assert found.span == made.span
    for name, layer in made.layers.items():
        other = found.layer(name)
        assert torch.equal(layer.sample.x, other.sample.x)
        assert all(torch.equal(layer.moments[n].squares, other.moments[n].squares) for n in layer.moments)
    assert found.parts.keys() == made.parts.keys()
    assert all(torch.equal(found.part(n).energy.squares, p.energy.squares) for n, p in made.parts.items())
    assert [p.name for p in tmp_path.iterdir()] == ["statistics.safetensors"]

    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    newer = {k: v.replace('"schema_version":2', '"schema_version":9') for k, v in header.items()}
    wrong = {**tensors, "0.hidden.mean": tensors["0.hidden.mean"] * math.nan}
    outside = {**tensors, "0.sample.group": tensors["0.sample.group"] + 99}
    short = {**tensors, "0.taylor.mean": tensors["0.taylor.mean"][:, 1:].contiguous()}
    for content, metadata, reason in (
        (tensors, newer, "schema 9"),
        (tensors, {}, "no header"),
        (wrong, header, "NaN"),
        (outside, header, "does not fit its groups"),
        (short, header, "0.taylor.mean"),
        ({**tensors, "part.1.energy.mean": tensors["part.1.energy.mean"][:1].clone()}, header, "part.1.energy.mean"),
        ({**tensors, "more": tensors["0.sample.x"] + 1}, header, "unknown tensors"),
    ):
        save_file(content, path, metadata=metadata)
        with pytest.raises(UnsafeInputError, match=reason):
            Calibration.load(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(UnsafeInputError, match="no safetensors"):
        Calibration.load(path)


def test_an_interruption_leaves_the_model_as_it_was() -> None:
    model = small_dit().train()

    def stop() -> Iterator[Any]:
        yield digits_batch(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moefx.calibrate(model, stop(), progress=False)
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_errors_say_what_to_do() -> None:
    model = small_dit()
    with pytest.raises(InputError, match="no batch"):
        moefx.calibrate(model, [], progress=False)
    with pytest.raises(OptionError, match="at least 1"):
        moefx.calibrate(model, [digits_batch(0)], buckets=0, progress=False)
    with pytest.raises(InputError, match="no feed-forward network"):
        moefx.calibrate(nn.Linear(3, 3), [(torch.randn(2, 3),)], progress=False)
    with pytest.raises(InputError, match="scalar"):
        moefx.calibrate(model, [digits_batch(0)], loss=lambda output, _: output, progress=False)
    found = moefx.calibrate(model, [digits_batch(0)], progress=False)
    with pytest.raises(InputError, match="did you mean"):
        found.layer("blocks.0.mpl")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 3))
def test_moments_merge_like_the_union(sizes: list[int], groups: int) -> None:
    draws = torch.Generator().manual_seed(sum(sizes))
    rows = [torch.randn(n, 3, generator=draws, dtype=torch.float64) + 1e6 for n in sizes]
    marks = [torch.randint(0, groups, (n,), generator=draws) for n in sizes]
    total = Moments.empty(groups, 3)
    for x, group in zip(rows, marks, strict=True):
        total = total.merged(Moments.of(x, group, groups))
    x, group = torch.cat(rows), torch.cat(marks)
    for g in range(groups):
        if (group == g).any():
            assert torch.allclose(total.mean[g], x[group == g].mean(0), rtol=1e-14)
            assert torch.allclose(total.variance[g], x[group == g].var(0, unbiased=False), atol=1e-8)
    if len(x):
        assert torch.allclose(total.pooled().variance[0], x.var(0, unbiased=False), atol=1e-8)


def test_processes_share_one_calibration(tmp_path: Path) -> None:
    run(calibration_worker.main, 2, str(tmp_path))
    parts = [Calibration.load(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    alone = moefx.calibrate(support.small_dit(), [support.batch(i) for i in range(4)], buckets=2, progress=False)
    for name, layer in alone.layers.items():
        one, two = (part.layer(name) for part in parts)
        assert torch.equal(one.sample.x, two.sample.x)
        assert len(one.sample.x) == 30
        assert torch.equal(one.hidden.mean, two.hidden.mean)
        assert torch.allclose(one.hidden.mean, layer.hidden.mean, rtol=1e-12, atol=1e-14)
        assert one.count == layer.count
