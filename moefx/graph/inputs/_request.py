"""What a maker of example inputs works with: the model's config, the sizes chosen, and tensors of the right kind.

Shapes: B batch, C latent channels, F latent frames, H x W latent size, T image tokens, L text tokens, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from moefx.errors import InputError

GRID = (4, 6)
"""Rows and columns of image tokens; 4 x 6 = 24 differs from every other size chosen here."""
FRAMES = 3
"""Latent frames of a video model."""
TEXT_TOKENS = 7
"""Length of the text, for models which take any."""


class Request:
    """One call of `synthesise`: read sizes with ``want``/``get``, make tensors with ``normal``, ``integers`` and so on.

    Every random tensor is drawn on the CPU in float32 from one private generator and then moved to the model's device
    and float type, so a seed gives the same numbers everywhere. On the meta device nothing is drawn.
    """

    def __init__(self, model: nn.Module, batch: int, seed: int) -> None:
        self.model, self.batch = model, batch
        config = getattr(model, "config", None)
        self.config: Mapping[str, Any] = config if isinstance(config, Mapping) else {}
        self.parameters = _forward_parameters(model)
        tensors = [*model.parameters(), *model.buffers()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.dtype = _main_dtype(tensors)
        self._generator = torch.Generator().manual_seed(seed)

    # ---- config -----------------------------------------------------------------------------------------------------

    def get(self, *names: str, default: Any = None) -> Any:
        """Return the first of the config entries that is set (present and not None), else ``default``."""
        return next((self.config[n] for n in names if self.config.get(n) is not None), default)

    def want(self, *names: str, argument: str, shape: str) -> Any:
        """Return the first of the config entries that is set, or raise an InputError naming the argument to pass."""
        value = self.get(*names)
        if value is None:
            raise self.refuse(argument, shape, f"none of {', '.join(map(repr, names))} is set in the model's config")
        return value

    def refuse(self, argument: str, shape: str, why: str) -> InputError:
        """Return the error for an argument that cannot be made; ``shape`` is what is known about it, or ``""``."""
        name = type(self.model).__name__
        spelled = f"{argument}: {shape or describe(self.parameters.get(argument), self.dtype)}"
        return InputError(
            f"cannot make example inputs for {name}: argument {argument!r} of forward is not understood",
            found=f"{why}; {name}.forward{self.spell_signature()}",
            do=f"pass it yourself ({spelled}) among the inputs, or register a maker: @register_inputs({name!r})",
        )

    def spell_signature(self) -> str:
        """Return the signature of ``forward`` without ``self``, in one line."""
        return "(" + ", ".join(str(p) for p in self.parameters.values()) + ")"

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @property
    def patch(self) -> tuple[int, int, int]:
        """Return (frames, rows, columns) of one patch."""
        size = self.get("patch_size", default=1)
        time = self.get("patch_size_t", default=1)
        if isinstance(size, Sequence):
            padded = (1,) * (3 - len(size)) + tuple(size)
            return padded[0], padded[1], padded[2]
        return time, size, size

    @property
    def grid(self) -> tuple[int, int]:
        """Return (rows, columns) of image tokens: the model's own where it holds a fixed position table, else small."""
        for module in self.model.modules():
            if type(module).__name__ == "PatchEmbed" and _fixed_table(module):
                return int(module.height), int(module.width)  # type: ignore[arg-type]
        return GRID

    @property
    def size(self) -> tuple[int, int]:
        """Return (H, W), the latent size in pixels of the latent."""
        return self.grid[0] * self.patch[1], self.grid[1] * self.patch[2]

    @property
    def frames(self) -> int:
        """Return F, the number of latent frames."""
        return FRAMES * self.patch[0]

    @property
    def tokens(self) -> int:
        """Return T, the number of image tokens of one frame."""
        return prod(self.grid)

    @property
    def text(self) -> int:
        """Return L, the number of text tokens."""
        return TEXT_TOKENS

    # ---- tensors ----------------------------------------------------------------------------------------------------

    def place(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor on the model's device, cast to ``dtype`` if given."""
        return tensor.to(device=self.device, dtype=dtype or tensor.dtype)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return standard normal numbers in the model's float type."""
        dtype = dtype or self.dtype
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return self.place(torch.randn(shape, generator=self._generator), dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Return numbers of [low, high) in the model's float type."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype or self.dtype, device="meta")
        drawn = torch.rand(shape, generator=self._generator) * (high - low) + low
        return self.place(drawn, dtype or self.dtype)

    def integers(self, high: int, *shape: int, low: int = 0) -> Tensor:
        """Return int64 numbers of [low, high)."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=torch.int64, device="meta")
        return self.place(torch.randint(low, high, shape, generator=self._generator))

    def ones(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return ones in the model's float type unless another is given."""
        return torch.ones(shape, dtype=dtype or self.dtype, device=self.device)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return zeros in the model's float type unless another is given."""
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def mask(self, *shape: int, dtype: torch.dtype = torch.bool) -> Tensor:
        """Return a mask that keeps everything: the one mask whose value cannot specialise a captured graph."""
        return torch.ones(shape, dtype=dtype, device=self.device)

    def rows(self, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
        """Return [B, len(values)]: the same row for each batch element."""
        return self.place(torch.tensor([list(values)] * self.batch), dtype or self.dtype)

    def steps(self) -> Tensor:
        """Return int64 [B]: distinct timesteps of 1..999 where the batch allows."""
        if self.device.type == "meta":
            return torch.empty(self.batch, dtype=torch.int64, device="meta")
        order = torch.randperm(999, generator=self._generator) + 1
        return self.place(order.repeat(-(-self.batch // 999))[: self.batch])

    def float_steps(self) -> Tensor:
        """Return the timesteps of 1..999 in the model's float type."""
        return self.steps().to(self.dtype)

    def unit_steps(self) -> Tensor:
        """Return times of (0, 1), for models that scale by 1000 themselves."""
        return (self.steps().float() / 1000).to(self.dtype)

    def positions(self, *lengths: int, axes: int | None = None) -> Tensor:
        """Return float32 [prod(lengths), axes]: grid coordinates in row-major order, right-aligned in the axes."""
        grids = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in lengths), indexing="ij")
        ids = torch.stack([g.reshape(-1) for g in grids], dim=-1)
        return self.place(nn.functional.pad(ids, ((axes or len(lengths)) - len(lengths), 0)))

    def angles(self, tokens: int, width: int) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), float32 [tokens, width]: one-axis rotary tables with each frequency repeated twice."""
        half = torch.arange(0, width, 2, dtype=torch.float32) / width
        phase = torch.outer(torch.arange(tokens, dtype=torch.float32), 10000.0**-half).repeat_interleave(2, dim=1)
        return self.place(phase.cos()), self.place(phase.sin())

    def default(self, *, without: Sequence[str] = (), **given: Any) -> dict[str, Any]:
        """Return the arguments that the rules by name make, with ``given`` instead of what they would say."""
        from moefx.graph.inputs._arguments import by_rules

        return by_rules(self, given, frozenset(without))


def describe(parameter: inspect.Parameter | None, dtype: torch.dtype) -> str:
    """Return what the annotation of an argument says about its type and dtype, for an error message."""
    if parameter is None or parameter.annotation is inspect.Parameter.empty:
        return "a value of unknown type"
    spelled = (
        parameter.annotation
        if isinstance(parameter.annotation, str)
        else inspect.formatannotation(parameter.annotation)
    )
    kinds = {
        "LongTensor": "int64 tensor",
        "BoolTensor": "bool tensor",
        "Tensor": f"{str(dtype).removeprefix('torch.')} tensor",
    }
    known = next(
        (text for word, text in kinds.items() if spelled.removeprefix("torch.").split(" ")[0].endswith(word)), ""
    )
    return f"{known} of unknown shape" if known else f"a value of type {spelled}"


def _main_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the float type of most elements: some models keep a few layers in float32, and fp8 is storage only."""
    elements: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.numel()
    return max(elements, key=lambda dtype: elements[dtype], default=torch.float32)


def _fixed_table(module: nn.Module) -> bool:
    return getattr(module, "pos_embed", None) is not None and not getattr(module, "pos_embed_max_size", None)


def _forward_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(inspect.unwrap(type(model).forward)).parameters)
    parameters.pop(next(iter(parameters), ""), None)
    return parameters
