"""Every feed-forward network and every attention of the named models is found, and nothing else is.

The counts are written by hand from the architectures at the sizes of the tiny configurations.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from analysis_support import attend, close, exported, features_last, fingerprint, recompute_ffn, traced

from moefx.passes.analysis import misses, sites

# model: feed-forward networks by (flavour, role), attentions by flavour.
EXPECTED: dict[str, tuple[dict[tuple[str, str], int], dict[str, int]]] = {
    "DiT": ({("plain", "main"): 2}, {"self": 2}),
    "InlineDiT": ({("plain", "main"): 2}, {"self": 2}),
    "FunctionalDiT": ({("plain", "main"): 2}, {"self": 2}),
    "VisionTransformer": ({("plain", "main"): 2}, {"self": 2}),
    "DiTTransformer2DModel": ({("plain", "main"): 2}, {"self": 2}),
    "PixArtTransformer2DModel": ({("plain", "main"): 2}, {"self": 2, "cross": 2}),
    # Three joint blocks, the last without a context network; the first has a second, self attention.
    "SD3Transformer2DModel": ({("plain", "main"): 3, ("plain", "context"): 2}, {"joint": 3, "self": 1}),
    # Two double blocks; two single blocks whose network is a branch of the output projection.
    "FluxTransformer2DModel": ({("plain", "main"): 4, ("plain", "context"): 2}, {"joint": 2, "self": 2}),
    # One transformer block down, one in the middle, two up.
    "UNet2DConditionModel": ({("gated", "main"): 4}, {"self": 4, "cross": 4}),
    # Both attentions of the two U-blocks read the text; the transformer has two layers.
    "UVit2DModel": ({("gated", "main"): 2}, {"self": 2, "cross": 6}),
    "HunyuanDiT2DModel": ({("plain", "main"): 4}, {"self": 4, "cross": 4}),
    "SanaTransformer2DModel": ({("conv", "main"): 2}, {"linear": 2, "cross": 2}),
    # A context refiner, a noise refiner, two layers.
    "Lumina2Transformer2DModel": ({("gated", "main"): 3, ("gated", "refiner"): 1}, {"self": 4}),
    "AuraFlowTransformer2DModel": ({("gated", "main"): 3, ("gated", "context"): 1}, {"joint": 1, "self": 2}),
    "QwenImageTransformer2DModel": ({("plain", "main"): 2, ("plain", "context"): 2}, {"joint": 2}),
    # Text and video are concatenated before the projections.
    "CogVideoXTransformer3DModel": ({("plain", "main"): 2}, {"self": 2}),
    # One network per block, called for the image and for the text.
    "CogView4Transformer2DModel": ({("plain", "main"): 2, ("plain", "context"): 2}, {"self": 2}),
    "WanTransformer3DModel": ({("plain", "main"): 2}, {"self": 2, "cross": 2}),
    "LTXVideoTransformer3DModel": ({("plain", "main"): 2}, {"self": 2, "cross": 2}),
    "Flux2Transformer2DModel": ({("gated", "main"): 4, ("gated", "context"): 2}, {"joint": 2, "self": 2}),
}
ACTIVATIONS = {
    "UNet2DConditionModel": "gelu",
    "UVit2DModel": "gelu",
    "SanaTransformer2DModel": "silu",
    "Lumina2Transformer2DModel": "silu",
    "AuraFlowTransformer2DModel": "silu",
    "Flux2Transformer2DModel": "silu",
    "FunctionalDiT": "gelu",
    "VisionTransformer": "gelu",
}
NO_EXPORT = {"CogVideoXTransformer3DModel", "Lumina2Transformer2DModel"}
NAMES = sorted(EXPECTED)


@pytest.mark.parametrize("name", NAMES)
def test_every_ffn_is_found_and_nothing_else_is(name: str) -> None:
    graph = traced(name)[3]
    found = [s for s in sites(graph) if s.kind == "ffn"]
    assert Counter((s.flavour, s.role) for s in found) == EXPECTED[name][0]
    assert {s.operands["act"].name for s in found} == {ACTIVATIONS.get(name, "gelu_tanh")}
    assert len({s.name for s in sites(graph)}) == len(sites(graph))


@pytest.mark.parametrize("name", NAMES)
def test_every_attention_is_found_and_nothing_else_is(name: str) -> None:
    found = [s for s in sites(traced(name)[3]) if s.kind == "attention"]
    assert Counter(s.flavour for s in found) == EXPECTED[name][1]


@pytest.mark.parametrize("name", NAMES)
def test_ffn_sites_equal_what_their_operands_compute(name: str) -> None:
    _, args, kwargs, graph = traced(name)
    found = [s for s in sites(graph) if s.kind == "ffn"]
    wanted = {n for s in found for n in (*s.inputs, s.output)}
    values = graph.values(wanted, *args, **kwargs)
    for site in found:
        assert close(recompute_ffn(site, graph, values), values[site.output], site.nodes), site.name


@pytest.mark.parametrize("name", NAMES)
def test_attention_projections_equal_what_their_operands_compute(name: str) -> None:
    _, args, kwargs, graph = traced(name)
    found = [s for s in sites(graph) if s.kind == "attention"]
    parts = [p for s in found for stream in s.operands["streams"] for p in (stream.q, stream.k, stream.v)]
    values = graph.values({n for p in parts for n in (p.x, p.value)}, *args, **kwargs)
    for part in parts:
        weight, bias = part.weight.tensor(graph), part.bias.tensor(graph) if part.bias else None
        projected = torch.nn.functional.linear(values[part.x].to(weight.dtype), weight, bias)
        held = features_last(values[part.value], part.lane.dims)
        assert part.lane.rows.size == held.shape[-1]
        assert close(projected.reshape(held.shape), held), part.node


@pytest.mark.parametrize("name", NAMES)
def test_attention_cores_and_outputs_equal_what_their_operands_compute(name: str) -> None:
    _, args, kwargs, graph = traced(name)
    found = [s for s in sites(graph) if s.kind == "attention"]
    outs = [stream.out for s in found for stream in s.operands["streams"] if stream.out]
    cores = [s.operands for s in found if s.flavour != "linear"]
    wanted = {n for o in cores for n in (o["q"], o["k"], o["v"], o["core"], o["mask"]) if n is not None}
    wanted |= {n for o in outs for n in (o.node, o.pre)} | {o.node.args[0] for o in outs}
    values = graph.values(wanted, *args, **kwargs)
    for o in cores:
        keys = values[o["k"]] if o["core_kind"] == "sdpa" else values[o["k"]].transpose(-1, -2)
        result = attend(values[o["q"]], keys, values[o["v"]], values.get(o["mask"]))
        assert close(result, values[o["core"]]), o["core"]
    for out in outs:
        weight, bias = out.weight.tensor(graph), out.bias.tensor(graph) if out.bias else 0
        if out.weight.cols is None:
            assert close(values[out.pre] @ weight.T + bias, values[out.node]), out.node
        else:
            assert torch.equal(values[out.node.args[0]][..., out.weight.cols], values[out.pre])


@pytest.mark.parametrize("name", NAMES)
def test_heads_fit_the_weights(name: str) -> None:
    graph = traced(name)[3]
    for site in (s for s in sites(graph) if s.kind == "attention"):
        sizes = site.shapes
        assert len(site.operands["w_q"].tensor(graph)) == sizes["heads"] * sizes["head_dim"]
        assert len(site.operands["w_k"].tensor(graph)) == sizes["kv_heads"] * sizes["head_dim"]
        assert site.operands["w_out"].tensor(graph).shape[1] == sizes["heads"] * sizes["head_dim"]
        assert site.operands["pre_out"].meta["val"].shape[-1] == sizes["heads"] * sizes["head_dim"]


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NO_EXPORT])
def test_the_exported_graph_has_the_same_sites(name: str) -> None:
    ours = Counter(fingerprint(s) for s in sites(traced(name)[3]))
    oracle = Counter(fingerprint(s) for s in sites(exported(name)))
    assert ours == oracle


def test_embedders_are_near_misses_with_the_condition_that_failed() -> None:
    found = {m.node.name: m.reason for m in misses(traced("PixArtTransformer2DModel")[3])}
    assert "rank 2" in found["adaln_single_emb_timestep_embedder_linear_2"]
    assert "no residual" in found["caption_projection_linear_2"]
    assert len(found) == 4


def test_misses_say_where_they_are() -> None:
    (found,) = (m for m in misses(traced("PixArtTransformer2DModel")[3]) if m.module_path == "caption_projection")
    assert found.source_line.startswith("diffusers/models/embeddings.py:")
    assert found.progress >= 3
    assert "caption_projection" in str(found)


def test_one_module_called_twice_is_two_sites_with_shared_weights() -> None:
    found = {s.name: s for s in sites(traced("CogView4Transformer2DModel")[3]) if s.kind == "ffn"}
    first, second = found["transformer_blocks.0.ff"], found["transformer_blocks.0.ff#1"]
    assert (first.call_index, second.call_index) == (0, 1)
    assert first.weights() == second.weights()
    assert (first.role, second.role) == ("main", "context")


@pytest.mark.parametrize("name", ["QwenImageTransformer2DModel", "CogView4Transformer2DModel"])
def test_the_last_context_ffn_is_dead(name: str) -> None:
    found = [s for s in sites(traced(name)[3]) if s.kind == "ffn"]
    assert [s.role for s in found if s.dead] == ["context"]


def test_cut_out_ffns_name_their_rows_and_columns() -> None:
    flux = next(s for s in sites(traced("FluxTransformer2DModel")[3]) if s.name == "single_transformer_blocks.0:ffn")
    assert str(flux.operands["w_out"]) == "single_transformer_blocks.0.proj_out.weight[:, 32:160]"
    assert not flux.region_is_module
    flux2 = [s for s in sites(traced("Flux2Transformer2DModel")[3]) if s.name == "single_transformer_blocks.0.attn:ffn"]
    assert flux2[0].gate_first
    assert flux2[0].operands["w_in"].fqn == flux2[0].operands["w_gate"].fqn


def test_half_order_comes_from_the_data_flow() -> None:
    unet = [s for s in sites(traced("UNet2DConditionModel")[3]) if s.kind == "ffn"]
    flux2 = [s for s in sites(traced("Flux2Transformer2DModel")[3]) if s.kind == "ffn"]
    assert not any(s.gate_first for s in unet)
    assert all(s.gate_first for s in flux2)


def test_flags_of_attentions() -> None:
    def flags(name: str) -> set[tuple[bool, bool, bool]]:
        found = [s for s in sites(traced(name)[3]) if s.kind == "attention" and s.flavour != "cross"]
        return {(s.operands["qk_norm"], s.operands["rope"], s.operands["mask"] is not None) for s in found}

    assert flags("DiTTransformer2DModel") == {(False, False, False)}
    assert flags("FluxTransformer2DModel") == {(True, True, False)}
    assert flags("WanTransformer3DModel") == {(True, True, False)}
    assert flags("SD3Transformer2DModel") == {(True, False, False)}
    assert flags("CogView4Transformer2DModel") == {(True, True, False)}
    assert flags("QwenImageTransformer2DModel") == {(True, True, True)}
    assert flags("LTXVideoTransformer3DModel") == {(True, True, False)}


def test_fused_projections_are_rows_of_one_weight() -> None:
    site = next(s for s in sites(traced("DiT")[3]) if s.kind == "attention")
    assert site.operands["layout"] == "fused_qkv"
    assert str(site.operands["w_k"]) == "blocks.0.attn.qkv.weight[32:64]"
    assert str(site.operands["b_v"]) == "blocks.0.attn.qkv.bias[64:96]"


def test_which_regions_are_modules() -> None:
    def modules(name: str, kind: str) -> set[bool]:
        return {s.region_is_module for s in sites(traced(name)[3]) if s.kind == kind}

    assert modules("DiT", "ffn") == {True}
    assert modules("DiT", "attention") == {True}
    assert modules("InlineDiT", "ffn") == {False}
    assert modules("FunctionalDiT", "ffn") == {False}
    assert modules("SanaTransformer2DModel", "ffn") == {True}
    assert modules("Lumina2Transformer2DModel", "ffn") == {True}
