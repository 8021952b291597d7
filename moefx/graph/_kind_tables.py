"""Tables behind :mod:`moefx.graph.kinds`: which torch spelling is which operation, and of which kind that is.

Torch functions are recognised by object, never by the name of a user's function; methods and ATen operators by name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def _named_functions() -> dict[Any, str]:
    found: dict[Any, str] = {}
    for room in (math, operator, torch.special, torch.linalg, torch, F, torch._C._nn, torch.nn.utils.rnn):
        for name in dir(room):
            value = getattr(room, name, None)
            if callable(value) and not isinstance(value, type) and not name.startswith("__"):
                found.setdefault(value, name)
    found[F.scaled_dot_product_attention] = "scaled_dot_product_attention"
    found[torch.nn.functional.gelu] = "gelu"
    return found


FUNCTIONS: dict[Any, str] = _named_functions()


def _words(joined: str) -> list[str]:
    return joined.split()


def _kinds(**names: str) -> dict[str, str]:
    return {name: kind for kind, joined in names.items() for name in _words(joined)}


ALIASES: dict[str, str] = _kinds(
    abs="absolute",
    batch_norm="_native_batch_norm_legit_no_training native_batch_norm",
    bitwise_and="and_",
    bitwise_not="invert",
    bitwise_or="or_",
    cat="concat concatenate",
    clamp="clip",
    convolution="_convolution convolution",
    div="truediv true_divide divide",
    dropout="native_dropout feature_dropout alpha_dropout dropout1d dropout2d dropout3d",
    group_norm="native_group_norm",
    layer_norm="native_layer_norm",
    log_softmax="_log_softmax",
    movedim="moveaxis",
    mul="multiply",
    neg="negative",
    positive="pos",
    pow="float_power",
    rms_norm="_fused_rms_norm",
    sigmoid="expit",
    silu="swish",
    softmax="_softmax logit_softmax safe_softmax _safe_softmax",
    sub="subtract",
    to="_to_copy type",
    transpose="swapaxes swapdims",
    view="_unsafe_view",
)

IN_PLACE_OPERATORS = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "ipow": "pow",
    "iand": "bitwise_and",
}


KINDS: dict[str, str] = _kinds(
    linear="linear addmm",
    conv="conv1d conv2d conv3d convolution",
    act="""
        gelu silu relu relu6 leaky_relu elu selu celu mish hardswish hardsigmoid hardtanh sigmoid tanh
        softplus softsign logsigmoid log_sigmoid tanhshrink softshrink hardshrink threshold erf
    """,
    add="add",
    sub="sub rsub",
    mul="mul",
    div="div",
    pointwise="""
        neg abs exp exp2 expm1 log log2 log1p sqrt rsqrt reciprocal square pow sin cos tan atan atan2 sinh
        cosh asinh clamp clamp_min clamp_max maximum minimum where sign round floor ceil trunc remainder
        fmod sinc eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not
        nan_to_num masked_fill lerp addcmul addcdiv erfc isnan isinf isfinite floor_divide floordiv mod
    """,
    identity="""
        positive to contiguous clone type_as float half bfloat16 double detach alias lift_fresh
        lift_fresh_copy requires_grad_ cpu cuda int long bool view_as_real_copy detach_copy
        _assert_tensor_metadata
    """,
    norm="layer_norm rms_norm group_norm batch_norm instance_norm normalize local_response_norm",
    sdpa="""
        scaled_dot_product_attention _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math
        _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps
    """,
    mha="multi_head_attention_forward _native_multi_head_attention",
    routed="""
        moefx.group.default moefx.grouped_linear.default moefx.combine.default moefx.scatter.default
        moefx.head_attention.default
    """,
    matmul="matmul bmm mm baddbmm einsum tensordot mv dot",
    softmax="softmax",
    reshape="""
        view reshape flatten unflatten unsqueeze squeeze view_as reshape_as ravel atleast_1d atleast_2d
        atleast_3d
    """,
    permute="transpose permute t T mT H mH movedim adjoint numpy_T matrix_H",
    expand="expand expand_as broadcast_to",
    slice="getitem select slice narrow",
    split="""
        chunk split split_with_sizes unbind tensor_split unsafe_chunk unsafe_split unsafe_split_with_sizes
        hsplit vsplit
    """,
    cat="cat hstack vstack",
    stack="stack pad_sequence",
    scatter="""
        index_copy index_add scatter scatter_add scatter_reduce masked_scatter index_put slice_scatter select_scatter
    """,
    size="""
        size sym_size shape numel sym_numel nelement dim ndim ndimension stride sym_stride storage_offset
        element_size len dtype device layout requires_grad is_floating_point
    """,
    reduce="""
        mean sum amax amin max min var std norm vector_norm prod cumsum cumprod argmax argmin all any
        logsumexp var_mean
    """,
    embedding="embedding one_hot embedding_bag bucketize",
    gather="""
        index gather index_select take take_along_dim masked_select topk sort argsort nonzero scatter
        scatter_add index_put
    """,
    pad="pad constant_pad_nd",
    repeat="repeat repeat_interleave tile roll flip",
    outer="outer ger meshgrid cartesian_prod",
    complex="view_as_complex view_as_real polar complex real imag conj resolve_conj",
    resample="""
        interpolate upsample_nearest2d upsample_bilinear2d avg_pool1d avg_pool2d avg_pool3d max_pool2d
        adaptive_avg_pool2d pixel_shuffle pixel_unshuffle unfold fold adaptive_avg_pool1d upsample_bicubic2d
        upsample_nearest3d upsample_nearest1d conv_transpose1d conv_transpose2d conv_transpose3d im2col
        col2im
    """,
    factory="""
        arange zeros ones full empty zeros_like ones_like full_like empty_like rand randn rand_like
        randn_like linspace eye tensor new_zeros new_ones new_full new_empty new_tensor tril_indices
        triu_indices scalar_tensor logspace as_tensor bernoulli randint
    """,
    mask="tril triu",
    setitem="setitem copy",
    cumulative="cummax cummin",
    dropout="dropout",
)

NONLINEAR = frozenset(
    _words("""
        abs asinh atan atan2 ceil celu clamp clamp_max clamp_min cos cosh elu eq erf erfc exp exp2 expm1
        floor fmod ge gelu gt hardshrink hardsigmoid hardswish hardtanh le leaky_relu log log1p log2
        log_sigmoid logsigmoid lt maximum minimum mish ne pow reciprocal relu relu6 remainder round rsqrt
        selu sigmoid sign silu sin sinc sinh softplus softshrink softsign sqrt square tan tanh tanhshrink
        threshold trunc where
    """)
)


# Options of pointwise functions with their defaults, in the order in which they may be given by position.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gelu": {"approximate": "none"},
    "leaky_relu": {"negative_slope": 0.01},
    "elu": {"alpha": 1.0},
    "celu": {"alpha": 1.0},
    "hardtanh": {"min_val": -1.0, "max_val": 1.0},
    "softplus": {"beta": 1, "threshold": 20},
    "softshrink": {"lambd": 0.5},
    "hardshrink": {"lambd": 0.5},
    "add": {"alpha": 1},
    "sub": {"alpha": 1},
}
POSITIONAL = frozenset({"leaky_relu", "elu", "celu", "hardtanh", "softplus", "softshrink", "hardshrink"})


def _activation(name: str, *fields: str) -> Callable[[nn.Module], tuple[str, dict[str, Any]]]:
    return lambda module: (name, {field: getattr(module, field) for field in fields})


# Leaf modules that are one pointwise function: how to read its name and options.
ACTIVATION_MODULES: dict[type[nn.Module], Callable[[nn.Module], tuple[str, dict[str, Any]]]] = {
    nn.GELU: _activation("gelu", "approximate"),
    nn.SiLU: _activation("silu"),
    nn.ReLU: _activation("relu"),
    nn.ReLU6: _activation("relu6"),
    nn.LeakyReLU: _activation("leaky_relu", "negative_slope"),
    nn.ELU: _activation("elu", "alpha"),
    nn.SELU: _activation("selu"),
    nn.CELU: _activation("celu", "alpha"),
    nn.Mish: _activation("mish"),
    nn.Hardswish: _activation("hardswish"),
    nn.Hardsigmoid: _activation("hardsigmoid"),
    nn.Hardtanh: _activation("hardtanh", "min_val", "max_val"),
    nn.Sigmoid: _activation("sigmoid"),
    nn.Tanh: _activation("tanh"),
    nn.Softplus: _activation("softplus", "beta", "threshold"),
    nn.Softsign: _activation("softsign"),
    nn.LogSigmoid: _activation("logsigmoid"),
    nn.Tanhshrink: _activation("tanhshrink"),
    nn.Softshrink: _activation("softshrink", "lambd"),
    nn.Hardshrink: _activation("hardshrink", "lambd"),
}

NORM_MODULES: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
    nn.LocalResponseNorm,
)
DROPOUT_MODULES: tuple[type[nn.Module], ...] = (nn.modules.dropout._DropoutNd,)
CONV_MODULES: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
RESHAPE_MODULES: tuple[type[nn.Module], ...] = (nn.Flatten, nn.Unflatten)
RESAMPLE_MODULES: tuple[type[nn.Module], ...] = (
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.conv._ConvTransposeNd,
)
