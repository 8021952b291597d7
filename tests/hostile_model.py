"""A small model whose module names try to speak to terminals, browsers and parsers."""

from __future__ import annotations

import torch
from torch import nn

NAMES = (
    "\x1b[31mred\x1b]0;title\x07",
    "<img src=x onerror=alert(1)>",
    "[bold]markup[/bold]",
    "right\u202eto left",
    'quote"back\\slash',
    "new\nline\rreturn",
    "</text><script>",
    "$(touch owned)`id`%s{0}",
)


class Mlp(nn.Module):
    """A feed-forward network."""

    def __init__(self, width: int, name: str) -> None:
        super().__init__()
        self.add_module(name + " in", nn.Linear(width, 4 * width))
        self.add_module(name + " out", nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = self.children()
        return down(torch.nn.functional.gelu(up(x)))


class Hostile(nn.Module):
    """Residual feed-forward networks under hostile names."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        for name in NAMES:
            self.add_module(name, Mlp(width, name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for mlp in self.children():
            x = x + mlp(x)
        return x


def make() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """Return the model and its inputs."""
    return Hostile().eval(), (torch.zeros(2, 5, 8),)
