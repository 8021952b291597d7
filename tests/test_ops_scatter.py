"""``moefx::scatter`` against a loop, in every dtype, with rows that belong to nobody."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefx.errors import InputError
from moefx.ops import scatter

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def given_rows(rows: int, tokens: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=draws).to(dtype)
    return values, torch.randint(0, tokens + 1, (rows,), generator=draws), torch.randn(rows, generator=draws)


@settings(max_examples=40)
@given(
    st.integers(0, 9), st.integers(0, 5), st.integers(1, 4), st.sampled_from(list(DTYPES)), st.integers(0, 20)
)  # fmt: skip
def test_sum_of_rows(rows: int, tokens: int, width: int, dtype: torch.dtype, seed: int) -> None:
    values, index, weights = given_rows(rows, tokens, width, dtype, seed)
    wanted = torch.zeros(tokens, width, dtype=torch.float64)
    for r in range(rows):
        if int(index[r]) < tokens:
            wanted[index[r]] += float(weights[r]) * values[r].double()
    found = scatter(values, index, weights, tokens)
    assert (found.shape, found.dtype) == (wanted.shape, dtype)
    assert torch.allclose(found.double(), wanted, atol=DTYPES[dtype] * 10, rtol=DTYPES[dtype])


def test_gradients_and_registration() -> None:
    values, index, weights = given_rows(7, 3, 2, torch.float64)
    leaves = values.requires_grad_(), weights.double().requires_grad_()
    torch.autograd.gradcheck(lambda v, w: scatter(v, index, w, 3), leaves)
    torch.library.opcheck(torch.ops.moefx.scatter.default, (leaves[0], index, leaves[1], 3))


def test_refusals() -> None:
    values, index, weights = given_rows(4, 3, 2, torch.float32)
    for rows, tokens, gates in (
        (values[0], index, weights),
        (values, index[:3], weights),
        (values, index.int(), weights),
        (values.long(), index, weights),
    ):
        with pytest.raises(InputError, match=r"moefx\.ops\.scatter"):
            scatter(rows, tokens, gates, 3)
