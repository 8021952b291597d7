"""Which values of a block a router can read, by name."""

import pytest
from torch.fx import Node

from moefx.errors import OptionError
from moefx.graph import trace
from moefx.graph.inputs import synthesise
from moefx.model import places
from moefx.model.local import call_inputs, local_graph
from moefx.model.taps import TAPS, choose_tap
from moefx.passes.analysis import analyse
from moefx.zoo import tiny

# Width 24, 7 text tokens and so on are those of the tiny configs; "-" is out of sight inside the block.
SEEN = {
    "DiTTransformer2DModel": {
        "timestep": "timestep (2,)",
        "label": "class_labels (2,)",
        "unmodulated": "norm3 (2, 25, 32)",
    },
    "PixArtTransformer2DModel": {
        "timestep": "timestep (2, 144)",
        "condition": "timestep (2, 144)",
        "text": "encoder_hidden_states (2, 7, 24)",
        "unmodulated": "norm2 (2, 25, 24)",
    },
    "SD3Transformer2DModel": {
        "timestep": "temb (2, 32)",
        "condition": "temb (2, 32)",
        "text": "encoder_hidden_states (2, 7, 32)",
        "unmodulated": "norm2 (2, 24, 32)",
    },
    "WanTransformer3DModel": {
        "timestep": "getitem (2, 1, 24)",
        "text": "encoder_hidden_states (2, 7, 24)",
        "unmodulated": "norm3 (2, 72, 24)",
    },
    "UNet2DConditionModel": {"text": "encoder_hidden_states (2, 7, 20)", "unmodulated": "norm3 (2, 24, 16)"},
}


def taps_of(name: str) -> dict[str, Node | None]:
    """Return each tap of the first feed-forward network's block."""
    model = tiny(name)
    graph = trace(model, synthesise(model))
    facts = analyse(graph)
    site = next(s for s in facts.sites if s.kind == "ffn" and s.role == "main")
    path = site.path.rpartition(".")[0]
    call = next(c for c in graph.calls if c.path == path)
    local = local_graph(graph.root.get_submodule(path), call_inputs(call), "children")
    entry = places.argument_of(local, site.path.rpartition(".")[2])
    return {tap: choose_tap(tap, facts, call, local, entry) for tap in TAPS}


@pytest.mark.parametrize("name", SEEN)
def test_taps_in_sight(name: str) -> None:
    found = taps_of(name)
    shown = {tap: f"{node.name} {tuple(node.meta['val'].shape)}" for tap, node in found.items() if node is not None}
    assert shown == SEEN[name]


def test_a_tap_without_an_entry_or_a_name() -> None:
    model = tiny("DiTTransformer2DModel")
    graph = trace(model, synthesise(model))
    assert choose_tap("unmodulated", analyse(graph), None, graph) is None
    with pytest.raises(OptionError, match="did you mean 'timestep'"):
        choose_tap("timesteps", analyse(graph), None, graph)
