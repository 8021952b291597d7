"""Static variants per sampler step: equal to the routed model, without routers, sharing weights."""

from collections.abc import Hashable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import moefx
from examples.dit import DiT
from examples.randomise import randomise_zeros
from moefx.errors import InputError, NothingMatched
from moefx.graph.inputs import synthesise
from moefx.model.specialise import specialise
from moefx.model.specialised import Specialised
from moefx.routing import Experts, LinearRouter, RoutedFFN, random_weights
from moefx.routing.static import FusedFFN, fuse
from moefx.zoo import tiny

FIXED = ("added_cond_kwargs_resolution", "added_cond_kwargs_aspect_ratio")
STEPS = [999.0, 750.5, 500.0, 250.0, 1.0]
WHOLE = [999, 600, 1]


class TimeRouted(nn.Module):
    """A toy denoiser: its FFN's experts are chosen by the timestep alone, which is embedded by the router."""

    def __init__(self, top_k: int, mode: str) -> None:
        super().__init__()
        seeded = torch.Generator().manual_seed(0)
        router = LinearRouter(0, 4, tap_dim=16, embed_timestep=True)
        with torch.no_grad():
            router.tap_weight.copy_(torch.randn(4, 16, generator=seeded))
        experts = Experts(random_weights(8, 12, num_experts=4, generator=seeded), F.gelu)
        self.norm = nn.LayerNorm(8)
        self.ffn = RoutedFFN(router, experts, top_k=top_k, mode=mode)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x), timestep)


def build(top_k: int = 2, mode: str = "softmax_topk") -> TimeRouted:
    return TimeRouted(top_k, mode).double().eval()


def inputs(batch: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 5, 8, dtype=torch.float64), torch.full((batch,), 500.0)


@pytest.mark.parametrize(("top_k", "mode"), [(1, "ste"), (2, "softmax_topk"), (2, "unit"), (4, "soft")])
def test_every_step_equals_the_routed_model(top_k: int, mode: str) -> None:
    model = build(top_k, mode)
    special = specialise(model, STEPS, inputs())
    assert not special.left
    for time in STEPS:
        x, _ = inputs(2)
        t = torch.full((2,), time)
        torch.testing.assert_close(special(x, t), model(x, t), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(special(x, timestep=t), model(x, t), rtol=1e-12, atol=1e-12)
        with special.at(time):
            torch.testing.assert_close(special(x, t), model(x, t), rtol=1e-12, atol=1e-12)
    assert special.fallbacks == 0
    assert not any(isinstance(m, LinearRouter) for variant in special.variants for m in variant.modules())


def test_the_same_choice_is_one_variant_and_weights_are_shared() -> None:
    model = build(1, "ste")
    special = specialise(model, torch.linspace(1000, 0, 40), inputs())
    choices = {int(model.ffn.route(inputs(1)[0], torch.tensor([t])).experts[0, 0]) for t in special.variant_of}
    assert len(special.variants) == len(choices) > 1
    for variant in special.variants:
        assert variant.norm.weight is model.norm.weight
        start, end = model.ffn.experts.w_in.data_ptr(), model.ffn.experts.w_in[-1].data_ptr()
        assert start <= variant.ffn.static.weights.w_in.data_ptr() <= end  # a view of the stacked experts
    many = specialise(build(2, "softmax_topk"), STEPS, inputs())
    pairs = {id(variant.ffn.static.weights) for variant in many.variants}
    assert len(pairs) <= len(many.variants) == len(STEPS)  # gates differ at every step, weights do not


def test_other_timesteps_run_the_routed_model() -> None:
    model = build()
    special = specialise(model, STEPS, inputs())
    x, _ = inputs(2)
    for t in (torch.tensor([1.0, 999.0]), torch.tensor([123.0, 123.0])):
        assert torch.equal(special(x, t), model(x, t))
    assert special.fallbacks == 2
    with pytest.raises(InputError, match="timestep 7"), special.at(7):
        pass


def test_python_numbers_and_float32_tensors_are_the_same_timestep() -> None:
    model = build()
    special = specialise(model, [0.1, 0.2], inputs())
    x, _ = inputs(1)
    special(x, torch.tensor([0.1]))
    with special.at(0.2):
        special(x, torch.tensor([0.2]))
    assert special.fallbacks == 0


def test_the_model_is_left_alone_and_lends_its_attributes() -> None:
    model = build()
    model.config = {"width": 8}
    before = {name: id(p) for name, p in model.named_parameters()}
    special = specialise(model, STEPS, inputs())
    assert special.config == {"width": 8}
    assert special.routed is model
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert isinstance(model.ffn, RoutedFFN)
    special.to(torch.float32)
    x, _ = inputs(2)
    y = special(x.float(), torch.full((2,), 999.0))
    assert y.dtype == torch.float32


def test_a_compiled_variant_has_no_graph_break_and_no_recompilation_for_another_batch() -> None:
    torch._dynamo.reset()
    model = build()
    special = specialise(model, STEPS[:2], inputs())
    special.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5):
        x, _ = inputs(batch)
        for time in STEPS[:2]:
            t = torch.full((batch,), time)
            with torch.compiler.set_stance("default" if batch == 3 else "fail_on_recompile"):
                y = special(x, t)
            torch.testing.assert_close(y, model.forward(x, t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("timesteps", "found"), [([], r"timesteps \[\]"), ([1.0, float("nan")], "nan"), ([float("inf")], "inf")]
)
def test_impossible_timesteps(timesteps: Any, found: str) -> None:
    with pytest.raises(InputError, match=found):
        specialise(build(), timesteps, inputs())


def test_a_dense_or_a_training_model_is_refused() -> None:
    with pytest.raises(InputError, match="training mode"):
        specialise(build().train(), STEPS, inputs())
    dense = DiT(width=32).eval()
    x = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 4.0]), torch.tensor([0, 1])
    with pytest.raises(NothingMatched, match="no routed module"):
        specialise(dense, STEPS, x)
    with pytest.raises(InputError, match="Tensor"):
        specialise(torch.zeros(2), STEPS)


def test_fusing_drops_what_no_expert_serves() -> None:
    experts = Experts(random_weights(8, 12, num_experts=3), F.gelu)
    shared: dict[Hashable, Any] = {}
    x = torch.randn(4, 8)
    choice, nothing = fuse(experts, torch.tensor([3, 3]), torch.zeros(2), shared)
    assert choice == ()
    bias = torch.zeros(8) if experts.b_out is None else experts.b_out
    torch.testing.assert_close(nothing(x), bias.expand(4, 8))
    _, one = fuse(experts, torch.tensor([2, 3]), torch.tensor([1.0, 0.0]), shared)
    assert isinstance(one, FusedFFN)
    assert one.scale is None
    expected = experts(x, torch.full((4, 1), 2), torch.ones(4, 1))
    torch.testing.assert_close(one(x), expected)


def test_printing() -> None:
    special = specialise(build(), STEPS, inputs())
    assert isinstance(special, Specialised)
    assert "5 timesteps" in repr(special)


# ------------------------------------------------------------------------------------------------------ whole denoisers


def denoiser(name: str, recipe: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return a tiny transformed denoiser whose timestep routers choose this and that, and inputs for it."""
    model = tiny(name)
    inputs = synthesise(model)
    moefx.transform(model, inputs, recipe=recipe, verify=False, **options)
    seeded = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "router" in path:
                parameter.copy_(torch.randn(parameter.shape, generator=seeded))
    return model, inputs


def flops(model: nn.Module, inputs: dict[str, Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("name", "fixed"), [("DiTTransformer2DModel", ()), ("PixArtTransformer2DModel", FIXED)])
def test_heads_and_channels_that_are_off_are_cut_out(name: str, fixed: tuple[str, ...]) -> None:
    model, inputs = denoiser(name, "dydit")
    special = moefx.specialise(model, WHOLE, inputs, fixed=fixed)
    assert not special.left
    assert len(special.variants) > 1
    spent = []
    for time in WHOLE:
        at = inputs | {"timestep": torch.full_like(inputs["timestep"], time)}
        with torch.no_grad():
            torch.testing.assert_close(special(**at).sample, model(**at).sample, rtol=1e-4, atol=1e-5)
        spent.append((flops(special, at), flops(model, at)))
    assert sum(cut for cut, _ in spent) < 0.9 * sum(masked for _, masked in spent)
    assert special.fallbacks == 0
    queries = [m.weight for v in special.variants for path, m in v.named_modules() if path.endswith("to_q")]
    assert min(len(q) for q in queries) < max(len(q) for q in queries)


def test_heads_are_cut_out_of_an_attention_that_is_handed_its_timestep() -> None:
    torch.manual_seed(0)
    model = randomise_zeros(DiT(width=32, depth=1)).eval()
    call = (torch.randn(2, 1, 8, 8), torch.full((2,), 500.0), torch.tensor([3, 7]))
    moefx.transform(model, call, recipe="dydit-heads")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.bias"):
                parameter.copy_(torch.linspace(15, -15, len(parameter)))
        special = specialise(model, [500.0], call, fixed=["y"])
        torch.testing.assert_close(special(*call), model(*call), rtol=1e-4, atol=1e-5)
    assert not special.left
    (variant,) = special.variants
    narrow, wide = (dict(m.named_parameters())["blocks.0.attn.qkv.weight"] for m in (variant, model))
    assert len(narrow) < len(wide)


def test_heads_whose_norm_runs_across_them_stay_masked() -> None:
    model, inputs = denoiser("WanTransformer3DModel", "dydit-heads")
    special = moefx.specialise(model, WHOLE, inputs)
    assert any("masked, not cut out" in why for why in special.left.values())
    for time in WHOLE:
        at = inputs | {"timestep": torch.full_like(inputs["timestep"], time)}
        with torch.no_grad():
            torch.testing.assert_close(special(**at).sample, model(**at).sample, rtol=1e-4, atol=1e-5)


def test_a_broken_promise_runs_the_routed_model() -> None:
    model, inputs = denoiser("PixArtTransformer2DModel", "dydit")
    with pytest.raises(NothingMatched, match="added_cond_kwargs_resolution"):
        moefx.specialise(model, WHOLE, inputs)
    with pytest.raises(InputError, match="did you mean"):
        moefx.specialise(model, WHOLE, inputs, fixed=["added_cond_kwargs_resolutions"])
    special = moefx.specialise(model, WHOLE, inputs, fixed=FIXED)
    at = inputs | {"timestep": torch.full_like(inputs["timestep"], WHOLE[0])}
    extra = {k: v * 2 for k, v in inputs["added_cond_kwargs"].items()}
    with torch.no_grad():
        special(**at)
        assert special.fallbacks == 0
        other = at | {"added_cond_kwargs": extra}
        assert torch.equal(special(**other).sample, model(**other).sample)
    assert special.fallbacks == 1


def test_experts_chosen_by_the_noise_level_become_one_network() -> None:
    model, inputs = denoiser("DiTTransformer2DModel", "mode")
    special = moefx.specialise(model, WHOLE, inputs)
    assert not special.left
    assert any(isinstance(m, RoutedFFN) for m in model.modules())
    assert not any(isinstance(m, RoutedFFN) for variant in special.variants for m in variant.modules())
    for time in WHOLE:
        at = inputs | {"timestep": torch.full_like(inputs["timestep"], time)}
        with torch.no_grad():
            torch.testing.assert_close(special(**at).sample, model(**at).sample, rtol=1e-4, atol=1e-5)
    assert special.fallbacks == 0
