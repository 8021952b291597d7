"""Attention in every spelling: fused or written out, grouped, cross, joint, linear, opaque."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from analysis_support import attend, close, features_last, fingerprint
from torch import Tensor, nn

from moefx.graph import Graph, trace
from moefx.passes.analysis import Site, misses, sites

D, H, HEAD = 24, 3, 8


class Net(nn.Module):
    """Tokens ``[B, T, D]`` and text ``[B, S, 10]`` in, tokens out, with ``core(self, x, text)`` added to the stream."""

    def __init__(self, core: Callable[[Net, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.core = core
        self.embed, self.norm, self.head = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.qkv, self.kv_text = nn.Linear(D, 3 * D), nn.Linear(10, 2 * D)
        self.k_one, self.v_one = nn.Linear(D, HEAD), nn.Linear(D, HEAD)
        self.q_text, self.k_text, self.v_text = (nn.Linear(10, D) for _ in range(3))
        self.norm_q, self.norm_k = nn.RMSNorm(HEAD), nn.RMSNorm(HEAD)
        self.mha = nn.MultiheadAttention(D, H, batch_first=True)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.core(self, self.norm(x), text))


def split(x: Tensor, heads: int = H) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def heads_of(m: Net, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return split(m.q(x)), split(m.k(x)), split(m.v(x))


def fused(m: Net, x: Tensor, text: Tensor) -> Tensor:
    return m.out(join(F.scaled_dot_product_attention(*heads_of(m, x))))


def written(m: Net, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = heads_of(m, x)
    return m.out(join(torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(HEAD), dim=-1) @ v))


def einsums(m: Net, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = (p(x).unflatten(-1, (H, HEAD)) for p in (m.q, m.k, m.v))
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(HEAD**-0.5).softmax(-1)
    return m.out(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))


def baddbmm(m: Net, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in heads_of(m, x))
    bias = torch.zeros(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=0, alpha=HEAD**-0.5)
    return m.out(join(torch.bmm(scores.softmax(dim=-1), v).unflatten(0, (-1, H))))


def masked(m: Net, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = heads_of(m, x)
    scores = q @ k.transpose(-1, -2) * HEAD**-0.5
    return m.out(join((scores + text.mean() * x.mean(2)[:, None, None, :]).softmax(-1) @ v))


def packed(m: Net, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(x.shape[0], x.shape[1], 3, H, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
    return m.out(join(F.scaled_dot_product_attention(q, k, v)))


def packed_by_head(m: Net, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(x.shape[0], x.shape[1], H, 3, HEAD).permute(3, 0, 2, 1, 4)
    return m.out(join(F.scaled_dot_product_attention(q, k, v)))


def normed(m: Net, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = heads_of(m, x)
    return m.out(join(F.scaled_dot_product_attention(m.norm_q(q), m.norm_k(k), v)))


def normed_by_hand(m: Net, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = heads_of(m, x)
    q, k = (t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6) for t in (q, k))
    return m.out(join(F.scaled_dot_product_attention(q, k, v)))


def rotate(x: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[2], dtype=x.dtype), torch.arange(1, HEAD // 2 + 1, dtype=x.dtype))
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


def rotate_complex(x: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[2], dtype=x.dtype), torch.arange(1, HEAD // 2 + 1, dtype=x.dtype))
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(3)


def rotary(m: Net, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = heads_of(m, x)
    return m.out(join(F.scaled_dot_product_attention(rotate(q), rotate(k), v)))


def rotary_complex(m: Net, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = heads_of(m, x)
    return m.out(join(F.scaled_dot_product_attention(rotate_complex(q), rotate_complex(k), v)))


def grouped(m: Net, x: Tensor, text: Tensor) -> Tensor:
    k, v = split(m.k_one(x), 1), split(m.v_one(x), 1)
    return m.out(join(F.scaled_dot_product_attention(split(m.q(x)), k, v, enable_gqa=True)))


def grouped_by_expand(m: Net, x: Tensor, text: Tensor) -> Tensor:
    k, v = (split(p(x), 1).expand(-1, H, -1, -1) for p in (m.k_one, m.v_one))
    return m.out(join(F.scaled_dot_product_attention(split(m.q(x)), k, v)))


def cross(m: Net, x: Tensor, text: Tensor) -> Tensor:
    k, v = m.kv_text(text).chunk(2, dim=-1)
    return m.out(join(F.scaled_dot_product_attention(split(m.q(x)), split(k), split(v))))


def joint(m: Net, x: Tensor, text: Tensor) -> Tensor:
    pairs = zip((m.q_text, m.k_text, m.v_text), (m.q, m.k, m.v), strict=True)
    q, k, v = (torch.cat([split(a(text)), split(b(x))], dim=2) for a, b in pairs)
    return m.out(join(F.scaled_dot_product_attention(q, k, v))[:, text.shape[1] :])


def linear_states(m: Net, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = heads_of(m, x)
    q, k = F.relu(q), F.relu(k)
    return m.out(join(q @ (k.transpose(-1, -2) @ v)))


def linear_transposed(m: Net, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = (t.transpose(-1, -2) for t in heads_of(m, x))
    state = F.pad(v, (0, 0, 0, 1), value=1.0) @ F.relu(k).transpose(-1, -2)
    found = state @ F.relu(q)
    return m.out(join((found[:, :, :-1] / (found[:, :, -1:] + 1e-6)).transpose(-1, -2)))


def sigmoid_scores(m: Net, x: Tensor, text: Tensor) -> Tensor:
    q, k, v = heads_of(m, x)
    return m.out(join(torch.sigmoid(q @ k.transpose(-1, -2)) @ v))


def gated(m: Net, x: Tensor, text: Tensor) -> Tensor:
    return m.out(join(F.scaled_dot_product_attention(*heads_of(m, x))) * torch.sigmoid(m.embed(x)))


def opaque(m: Net, x: Tensor, text: Tensor) -> Tensor:
    return m.mha(x, x, x, need_weights=False)[0]


# name: (core, flavour, kind of core, layout, query-key norm, rotary embedding)
SPELLINGS: dict[str, tuple[Callable[[Net, Tensor, Tensor], Tensor], str, str, str, bool, bool]] = {
    "fused": (fused, "self", "sdpa", "separate", False, False),
    "written": (written, "self", "softmax", "separate", False, False),
    "einsums": (einsums, "self", "softmax", "separate", False, False),
    "baddbmm": (baddbmm, "self", "softmax", "separate", False, False),
    "masked": (masked, "self", "softmax", "separate", False, False),
    "packed": (packed, "self", "sdpa", "fused_qkv", False, False),
    "packed by head": (packed_by_head, "self", "sdpa", "fused_qkv", False, False),
    "normed": (normed, "self", "sdpa", "separate", True, False),
    "normed by hand": (normed_by_hand, "self", "sdpa", "separate", True, False),
    "rotary": (rotary, "self", "sdpa", "separate", False, True),
    "rotary complex": (rotary_complex, "self", "sdpa", "separate", False, True),
    "grouped": (grouped, "self", "sdpa", "separate", False, False),
    "grouped by expand": (grouped_by_expand, "self", "sdpa", "separate", False, False),
    "cross": (cross, "cross", "sdpa", "fused_kv", False, False),
    "joint": (joint, "joint", "sdpa", "separate", False, False),
    "linear states": (linear_states, "linear", "linear", "separate", False, False),
    "linear transposed": (linear_transposed, "linear", "linear", "separate", False, False),
    "sigmoid scores": (sigmoid_scores, "self", "scores", "separate", False, False),
    "gated": (gated, "self", "sdpa", "separate", False, False),
}


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 7, D, dtype=torch.float64), torch.randn(2, 5, 10, dtype=torch.float64)


def graph_of(core: Callable[[Net, Tensor, Tensor], Tensor]) -> tuple[Graph, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model, example = Net(core).double().eval(), inputs()
    return trace(model, example), example


def only(graph: Graph) -> Site:
    (site,) = (s for s in sites(graph) if s.kind == "attention")
    return site


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_found(name: str) -> None:
    core, flavour, kind, layout, norm, rope = SPELLINGS[name]
    site = only(graph_of(core)[0])
    o = site.operands
    assert (site.flavour, o["core_kind"], o["layout"], o["qk_norm"], o["rope"]) == (flavour, kind, layout, norm, rope)
    assert site.shapes["heads"] == H
    assert site.shapes["kv_heads"] == (1 if name.startswith("grouped") else H)
    assert site.shapes["head_dim"] == HEAD
    assert (o["mask"] is not None) == (name == "masked")
    assert site.role == "main"


@pytest.mark.parametrize("name", SPELLINGS)
def test_operands_recompute_the_projections_and_the_output(name: str) -> None:
    graph, example = graph_of(SPELLINGS[name][0])
    site = only(graph)
    o = site.operands
    parts = [p for stream in o["streams"] for p in (stream.q, stream.k, stream.v)]
    values = graph.values({*(n for p in parts for n in (p.x, p.value)), o["pre_out"], site.output}, *example)
    for part in parts:
        projected = F.linear(values[part.x], part.weight.tensor(graph), part.bias.tensor(graph))
        held = features_last(values[part.value], part.lane.dims)
        rows = list(part.lane.flat())
        order = [rows.index(r) for r in dict.fromkeys(rows)]
        assert close(projected, held[..., order].reshape(projected.shape))
    out = F.linear(values[o["pre_out"]], o["w_out"].tensor(graph), o["b_out"].tensor(graph))
    assert close(out, values[site.output])
    assert values[o["pre_out"]].shape[-1] == H * HEAD


@pytest.mark.parametrize("name", ["fused", "written", "packed", "normed", "rotary", "grouped", "cross", "joint"])
def test_the_core_is_attention_over_its_operands(name: str) -> None:
    graph, example = graph_of(SPELLINGS[name][0])
    o = only(graph).operands
    q, k, v, core = graph.values([o["q"], o["k"], o["v"], o["core"]], *example).values()
    k = k.transpose(-1, -2) if name == "written" else k
    assert close(attend(q, k, v, None), core)


@pytest.mark.parametrize("name", ["linear states", "linear transposed"])
def test_linear_attention_names_its_three_projections(name: str) -> None:
    found = only(graph_of(SPELLINGS[name][0])[0]).weights()
    assert [str(found[f"w_{letter}"]) for letter in "qkv"] == ["q.weight", "k.weight", "v.weight"]


@pytest.mark.parametrize("name", [n for n in SPELLINGS if n not in ("rotary complex",)])
def test_the_exported_spelling_is_the_same_site(name: str) -> None:
    graph, example = graph_of(SPELLINGS[name][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = Graph.from_export(torch.export.export(graph.root, example, strict=False), graph.root)
    assert fingerprint(only(graph)) == fingerprint(only(oracle))


def test_packed_by_head_has_interleaved_rows() -> None:
    weights = only(graph_of(packed_by_head)[0]).weights()
    assert weights["w_q"].rows == tuple(h * 3 * HEAD + i for h in range(H) for i in range(HEAD))


def test_a_joint_attention_has_two_streams_and_names_the_main_one() -> None:
    site = only(graph_of(joint)[0])
    text, image = site.operands["streams"]
    assert text.out is None
    assert image.out.node is site.output
    assert str(site.operands["w_q"]) == "q.weight"
    assert str(text.q.weight) == "q_text.weight"
    assert (text.q.offset, image.q.offset) == (0, 5)


def test_an_opaque_multihead_attention_names_its_weights_but_no_place_for_gates() -> None:
    graph, example = graph_of(opaque)
    site = only(graph)
    assert site.operands["core_kind"] == "mha"
    assert site.operands["pre_out"] is None
    assert (site.shapes["heads"], site.shapes["head_dim"]) == (H, HEAD)
    x, out = graph.values([site.operands["x"], site.output], *example).values()
    q, k, v = (split(F.linear(x, *(site.operands[f"{p}_{n}"].tensor(graph) for p in "wb"))) for n in "qkv")
    o = site.operands
    assert close(F.linear(join(attend(q, k, v, None)), o["w_out"].tensor(graph), o["b_out"].tensor(graph)), out)


def test_an_exported_multihead_attention_has_the_same_rows() -> None:
    graph, example = graph_of(opaque)
    oracle = Graph.from_export(torch.export.export(graph.root, example, strict=False), graph.root)
    ours, theirs = only(graph).weights(), only(oracle).weights()
    assert {n: str(w) for n, w in ours.items()} == {n: str(w) for n, w in theirs.items()}


def test_attention_over_values_that_are_no_projections_is_a_miss() -> None:
    def pooled(m: Net, x: Tensor, text: Tensor) -> Tensor:
        memory = torch.randn(2, H, 4, HEAD, dtype=x.dtype)
        return m.out(join(F.scaled_dot_product_attention(split(m.q(x)), memory, memory)))

    graph, _ = graph_of(pooled)
    assert [s for s in sites(graph) if s.kind == "attention"] == []
    assert any(m.kind == "attention" and "not projections" in m.reason for m in misses(graph))


@pytest.mark.parametrize("name", ["fused", "written", "linear states"])
def test_products_outside_attention_are_not_attention(name: str) -> None:
    def more(m: Net, x: Tensor, text: Tensor) -> Tensor:
        scale = torch.softmax(text.mean((1, 2)), dim=0)[:, None, None]
        mixed = (x.transpose(1, 2) @ x) @ x.transpose(1, 2)
        return SPELLINGS[name][0](m, x, text) * scale + mixed.transpose(1, 2) * 1e-3

    assert only(graph_of(more)[0]).operands["core_kind"] == SPELLINGS[name][2]
