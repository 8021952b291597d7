"""Hugging Face MoE models on moefx's operators: ``experts_implementation="moefx"``.

    moefx.integrations.register_experts()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moefx")
    model.set_experts_implementation("moefx")            # or later

transformers dispatches the forward of every experts module through a table of functions; this adds one.  Weights stay
where they are and as they are.  Unlike ``grouped_mm`` it takes any dtype, width and bias and never waits for a device;
under ``torch.compile(model, backend="moefx")`` it becomes emitted kernels.

Shapes: T tokens, K experts per token, R = T·K rows sorted by expert, E experts, D width, m hidden width of one expert.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moefx import ops
from moefx.errors import MoefxError

NAME = "moefx"


def register_experts() -> None:
    """Add ``"moefx"`` to the experts implementations of transformers; again does nothing.

    Raises:
        MoefxError: transformers is missing, or too old to have an experts interface.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise MoefxError(
            "register moefx as an experts implementation",
            found=f"{error}",
            do="pip install 'transformers>=5'",
        ) from error
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the weighted sum of the chosen experts, ``[T, D]``; ``self`` is transformers' experts module.

    ``top_k_index`` and ``top_k_weights`` are ``[T, K]``; an index of ``num_experts`` or more (the sentinel of expert
    parallelism) contributes nothing.
    """
    k = top_k_index.shape[-1]
    order, offsets = ops.group(top_k_index, self.num_experts)
    w_in, b_in = _weights(self, "gate_up_proj" if self.has_gate else "up_proj")
    h = ops.grouped_linear(hidden_states.to(w_in.dtype), w_in, b_in, order, offsets, k)
    h = self._apply_gate(h) if self.has_gate else ops.activate(self.act_fn, h)
    w_out, b_out = _weights(self, "down_proj")
    rows = ops.grouped_linear(h, w_out, b_out, None, offsets)
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    out: Tensor = ops.combine(rows, order, top_k_weights)
    return out.to(hidden_states.dtype)


def _weights(module: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Return a stacked weight as ``[E, out, in]``, a view of the module's own, and its bias."""
    weight: Tensor = getattr(module, name)
    bias: Tensor | None = getattr(module, f"{name}_bias") if module.has_bias else None
    return weight.transpose(1, 2) if module.is_transposed else weight, bias
