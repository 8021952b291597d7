"""The routed FFN against its equation and against the function-preservation theorems."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_oracle import dense, ffn, relative, routed

from moefx.errors import InputError, OptionError
from moefx.graph import trace
from moefx.routing import (
    MODES,
    DenseFFN,
    Experts,
    FFNWeights,
    Gated,
    LinearRouter,
    RoutedFFN,
    activation,
    initialise,
    random_weights,
)
from moefx.routing.normalise import SUM_TO_ONE

D, F_ = 12, 24


def weights(
    *, experts: int | None = None, gated: bool = False, bias: bool = True, dtype=torch.float64, seed: int = 1
) -> FFNWeights:
    seeded = torch.Generator().manual_seed(seed)
    return random_weights(D, F_, num_experts=experts, gated=gated, bias=bias, generator=seeded, dtype=dtype)


def act_of(gated: bool):
    return Gated(F.silu) if gated else F.gelu


def layer(stacked: FFNWeights, *, std: float = 0.5, gated: bool = False, granularity: int = 1, **options) -> RoutedFFN:
    router = LinearRouter(D, stacked.num_experts // granularity, std=std, generator=torch.Generator().manual_seed(7))
    return RoutedFFN(router.double(), Experts(stacked, act_of(gated)), granularity=granularity, **options)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 9, D, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------- the equation


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equation(mode: str, gated: bool, bias: bool, x: torch.Tensor) -> None:
    stacked = weights(experts=5, gated=gated, bias=bias)
    k = 5 if mode == "soft" else 3
    model = layer(stacked, gated=gated, mode=mode, top_k=k, scale=1.25)
    expected = routed(stacked, act_of(gated), x, model.router(x), mode, k, 1.25)
    assert relative(model(x), expected) < 1e-12


def test_equation_with_a_shared_ffn_and_another_output_width(x: torch.Tensor) -> None:
    seeded = torch.Generator().manual_seed(2)
    options = {"out_dim": 7, "dtype": torch.float64, "generator": seeded}
    stacked, shared = random_weights(D, F_, num_experts=4, **options), random_weights(D, 8, **options)
    model = layer(stacked, shared=DenseFFN(shared, F.gelu), shared_scale=0.3)
    expected = routed(stacked, F.gelu, x, model.router(x), "softmax_topk_renorm", 2) + 0.3 * dense(shared, F.gelu, x)
    assert model(x).shape == (2, 9, 7)
    assert relative(model(x), expected) < 1e-12


@settings(max_examples=40)
@given(st.data())
def test_any_shape_dtype_and_tie(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    lead = tuple(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
    experts = data.draw(st.integers(1, 6))
    k = data.draw(st.integers(1, experts))
    std = data.draw(st.sampled_from([0.0, 0.5, 100.0]))  # only ties; usual; one expert takes nearly all the gate
    mode = data.draw(st.sampled_from([m for m in MODES if m != "soft"]))
    gated = data.draw(st.booleans())
    stacked = weights(experts=experts, gated=gated)
    x = torch.randn(*lead, D, dtype=torch.float64).to(dtype)
    model = layer(stacked.map(lambda t: t.to(dtype)), std=std, gated=gated, mode=mode, top_k=k).float()
    model.experts.to(dtype)
    y = model(x)
    assert y.shape == x.shape
    assert y.dtype == dtype
    if x.numel():
        wide = stacked.map(lambda t: t.to(dtype).double())
        expected = routed(wide, act_of(gated), x.double(), model.router(x).double(), mode, k)
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        assert relative(y, expected) < tolerance


def test_one_expert_takes_every_token(x: torch.Tensor) -> None:
    stacked = weights(experts=4)
    model = layer(stacked, top_k=1, std=0)
    model.router.bias = torch.nn.Parameter(torch.tensor([0.0, 0, 9, 0], dtype=torch.float64))
    expected = torch.stack([ffn(stacked, F.gelu, t, 2) for t in x.flatten(0, 1)]).reshape_as(x) + stacked.b_out
    assert relative(model(x), expected) < 1e-12
    assert model.record.load.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_expert_is_the_dense_ffn_to_the_bit(dtype: torch.dtype) -> None:
    plain = weights(dtype=dtype, bias=False)
    x = torch.randn(2, 9, D).to(dtype)
    model = RoutedFFN(LinearRouter(D, 1), Experts(initialise.copies(plain, 1), F.gelu), top_k=1)
    assert torch.equal(model(x), DenseFFN(plain, F.gelu)(x))


def test_per_sample_routers_decide_once_for_all_tokens(x: torch.Tensor) -> None:
    stacked = weights(experts=4)
    router = LinearRouter(0, 4, tap_dim=8, embed_timestep=True)
    torch.nn.init.normal_(router.tap_weight)
    model = RoutedFFN(router.double(), Experts(stacked, F.gelu), mode="softmax_topk")
    assert model.taps == ("timestep",)
    t = torch.tensor([5, 900])
    expected = routed(stacked, F.gelu, x, model.router(x, t).expand(2, 9, 4), "softmax_topk", 2)
    assert relative(model(x, t), expected) < 1e-12
    scalar = routed(stacked, F.gelu, x, model.router(x, t[0]).expand(2, 9, 4), "softmax_topk", 2)
    assert relative(model(x, t[0]), scalar) < 1e-12


def test_a_router_of_ones_own(x: torch.Tensor) -> None:
    class Positions(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.one_hot(torch.arange(x.shape[1]) % 4, 4).to(torch.bfloat16)  # [T, E], the same for all samples

    stacked = weights(experts=4)
    model = RoutedFFN(Positions(), Experts(stacked, F.gelu), top_k=1)
    expected = torch.stack([ffn(stacked, F.gelu, x[b, t], t % 4) for b in range(2) for t in range(9)]).reshape_as(x)
    assert relative(model(x), expected + stacked.b_out) < 1e-12


def test_the_result_of_a_sample_does_not_depend_on_its_batch() -> None:
    x = torch.randn(3, 9, D, dtype=torch.float64)
    model = layer(weights(experts=4))
    assert relative(model(x)[:1], model(x[:1])) < 1e-14


def test_selection_bias_masks_an_expert_and_leaves_gates_alone(x: torch.Tensor) -> None:
    stacked = weights(experts=4)
    model = layer(stacked, selection_bias=True, mode="softmax_topk")
    free = layer(stacked, mode="softmax_topk")
    assert relative(model(x), free(x)) < 1e-14  # a bias of zero ranks probabilities instead of logits: the same order
    model.selection_bias[1] = float("-inf")
    routing = model.route(x)
    assert 1 not in routing.experts
    expected = routing.logits.softmax(-1).reshape(-1, 4).gather(-1, routing.experts)
    assert torch.equal(routing.gates, expected)
    assert "selection_bias" in model.state_dict()
    assert model.to(torch.bfloat16).selection_bias.dtype == torch.float32


# ------------------------------------------------------------------------------------------- T1 … T20: what is exact


@pytest.mark.parametrize("mode", sorted(SUM_TO_ONE - {"soft"}))
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("std", [0.0, 0.02, 5.0])
def test_t1_copies_are_exact_if_gates_sum_to_one(mode: str, k: int, std: float, x: torch.Tensor) -> None:
    plain = weights(gated=True)
    model = layer(initialise.copies(plain, 4), gated=True, mode=mode, top_k=k, std=std)
    assert relative(model(x), dense(plain, act_of(True), x)) < 1e-12


def test_t1_copies_under_soft_unit_and_straight_through(x: torch.Tensor) -> None:
    plain = weights()
    expected = dense(plain, F.gelu, x)
    for mode, k, scale in (("soft", 4, 1), ("unit", 1, 1), ("unit", 3, 1 / 3), ("ste", 1, 1), ("ste", 4, 1 / 4)):
        model = layer(initialise.copies(plain, 4), mode=mode, top_k=k, scale=scale)
        assert relative(model(x), expected) < 1e-12, mode


def test_t2_softmax_topk_scales_copies_by_k_over_e(x: torch.Tensor) -> None:
    plain = weights(bias=False)
    expected = dense(plain, F.gelu, x)
    copies = initialise.copies(plain, 8)
    assert relative(layer(copies, mode="softmax_topk", std=0)(x), expected / 4) < 1e-12
    assert relative(layer(copies, mode="softmax_topk", std=0, scale=4)(x), expected) < 1e-12
    assert relative(layer(copies, mode="softmax_topk", std=0.5, scale=4)(x), expected) > 0.05


def test_t3_sigmoid_topk_scales_copies_by_half_k(x: torch.Tensor) -> None:
    plain = weights(bias=False)
    model = layer(initialise.copies(plain, 4), mode="sigmoid_topk", top_k=2, std=0)
    assert relative(model(x), dense(plain, F.gelu, x)) < 1e-12


def test_t4_selection_bias_keeps_copies_exact(x: torch.Tensor) -> None:
    plain = weights()
    model = layer(initialise.copies(plain, 4), selection_bias=True)
    model.selection_bias.copy_(torch.randn(4))
    assert relative(model(x), dense(plain, F.gelu, x)) < 1e-12


@pytest.mark.parametrize("training", [True, False])
def test_t5_identical_experts_train_the_router_only_without_renormalisation(training: bool, x: torch.Tensor) -> None:
    target = torch.randn_like(x)
    sizes = {}
    for mode, k in (
        ("topk_softmax", 2),
        ("softmax_topk_renorm", 2),
        ("softmax_topk_renorm", 1),
        ("softmax_topk", 2),
        ("ste", 1),
        ("ste", 2),
    ):
        model = layer(initialise.copies(weights(), 4), mode=mode, top_k=k).train(training)
        F.mse_loss(model(x), target).backward()
        sizes[mode, k] = float(model.router.weight.grad.abs().max())
    assert max(sizes["topk_softmax", 2], sizes["softmax_topk_renorm", 2], sizes["softmax_topk_renorm", 1]) < 1e-15
    assert min(sizes["softmax_topk", 2], sizes["ste", 1], sizes["ste", 2]) > 1e-5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("mode", "k"),
    [(None, 1), (None, 2), ("softmax_topk", 2), ("sigmoid_topk_renorm", 2), ("soft", 4), ("one_plus_su", 2)],
)
def test_gradients_reach_router_and_experts(training: bool, mode: str | None, k: int, x: torch.Tensor) -> None:
    model = layer(weights(experts=4, gated=True), gated=True, mode=mode, top_k=k).train(training)
    model(x).square().mean().backward()
    if mode != "one_plus_su":  # there u = 0 at the start: u learns first
        assert model.router.weight.grad.abs().max() > 1e-8
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.experts.parameters())
    if mode == "one_plus_su":
        assert model.gate_scale.grad.abs().max() > 0


@pytest.mark.parametrize("std", [0.0, 1.0])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("granularity", [2, 3, 4])
def test_t8_virtual_groups_are_exact(std: float, gated: bool, granularity: int, x: torch.Tensor) -> None:
    plain = weights(gated=gated)
    stacked = initialise.granular_copies(plain, 3, granularity)
    model = layer(stacked, std=std, gated=gated, granularity=granularity, top_k=2 * granularity)
    assert stacked.num_experts == 3 * granularity
    assert relative(model(x), dense(plain, act_of(gated), x)) < 1e-12
    torch.testing.assert_close(model.expert_load().sum(), torch.tensor(1.0))


@pytest.mark.parametrize("std", [0.0, 1.0])
def test_t8_untied_rows_are_exact_with_the_scale_of_the_group(std: float, x: torch.Tensor) -> None:
    plain = weights(gated=True)
    tied = layer(initialise.granular_copies(plain, 3, 4), std=std, gated=True, granularity=4, top_k=8)
    untied = layer(initialise.granular_copies(plain, 3, 4), gated=True, top_k=8, scale=4, mode="topk_softmax")
    with torch.no_grad():
        untied.router.weight.copy_(initialise.untie(tied.router.weight, 4))
    assert relative(untied(x), dense(plain, act_of(True), x)) < 1e-12


def test_t8b_the_output_bias_is_added_once(x: torch.Tensor) -> None:
    plain = weights()
    far = FFNWeights(**{**vars(plain), "b_out": torch.full((D,), 100.0, dtype=torch.float64)})
    scaled = layer(initialise.copies(far, 8), mode="softmax_topk", std=0)(x)
    without = dense(FFNWeights(**{**vars(plain), "b_out": None}), F.gelu, x)
    assert relative(scaled, without / 4 + 100) < 1e-12


def test_t9_all_shards_at_weight_one_are_exact_and_fewer_are_not(x: torch.Tensor) -> None:
    plain = weights(gated=True)
    labels = torch.randperm(F_) % 4
    for shards in (initialise.shards(plain, 4), initialise.shards(plain, 4, labels)):
        assert relative(layer(shards, gated=True, mode="unit", top_k=4)(x), dense(plain, act_of(True), x)) < 1e-12
        assert relative(layer(shards, gated=True, mode="unit", top_k=3)(x), dense(plain, act_of(True), x)) > 0.05


@pytest.mark.parametrize("a", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 2])
def test_t10_shared_and_routed_parts_are_exact_at_any_share(a: float, n: int, x: torch.Tensor) -> None:
    plain = weights()
    shared, stacked, shared_scale, scale = initialise.arrange_shared(plain, initialise.copies(plain, 4), n, a=a)
    model = layer(stacked, shared=DenseFFN(shared, F.gelu), shared_scale=shared_scale, scale=scale)
    assert relative(model(x), dense(plain, F.gelu, x)) < 1e-12


@pytest.mark.parametrize("mode", [m for m in MODES if m != "soft"])
def test_t10_t17_silent_experts_beside_the_dense_ffn_are_exact_in_every_mode(mode: str, x: torch.Tensor) -> None:
    plain = weights(gated=True)
    silent = initialise.zero_output(initialise.copies(plain, 4))
    model = layer(silent, gated=True, mode=mode, shared=DenseFFN(plain, act_of(True)))
    assert relative(model(x), dense(plain, act_of(True), x)) < 1e-14
    model(x).square().mean().backward()
    assert model.experts.w_out.grad.abs().max() > 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_t19_low_precision_copies_are_as_good_as_the_dense_layer(
    dtype: torch.dtype, tolerance: float, x: torch.Tensor
) -> None:
    plain = weights(gated=True, dtype=torch.float32)
    model = RoutedFFN(LinearRouter(D, 4, std=1.0), Experts(initialise.copies(plain, 4), act_of(True))).to(dtype)
    x = x.to(dtype)
    routing = model.route(x)
    assert routing.gates.dtype == torch.float32
    assert (routing.gates.sum(-1) - 1).abs().max() < 1e-6
    low = plain.map(lambda t: t.to(dtype))
    assert relative(model(x), DenseFFN(low, act_of(True))(x)) < tolerance
    noise = relative(DenseFFN(low, act_of(True))(x), dense(low.map(torch.Tensor.double), act_of(True), x.double()))
    assert relative(model(x), dense(low.map(torch.Tensor.double), act_of(True), x.double())) < 1.5 * noise


def test_t20_the_adaln_gate_comes_after(x: torch.Tensor) -> None:
    plain, adaln = weights(), torch.randn(2, 1, D, dtype=torch.float64)
    model = layer(initialise.copies(plain, 4))
    assert relative(x + adaln * model(x), x + adaln * dense(plain, F.gelu, x)) < 1e-12


def test_autocast_runs_experts_low_and_the_router_high() -> None:
    plain = weights(dtype=torch.float32, gated=True)
    model = RoutedFFN(LinearRouter(D, 4), Experts(initialise.copies(plain, 4), act_of(True)))
    x = torch.randn(2, 9, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, reference = model(x), DenseFFN(plain, act_of(True))(x)
        assert model.route(x).logits.dtype == torch.float32
    assert y.dtype == reference.dtype == torch.bfloat16
    assert relative(y, reference) < 2e-2


# ------------------------------------------------------------------------------------------------ modules among modules


def test_deepcopy_and_pickle_after_a_forward_pass(x: torch.Tensor) -> None:
    model = layer(weights(experts=4, gated=True), gated=True)
    y = model(x)
    assert model.record.terms
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.record.terms == {}
        assert torch.equal(twin.record.load, model.record.load)
        assert torch.equal(twin(x), y)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert set(model.state_dict()) == {
        "router.weight",
        *(f"experts.{name}" for name in ("w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out")),
    }


def test_fx_leaves_the_layer_whole_and_a_tracer_leaves_nothing_behind(x: torch.Tensor) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ff = layer(weights(experts=4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.ff(x)

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m: torch.nn.Module, name: str) -> bool:
            return isinstance(m, RoutedFFN)

    block = Block()
    traced = torch.fx.GraphModule(block, Leaves().trace(block))
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["ff"]
    assert torch.equal(traced(x), block(x))


@pytest.mark.parametrize("granularity", [1, 2])
def test_our_own_tracer_sees_the_dialect_and_no_statistics(granularity: int, x: torch.Tensor) -> None:
    model = layer(weights(experts=4, gated=True), gated=True, granularity=granularity)
    graph = trace(model, (x,))
    assert model.record.terms == {}
    routing = model.route(x)
    inside = trace(model.experts, (x.flatten(0, 1), routing.experts, routing.gates))
    called = [str(node.target) for node in inside.fx.nodes if "moefx" in str(node.target)]
    assert called == ["moefx.group.default", *["moefx.grouped_linear.default"] * 3, "moefx.combine.default"]
    longer = torch.randn(3, 17, D, dtype=torch.float64)
    assert torch.equal(graph(longer), model(longer))


def test_export_is_pure_and_equal(x: torch.Tensor) -> None:
    model = layer(weights(experts=4, gated=True), gated=True).eval()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},))
    assert not program.graph_signature.buffers_to_mutate
    longer = torch.randn(3, 17, D, dtype=torch.float64)
    assert relative(program.module()(longer), model(longer)) < 1e-14


def test_meta_end_to_end() -> None:
    plain = weights(dtype=torch.float32).map(lambda t: t.to("meta"))
    model = RoutedFFN(
        LinearRouter(D, 4, device="meta"),
        Experts(initialise.partially_reinitialise(initialise.copies(plain, 4), 0), F.gelu),
    )
    assert model.record.load.is_meta
    assert model(torch.empty(2, 5, D, device="meta")).shape == (2, 5, D)


def test_what_does_not_fit_is_refused(x: torch.Tensor) -> None:
    experts = Experts(weights(experts=6), F.gelu)
    for options in ({"top_k": 7}, {"top_k": 3, "granularity": 2}, {"granularity": 4}, {"top_k": 0}):
        with pytest.raises(OptionError, match="experts"):
            RoutedFFN(LinearRouter(D, 6), experts, **options)
    with pytest.raises(OptionError, match="router over 5"):
        RoutedFFN(LinearRouter(D, 5), experts)
    with pytest.raises(OptionError, match="did you mean"):
        RoutedFFN(LinearRouter(D, 6), experts, mode="softmax")
    with pytest.raises(InputError, match="stack them"):
        Experts(weights(), F.gelu)
    with pytest.raises(InputError, match="logits"):
        RoutedFFN(torch.nn.Linear(D, 3).double(), experts)(x)
    with pytest.raises(InputError, match="b_in does not fit"):
        FFNWeights(w_in=torch.zeros(4, 3), w_out=torch.zeros(3, 4), b_in=torch.zeros(3))
    with pytest.raises(OptionError, match="did you mean 'gelu'"):
        activation("gelo")


def test_activations_by_name() -> None:
    up, gate = torch.randn(2, 5), torch.randn(2, 5)
    assert torch.equal(activation("gelu_tanh")(up), F.gelu(up, approximate="tanh"))
    assert torch.equal(activation("relu2")(up), F.relu(up) ** 2)
    assert torch.equal(activation("silu", gated=True)(up, gate), F.silu(gate) * up)
    assert torch.equal(activation("identity", gated=True)(up, gate), gate * up)
