"""Kernels of routed tokens: in Triton's interpreter, what compilers make of them, and where none is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.codegen import Refusal, TokenLowering, lowerings, target, trace_pointwise
from moefx.codegen.aot import Compiled, Job, compile_all
from moefx.codegen.kernels import TokenGatherSpec, TokenGradSpec, TokenProgram, TokenScatterSpec, TokenSumSpec
from moefx.codegen.reasons import CannotLower
from moefx.codegen.spec import Kernel
from moefx.graph import trace
from moefx.routing.tokens import gather_tokens, put_tokens
from tests.codegen_support import DEVICES, needs_triton


def modulated(width: int = 1152) -> TokenProgram:
    """Return a norm with adaLN behind it."""
    program = trace_pointwise(lambda z, scale, shift: z * scale + shift, width, 3)
    return TokenProgram(width, "bfloat16", program, ("sample", "sample"), "layer", 1e-6)


def put_back(width: int = 1152) -> TokenProgram:
    """Return a gate per sample, a weight per token and the residual."""
    program = trace_pointwise(lambda y, gate, weight, x: x + gate * weight * y, width, 4)
    return TokenProgram(width, "bfloat16", program, ("sample", "token", "row"))


def kernels(width: int = 1152) -> list[Kernel]:
    return [
        TokenGatherSpec(modulated(width), keeps=True),
        TokenScatterSpec(put_back(width)),
        TokenGradSpec(modulated(width), "gather", adds=True),
        TokenGradSpec(put_back(width), "scatter"),
        TokenSumSpec(width, "bfloat16"),
    ]


CASES = [*((device, 1152) for device in DEVICES), ("sm_90", 3072), ("gfx942", 3072)]


@needs_triton
@pytest.mark.slow
def test_kernels_fit_their_targets() -> None:
    jobs = [
        Job(
            spec.name,
            spec.emit(spec.schedule(target(device), 0, 0)),
            tuple(spec.arguments(4098, 7, 39)),
            target(device),
        )
        for device, width in CASES
        for spec in kernels(width)
    ]
    for job, found in zip(jobs, compile_all(jobs), strict=True):
        assert isinstance(found, Compiled), found
        assert not found.problems(job.target), job.name
        assert 0 < found.main.registers <= 128, "two programs of eight warps share a processor"


@pytest.mark.parametrize(("place", "name"), [(0, "gather"), (1, "scatter"), (2, "grad_gather"), (3, "grad_scatter")])
def test_sources_are_stable(place: int, name: str, golden: Callable[[str, str], None]) -> None:
    spec = kernels()[place]
    golden(f"kernel_token_{name}.py", spec.emit(spec.schedule(target("sm_90"), 0, 0)))


def test_what_a_row_program_cannot_be_is_said() -> None:
    with pytest.raises(CannotLower, match="do not fit into registers"):
        TokenProgram(10_000, "bfloat16", norm="layer")
    with pytest.raises(CannotLower, match="float64"):
        TokenProgram(64, "float64")
    with pytest.raises(CannotLower, match="1 inputs and 1 operands"):
        TokenProgram(64, "float32", operands=("row",))


class Block(nn.Module):
    """A block by token; ``spoil`` names what stands in a kernel's way."""

    def __init__(self, spoil: str = "") -> None:
        super().__init__()
        self.norm, self.linear, self.spoil = nn.LayerNorm(24), nn.Linear(24, 24), spoil

    def forward(self, x: Tensor, index: Tensor, scale: Tensor) -> Tensor:
        rows = gather_tokens(x, index)
        h = rows if self.spoil == "no norm" else F.normalize(rows) if self.spoil == "other norm" else self.norm(rows)
        y = self.linear(h * scale[:, None])
        if self.spoil == "overwritten":
            rows = rows.add_(1.0)
        return put_tokens(x, index, y if self.spoil == "plain" else rows + y)


def found_in(spoil: str, dtype: torch.dtype = torch.float32) -> list[TokenLowering | Refusal]:
    given = (torch.randn(2, 9, 24, dtype=dtype), torch.tensor([[0, 3], [1, 8]]), torch.randn(2, 24, dtype=dtype))
    return lowerings(trace(Block(spoil).to(dtype), given))  # type: ignore[return-value]


def test_a_traced_graph_is_read() -> None:
    gather, scatter = found_in("")
    assert isinstance(gather, TokenLowering)
    assert isinstance(scatter, TokenLowering)
    assert gather.spec.program.operands == ("column", "column", "sample")
    assert gather.inputs[2:4] == ("norm.weight", "norm.bias")
    assert isinstance(gather.spec, TokenGatherSpec)
    assert gather.spec.keeps, "the residual reads the tokens as well"
    assert scatter.spec.program.operands == ("row",)


@pytest.mark.parametrize(
    ("spoil", "place", "reason"),
    [
        ("no norm", 0, "no norm reads its tokens"),
        ("other norm", 0, "no norm reads its tokens"),
        ("plain", 1, "a copy needs no kernel"),
    ],
)
def test_where_there_is_no_kernel_the_reason_is_said(spoil: str, place: int, reason: str) -> None:
    refusal = found_in(spoil)[place]
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason


def test_float64_is_refused() -> None:
    for refusal in found_in("", torch.float64):
        assert isinstance(refusal, Refusal)
        assert "float64" in refusal.reason


def test_what_is_overwritten_in_between_is_not_fused() -> None:
    _, scatter = found_in("overwritten")
    assert isinstance(scatter, TokenLowering), "the sum alone, behind the change, is fused"
    assert [node.name for node in scatter.nodes if "add_" in str(node.target)] == []
