"""Kernels that are no forward projection, one file each: its spec, its tiles and its text."""

from moefx.codegen.kernels.choice_layout import ChoiceLayoutSpec
from moefx.codegen.kernels.choice_sum import ChoiceGradSpec, ChoiceSumSpec
from moefx.codegen.kernels.gate_grad import GateGradSpec
from moefx.codegen.kernels.head_attention import HeadAttentionSpec
from moefx.codegen.kernels.input_grad import InputGradSpec
from moefx.codegen.kernels.point_grad import PointGradSpec
from moefx.codegen.kernels.token_gather import TokenGatherSpec
from moefx.codegen.kernels.token_grad import TokenGradSpec
from moefx.codegen.kernels.token_program import TokenProgram
from moefx.codegen.kernels.token_scatter import TokenScatterSpec
from moefx.codegen.kernels.token_sum import TokenSumSpec
from moefx.codegen.kernels.weight_grad import WeightGradSpec

__all__ = [
    "ChoiceGradSpec",
    "ChoiceLayoutSpec",
    "ChoiceSumSpec",
    "GateGradSpec",
    "HeadAttentionSpec",
    "InputGradSpec",
    "PointGradSpec",
    "TokenGatherSpec",
    "TokenGradSpec",
    "TokenProgram",
    "TokenScatterSpec",
    "TokenSumSpec",
    "WeightGradSpec",
]
