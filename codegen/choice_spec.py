"""What is computed of the tokens that experts chose, as data: projections over equal groups, and a sum by token.

Shapes: T tokens, E experts, C tokens of each, R = E * C rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from moefx.codegen.kernels import ChoiceGradSpec, ChoiceLayoutSpec, ChoiceSumSpec, TokenGradSpec, TokenProgram
from moefx.codegen.spec import Kernel, RegionSpec, digest

#: The place of the first weight among the inputs, which knows how many experts there are.
WEIGHT = 2


@dataclass(frozen=True)
class ChoiceSpec:
    """Projections over the tokens that experts chose, and the weighted sum of each token's rows."""

    region: RegionSpec
    total: ChoiceSumSpec

    @property
    def key(self) -> str:
        """Content hash; names the whole in graphs."""
        return digest(f"{self.region.key}\n{self.total.text}")[:16]

    @property
    def ends_at(self) -> int:
        """The place of the weights of the rows, behind those of the projections."""
        return WEIGHT + sum(one.weights * (1 + one.bias) for one in self.region.linears)

    @property
    def tail_grad(self) -> TokenGradSpec | None:
        """The kernel of the gradient of what follows the sum, if anything does."""
        total = self.total
        if not total.operands:
            return None
        return TokenGradSpec(TokenProgram(total.features, total.dtype, total.tail, total.operands))

    @property
    def input_sum(self) -> ChoiceSumSpec:
        """The kernel that adds up the gradients of a token's rows."""
        return ChoiceSumSpec(self.region.linears[0].in_features, self.total.dtype, weighted=False)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The kernels besides the projections, forward."""
        return (ChoiceLayoutSpec(), self.total)

    @property
    def training_kernels(self) -> tuple[Kernel, ...]:
        """The kernels besides those of the projections, forward and backward."""
        tail = self.tail_grad
        grad = ChoiceGradSpec(self.total.features, self.total.dtype)
        return (ChoiceLayoutSpec(), self.keeping().total, *([tail] if tail else []), grad, self.input_sum)

    def keeping(self) -> ChoiceSpec:
        """Return what keeps all that its gradient reads."""
        from moefx.codegen.backward import training_region  # which defines operators

        tail = self.tail_grad
        total = dataclasses.replace(self.total, keep=tail is not None and tail.reads_rows)
        return ChoiceSpec(training_region(self.region), total)
