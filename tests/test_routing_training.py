"""Auxiliary losses and statistics, and the training machinery they must survive."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from moefx.errors import InputError, MoefxWarning
from moefx.routing import Experts, HeadGate, LinearRouter, RoutedFFN, RoutingRecord, random_weights
from moefx.routing.initialise import copies
from moefx.routing.losses import entropy, load_fractions, switch_balance, z_loss
from moefx.training import aux_loss, health, routing_records, step_schedules, update_biases
from tests.ranks import run

D, E = 8, 4


class Model(nn.Module):
    """Two routed layers with a residual each, optionally checkpointed."""

    def __init__(self, mode: str | None = None, checkpointed: str | None = None) -> None:
        super().__init__()
        seeded = torch.Generator().manual_seed(0)
        self.checkpointed = checkpointed

        def layer() -> RoutedFFN:
            router = LinearRouter(D, E, std=0.5, generator=seeded)
            return RoutedFFN(router, Experts(random_weights(D, 16, num_experts=E, generator=seeded), F.gelu), mode=mode)

        self.layers = nn.ModuleList([layer(), layer()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if self.checkpointed is None:
                x = x + layer(x)
            else:
                x = x + checkpoint(layer, x, use_reentrant=self.checkpointed == "re-entrant")
        return x


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    (model(x).square().mean() + aux_loss(model, balance=1.0, z=0.1)).backward()
    return gradients(model)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 7, D)


# ------------------------------------------------------------------------------------------------------------- formulas


def test_losses_follow_their_formulas() -> None:
    logits = torch.randn(50, E, dtype=torch.float64)
    experts = torch.randint(0, E, (50, 2))
    f = [sum(row.count(e) for row in experts.tolist()) / 100 for e in range(E)]
    assert load_fractions(experts, E).tolist() == pytest.approx(f)
    P = [sum(math.exp(r[e]) / sum(map(math.exp, r)) for r in logits.tolist()) / 50 for e in range(E)]
    balance = switch_balance(load_fractions(experts, E), logits.softmax(-1).mean(0))
    assert float(balance) == pytest.approx(E * sum(a * b for a, b in zip(f, P, strict=True)), rel=1e-6)
    z = sum(math.log(sum(map(math.exp, r))) ** 2 for r in logits.tolist()) / 50
    assert float(z_loss(logits)) == pytest.approx(z, rel=1e-12)
    assert float(entropy(torch.full((3, E), 1 / E))) == pytest.approx(math.log(E))
    assert float(entropy(torch.eye(E))) == 0


def test_balance_is_one_when_even_and_e_when_one_expert_takes_all() -> None:
    even = switch_balance(torch.full((E,), 1 / E), torch.full((E,), 1 / E))
    assert float(even) == pytest.approx(1)
    one = torch.tensor([0.0, 1, 0, 0])
    assert float(switch_balance(one, one)) == E


def test_aux_loss_is_the_mean_over_layers_times_its_coefficient(x: torch.Tensor) -> None:
    model = Model()
    model(x)
    balances, zs = [], []
    h = x
    for layer in model.layers:
        routing = layer.route(h)
        p = routing.logits.softmax(-1).flatten(0, 1)
        balances.append(E * (load_fractions(routing.experts, E) * p.mean(0)).sum())
        zs.append(routing.logits.logsumexp(-1).square().mean())
        h = h + layer(h)
    expected = 0.03 * sum(balances) / 2 + 0.5 * sum(zs) / 2
    torch.testing.assert_close(aux_loss(model, balance=0.03, z=0.5), expected)
    torch.testing.assert_close(aux_loss(model), 0.01 * sum(balances) / 2)
    assert [name for name, _ in routing_records(model)] == ["layers.0", "layers.1"]


def test_the_balance_loss_spreads_the_load() -> None:
    torch.manual_seed(1)
    layer = RoutedFFN(
        LinearRouter(D, E, std=0.02, bias=True), Experts(random_weights(D, 16, num_experts=E), F.gelu), top_k=1
    )
    with torch.no_grad():
        layer.router.bias.copy_(torch.tensor([2.0, 0, 0, 0]))
    tokens = torch.randn(256, D)
    layer(tokens)
    assert layer.record.load.max() > 0.95
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        layer(tokens)
        aux_loss(layer, balance=1.0).backward()
        optimizer.step()
    assert layer.record.load.max() < 0.5


def test_statistics_and_health(x: torch.Tensor) -> None:
    model = Model()
    assert health(model) == []
    model(x)
    for layer, report in zip(model.layers, health(model), strict=True):
        p = layer.route(x).logits.softmax(-1).flatten(0, 1)  # the first layer reads x
        if report.layer == "layers.0":
            torch.testing.assert_close(layer.record.probability, p.mean(0))
            torch.testing.assert_close(layer.record.entropy, -(p * p.log()).sum(-1).mean())
        torch.testing.assert_close(layer.record.load.sum(), torch.tensor(1.0))
        assert report.max_load >= 1 / E
        assert report.max_entropy == pytest.approx(math.log(E))
    frozen = RoutedFFN(LinearRouter(D, E, std=0), Experts(random_weights(D, 4, num_experts=E), F.gelu), top_k=1)
    frozen(x)
    assert health(frozen)[0].dead == (1, 2, 3)
    assert health(frozen)[0].max_load == 1


def test_no_tokens_give_finite_statistics_and_losses() -> None:
    model = Model()
    model(torch.zeros(2, 0, D))
    assert aux_loss(model, z=1.0) == 0
    assert health(model)[0].max_load == 0


# ------------------------------------------------------------------------------------------------------------ machinery


@pytest.mark.parametrize("training", [True, False])
def test_the_router_learns_from_the_loss_in_train_and_eval(training: bool, x: torch.Tensor) -> None:
    model = Model().train(training)
    model(x)
    aux_loss(model).backward()
    assert all(layer.router.weight.grad.abs().max() > 0 for layer in model.layers)


def test_accumulation_equals_the_mean_of_the_steps(x: torch.Tensor) -> None:
    y = torch.randn(3, 7, D)
    each = [step(Model(), part) for part in (x, y)]
    model = Model()
    for part in (x, y):
        ((model(part).square().mean() + aux_loss(model, balance=1.0, z=0.1)) / 2).backward()
    together = Model()  # two forward passes before one backward pass
    losses = [together(part).square().mean() + aux_loss(together, balance=1.0, z=0.1) for part in (x, y)]
    (sum(losses) / 2).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, (each[0][name] + each[1][name]) / 2)
        torch.testing.assert_close(gradients(together)[name], gradient)


def test_checkpointing_changes_neither_gradients_nor_statistics(x: torch.Tensor) -> None:
    plain, checkpointed = Model(), Model(checkpointed="yes")
    expected = step(plain, x)
    load = []
    checkpointed.layers[0].register_forward_pre_hook(lambda *_: load.append(1))
    for name, gradient in step(checkpointed, x).items():
        torch.testing.assert_close(gradient, expected[name])
    assert len(load) == 2  # it was recomputed
    assert torch.equal(checkpointed.layers[0].record.load, plain.layers[0].record.load)


def test_recomputation_leaves_no_graph_behind(x: torch.Tensor) -> None:
    model = Model(checkpointed="yes")
    loss = model(x).square().mean() + aux_loss(model)
    before = [layer.record.terms for layer in model.layers]
    loss.backward()
    assert all(layer.record.terms is terms for layer, terms in zip(model.layers, before, strict=True))


def test_reentrant_checkpointing_is_refused_not_ignored(x: torch.Tensor) -> None:
    model = Model(checkpointed="re-entrant")
    model(x.requires_grad_())
    with pytest.raises(InputError, match=r"layers\.0.*use_reentrant=True"):
        aux_loss(model)
    with torch.no_grad():
        assert aux_loss(model) > 0


def test_a_frozen_router_has_a_constant_loss(x: torch.Tensor) -> None:
    model = Model()
    for layer in model.layers:
        layer.router.requires_grad_(False)
    model(x)
    assert aux_loss(model) > 0


def test_the_loss_needs_a_routed_layer_and_a_forward_pass(x: torch.Tensor) -> None:
    with pytest.raises(InputError, match="0 routed layers"):
        aux_loss(nn.Linear(2, 2))
    model = Model()
    with pytest.raises(InputError, match="2 routed layers, none called"):
        aux_loss(model)
    model(x)
    with pytest.raises(InputError, match="none called"):
        aux_loss(copy.deepcopy(model))


def test_inference_mode_records_statistics(x: torch.Tensor) -> None:
    model = Model()
    with torch.inference_mode():
        model(x)
    assert model.layers[0].record.load.sum() == 1
    step(model, x)


def test_statistics_stay_float32_in_a_low_precision_model(x: torch.Tensor) -> None:
    model = Model().to(torch.bfloat16)
    model(x.bfloat16())
    record = model.layers[0].record
    assert record.load.dtype == record.probability.dtype == record.entropy.dtype == torch.float32
    assert aux_loss(model).dtype == torch.float32
    assert not any("record" in name for name in model.state_dict())


def test_gradient_scaler_scales_the_loss_like_any_other(x: torch.Tensor) -> None:
    expected = step(Model(), x)
    model = Model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler.scale(model(x).square().mean() + aux_loss(model, balance=1.0, z=0.1)).backward()
    scaler.unscale_(optimizer)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("find_unused", [False, True])
def test_data_parallel(find_unused: bool, tmp_path: Path, x: torch.Tensor) -> None:
    expected = step(Model(), x)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Model(), find_unused_parameters=find_unused)
        for _ in range(2):
            model.zero_grad()
            for name, gradient in step(model, x).items():
                torch.testing.assert_close(gradient, expected[name.removeprefix("module.")])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", [None, "ste"])
def test_compiles_whole_and_once_for_any_number_of_tokens(mode: str | None, x: torch.Tensor) -> None:
    torch._dynamo.reset()
    model, eager = Model(mode), Model(mode)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (7, 5, 12):
        part = torch.randn(3, tokens, D)
        model.zero_grad()
        eager.zero_grad()
        expected = step(eager, part)
        with torch.compiler.set_stance("default" if tokens == 7 else "fail_on_recompile"):
            y = compiled(part)
        (y.square().mean() + aux_loss(model, balance=1.0, z=0.1)).backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name])
        torch.testing.assert_close(model.layers[1].record.load, eager.layers[1].record.load)
    copy.deepcopy(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it, and silences only a warning
@pytest.mark.parametrize("whole", [True, False])
def test_compiles_with_checkpoints_inside_and_outside(whole: bool, x: torch.Tensor) -> None:
    torch._dynamo.reset()
    expected, model = step(Model(), x), Model(checkpointed="yes")
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        for part in [model] if whole else model.layers:
            part.compile(fullgraph=True, backend="aot_eager")
        for name, gradient in step(model, x).items():
            torch.testing.assert_close(gradient, expected[name])


def test_head_gates_take_part_in_the_loss(x: torch.Tensor) -> None:
    gate = HeadGate(D, 6, shared=2, top_k=2, std=0.5)
    gate(x)
    aux_loss(gate).backward()
    assert gate.routed_weight.grad.abs().max() > 0


# --------------------------------------------------------------------------------------------- terms, biases, schedules


def test_a_layer_adds_terms_of_its_own_and_knows_its_coefficients(x: torch.Tensor) -> None:
    model = Model()
    model(x)
    first, second = (layer.record for layer in model.layers)
    first.add("budget", torch.tensor(3.0))
    balance = (first.terms["balance"] + second.terms["balance"]) / 2
    torch.testing.assert_close(aux_loss(model), 0.01 * balance)  # no coefficient, no part in the loss
    first.coefficients["budget"] = 2.0
    torch.testing.assert_close(aux_loss(model), 0.01 * balance + 6.0)
    torch.testing.assert_close(aux_loss(model, budget=1.0, balance=0), torch.tensor(3.0))
    with pytest.raises(InputError, match="did you mean 'budget'"):
        aux_loss(model, budgets=1.0)
    model(x)
    assert "budget" not in first.terms


def test_slots_without_an_expert_count_nowhere() -> None:
    record = RoutingRecord(E)
    record.update(torch.zeros(3, E), torch.tensor([[0, E], [1, E], [0, -1]]), "softmax_topk")
    assert record.assigned.tolist() == [2, 1, 0, 0]
    torch.testing.assert_close(record.load, torch.tensor([2 / 3, 1 / 3, 0, 0]))


def biased_layer(k: int = 1) -> RoutedFFN:
    seeded = torch.Generator().manual_seed(3)
    router = LinearRouter(D, E, std=0.5, generator=seeded)
    experts = Experts(random_weights(D, 16, num_experts=E, generator=seeded), F.gelu)
    return RoutedFFN(router, experts, top_k=k, selection_bias=True)


def test_biases_follow_the_sign_of_the_load_over_all_calls_since_the_last_update() -> None:
    layer, model = biased_layer(), nn.ModuleDict()
    model["ffn"] = layer
    batches = [torch.randn(5, D), torch.randn(40, D)]
    counts = torch.zeros(E)
    for batch in batches:
        layer(batch)
        counts += torch.bincount(layer.route(batch).experts.flatten(), minlength=E)  # route records as well
    torch.testing.assert_close(layer.record.assigned, counts * 2)
    assert update_biases(model, 0.5) == ["ffn"]
    torch.testing.assert_close(layer.selection_bias, 0.5 * torch.sign(counts.mean() - counts))
    assert layer.record.assigned.sum() == 0
    before = layer.selection_bias.clone()
    update_biases(model, 0.5)  # nothing was routed in between
    assert torch.equal(layer.selection_bias, before)


def test_biases_balance_a_lopsided_router() -> None:
    layer = biased_layer()
    with torch.no_grad():
        layer.router.weight[0] += 1.0
    tokens = torch.randn(512, D) + 1
    layer(tokens)
    before = float(layer.record.load.max())
    for step_number in range(200):
        layer(tokens)
        update_biases(layer, 0.05 * 0.97**step_number)
    layer(tokens)
    assert before > 0.6 > 0.4 > float(layer.record.load.max())


def test_biases_need_a_layer_that_has_them() -> None:
    with pytest.raises(InputError, match="selection_bias=True"):
        update_biases(Model())


def _bias_worker(results: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    layer = biased_layer()
    torch.manual_seed(rank)
    layer(torch.randn(30 + 50 * rank, D))
    mine = layer.record.assigned.clone()
    update_biases(layer, 1.0)
    torch.save((mine, layer.selection_bias), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_biases_are_updated_over_the_global_batch(tmp_path: Path) -> None:
    run(_bias_worker, 2, str(tmp_path))
    (one, bias), (two, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(bias, other)
    total = one + two
    assert torch.equal(bias, torch.sign(total.mean() - total))


def test_schedules_reach_every_module_that_has_one() -> None:
    class Warm(nn.Linear):
        progress = 0.0

        def set_progress(self, progress: float) -> None:
            self.progress = progress

    model = nn.Sequential(nn.Linear(2, 2), Warm(2, 2), nn.Sequential(Warm(2, 2)))
    assert step_schedules(model, 0.25) == ["1", "2.0"]
    assert model[1].progress == model[2][0].progress == 0.25
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="progress"):
            step_schedules(model, wrong)


def test_health_names_what_is_wrong(x: torch.Tensor) -> None:
    weights = random_weights(D, 16, num_experts=E)
    stuck = RoutedFFN(LinearRouter(D, E, std=0, bias=True), Experts(weights, F.gelu), top_k=1, mode="unit")
    with torch.no_grad():
        stuck.router.bias[2] = 5.0
    stuck(x)
    (report,) = health(stuck)
    assert report.max_load == 1
    assert report.dead == (0, 1, 3)
    assert "deadlocked" in report.problems[0]
    with pytest.warns(MoefxWarning, match=r"1 of 1 routed layers"):
        health(stuck, warn=True)

    alike = copies(random_weights(D, 16), E)
    fresh = RoutedFFN(LinearRouter(D, E, std=1e-4), Experts(alike, F.gelu), top_k=2)
    (fresh(x).square().mean()).backward()
    (report,) = health(fresh)
    assert report.expert_cosine == pytest.approx(1, abs=1e-5)
    assert any("saturated" in problem for problem in report.problems)
    assert report.router_gradient is not None
    apart = RoutedFFN(LinearRouter(D, E, std=0.5), Experts(weights, F.gelu), top_k=2)
    apart(x)
    cosine = health(apart)[0].expert_cosine
    assert cosine is not None
    assert cosine < 0.9
