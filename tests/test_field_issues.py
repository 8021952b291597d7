"""Failures that users of other mixture-of-experts code reported, each as a test that names where."""

import copy
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moefx
from examples.dit import DiT
from moefx.errors import NothingMatched, OptionError, PlanError
from moefx.routing import DenseFFN, Experts, LinearRouter, RoutedFFN, random_weights
from moefx.routing.by_expert import ExpertChoice
from moefx.routing.initialise import copies
from moefx.routing.selectors import Selector, Threshold, TopP

D, F_, E = 16, 24, 4


def dit() -> tuple[DiT, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = DiT(width=32, label_dropout=0.0).eval()
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model, (torch.randn(2, 1, 8, 8), torch.tensor([10.0, 900.0]), torch.tensor([1, 2]))


def layer(experts: int = E, *, mode: str | None = None, selector: Selector | None = None, **options: Any) -> RoutedFFN:
    seeded = torch.Generator().manual_seed(0)
    stack = Experts(random_weights(D, F_, num_experts=experts, generator=seeded), F.gelu)
    router = LinearRouter(D, experts, std=1.0, generator=seeded)
    return RoutedFFN(router, stack, mode=mode, selector=selector, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_expert_is_the_dense_network_forward_and_backward(dtype: torch.dtype) -> None:
    """Megablocks issue 107: a mixture of one expert trained worse than the dense network.

    To the bit in float32. In bfloat16 the output bias is added after a rounding, because it is outside the sum.
    """
    exact = {"rtol": 0.0, "atol": 0.0} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    dense = random_weights(D, F_)
    plain = DenseFFN(dense, F.gelu).to(dtype)
    routed = RoutedFFN(LinearRouter(D, 1), Experts(copies(dense, 1), F.gelu), top_k=1).to(dtype)
    x = torch.randn(3, 7, D, dtype=dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = routed(ours), plain(theirs)
    torch.testing.assert_close(a, b, **exact)
    (a * x).sum().backward()
    (b * x).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, **exact)
    torch.testing.assert_close(routed.experts.w_in.grad[0], plain.w_in.grad, **exact)


def test_a_capacity_beyond_need_takes_each_token_once() -> None:
    """Megablocks issue 125: a capacity of 16384 allocated a terabyte."""
    routed = layer(selector=ExpertChoice(capacity=1e6))
    x = torch.randn(2, 5, D)
    routing = routed.route(x)
    assert routing.tokens is not None
    assert routing.tokens.shape == (E, 10)
    every = layer(selector=ExpertChoice(capacity=float(E)))
    torch.testing.assert_close(routed(x), every(x))


def test_experts_without_tokens_get_gradients_of_zero() -> None:
    """PyTorch issue 126616: they were None, which breaks distributed optimisers."""
    routed = layer(top_k=1)
    with torch.no_grad():
        routed.router.weight.zero_()  # ties: every token goes to expert 0
    routed(torch.randn(2, 5, D)).square().mean().backward()
    gradient = routed.experts.w_in.grad
    assert gradient[0].abs().max() > 0
    assert torch.equal(gradient[1:], torch.zeros_like(gradient[1:]))
    assert routed.record.load.tolist() == [1, 0, 0, 0]


def test_a_second_call_may_have_a_larger_batch() -> None:
    """Tutel issue 96: buffers of the first call were kept."""
    routed = layer()
    small, large = torch.randn(1, 3, D), torch.randn(4, 9, D)
    routed(small)
    torch.testing.assert_close(routed(large)[:1], routed(large[:1]))


def test_dense_and_routed_layers_mix() -> None:
    """Megatron-LM issue 3646: every layer had to be of one kind."""
    model, inputs = dit()
    before = model(*inputs)
    moefx.transform(model, inputs, experts=4, every=2)
    assert [isinstance(block.mlp, RoutedFFN) for block in model.blocks] == [True, False, True]
    torch.testing.assert_close(model(*inputs), before, rtol=1e-4, atol=1e-5)
    moefx.aux_loss(model).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths_that_are_no_multiple_of_anything(dtype: torch.dtype) -> None:
    """Transformers issue 48644: grouped products refused K = 1025 and transposed weights."""
    weights = random_weights(1025, 7, num_experts=3, out_dim=13)
    turned = weights.map(lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim == 3 else t)
    x = torch.randn(11, 1025, dtype=dtype)
    index, gates = torch.randint(0, 3, (11, 2)), torch.rand(11, 2)
    found = [Experts(w, F.gelu).to(dtype)(x, index, gates) for w in (weights, turned)]
    w = weights.map(lambda t: t.to(dtype).double())
    rows = [
        sum(
            gates[t, k].double()
            * (w.w_out[e] @ F.gelu(w.w_in[e] @ x[t].double() + (0 if w.b_in is None else w.b_in[e])))
            for k, e in enumerate(index[t].tolist())
        )
        for t in range(11)
    ]
    expected = torch.stack(rows) + (0 if w.b_out is None else w.b_out)
    for each in found:
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(each.double(), expected, rtol=tolerance, atol=tolerance)


def test_autocast_over_bfloat16_experts() -> None:
    """PyTorch issue 174763: activations came out in float32 and the grouped product refused them."""
    routed = layer().to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = routed(torch.randn(2, 5, D))
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()


def test_weights_in_a_memory_map_that_is_not_aligned(tmp_path: Path) -> None:
    """Transformers, comment in moe.py: grouped products need 16-byte aligned pointers."""
    weights = random_weights(D, F_, num_experts=E)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\0" * 2 + weights.w_in.numpy().tobytes())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
        raw = torch.frombuffer(bytearray(memory[:]), dtype=torch.uint8)[2:]
    shifted = torch.empty(raw.numel() + 2, dtype=torch.uint8)[2:].copy_(raw).view(torch.uint8)
    odd = shifted.view(-1)
    assert odd.data_ptr() % 16
    unaligned = torch.frombuffer(odd.numpy(), dtype=torch.float32).reshape(weights.w_in.shape)
    x, index, gates = torch.randn(9, D), torch.randint(0, E, (9, 2)), torch.rand(9, 2)
    plain = Experts(weights, F.gelu)
    mapped = Experts(weights, F.gelu)
    mapped.w_in = nn.Parameter(unaligned, requires_grad=False)
    torch.testing.assert_close(mapped(x, index, gates), plain(x, index, gates))


def test_converting_twice_is_refused_and_undoing_is_bitwise() -> None:
    """A second conversion used to wrap experts in experts."""
    model, inputs = dit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moefx.transform(model, inputs, experts=4)
    with pytest.raises(PlanError, match="upcycle"):
        moefx.transform(model, inputs, experts=4)
    moefx.untransform(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_unknown_options_are_named_and_nothing_matched_is_an_error() -> None:
    """Mergekit issue 527 (an unknown option was ignored) and tomesd issue 50 (nothing was patched, silently)."""
    model, inputs = dit()
    with pytest.raises(OptionError, match="did you mean 'experts'"):
        moefx.transform(model, inputs, expert=4)
    with pytest.raises(NothingMatched):
        moefx.transform(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),))


def test_a_degenerate_start_of_the_router_is_warned_of() -> None:
    """Mergekit issue 93: identical gates made every expert but two idle, without a word."""
    model, inputs = dit()
    with pytest.warns(moefx.errors.MoefxWarning, match="router"):
        moefx.transform(model, inputs, experts=4, router_init="zero")


def test_statistics_are_there_after_one_forward_pass() -> None:
    """VeOmni issue 787: the router's statistics stayed zero."""
    model, inputs = dit()
    moefx.transform(model, inputs, experts=4)
    model(*inputs)
    assert all(record.load.sum() == 1 for record in model.moefx.routing.values())


SELECTORS: dict[str, Selector | None] = {
    "top-k": None,
    "top-p": TopP(0.5),
    "threshold": Threshold(E),
    "expert choice": ExpertChoice(capacity=1.0),
}


@pytest.mark.parametrize("name", SELECTORS)
def test_no_value_of_the_routed_path_reaches_the_host(name: str) -> None:
    """Minimind issue 835: three synchronisations per expert and layer. Tensors on meta have no values to read."""
    routed = copy.deepcopy(layer(selector=SELECTORS[name])).to("meta").eval()
    y = routed(torch.empty(2, 5, D, device="meta"))
    assert y.shape == (2, 5, D)
    with pytest.raises(RuntimeError):
        y[0, 0, 0].item()


@pytest.mark.parametrize("name", SELECTORS)
def test_compiles_into_one_graph_by_both_counts(name: str) -> None:
    """Minimind issue 835: a counter of graph breaks alone read zero while the model fell apart."""
    torch._dynamo.reset()
    routed, x = layer(selector=SELECTORS[name]).eval(), torch.randn(2, 5, D)
    explained = torch._dynamo.explain(routed)(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    torch._dynamo.reset()
    whole = torch.compile(routed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(x), routed(x))
