"""Tracing every denoiser of the zoo: equal outputs and gradients, shared parameters, an untouched model."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from examples.dit import DiT
from examples.functional_dit import FunctionalDiT
from examples.inline_dit import InlineDiT
from examples.randomise import randomise_zeros
from examples.vit import VisionTransformer
from moefx import zoo
from moefx.errors import CaptureError, GuardError
from moefx.graph import Graph, trace
from moefx.graph.inputs import synthesise
from moefx.graph.origin import Origin
from moefx.graph.verify import check_shapes, verify_graph
from tests.trace_support import QUIET, attempt, call, error, fingerprint, gradients, resized, same_gradients, tensors
from tests.zoo_models import FULL, NAMED

pytest.importorskip("diffusers")
pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

# Models that cannot be traced, and what the error must show: an argument, or the user's own line.
REFUSED = {
    "AnyFlowFARTransformer3DModel": "transformer_anyflow_far.py",
    "Kandinsky6SRTransformer3DModel": "BlockMask.from_kv_blocks",
    "WanAnimate2Transformer3DModel": "argument 'kv_cache' is a WanAnimate2KVCache",
}
TRACED = [name for name in zoo.names() if name not in REFUSED]
# Named models that read no data and no batch size in Python, so that one trace serves all batches.
DATA_DEPENDENT = {"Lumina2Transformer2DModel", "QwenImageTransformer2DModel"}
SMALL: dict[str, Any] = {"image_size": 8, "patch": 2, "in_channels": 3, "depth": 2, "width": 32, "heads": 4}
OURS: dict[str, Any] = {
    "DiT": lambda: DiT(**SMALL, classes=5),
    "InlineDiT": lambda: InlineDiT(**SMALL, classes=5),
    "FunctionalDiT": lambda: FunctionalDiT(**SMALL, classes=5),
    "VisionTransformer": lambda: VisionTransformer(image_size=8, patch=2, depth=2, width=32, heads=4, qk_norm=True),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name not in OURS:
        return zoo.tiny(name)
    model: nn.Module = randomise_zeros(OURS[name]()).eval()
    return model


def example(name: str, model: nn.Module, batch: int = 2) -> Any:
    if name not in OURS:
        return synthesise(model, batch=batch)
    draws = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 3, 8, 8, generator=draws)
    return (x,) if name == "VisionTransformer" else (x, torch.rand(batch, generator=draws) * 1000, torch.arange(batch))


@functools.cache
def traced(name: str) -> tuple[nn.Module, Graph]:
    model = build(name)
    return model, trace(model, example(name, model))


@pytest.mark.parametrize("name", [*OURS, *TRACED])
def test_traced_faithfully(name: str) -> None:
    model = build(name)
    inputs = example(name, model)
    before, random_state = fingerprint(model), torch.get_rng_state()
    graph = trace(model, inputs)
    assert fingerprint(model) == before
    assert torch.equal(random_state, torch.get_rng_state())

    assert error(call(graph, inputs), call(model, inputs)) == 0
    reads = {str(n.target) for n in graph.fx.nodes if n.op == "get_attr"} - set(graph.constants)
    own = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert all(graph.parameter(target).data_ptr() in own for target in reads)
    assert all(model.get_submodule(str(n.target)) is not None for n in graph.fx.nodes if n.op == "call_module")
    assert not any(type(leaf).__name__.endswith("Proxy") for c in graph.calls for leaf in pytree.tree_leaves(c.output))
    assert all(isinstance(n.meta["moefx"], Origin) and "val" in n.meta for n in graph.fx.nodes if n.op != "output")
    verify_graph(graph, "tracing")
    assert all(guard.source and guard.describe() for guard in graph.guards)

    for batch in (1, 3):
        other = example(name, model, batch)
        found = attempt(graph, other)
        if isinstance(found, GuardError):
            assert name not in {*OURS, *NAMED} - DATA_DEPENDENT, "this model needs no guard on the batch"
        else:
            assert error(found, call(model, other)) == 0, batch


@pytest.mark.parametrize("name", [*OURS, *NAMED])
def test_gradients_are_the_models(name: str) -> None:
    model, graph = traced(name)
    inputs = example(name, model)
    same_gradients(gradients(model, model, inputs), gradients(graph, model, inputs))


@pytest.mark.parametrize("name", [*OURS, *NAMED])
def test_traced_in_train_mode(name: str) -> None:
    model = build(name).train()
    inputs = example(name, model)
    graph = trace(model, inputs)
    assert error(call(graph, inputs), call(model, inputs)) == 0
    same_gradients(gradients(model, model, inputs), gradients(graph, model, inputs))
    model.eval()
    with pytest.raises(GuardError, match="in eval mode, the graph was captured in train mode"):
        call(graph, inputs)


# Models whose graph must serve other sizes; the others may refuse, but never return other numbers.
ANY_SIZE = (
    *("AuraFlowTransformer2DModel", "FluxTransformer2DModel", "SanaTransformer2DModel", "SD3Transformer2DModel"),
    *("UNet2DConditionModel", "WanTransformer3DModel"),
)


@pytest.mark.parametrize("sizes", [(8, 4, 7), (4, 8, 5), (12, 12, 9)], ids=str)
@pytest.mark.parametrize("name", [*ANY_SIZE, "PixArtTransformer2DModel", "Lumina2Transformer2DModel"])
def test_other_resolutions_and_text_lengths(name: str, sizes: tuple[int, int, int]) -> None:
    model, graph = traced(name)
    other = resized(example(name, model), *sizes)
    wanted = call(model, other)
    found = attempt(graph, other)
    if isinstance(found, GuardError):
        assert name not in ANY_SIZE
        assert " at diffusers/" in found.found
    else:
        assert error(found, wanted) == 0


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason_and_nothing_changed(name: str) -> None:
    model = zoo.tiny(name)
    before, random_state = fingerprint(model), torch.get_rng_state()
    with pytest.raises(CaptureError) as caught:
        trace(model)
    assert REFUSED[name] in caught.value.found
    assert caught.value.do
    assert fingerprint(model) == before
    assert torch.equal(random_state, torch.get_rng_state())
    assert tensors(call(model, synthesise(model)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel"])
def test_other_float_types(name: str, dtype: torch.dtype) -> None:
    model = zoo.tiny(name).to(dtype)
    graph = trace(model)
    inputs = synthesise(model, batch=3)
    assert error(call(graph, inputs), call(model, inputs)) == 0
    check_shapes(graph, "tracing")
    with pytest.raises(GuardError, match="captured as"):
        call(graph, synthesise(zoo.tiny(name)))


@pytest.mark.parametrize("name", ["DiT-XL/2 256", "SD3 medium", "PixArt-sigma 512", "Wan 2.1 T2V 14B"])
def test_full_size_on_meta(name: str) -> None:
    class_name, config, millions = FULL[name]
    model = zoo.from_config(class_name, config, device="meta")
    graph = trace(model)
    assert all(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.01)
    values = [n.meta["val"] for n in graph.fx.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert values
    assert {v.device.type for v in values} == {"meta"}
    assert all(isinstance(v, torch._subclasses.FakeTensor) for v in values)


def test_a_meta_graph_is_the_real_one() -> None:
    """Shapes, spelling and guards do not depend on whether there are weights."""
    name = "SD3Transformer2DModel"
    real = traced(name)[1]
    meta = trace(zoo.from_config(name, zoo.tiny_config(name), device="meta").eval())
    assert [(n.op, str(n.target), str(n.args)) for n in real.nodes] == [
        (n.op, str(n.target), str(n.args)) for n in meta.nodes
    ]
    values = [[n.meta.get("val") for n in g.nodes] for g in (real, meta)]
    shapes = [[v.shape for v in found if isinstance(v, torch.Tensor)] for found in values]
    assert shapes[0] == shapes[1]


def test_the_same_call_gives_the_same_graph() -> None:
    model = zoo.tiny("FluxTransformer2DModel")
    graphs = [trace(model), trace(model)]
    text = [[(n.name, n.format_node(), n.meta.get("moefx")) for n in g.nodes] for g in graphs]
    assert text[0] == text[1]


def test_inputs_may_be_fake_and_the_caller_sees_a_plain_graph() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = zoo.tiny("DiTTransformer2DModel")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = {k: mode.from_tensor(v) for k, v in synthesise(model).items()}
    graph = trace(model, inputs)
    assert error(call(graph, synthesise(model)), call(model, synthesise(model))) == 0


@pytest.mark.parametrize(
    "name",
    ["DiT", "InlineDiT", "FunctionalDiT", "VisionTransformer", "DiTTransformer2DModel", "SD3Transformer2DModel"],
)
def test_the_export_oracle_agrees(name: str) -> None:
    """The same values come out of torch.export, and the graph read from it names the same parameters."""
    import warnings

    model, graph = traced(name)
    inputs = example(name, model)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, args, kwargs, strict=False)
    oracle = Graph.from_export(program, model)
    assert error(call(graph, inputs), call(program.module(), inputs)) <= 1e-5
    used = {n.meta["moefx_param"] for n in oracle.fx.nodes if "moefx_param" in n.meta and n.users}
    assert {name for name in used if name in dict(model.named_parameters())} == _parameters_used(graph)
    assert {c.path for c in graph.calls} <= {c.path for c in oracle.calls}
    assert {n.meta["moefx"].path for n in oracle.fx.nodes} >= {c.path for c in graph.calls if c.nodes and _computes(c)}


def _parameters_used(graph: Graph) -> set[str]:
    named = dict(graph.root.named_parameters())
    found = {str(n.target) for n in graph.fx.nodes if n.op == "get_attr"}
    for node in graph.fx.nodes:
        if node.op == "call_module":
            module = graph.root.get_submodule(str(node.target))
            found |= {f"{node.target}.{name}" for name, _ in module.named_parameters()}
    return found & set(named)


def _computes(invocation: Any) -> bool:
    """Whether a module does anything itself, rather than through the modules it calls."""
    return any(n.meta["moefx"].path == invocation.path and n.op == "call_function" for n in invocation.nodes)
