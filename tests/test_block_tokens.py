"""Blocks on some of their tokens: positions, masks and streams, each sample against the dense block on its tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import moefx
from moefx import zoo
from moefx.api import plan, transform
from moefx.graph import trace
from moefx.graph.inputs import synthesise

OPTIONS: dict[str, Any] = {"every": 1, "capacity": 0.5, "router_std": 1.0, "max_error": 100.0}
# Class, block, its stream, which output is the stream, arguments per token: axis, and whether text rows come first.
CASES = [
    ("FluxTransformer2DModel", "transformer_blocks.0", "hidden_states", 1, {"image_rotary_emb": (0, True)}),
    ("FluxTransformer2DModel", "single_transformer_blocks.0", "hidden_states", 1, {"image_rotary_emb": (0, True)}),
    ("SD3Transformer2DModel", "transformer_blocks.0", "hidden_states", 1, {}),
    ("WanTransformer3DModel", "blocks.0", "hidden_states", 0, {"rotary_emb": (1, False)}),
    ("CogVideoXTransformer3DModel", "transformer_blocks.0", "hidden_states", 0, {"image_rotary_emb": (0, False)}),
    ("LTXVideoTransformer3DModel", "transformer_blocks.0", "hidden_states", 0, {"image_rotary_emb": (1, False)}),
    ("QwenImageTransformer2DModel", "transformer_blocks.0", "hidden_states", 1, {}),
    ("UNet2DConditionModel", "mid_block.attentions.0.transformer_blocks.0", "hidden_states", 0, {}),
]


def _call(model: nn.Module, path: str) -> tuple[dict[str, Any], list[Any]]:
    """Return the arguments of one block in a run of the model, by name, and what it returned."""
    import inspect

    block, seen = model.get_submodule(path), []
    signature = inspect.signature(type(block).forward)
    hook = block.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((signature.bind(module, *args, **kwargs).arguments, out)),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**synthesise(model, batch=2, seed=3))
    hook.remove()
    arguments, out = seen[0]
    return {k: v for k, v in arguments.items() if k != "self"}, list(out) if isinstance(out, tuple) else [out]


def _cut(value: Any, rows: Tensor, axis: int, text_first: bool, total: int) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_cut(v, rows, axis, text_first, total) for v in value)
    others = value.shape[axis] - total if text_first else 0
    rows = torch.cat([torch.arange(others), rows + others])
    return value.index_select(axis, rows)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "path", "stream", "output", "tables"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_what_belongs_to_a_token_goes_with_it(
    name: str, path: str, stream: str, output: int, tables: dict[str, tuple[int, bool]]
) -> None:
    model = zoo.tiny(name).double()
    dense = zoo.tiny(name).double()
    transform(model, recipe="mixture-of-depths", only=path, verify=False, **OPTIONS)
    arguments, found = _call(model, path)
    router = model.get_submodule(path).token_router
    x = arguments[stream]
    weights = router.scores(x)
    for b in range(2):
        chosen = weights[b].topk(x.shape[1] // 2).indices.sort().values
        mine = {k: v[b : b + 1] if isinstance(v, Tensor) and v.shape[0] == 2 else v for k, v in arguments.items()}
        mine[stream] = x[b : b + 1, chosen]
        for table, (axis, text_first) in tables.items():
            shared = arguments[table] if axis == 0 else _one(arguments[table], b)
            mine[table] = _cut(shared, chosen, axis, text_first, x.shape[1])
        if name.startswith("Qwen"):
            mine["image_rotary_emb"] = (arguments["image_rotary_emb"][0][chosen], arguments["image_rotary_emb"][1])
        with torch.no_grad():
            after = dense.get_submodule(path)(**mine)
        after = after[output] if isinstance(after, tuple) else after
        wanted = x[b].clone()
        wanted[chosen] += weights[b, chosen, None] * (after[0] - x[b, chosen])
        torch.testing.assert_close(found[output][b], wanted, rtol=1e-6, atol=1e-6)
        for other, value in enumerate(found):
            if other != output:
                assert value[b].shape == arguments["encoder_hidden_states"][b].shape


def _one(tables: Any, b: int) -> Any:
    """Return what belongs to one sample of tables with a batch axis, which may have size 1."""
    return tuple(t[b : b + 1] if t.shape[0] > 1 else t for t in tables)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "CogVideoXTransformer3DModel"])
def test_capacity_one_is_the_dense_model(name: str) -> None:
    model, dense = zoo.tiny(name), zoo.tiny(name)
    transform(model, recipe="mixture-of-depths", every=1)
    inputs = synthesise(dense, batch=3, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).sample, dense(**inputs).sample, rtol=1e-6, atol=1e-6)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = transform(zoo.tiny("SD3Transformer2DModel").double(), recipe="mixture-of-depths", verify=False, **OPTIONS)
    inputs = synthesise(model, batch=3, seed=1)
    first = {k: v[:1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).sample[:1], model(**first).sample, rtol=1e-9, atol=1e-9)


def test_a_block_compiles_whole_and_once_for_two_batch_sizes_and_learns() -> None:
    torch._dynamo.reset()
    model = zoo.tiny("FluxTransformer2DModel")
    transform(model, recipe="mixture-of-depths", only="transformer_blocks.0", verify=False, **OPTIONS)
    block = model.transformer_blocks[0]
    counter = CompileCounter()
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    rotary = torch.randn(31, 16), torch.randn(31, 16)
    for batch in (3, 4):
        image, text, temb = torch.randn(batch, 24, 32), torch.randn(batch, 7, 32), torch.randn(batch, 32)
        arguments = {"hidden_states": image, "encoder_hidden_states": text, "temb": temb, "image_rotary_emb": rotary}
        for ours, theirs in zip(compiled(**arguments), block(**arguments), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 1
    block(**arguments)[1].square().mean().backward()
    assert block.token_router.weight.grad.abs().sum() > 0


def test_the_rewritten_model_can_be_traced_again() -> None:
    model = transform(zoo.tiny("WanTransformer3DModel"), recipe="mixture-of-depths", verify=False, **OPTIONS)
    inputs = synthesise(model)
    torch.testing.assert_close(trace(model, inputs)(**inputs).sample, model(**inputs).sample)


@pytest.mark.parametrize("recipe", ["mixture-of-depths", "gamma-mod", "dydit-tokens"])
def test_save_and_load(recipe: str, tmp_path: Any) -> None:
    options = {"dense_first": 0, "dense_last": 0} if recipe == "gamma-mod" else {}
    model = transform(zoo.tiny("SD3Transformer2DModel"), recipe=recipe, verify=False, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = moefx.load(tmp_path).eval()
    inputs = synthesise(model)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)
    if recipe == "gamma-mod":
        assert loaded.transformer_blocks[0].token_router is loaded.transformer_blocks[1].token_router


def test_one_expert_recipe_and_one_token_recipe_together() -> None:
    model, dense = zoo.tiny("FluxTransformer2DModel"), zoo.tiny("FluxTransformer2DModel")
    transform(model, recipe="mixture-of-depths", every=1, verify=False)
    transform(model, recipe="sparse-upcycling", experts=4, top_k=1, verify=False)
    inputs = synthesise(dense)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).sample, dense(**inputs).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
def test_tokens_take_a_short_cut_in_training_alone(name: str) -> None:
    model, dense = zoo.tiny(name), zoo.tiny(name)
    transform(model, recipe="tread", start=0.0, end=0.5, verify=False)
    inputs = synthesise(dense, batch=3, seed=2)
    with torch.no_grad():
        wanted = dense(**inputs).sample
        assert torch.equal(model(**inputs).sample, wanted)
        assert torch.equal(model(**inputs, return_dict=False)[0], wanted)
        assert not torch.equal(model.train()(**inputs).sample, wanted)


def test_the_plan_names_what_follows() -> None:
    made = plan(zoo.tiny("FluxTransformer2DModel"), recipe="mixture-of-depths", every=1)
    layout = made.sites[0].tokens
    assert layout is not None
    assert layout.stream == "hidden_states"
    assert {item.joint for item in layout.follows} == {"last"}
    assert type(made).from_json(made.to_json()) == made
