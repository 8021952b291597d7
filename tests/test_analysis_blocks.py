"""Residual blocks, their streams and their dead tails."""

from __future__ import annotations

import pytest
import torch
from analysis_support import exported, traced

from moefx.passes.analysis import Site, sites

# model: blocks by (path without numbers at the end, streams, sub-layers).
EXPECTED: dict[str, list[tuple[str, int, int]]] = {
    "DiT": [("blocks.0", 1, 2), ("blocks.1", 1, 2)],
    "InlineDiT": [("blocks.0", 1, 2), ("blocks.1", 1, 2)],
    "FunctionalDiT": [("", 1, 2), ("", 1, 2)],
    "VisionTransformer": [("blocks.0", 1, 2), ("blocks.1", 1, 2)],
    "PixArtTransformer2DModel": [("transformer_blocks.0", 1, 3), ("transformer_blocks.1", 1, 3)],
    "FluxTransformer2DModel": [
        ("transformer_blocks.0", 2, 3),
        ("transformer_blocks.1", 2, 3),
        ("single_transformer_blocks.0", 2, 2),
        ("single_transformer_blocks.1", 2, 2),
    ],
    "UNet2DConditionModel": [
        ("down_blocks.0.attentions.0.transformer_blocks.0", 1, 3),
        ("mid_block.attentions.0.transformer_blocks.0", 1, 3),
        ("up_blocks.1.attentions.0.transformer_blocks.0", 1, 3),
        ("up_blocks.1.attentions.1.transformer_blocks.0", 1, 3),
    ],
    "CogView4Transformer2DModel": [("transformer_blocks.0", 2, 3), ("transformer_blocks.1", 2, 3)],
    "QwenImageTransformer2DModel": [("transformer_blocks.0", 2, 3), ("transformer_blocks.1", 2, 3)],
    "WanTransformer3DModel": [("blocks.0", 1, 3), ("blocks.1", 1, 3)],
}


def blocks(name: str) -> list[Site]:
    return [s for s in sites(traced(name)[3]) if s.kind == "block"]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_blocks_and_their_streams_are_found(name: str) -> None:
    found = [
        (s.path, len(s.operands["streams"]), len(s.operands["sites"])) for s in blocks(name) if s.operands["sites"]
    ]
    assert sorted(found) == sorted(EXPECTED[name])


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_streams_keep_their_shape_and_main_reaches_the_output(name: str) -> None:
    for site in blocks(name):
        for entry, exit_ in site.operands["streams"]:
            assert entry.meta["val"].shape == exit_.meta["val"].shape
            assert entry not in site.nodes
            assert exit_ in site.nodes
        assert site.role == "main"


@pytest.mark.parametrize(
    "name", ["DiT", "FluxTransformer2DModel", "UNet2DConditionModel", "QwenImageTransformer2DModel"]
)
def test_the_exported_graph_has_the_same_blocks(name: str) -> None:
    def facts(found: list[Site]) -> list[tuple[str, str, int, int]]:
        return [(s.name, s.flavour, s.operands["repeats"], len(s.operands["dead_outputs"])) for s in found]

    assert facts(blocks(name)) == facts([s for s in sites(exported(name)) if s.kind == "block"])


def test_equal_blocks_are_counted() -> None:
    assert [(s.operands["position"], s.operands["repeats"]) for s in blocks("DiT")] == [(0, 2), (1, 2)]
    assert [s.operands["repeats"] for s in blocks("UNet2DConditionModel") if s.operands["sites"]] == [4, 4, 4, 4]


def test_dead_tails_are_named() -> None:
    last = blocks("QwenImageTransformer2DModel")[-1]
    (dead,) = last.operands["dead_outputs"]
    assert dead.meta["val"].shape[1] == 7
    assert not last.dead


def test_a_block_is_its_stream_plus_its_branches() -> None:
    _, args, kwargs, graph = traced("DiT")
    found = blocks("DiT")[0]
    layers = [s for s in sites(graph) if s.name in found.operands["sites"]]
    wanted = {found.operands["stream"], found.output, *(s.operands["residual"] for s in layers)}
    values = graph.values(wanted, *args, **kwargs)
    first = min(layers, key=lambda s: graph.nodes.index(s.output))
    assert first.operands["stream"] is found.operands["stream"]
    assert torch.equal(values[found.output], values[found.operands["residual"]])
