"""Sub-layers that are reused between sampler steps: against a cache written by hand, over whole runs."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moefx
from examples.dit import DiT
from examples.randomise import randomise_zeros
from moefx import zoo
from moefx.errors import InputError, OptionError, PlanError
from moefx.graph.inputs import synthesise
from moefx.routing.step_cache import StepCache, StepCaches

NAMES = [
    "DiTTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "UNet2DConditionModel",
    "WanTransformer3DModel",
]
STEPS = 5


class ByHand(nn.Module):
    """A sub-layer that runs at even steps and repeats itself at odd ones."""

    def __init__(self, inner: nn.Module, now: list[int]) -> None:
        super().__init__()
        self.inner, self.now, self.last = inner, now, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        if self.now[0] % 2 == 0:
            self.last = self.inner(x)
        return self.last


def dit() -> DiT:
    torch.manual_seed(0)
    return randomise_zeros(DiT()).double().eval()


def steps() -> list[tuple[Tensor, Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(1)
    label = torch.tensor([3, 7])
    return [
        (torch.randn(2, 1, 8, 8, generator=draws).double(), torch.full((2,), 900.0 - 100 * i).double(), label)
        for i in range(STEPS)
    ]


def test_every_second_step_is_reused_and_not_computed() -> None:
    model, now = dit(), [0]
    by_hand = copy.deepcopy(model)
    for block in by_hand.blocks:
        block.attn, block.mlp = ByHand(block.attn, now), ByHand(block.mlp, now)
    moefx.transform(model, steps()[0], recipe="harmonica", steps=STEPS, period=2)
    ran: list[int] = []
    model.blocks[0].attn.qkv.register_forward_hook(lambda *_: ran.append(now[0]))
    with torch.no_grad(), StepCaches(model) as caches:
        assert len(caches.caches) == 6
        for i, inputs in enumerate(steps()):
            now[0] = i
            caches.step(i)
            assert torch.equal(model(*inputs), by_hand(*inputs))
    assert ran == [0, 2, 4]


@pytest.mark.parametrize("name", NAMES)
def test_with_all_gates_on_a_run_is_the_dense_models(name: str) -> None:
    dense = zoo.tiny(name)
    model = moefx.transform(copy.deepcopy(dense), recipe="harmonica", steps=3)
    with torch.no_grad(), StepCaches(model) as caches:
        for i in range(3):
            inputs = synthesise(dense, batch=2, seed=i)
            caches.step(i)
            assert torch.equal(model(**inputs)[0], dense(**inputs)[0])
    assert torch.equal(model(**inputs)[0], dense(**inputs)[0])  # outside a run nothing is cached


def test_training_computes_both_sides_and_the_table_learns() -> None:
    cache = StepCache(4, period=2).double().train()
    layer = nn.Linear(3, 3).double()
    x = [torch.randn(2, 3).double() for _ in range(4)]
    with StepCaches(cache) as caches:
        found = []
        for i in range(4):
            caches.step(i)
            found.append(cache(lambda i=i: layer(x[i])))
        cost = caches.cost()
    y = [layer(value) for value in x]
    wanted = [y[0], y[0], y[2], y[2]]  # odd steps are off
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    weights = torch.randn(4, 2, 3).double()
    sum((a * w).sum() for a, w in zip(found, weights, strict=True)).backward()
    w = torch.sigmoid(cache.table.detach().double())
    cached = [None, y[0], y[0], y[2]]
    slopes = [0.0] + [((y[i] - cached[i]) * weights[i]).sum().item() * (w[i] * (1 - w[i])).item() for i in (1, 2, 3)]
    torch.testing.assert_close(cache.table.grad, torch.tensor(slopes).to(cache.table.grad), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(cost.double(), w.sum())


def test_branches_keep_what_is_theirs_and_runs_forget() -> None:
    cache = StepCache(3, period=3).eval()
    with StepCaches(cache) as caches, torch.no_grad():
        for i in range(2):
            for branch, value in (("positive", 1.0), ("negative", 2.0)):
                caches.step(i, branch)
                assert cache(lambda i=i, value=value: torch.tensor(value + 10 * i)) == value
        caches.clear()
        caches.step(1)
        assert cache(lambda: torch.tensor(7.0)) == 7.0  # nothing kept: it runs
        with pytest.raises(InputError, match="tables of 3 steps"):
            caches.step(3)
    assert cache(lambda: torch.tensor(8.0)) == 8.0
    assert not copy.deepcopy(cache)._kept


def test_results_of_several_tensors_are_kept_as_they_are() -> None:
    cache = StepCache(2, period=2).train()
    with StepCaches(cache) as caches:
        for i in range(2):
            caches.step(i)
            image, text = cache(lambda i=i: (torch.full((2,), float(i)), torch.full((3,), float(i))))
            assert image.sum() == 0
            assert text.shape == (3,)


def test_with_routed_heads_in_one_transform() -> None:
    model = dit()
    plain = copy.deepcopy(model)
    options: dict[str, Any] = {"router_std": 1.0, "max_error": 9.0}
    moefx.transform(plain, steps()[0], recipe="moh", **options)
    passes = ["mixture-of-heads", "step-cache-attention", "step-cache-ffn"]
    moefx.transform(model, steps()[0], passes=passes, steps=STEPS, **options)
    assert model.blocks[0].attn.head_gate is not None
    with torch.no_grad(), StepCaches(model) as caches:
        for i, inputs in enumerate(steps()):
            caches.step(i)
            torch.testing.assert_close(model(*inputs), plain(*inputs), rtol=1e-12, atol=1e-12)
    before = dict(dit().named_parameters())
    moefx.untransform(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(PlanError, match="takes the module apart or replaces"):
        moefx.transform(dit(), steps()[0], passes=["step-cache-ffn", "upcycle"])


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = zoo.tiny("DiTTransformer2DModel")
    inputs = synthesise(model)
    moefx.transform(model, recipe="harmonica", steps=2, period=2)
    model.save_pretrained(tmp_path)
    again = moefx.load(tmp_path)
    for one in (model, again):
        with torch.no_grad(), StepCaches(one) as caches:
            caches.step(0)
            one(**inputs)
            caches.step(1)
            one.result = one(**{**inputs, "hidden_states": inputs["hidden_states"] * 2})[0]
    assert torch.equal(again.result, model.result)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at what is kept
@pytest.mark.parametrize("training", [False, True])
def test_a_cached_layer_compiles_whole_and_no_step_compiles_again(training: bool) -> None:
    torch._dynamo.reset()
    model = dit()
    moefx.transform(model, steps()[0], recipe="harmonica", steps=12, period=3)
    layer = model.blocks[0].mlp.train(training)
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(training), StepCaches(layer) as caches, StepCaches(plain) as others:
        x = torch.randn(2, 16, 64).double()
        for i in range(12):
            caches.step(i)
            others.step(i)
            # The first step, one that runs and one that does not: three graphs for all there are.
            with torch._dynamo.config.patch(error_on_recompile=i > 3):
                torch.testing.assert_close(compiled(x + i), plain(x + i))


def test_nonsense_is_refused() -> None:
    with pytest.raises(InputError, match="no step cache"):
        StepCaches(nn.Linear(1, 1))
    for options in ({"steps": 0}, {"period": 0}, {"threshold": 1.0}):
        with pytest.raises(OptionError, match="out of range"):
            StepCache(**{"steps": 3, **options})
