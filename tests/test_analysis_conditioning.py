"""What depends on what: checked by changing inputs and by hand for the named models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from analysis_support import traced
from torch import Tensor

from moefx.graph.kinds import shape
from moefx.passes.analysis import analyse, conditioning

CLASSES: dict[str, dict[str, str]] = {
    "DiT": {"x": "tokens", "t": "timestep", "y": "label"},
    "FunctionalDiT": {"x": "tokens", "t": "timestep", "y": "label"},
    "VisionTransformer": {"x": "tokens"},
    "DiTTransformer2DModel": {"hidden_states": "tokens", "timestep": "timestep", "class_labels": "label"},
    "FluxTransformer2DModel": {
        "hidden_states": "tokens",
        "encoder_hidden_states": "text",
        "pooled_projections": "label",
        "timestep": "timestep",
        "guidance": "label",
        "img_ids": "position",
        "txt_ids": "position",
    },
    "PixArtTransformer2DModel": {
        "hidden_states": "tokens",
        "encoder_hidden_states": "text",
        "timestep": "timestep",
        "added_cond_kwargs_resolution": "label",
        "added_cond_kwargs_aspect_ratio": "label",
        "encoder_attention_mask": "mask",
    },
    "HunyuanDiT2DModel": {
        "hidden_states": "tokens",
        "timestep": "timestep",
        "encoder_hidden_states": "text",
        "text_embedding_mask": "mask",
        "encoder_hidden_states_t5": "text",
        "text_embedding_mask_t5": "mask",
        "image_meta_size": "label",
        "style": "label",
        "image_rotary_emb_0": "position",
        "image_rotary_emb_1": "position",
    },
    "UVit2DModel": {
        "input_ids": "tokens",
        "encoder_hidden_states": "text",
        "pooled_text_emb": "label",
        "micro_conds": "label",
    },
    "Lumina2Transformer2DModel": {
        "hidden_states": "tokens",
        "timestep": "timestep",
        "encoder_hidden_states": "text",
        "encoder_attention_mask": "mask",
    },
}


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_inputs_are_classed_by_what_the_model_does_with_them(name: str) -> None:
    facts = analyse(traced(name)[3])
    assert {node.name: kind for node, kind in facts.context.classes.inputs.items()} == CLASSES[name]


def changed(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree * 1.25 + 0.125 if tree.is_floating_point() else (tree + 1) % 3
    return tree


@pytest.mark.parametrize("name", ["DiT", "SD3Transformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel"])
def test_a_node_changes_only_with_inputs_it_depends_on(name: str) -> None:
    _, args, kwargs, graph = traced(name)
    facts = analyse(graph)
    nodes = [n for n in graph.nodes if n.op != "output" and shape(n) is not None and not facts.context.flow.writes(n)]
    names = dict(zip(("x", "t", "y"), args, strict=False)) or kwargs
    with torch.no_grad():
        before = graph.values(nodes, *args, **kwargs)
        for key in [k for k, v in names.items() if isinstance(v, Tensor)]:
            other = names | {key: changed(names[key])}
            after = graph.values(nodes, *(other.values() if args else ()), **({} if args else other))
            placeholder = next(p for p in facts.context.flow.placeholders if p.name == key)
            moved = [n for n in nodes if not torch.equal(before[n], after[n])]
            assert all(facts.context.flow.depends(n, placeholder) for n in moved)
            assert len(moved) > 3


def test_conditioning_names_the_classes_of_every_node() -> None:
    graph = traced("DiT")[3]
    found = {node.name: depends for node, depends in conditioning(graph).items()}
    assert found["t_embedder_mlp_2"] == {"timestep"}
    assert found["y_embedder_embedding_table"] == {"label"}
    assert found["blocks_0_ada_ln_modulation_1"] == {"timestep", "label"}
    assert found["x_embedder_proj"] == {"tokens"}
    assert found["blocks_0_mlp_fc1"] == {"timestep", "label", "tokens"}
    assert found["pos_embed"] == frozenset()


def test_taps_offer_raw_timesteps_then_embeddings_then_mixtures() -> None:
    graph = traced("DiT")[3]
    facts = analyse(graph)
    taps = facts.taps(before=next(n for n in graph.nodes if n.name == "blocks_0_norm1"))
    assert taps[0].node.name == "t"
    assert taps[0].form == "raw"
    embeddings = [t for t in taps if t.form == "embedding"]
    assert embeddings[0].node.name == "t_embedder_mlp_2"
    assert [len(t.depends) for t in embeddings] == sorted(len(t.depends) for t in embeddings)
    assert embeddings[-1].depends == {"timestep", "label"}
    assert not any(facts.context.flow.index[t.node] >= facts.context.flow.index[graph.nodes[-1]] for t in taps)


@pytest.mark.parametrize(
    ("name", "embedding"),
    [
        ("SD3Transformer2DModel", "time_text_embed_timestep_embedder_linear_2"),
        ("UNet2DConditionModel", "time_embedding_linear_2"),
        ("WanTransformer3DModel", "condition_embedder_time_embedder_linear_2"),
    ],
)
def test_the_preferred_embedding_is_the_finished_one(name: str, embedding: str) -> None:
    taps = analyse(traced(name)[3]).taps()
    assert next(t for t in taps if t.form == "embedding").node.name == embedding


def test_a_model_without_a_timestep_has_no_taps() -> None:
    assert analyse(traced("VisionTransformer")[3]).taps() == []


def test_adaln_modulation_is_found() -> None:
    _, args, kwargs, graph = traced("DiT")
    facts = analyse(graph)
    site = next(s for s in facts.sites if s.name == "blocks.1.mlp")
    found = facts.modulation(site)
    assert None not in (found.shift, found.scale, found.gate)
    assert found.shift is not None
    stream = site.operands["stream"]
    wanted = [found.shift, found.scale, found.gate, stream, site.inputs[0], site.output, site.operands["residual"]]
    shift, scale, gate, s, x, y, out = (graph.values(wanted, *args, **kwargs)[n] for n in wanted)
    normed = torch.nn.functional.layer_norm(s, s.shape[-1:], eps=1e-6)
    torch.testing.assert_close(normed * (1 + scale[:, None]) + shift[:, None], x)
    torch.testing.assert_close(s + gate[:, None] * y, out)


@pytest.mark.parametrize("name", ["FunctionalDiT", "InlineDiT", "FluxTransformer2DModel", "WanTransformer3DModel"])
def test_every_main_ffn_of_an_adaln_model_has_its_three_vectors(name: str) -> None:
    facts = analyse(traced(name)[3])
    for site in (s for s in facts.sites if s.kind == "ffn"):
        found = facts.modulation(site)
        assert None not in (found.shift, found.scale, found.gate), site.name
