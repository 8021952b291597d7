"""Starts from dense weights: exact layouts, expected errors, determinism, dtypes, meta."""

import math

import pytest
import torch
import torch.nn.functional as F
from routing_oracle import relative

from moefx.errors import OptionError
from moefx.routing import DenseFFN, Experts, FFNWeights, Gated, LinearRouter, RoutedFFN, initialise, random_weights


def weights(
    gated: bool = True, hidden: int = 24, dim: int = 12, dtype: torch.dtype = torch.float64, **options
) -> FFNWeights:
    return random_weights(dim, hidden, gated=gated, dtype=dtype, generator=torch.Generator().manual_seed(1), **options)


def tensors(data: FFNWeights) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(data).items() if value is not None}


def same(a: FFNWeights, b: FFNWeights) -> bool:
    return all(torch.equal(v, tensors(b)[n]) for n, v in tensors(a).items()) and tensors(a).keys() == tensors(b).keys()


def test_copies_are_bitwise_and_own_their_storage() -> None:
    plain = weights()
    stacked = initialise.copies(plain, 3)
    for name, value in tensors(stacked).items():
        dense = tensors(plain)[name]
        assert all(torch.equal(one, dense) for one in (value if name != "b_out" else [value]))
    stacked.w_in[0].zero_()
    assert plain.w_in.count_nonzero() > 0
    assert stacked.w_in[1].count_nonzero() > 0


def test_expert_a_g_is_shard_g_of_copy_a() -> None:
    plain = weights()
    stacked = initialise.granular_copies(plain, 2, 3)
    for a in range(2):
        for g in range(3):
            rows = slice(8 * g, 8 * g + 8)
            assert torch.equal(stacked.w_in[3 * a + g], plain.w_in[rows])
            assert torch.equal(stacked.w_gate[3 * a + g], plain.w_gate[rows])
            assert torch.equal(stacked.b_gate[3 * a + g], plain.b_gate[rows])
            assert torch.equal(stacked.w_out[3 * a + g], plain.w_out[:, rows])


def test_shards_by_label_hold_the_neurons_of_that_label_in_order() -> None:
    plain = weights()
    labels = torch.arange(24) % 3
    stacked = initialise.shards(plain, 3, labels)
    assert torch.equal(stacked.w_in[1], plain.w_in[1::3])
    assert torch.equal(stacked.w_out[2], plain.w_out[:, 2::3])
    with pytest.raises(OptionError, match="equally many"):
        initialise.shards(plain, 3, labels.clamp(max=1))
    with pytest.raises(OptionError, match="pad_hidden"):
        initialise.shards(plain, 5)


def test_t14_padding_is_exact_even_where_the_activation_of_zero_is_not_zero() -> None:
    plain = weights(gated=False)
    padded = initialise.pad_hidden(plain, 7)
    assert padded.hidden == 28
    x = torch.randn(5, 12, dtype=torch.float64)
    assert relative(DenseFFN(padded, torch.cosh)(x), DenseFFN(plain, torch.cosh)(x)) < 1e-14
    assert initialise.pad_hidden(plain, 8) is plain


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_drop_upcycling_replaces_one_set_of_neurons_per_expert(gated: bool, independent: bool) -> None:
    copies = initialise.copies(weights(gated, hidden=40), 4)
    changed = initialise.partially_reinitialise(copies, 0, r=0.3, independent_sets=independent)
    sets = {"w_in": (changed.w_in != copies.w_in).any(-1), "w_out": (changed.w_out != copies.w_out).any(-2)}
    if gated:
        sets["w_gate"] = (changed.w_gate != copies.w_gate).any(-1)
    assert all((chosen.sum(-1) == 12).all() for chosen in sets.values())
    assert all(torch.equal(chosen, sets["w_in"]) for chosen in sets.values()) is not independent
    assert not torch.equal(sets["w_in"][0], sets["w_in"][1])
    assert torch.equal(changed.b_in, copies.b_in)


def test_drop_upcycling_draws_with_the_moments_of_what_it_replaces() -> None:
    plain = weights(hidden=400, dim=100)
    shifted = FFNWeights(**{**vars(plain), "w_in": plain.w_in * 3 + 0.7})
    copies = initialise.copies(shifted, 2)
    changed = initialise.partially_reinitialise(copies, 0, r=0.5)
    for name in ("w_in", "w_gate", "w_out"):
        old, new = tensors(copies)[name][0], tensors(changed)[name][0]
        mask = old != new
        assert float(new[mask].mean()) == pytest.approx(float(old[mask].mean()), abs=0.02)
        assert float(new[mask].std()) == pytest.approx(float(old[mask].std()), rel=0.02)


@pytest.mark.parametrize(
    ("r", "k", "independent", "survives"),
    [(0.5, 2, False, 0.5), (0.25, 2, False, 0.75), (0.1, 2, False, 0.9), (0.5, 1, False, 0.5), (0.5, 2, True, 0.125)],
)
def test_t15_error_at_the_start(r: float, k: int, independent: bool, survives: float) -> None:
    """E[rel²] = r² + r(2 − r)/k with r the fraction of neurons that did not survive."""
    plain = weights(hidden=1024, dim=64, bias=False)
    lost = 1 - survives
    expected = math.sqrt(lost**2 + lost * (2 - lost) / k)
    act = Gated(F.silu)
    stacked = initialise.partially_reinitialise(initialise.copies(plain, 4), 0, r=r, independent_sets=independent)
    model = RoutedFFN(LinearRouter(64, 4, std=0), Experts(stacked, act), top_k=k, mode="topk_softmax")
    x = torch.randn(128, 64, dtype=torch.float64)
    assert relative(model(x), DenseFFN(plain, act)(x)) == pytest.approx(expected, rel=0.06)


def test_noise_is_relative_to_the_weights_and_on_the_chosen_neurons() -> None:
    copies = initialise.copies(weights(hidden=400, dim=100), 3)
    noisy = initialise.add_noise(copies, 0, sigma=0.01, fraction=0.25)
    for name, axis in (("w_in", -1), ("w_gate", -1), ("w_out", -2)):
        difference = tensors(noisy)[name] - tensors(copies)[name]
        touched = (difference != 0).any(axis)
        assert (touched.sum(-1) == 100).all()
        size = difference[difference != 0].std() / tensors(copies)[name].std()
        assert float(size) == pytest.approx(0.01, rel=0.02)
    assert torch.equal(noisy.b_in, copies.b_in)


@pytest.mark.parametrize("change", [initialise.add_noise, initialise.partially_reinitialise])
def test_same_seed_same_weights(change) -> None:
    copies = initialise.copies(weights(), 3)
    torch.manual_seed(5)
    first = change(copies, 11)
    torch.manual_seed(6)
    assert same(first, change(copies, 11))
    assert not same(first, change(copies, 12))
    shared = torch.Generator().manual_seed(11)
    assert same(first, change(copies, shared))
    assert not same(first, change(copies, shared))  # a generator goes on


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_keep_their_dtype_and_are_rounded_once(dtype: torch.dtype) -> None:
    low = initialise.copies(weights(dtype=dtype, hidden=64), 2)
    wide = low.map(torch.Tensor.float)
    for change in (initialise.add_noise, initialise.partially_reinitialise):
        ours, reference = change(low, 3), change(wide, 3)
        for name, value in tensors(ours).items():
            assert value.dtype == dtype
            assert value.isfinite().all()
            assert torch.equal(value, tensors(reference)[name].to(dtype)), name


def test_meta_weights_keep_their_shapes() -> None:
    plain = weights()
    on_meta = plain.map(lambda t: t.to("meta"))
    for make in (
        lambda w: initialise.copies(w, 3),
        lambda w: initialise.granular_copies(w, 2, 3),
        lambda w: initialise.add_noise(initialise.copies(w, 3), 0),
        lambda w: initialise.partially_reinitialise(initialise.copies(w, 3), 0, independent_sets=True),
        lambda w: initialise.zero_output(initialise.copies(w, 3)),
        lambda w: initialise.pad_hidden(w, 7),
        lambda w: initialise.arrange_shared(w, initialise.copies(w, 2), 2)[0],
    ):
        real, shapes = make(plain), make(on_meta)
        assert {n: t.shape for n, t in tensors(real).items()} == {n: t.shape for n, t in tensors(shapes).items()}
        assert all(t.is_meta for t in tensors(shapes).values())


def test_router_rows() -> None:
    rows = initialise.normal_rows(64, 256, 0)
    assert float(rows.std()) == pytest.approx(0.02, rel=0.02)
    tied = initialise.tied_rows(12, 8, 0, granularity=3)
    assert torch.equal(tied.reshape(4, 3, 8), tied[::3, None].expand(4, 3, 8))
    assert torch.equal(tied[::3], initialise.normal_rows(4, 8, 0))


def test_impossible_fractions_are_refused() -> None:
    copies = initialise.copies(weights(), 2)
    for fraction in (-0.1, 1.1):
        with pytest.raises(OptionError, match="fraction"):
            initialise.partially_reinitialise(copies, 0, r=fraction)
    with pytest.raises(OptionError, match="dense"):
        initialise.add_noise(weights(), 0)
    with pytest.raises(OptionError, match=r"weight 1\.5"):
        initialise.arrange_shared(weights(), copies, a=1.5)
