"""Feed-forward networks in every spelling, decoys that look like them, and one planted in random graphs."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from analysis_support import close, fingerprint, recompute_ffn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moefx.graph import Graph, trace
from moefx.passes.analysis import Miss, Site, analyse, misses, sites

D, HIDDEN = 12, 20


class Net(nn.Module):
    """Tokens ``[B, T, D]`` in, tokens out; ``branch(self, x)`` is what is added to the stream."""

    def __init__(self, branch: Callable[[Net, Tensor], Tensor], residual: bool = True) -> None:
        super().__init__()
        self.branch, self.residual = branch, residual
        self.embed = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)
        self.up, self.gate, self.down = nn.Linear(D, HIDDEN), nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)
        self.fused, self.wide = nn.Linear(D, 2 * HIDDEN), nn.Linear(D + HIDDEN, D)
        self.w_up, self.w_down = nn.Parameter(torch.randn(D, HIDDEN)), nn.Parameter(torch.randn(HIDDEN, D))
        self.b_up = nn.Parameter(torch.randn(HIDDEN))
        self.slope = nn.Parameter(torch.randn(HIDDEN))
        self.hidden_norm = nn.LayerNorm(HIDDEN)
        self.drop = nn.Dropout(0.1)
        self.act = nn.GELU()
        self.conv_up, self.conv_down = nn.Conv1d(D, HIDDEN, 1), nn.Conv1d(HIDDEN, D, 1)
        self.head = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.branch(self, self.norm(x))
        return self.head(x + y if self.residual else y)


def graph_of(branch: Callable[[Net, Tensor], Tensor], residual: bool = True) -> tuple[Graph, Tensor]:
    torch.manual_seed(0)
    model, x = Net(branch, residual).double().eval(), torch.randn(3, 5, D, dtype=torch.float64)
    return trace(model, (x,)), x


def ffns(graph: Graph) -> list[Site]:
    return [s for s in sites(graph) if s.kind == "ffn"]


def recomputes(graph: Graph, site: Site, *args: Tensor) -> bool:
    values = graph.values({*site.inputs, site.output}, *args)
    return close(recompute_ffn(site, graph, values), values[site.output])


def halves(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    a, b = m.fused(x).chunk(2, dim=-1)
    return a, b


def unflattened(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    a, b = m.fused(x).unflatten(-1, (2, HIDDEN)).unbind(-2)
    return a, b


def interleaved(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    h = m.fused(x)
    return h[..., 0::2], h[..., 1::2]


def my_gelu(h: Tensor) -> Tensor:
    return 0.5 * h * (1.0 + torch.tanh(0.7978845608 * (h + 0.044715 * torch.pow(h, 3))))


def clamped_swiglu(m: Net, x: Tensor) -> Tensor:
    g, u = m.gate(x).clamp(max=1.5), m.up(x).clamp(min=-1.5, max=1.5)
    return m.down((u + 1) * g * torch.sigmoid(1.7 * g))


def gated(a: Tensor, b: Tensor) -> Tensor:
    return a * F.silu(b)


# name: branch, flavour, activation, whether the gate comes first
SPELLINGS: dict[str, tuple[Callable[[Net, Tensor], Tensor], str, str, bool]] = {
    "module": (lambda m, x: m.down(m.act(m.up(x))), "plain", "gelu", False),
    "dropout": (lambda m, x: m.drop(m.down(m.drop(m.act(m.up(x))))), "plain", "gelu", False),
    "functional": (lambda m, x: F.linear(F.silu(F.linear(x, m.up.weight)), m.down.weight), "plain", "silu", False),
    "matmul": (lambda m, x: torch.relu(x @ m.w_up + m.b_up) @ m.w_down, "plain", "relu", False),
    "einsum": (
        lambda m, x: torch.einsum("btf,fd->btd", F.relu(torch.einsum("btd,df->btf", x, m.w_up)), m.w_down),
        "plain",
        "relu",
        False,
    ),
    "transposed": (lambda m, x: F.relu(x @ m.up.weight.T) @ m.down.weight.t(), "plain", "relu", False),
    "addmm": (
        lambda m, x: torch.addmm(
            m.down.bias, F.relu(torch.addmm(m.up.bias, x.flatten(0, 1), m.up.weight.t())), m.down.weight.t()
        ).view_as(x),
        "plain",
        "relu",
        False,
    ),
    "relu2": (lambda m, x: m.down(F.relu(m.up(x)).square()), "plain", "relu2", False),
    "relu2 by power": (lambda m, x: m.down(F.relu(m.up(x)) ** 2), "plain", "relu2", False),
    "silu by hand": (lambda m, x: m.down((h := m.up(x)) * torch.sigmoid(h)), "plain", "silu", False),
    "gelu by hand": (lambda m, x: m.down(my_gelu(m.up(x))), "plain", "", False),
    "value first": (lambda m, x: m.down(gated(*halves(m, x))), "gated", "silu", False),
    "gate first": (lambda m, x: m.down(gated(*reversed(halves(m, x)))), "gated", "silu", True),
    "sliced": (
        lambda m, x: m.down(F.gelu((h := m.fused(x))[..., :HIDDEN]) * h[..., HIDDEN:]),
        "gated",
        "gelu",
        True,
    ),
    "split": (lambda m, x: m.down(gated(*m.fused(x).split([HIDDEN, HIDDEN], -1))), "gated", "silu", False),
    "unflattened": (lambda m, x: m.down(gated(*unflattened(m, x))), "gated", "silu", False),
    "interleaved": (lambda m, x: m.down(gated(*interleaved(m, x))), "gated", "silu", False),
    "separate": (lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), "gated", "silu", False),
    "separate, swish by hand": (
        lambda m, x: m.down((g := m.gate(x)) * (g.sigmoid() * m.up(x))),
        "gated",
        "silu",
        False,
    ),
    "glu": (lambda m, x: m.down(m.up(x) * m.gate(x).sigmoid()), "gated", "sigmoid", False),
    "bilinear": (lambda m, x: m.down(m.up(x) * m.gate(x)), "gated", "identity", False),
    "two arguments": (clamped_swiglu, "gated", "", False),
    "cut out": (lambda m, x: m.wide(torch.cat([x.roll(1, 1), F.gelu(m.up(x))], dim=-1)), "plain", "gelu", False),
    "rows of a parameter": (
        lambda m, x: m.down(F.silu(F.linear(x, m.fused.weight[:HIDDEN], m.fused.bias[:HIDDEN]))),
        "plain",
        "silu",
        False,
    ),
    "convolutions": (
        lambda m, x: m.conv_down(F.gelu(m.conv_up(x.transpose(1, 2)))).transpose(1, 2),
        "conv",
        "gelu",
        False,
    ),
    "casts": (lambda m, x: m.down(F.gelu(m.up(x).to(torch.float64)).type_as(x)), "plain", "gelu", False),
    "in place": (lambda m, x: m.down(F.relu(m.up(x), inplace=True)), "plain", "relu", False),
    "in place method": (lambda m, x: m.down(m.up(x).mul_(2.0).tanh_()), "plain", "", False),
    "flattened tokens": (lambda m, x: m.down(F.gelu(m.up(x.reshape(-1, D)))).reshape(x.shape), "plain", "gelu", False),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_found_and_recomputed(name: str) -> None:
    branch, flavour, act, gate_first = SPELLINGS[name]
    graph, x = graph_of(branch)
    (site,) = ffns(graph)
    assert (site.flavour, site.gate_first) == (flavour, gate_first)
    assert not act or site.operands["act"].name == act
    assert site.shapes["F"] == HIDDEN
    assert recomputes(graph, site, x)


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_exported_spelling_is_the_same_site(name: str) -> None:
    graph, x = graph_of(SPELLINGS[name][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = Graph.from_export(torch.export.export(graph.root, (x,), strict=False), graph.root)
    assert [fingerprint(s) for s in ffns(graph)] == [fingerprint(s) for s in ffns(oracle)]


def overwritten(m: Net, x: Tensor) -> Tensor:
    h = m.up(x)
    a = F.gelu(h)
    h.mul_(2.0)
    return m.down(a + h)


def overwritten_through_a_view(m: Net, x: Tensor) -> Tensor:
    h = m.up(x)
    h[..., :3].zero_()
    return m.down(F.gelu(h))


DECOYS: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    "overwritten": (overwritten, "overwritten in place"),
    "overwritten through a view": (overwritten_through_a_view, "overwritten in place"),
    "norm inside": (lambda m, x: m.down(m.hidden_norm(F.gelu(m.up(x)))), "layer_norm lies between"),
    "mean over tokens": (lambda m, x: m.down(F.gelu(m.up(x)) - F.gelu(m.up(x)).mean(1, keepdim=True)), ""),
    "learned slope": (lambda m, x: m.down(F.gelu(m.up(x)) * m.slope), ""),
    "no nonlinearity": (lambda m, x: m.down(2.0 * m.up(x)), ""),
    "softmax": (lambda m, x: m.down(m.up(x).softmax(-1)), ""),
    "different inputs": (lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x.roll(1, 1))), ""),
    "tokens mixed with features": (lambda m, x: m.down(F.gelu(m.up(x)).transpose(1, 2).reshape(3, 5, HIDDEN)), ""),
    "broadcast over tokens": (lambda m, x: x * m.down(F.gelu(m.up(x[:, :1]))), "no residual"),
}


@pytest.mark.parametrize("name", DECOYS)
def test_decoys_are_refused(name: str) -> None:
    branch, reason = DECOYS[name]
    graph, _ = graph_of(branch)
    assert ffns(graph) == []
    assert not reason or any(reason in miss.reason for miss in misses(graph))


def test_without_a_residual_it_is_a_near_miss() -> None:
    graph, _ = graph_of(SPELLINGS["module"][0], residual=False)
    assert ffns(graph) == []
    (miss,) = misses(graph)
    assert isinstance(miss, Miss)
    assert "no residual" in miss.reason
    assert "test_analysis_ffn.py" in miss.source_line


def test_the_residual_may_pass_through_gates_norms_and_parallel_branches() -> None:
    def branch(m: Net, x: Tensor) -> Tensor:
        return m.embed(x).tanh() + m.norm(m.down(F.gelu(m.up(x)))) * 0.5

    graph, x = graph_of(branch)
    (site,) = ffns(graph)
    assert recomputes(graph, site, x)


def test_sizes_are_not_data_flow() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, HIDDEN), nn.Linear(HIDDEN, D)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            # The embedding is added to x, and only the size of x reaches the embedding.
            e = self.b(F.silu(self.a(t[:, None, :].expand(t.shape[0], x.shape[1], 5))))
            return x + e

    graph = trace(Sized(), (torch.randn(3, 7, D), torch.randn(3, 5)))
    assert ffns(graph) == []


def test_vectors_per_sample_are_not_tokens_even_with_a_residual() -> None:
    class Embedder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Linear(1, D), nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            e = self.first(timestep[:, None])
            e = e + self.b(F.silu(self.a(e)))
            return x * e[:, None]

    graph = trace(Embedder(), (torch.randn(3, 7, D), torch.rand(3)))
    assert ffns(graph) == []
    assert ["rank 2" in miss.reason for miss in misses(graph)] == [True]


def test_a_denoiser_of_points_has_rank_two_tokens() -> None:
    class Points(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.a, self.b, self.out = nn.Linear(2, D), nn.Linear(D, 20), nn.Linear(20, D), nn.Linear(D, 2)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            h = self.inp(x) + t[:, None]
            return self.out(h + self.b(F.silu(self.a(h))))

    (site,) = ffns(trace(Points(), (torch.randn(7, 2), torch.rand(7))))
    assert site.role == "main"


def test_the_hidden_activation_may_have_another_reader_and_says_so() -> None:
    class Peek(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            h = F.gelu(self.up(self.norm(x)))
            return self.head(x + self.down(h)) + h.mean(-1, keepdim=True)

    graph = trace(Peek(lambda m, x: x).eval(), (torch.randn(3, 5, D),))
    (site,) = ffns(graph)
    assert [n.name for n in site.escapes()] == ["gelu"]


def test_a_shared_network_is_one_site_per_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(D, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, D))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mlp(x)
            return x + self.mlp(x)

    found = ffns(trace(Twice(), (torch.randn(3, 5, D),)))
    assert [(s.name, s.call_index, s.region_is_module) for s in found] == [("mlp", 0, True), ("mlp#1", 1, True)]
    assert found[0].weights() == found[1].weights()


def test_a_dead_branch_is_flagged() -> None:
    class Dead(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            unused = x + self.down(F.gelu(self.up(x)))
            unused.relu()
            return self.head(x)

    (site,) = ffns(trace(Dead(lambda m, x: x).eval(), (torch.randn(3, 5, D),)))
    assert site.dead


def test_active_dropout_is_recorded() -> None:
    model = Net(SPELLINGS["dropout"][0]).train()
    (site,) = ffns(trace(model, (torch.randn(3, 5, D),)))
    assert site.operands["dropout"] == (0.1,)


def test_half_of_a_fused_projection_keeps_its_rows() -> None:
    (site,) = ffns(graph_of(SPELLINGS["interleaved"][0])[0])
    assert site.operands["w_in"].rows == tuple(range(0, 2 * HIDDEN, 2))
    assert site.operands["w_gate"].rows == tuple(range(1, 2 * HIDDEN, 2))


# -- property: a network planted in a random graph is found if and only if it is one -----------------------------------

ACTS: list[Callable[[Tensor], Tensor]] = [F.gelu, F.silu, torch.relu, my_gelu, lambda h: h * torch.sigmoid(h)]


class Planted(nn.Module):
    """A random graph of token operations around one network; ``twist`` says how the plant is spoiled, if at all."""

    def __init__(self, seed: int, twist: str) -> None:
        super().__init__()
        self.rng, self.twist = seed, twist
        self.proj = nn.ModuleList([nn.Linear(D, D) for _ in range(4)])
        self.norms = nn.ModuleList([nn.LayerNorm(D) for _ in range(4)])
        self.up, self.gate, self.down = nn.Linear(D, HIDDEN), nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)
        self.time = nn.Sequential(nn.Linear(1, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, D))
        self.out = nn.Linear(D, D)

    def plant(self, s: Tensor, rng: random.Random) -> Tensor:
        x = self.norms[0](s) if rng.random() < 0.5 else s
        h = self.up(x)
        act = rng.choice(ACTS)
        if self.twist == "in place":
            early = act(h)
            h.add_(1.0)
            h = early * h
        else:
            h = act(self.gate(x)) * h if rng.random() < 0.5 else act(h)
        if self.twist == "reduced":
            h = h / h.abs().sum(1, keepdim=True)
        y = self.down(h)
        if rng.random() < 0.5:
            y = self.norms[1](y)
        if rng.random() < 0.5:
            y = y.reshape(-1, D).reshape(s.shape)
        return y if self.twist == "no residual" else s + y * rng.uniform(0.5, 2.0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rng = random.Random(self.rng)
        c = self.time(t[:, None])
        pool = [x, self.proj[0](x)]
        for i in range(rng.randint(1, 4)):
            a, b = rng.choice(pool), rng.choice(pool)
            pool.append(
                rng.choice([lambda a, b: a + b, lambda a, b, i=i: self.proj[i % 4](a), lambda a, b: a * b])(a, b)
            )
        s = rng.choice(pool) * (1 + c[:, None]) + rng.choice(pool)
        s = self.plant(s, rng)
        for i in range(rng.randint(0, 3)):
            join = self.twist != "no residual" and rng.random() < 0.5
            s = self.norms[2](s) + rng.choice(pool) if join else self.proj[i % 4](s)
        return self.out(s)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), twist=st.sampled_from(["", "", "in place", "reduced", "no residual"]))
def test_a_planted_network_is_found_if_and_only_if_it_is_one(seed: int, twist: str) -> None:
    torch.manual_seed(seed)
    model = Planted(seed, twist).double().eval()
    x, t = torch.randn(3, 5, D, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    graph = trace(model, (x, t))
    found = [s for s in ffns(graph) if s.operands["w_out"].fqn == "down.weight"]
    assert len(found) == (0 if twist else 1)
    assert all(s.operands["w_out"].fqn == "down.weight" for s in ffns(graph))
    for site in found:
        assert recomputes(graph, site, x, t)


def test_ten_thousand_nodes_take_less_than_a_second() -> None:
    block = nn.Sequential(nn.Linear(D, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, D))

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(1700):
                x = x + self.block(x * 0.5).clamp(-9, 9)
            return x

    graph = trace(Deep(), (torch.randn(2, 5, D),))
    assert len(graph.nodes) > 10_000
    start = time.process_time()
    found = analyse(graph)
    assert len([s for s in found.sites if s.kind == "ffn"]) == 1700
    assert time.process_time() - start < 5.0  # one second on an idle machine, with room for a busy one
