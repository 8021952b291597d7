"""Fixed channel masks by timestep: Denoising Task Routing (arXiv 2310.07138).

Legend: B samples, D width of the stream.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from moefx.errors import OptionError
from moefx.routing.static import Constant


def window_offset(fraction: Tensor, width: int, size: int, alpha: float) -> Tensor:
    """Return ``round(fraction^α · (D − n))``, int64: where the window of ``size`` n channels begins."""
    return (fraction.clamp(0, 1) ** alpha * (width - size)).round().to(torch.int64)


class ChannelWindow(nn.Module):
    """Masks ``[B, 1, D]`` that keep n = ⌊βD⌋ neighbouring channels; which ones slides with the timestep::

        o_t = round((t / (T − 1))^α · (D − n)),   M[t, o_t … o_t + n − 1] = 1

    Neighbouring timesteps share most of their channels; the larger α, the more timesteps share the first ones. No
    parameters.

    Args:
        width: D.
        share: β.
        alpha: α.
        last_timestep: T − 1, the largest timestep in the units of the model's argument: 999, or 1 if it takes σ.
    """

    def __init__(self, width: int, *, share: float = 0.8, alpha: float = 4.0, last_timestep: float = 999.0) -> None:
        super().__init__()
        if not 0 < share <= 1 or alpha <= 0 or last_timestep <= 0 or int(share * width) < 1:
            raise OptionError(
                f"a window of {share} of {width} channels, alpha {alpha}, last timestep {last_timestep}",
                found="no such window",
                do="0 < share <= 1 with at least one channel, alpha > 0, last_timestep > 0",
            )
        self.width, self.size = width, int(share * width)
        self.alpha, self.last_timestep = alpha, last_timestep

    # The timestep; see `moefx.routing.static`.
    deciding = (1,)

    def fold(self, values: tuple[Tensor, ...], shared: dict[Hashable, Any]) -> tuple[Hashable, nn.Module]:
        """Return where the window begins, and its mask as a constant."""
        mask = self(torch.ones((), device=values[0].device), values[0].reshape(-1)[:1])
        start = int(mask.argmax())
        return start, shared.setdefault(start, Constant(mask))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Return the masks of raw timesteps ``[B]``, or of one for all samples, in the dtype of ``x``."""
        t = timestep.reshape(-1, 1, 1).to(torch.float32)
        start = window_offset(t / self.last_timestep, self.width, self.size, self.alpha)
        channel = torch.arange(self.width, device=t.device)
        return ((channel >= start) & (channel < start + self.size)).to(x.dtype)

    def extra_repr(self) -> str:
        """Describe the window in ``print(model)``."""
        return f"{self.size} of {self.width}, alpha={self.alpha}, last_timestep={self.last_timestep}"
