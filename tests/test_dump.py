"""moefx.dump: readable, complete, stable, harmless; in every stage and format."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import moefx
from examples.inline_dit import InlineDiT
from moefx import zoo
from moefx.errors import MoefxError, MoefxWarning, NothingMatched, OptionError
from moefx.inspect.dump import STAGES
from moefx.inspect.text import WIDTH, clean, fit, merge_names, type_of, wrap
from tests.cli_models import dit_inputs, every_dump
from tests.hostile_model import NAMES, make

ROOT = Path(__file__).parent.parent
GOLDEN = ("DiTTransformer2DModel", "FluxTransformer2DModel", "UNet2DConditionModel", "WanTransformer3DModel")
_models: dict[str, nn.Module] = {}


def tiny(name: str) -> nn.Module:
    if name not in _models:
        _models[name] = zoo.tiny(name)
    return _models[name]


@pytest.fixture(scope="module")
def flux() -> moefx.Graph:
    return moefx.trace(tiny("FluxTransformer2DModel"))


# ------------------------------------------------------------------------------------------------------------ the tree


@pytest.mark.parametrize("name", GOLDEN)
def test_trees_of_named_models(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"dump_{name}.txt", moefx.dump(tiny(name)))


def test_what_a_recipe_would_do_and_does(flux: moefx.Graph, golden: Callable[[str, str], None]) -> None:
    golden("dump_flux_planned.txt", moefx.dump(flux, recipe="sparse-upcycling", skip="*context*", experts=4))
    golden("dump_flux_diff.txt", moefx.dump(flux, diff=True))


def test_a_57_block_model_fits_one_screen() -> None:
    config = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 2, "attention_head_dim": 16}
    config |= {"axes_dims_rope": (4, 6, 6), "in_channels": 12, "joint_attention_dim": 20, "pooled_projection_dim": 18}
    text = moefx.dump(zoo.from_config("FluxTransformer2DModel", config, device="meta"))
    assert "transformer_blocks.{0…18}  ×19" in text
    assert "single_transformer_blocks.{0…37}  ×38" in text
    assert len(text.splitlines()) <= 30
    assert all(len(line) <= WIDTH for line in text.splitlines())


def test_a_model_of_two_alternating_blocks_is_folded_in_turn() -> None:
    class Block(nn.Module):
        def __init__(self, hidden: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, hidden), nn.Linear(hidden, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    class Alternating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(16 if i % 2 else 24) for i in range(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    text = moefx.dump(Alternating(), (torch.zeros(1, 4, 8),))
    assert re.search(r"^2 in turn  ×3", text, re.MULTILINE)
    assert "blocks.{0,2,4}" in text
    assert "blocks.{1,3,5}" in text


def test_sites_written_inline_have_a_line_of_their_own() -> None:
    model = InlineDiT(image_size=8, patch=2, in_channels=3, depth=2, width=32, heads=4, classes=5).eval()
    text = moefx.dump(model, dit_inputs(model))
    assert re.search(r"^  :ffn +ffn gelu_tanh 32→128→32 ", text, re.MULTILINE)
    assert re.search(r"^  :attn +attention self 4×8 ", text, re.MULTILINE)


def test_depth_limits_the_levels(flux: moefx.Graph) -> None:
    text = moefx.dump(flux, depth=1)
    assert "transformer_blocks.{0,1}  ×2" in text
    assert "norm1_context" not in text


def test_a_transformed_model_shows_what_is_routed_and_why_not() -> None:
    model = zoo.tiny("FluxTransformer2DModel")
    with pytest.warns(MoefxWarning):
        moefx.transform(model, experts=4, top_k=2, skip="*context*")
    text = moefx.dump(model)
    assert text.count("[routed: top-2 of 4]") == 2  # the double and the single blocks
    assert "ff_context" in text
    assert "[dense: not selected]" in text
    assert "4 routed" in text.splitlines()[0]
    difference = moefx.dump(model, diff=True)  # against what it was
    assert re.search(r"^-FluxTransformer2DModel.*nothing routed", difference, re.MULTILINE)
    assert re.search(r"^\+ .*experts gelu_tanh", difference, re.MULTILINE)


@pytest.mark.parametrize("recipe", ["mixture-of-heads", "timestep-upcycling", "virtual-groups"])
def test_other_recipes_leave_marks(recipe: str) -> None:
    text = moefx.dump(tiny("DiTTransformer2DModel"), stage="routed", recipe=recipe)
    assert "[routed: " in text


def test_the_model_is_left_alone() -> None:
    model = zoo.tiny("DiTTransformer2DModel")
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    cls = type(model)
    for stage in STAGES:
        moefx.dump(model, stage=stage)
    assert type(model) is cls
    assert not hasattr(model, "moefx")
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


# ---------------------------------------------------------------------------------------------------- the other formats


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("stage", ["graph", "routed"])
def test_listings_are_valid_python(name: str, stage: str) -> None:
    text = moefx.dump(tiny(name), stage=stage, format="python")
    ast.parse(text)
    assert " at 0x" not in text


def test_a_listing_names_source_shape_and_rule(flux: moefx.Graph) -> None:
    text = moefx.dump(flux, stage="graph")
    assert re.search(r"# diffusers/\S+\.py:\d+: \S", text)
    assert re.search(r"= self\.transformer_blocks\[0\]\.norm1\.\w+\(\w+\)  # f32\[2, \d+\]", text)
    assert re.search(r"^    assert \w+ == False  # guard$", text, re.MULTILINE)
    from moefx.graph.splice import Splice

    graph = moefx.trace(tiny("DiTTransformer2DModel"))
    node = next(n for n in graph.fx.nodes if n.op == "call_module")
    splice = Splice(graph, "double")
    splice.replace(node, splice.call_function(torch.add, (node, node), around=node.next))
    assert re.search(r"torch\.add\(.*#.*; rule double$", moefx.dump(graph, stage="graph"), re.MULTILINE)


def test_every_stage_has_json_with_the_documented_keys(flux: moefx.Graph) -> None:
    head = {"format", "schema_version", "moefx_version", "stage", "model"}
    more = {"tree": {"inputs", "guards", "tree", "sites", "misses"}, "graph": {"inputs", "guards", "nodes"}}
    more |= {"sites": {"inputs", "guards", "sites", "misses"}, "plan": {"plan"}, "routed": more["tree"]}
    more |= {"lowered": {"inputs", "guards", "target", "regions", "others", "refused"}}
    more |= {"kernels": {"inputs", "guards", "target", "sources"}}
    document = (ROOT / "docs" / "dump-schema.md").read_text()
    for stage in STAGES:
        data = json.loads(moefx.dump(flux, stage=stage, format="json"))
        assert set(data) == head | more[stage], stage
        assert data["stage"] == stage
        for key in keys_of(data, skip=("plan", "shapes", "operands", "sources", "schedules")):
            assert f"`{key}`" in document, f"{stage}: {key} is not in docs/dump-schema.md"


def keys_of(data: object, skip: tuple[str, ...]) -> set[str]:
    if isinstance(data, list):
        return set().union(*(keys_of(item, skip) for item in data))
    if not isinstance(data, dict):
        return set()
    return set(data).union(*(keys_of(value, skip) for key, value in data.items() if key not in skip))


def test_json_trees_hold_every_site_once(flux: moefx.Graph) -> None:
    data = json.loads(moefx.dump(flux, format="json"))
    found: list[str] = []

    def walk(region: dict[str, object]) -> None:
        found.extend([str(region["site"])] if region["site"] else [])
        children = region["children"]
        assert isinstance(children, list)
        for child in children:
            walk(child)

    walk(data["tree"])
    assert sorted(found) == sorted(s["name"] for s in data["sites"] if s["kind"] != "block")


@pytest.mark.parametrize("name", GOLDEN)
def test_pictures_are_well_formed_and_boxes_do_not_overlap(name: str) -> None:
    root = ElementTree.fromstring(moefx.dump(tiny(name), format="svg"))
    boxes = [tuple(float(r.get(k, "")) for k in ("x", "y", "width", "height")) for r in rectangles(root)]
    assert len(boxes) > 8
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert apart(a, b) or inside(a, b) or inside(b, a)


def rectangles(root: ElementTree.Element) -> list[ElementTree.Element]:
    return [r for r in root.iter("{http://www.w3.org/2000/svg}rect") if r.get("x")]


def apart(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0] or a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1]


def inside(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return b[0] <= a[0] and b[1] <= a[1] and a[0] + a[2] <= b[0] + b[2] and a[1] + a[3] <= b[1] + b[3]


def test_dot_has_balanced_clusters_and_the_data_flow(flux: moefx.Graph) -> None:
    text = moefx.dump(flux, format="dot")
    assert text.count("{") == text.count("}")
    assert text.count("subgraph cluster_") == 2
    names = set(re.findall(r"^ *(n[_0-9]+) \[label", text, re.MULTILINE))
    for tail, head in re.findall(r"(n[_0-9]+) -> (n[_0-9]+)", text):
        assert {tail, head} <= names


# ------------------------------------------------------------------------------------------------------------- explain


def test_explaining_a_site_a_near_miss_and_nothing(flux: moefx.Graph) -> None:
    site = moefx.dump(flux, explain="transformer_blocks.0.ff")
    assert "why" in site
    assert "transformer_blocks.0.ff.net.0.proj.weight  f32[128, 32]" in site
    miss = moefx.dump(flux, explain="time_text_embed.text_embedder")
    assert "acts on one vector per sample" in miss
    assert re.search(r"^ >", miss, re.MULTILINE)
    nothing = moefx.dump(flux, explain="x_embedder")
    assert "no site, and nothing in it comes near one" in nothing
    assert json.loads(moefx.dump(flux, explain="transformer_blocks.*.ff", format="json"))["sites"][1]["kind"] == "ffn"
    with pytest.raises(NothingMatched, match=r"did you mean 'transformer_blocks\.0\.ff'"):
        moefx.dump(flux, explain="transformer_block.0.ff")


def test_explain_says_what_a_recipe_would_do(flux: moefx.Graph) -> None:
    text = moefx.dump(flux, explain="transformer_blocks.0.ff", recipe="sparse-upcycling", skip="transformer_blocks.0.*")
    assert "dense: not selected" in text


# ------------------------------------------------------------------------------------------------- stable and harmless


def test_two_processes_write_the_same_bytes() -> None:
    """This process, whose hashes are seeded at random and which has dumped before, and a fresh one."""
    code = "import sys; from tests.cli_models import every_dump; sys.stdout.write(every_dump())"
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=200,
    ).stdout.decode("utf-8")
    noise, _, text = other.partition("\n")
    assert noise == "noise on stdout, as libraries make it"
    assert text == every_dump()
    assert len(text) > 10_000
    assert str(ROOT) not in text
    assert " at 0x" not in text


def test_hostile_names_are_shown_but_not_obeyed() -> None:
    model, inputs = make()
    for stage, formats in STAGES.items():
        for kind in formats:
            text = moefx.dump(model, inputs, stage=stage, format=kind)
            assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text), (stage, kind)
            if kind == "json":
                assert "\\u001b[31mred" in text
            elif kind == "python":
                ast.parse(text)
            elif kind == "svg":
                texts = [t.text or "" for t in ElementTree.fromstring(text).iter() if t.tag.endswith("text")]
                assert any("<img src=x onerror=alert(1)>" in t for t in texts)
                assert "<img" not in text
            elif kind == "text" and stage in ("lowered", "kernels"):
                assert "\\x1b[31mred" in text  # one region stands for all of its kind
            elif kind == "text" and stage != "graph":
                assert "[bold]markup[/bold]" in text
    explained = moefx.dump(model, inputs, explain=NAMES[0])
    assert "\x1b" not in explained
    assert "ffn gelu" in explained


def test_unknown_stages_and_formats_are_refused_with_the_nearest(flux: moefx.Graph) -> None:
    with pytest.raises(OptionError, match="did you mean 'sites'"):
        moefx.dump(flux, stage="site")
    with pytest.raises(OptionError, match="did you mean 'json'"):
        moefx.dump(flux, format="jsn")
    with pytest.raises(OptionError, match="text, json"):
        moefx.dump(flux, stage="plan", format="svg")
    with pytest.raises(OptionError, match="differences of tree"):
        moefx.dump(flux, stage="plan", diff=True)
    with pytest.raises(MoefxError, match="experts"):
        moefx.dump(flux, stage="plan", expert=3)


# ---------------------------------------------------------------------------------------------------------- small parts


def test_text_helpers() -> None:
    assert clean("a\x1b\u202e\ue000é→") == "a\\x1b\\u202e\\ue000é→"
    assert type_of(torch.zeros(2, 3, dtype=torch.bfloat16)) == "bf16[2, 3]"
    assert type_of((torch.zeros(1), 3)) == "(f32[1], 3)"
    assert merge_names(["a.0.b", "a.1.b", "a.2.b"]) == "a.{0…2}.b"
    assert merge_names(["a.0:ffn", "a.2:ffn"]) == "a.{0,2}:ffn"
    assert merge_names(["a.b", "a.b.c"]) == "a.b … a.b.c"
    assert fit("x" * 130) == "x" * 119 + "…"
    lines = wrap("  " + "word " * 60)
    assert all(len(line) <= WIDTH for line in lines)
    assert " ".join(" ".join(lines).split()) == " ".join(["word"] * 60)
