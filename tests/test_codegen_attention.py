"""Kernels of routed-head attention: in Triton's interpreter, and what compilers make of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moefx import ops
from moefx.codegen import target
from moefx.codegen.aot import MATRIX_INSTRUCTIONS, Compiled, Job, compile_all
from moefx.codegen.kernels import HeadAttentionSpec
from moefx.codegen.kernels.head_attention import parts_of
from moefx.graph import trace
from moefx.inspect.lowered import others_of, write
from tests.codegen_support import needs_triton


def test_heads_are_cut_into_powers_of_two() -> None:
    assert parts_of(64) == [(0, 64, False)]
    assert parts_of(72) == [(0, 64, False), (64, 16, True)]
    assert parts_of(96) == [(0, 64, False), (64, 32, False)]
    assert parts_of(128) == [(0, 128, False)]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("device", ["sm_80", "sm_90"])
@pytest.mark.parametrize("width", [64, 72, 96, 128])
def test_kernels_fit_their_target(device: str, width: int) -> None:
    chosen = target(device)
    specs = [HeadAttentionSpec(width, 16, "bfloat16", stage) for stage in ("forward", "queries", "keys")]
    jobs = [
        Job(spec.name, spec.emit(spec.schedule(chosen, 1024, 128)), tuple(spec.arguments(4098, 7, 39)), chosen)
        for spec in specs
    ]
    for found in compile_all(jobs):
        assert isinstance(found, Compiled), found
        assert not found.problems(chosen)
        assert found.main.count(MATRIX_INSTRUCTIONS[device]) > 0, found.main.row()


@needs_triton
@pytest.mark.slow
def test_a_padded_head_in_float32_does_not_spill() -> None:
    chosen = target("sm_90")
    specs = [
        HeadAttentionSpec(72, 16, "float32", stage, precision)
        for stage in ("forward", "queries", "keys")
        for precision in ("ieee", "tf32")
    ]
    jobs = [
        Job(spec.name, spec.emit(spec.schedule(chosen, 1024, 128)), tuple(spec.arguments(4098, 7, 39)), chosen)
        for spec in specs
    ]
    for spec, found in zip(specs, compile_all(jobs), strict=True):
        assert isinstance(found, Compiled), found
        assert not found.problems(chosen), (spec.stage, spec.precision)


def test_a_dump_shows_the_kernels() -> None:
    class Layer(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
            return ops.head_attention(q, k, v, gates)

    given = (torch.randn(1, 5, 2, 8), *(torch.randn(1, 4, 2, 8) for _ in range(2)), torch.rand(1, 5, 2))
    graph = trace(Layer(), given)
    text = write(graph, "lowered", "text", None)
    assert "attention of routed heads at" in text
    assert "head_attention_keys_2x8_float32" in text
    assert "def kernel(" in write(graph, "kernels", "text", None)
    assert '"attention of routed heads"' in write(graph, "lowered", "json", None)
    assert [one.name for one in others_of(graph)[0].training] == [one.name for one in others_of(graph)[0].kernels]
