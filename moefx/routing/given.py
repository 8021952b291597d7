"""What only the caller knows, handed to routed layers for a while: which samples are unconditional, an edge map.

A tap is found in the model by data flow; these values are in no model, and no layer guesses them. A layer that wants
some has a tuple ``takes`` of their names and an empty dict ``given``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from moefx.errors import InputError, nearest


@contextmanager
def given(model: nn.Module, **values: Tensor) -> Iterator[list[str]]:
    """Let the layers of ``model`` that take these values read them inside the block; yield the layers' names.

    With gradient checkpointing the backward pass belongs inside too, for it runs the layers again.

        with given(pipe.transformer, unconditional=torch.tensor([True, False])):
            image = pipe(prompt)

    Raises:
        InputError: no layer takes one of the values.
    """
    takers = {name: module for name, module in model.named_modules() if getattr(module, "takes", ())}
    known = {value for module in takers.values() for value in module.takes}
    for value in values:
        if value not in known:
            raise InputError(f"give {value!r} to the layers", found="no layer takes it", do=nearest(value, known))
    readers = {n: m for n, m in takers.items() if set(m.takes) & set(values)}
    before = {name: module.given for name, module in readers.items()}
    try:
        for module in readers.values():
            wanted = {key: value for key, value in values.items() if key in module.takes}
            module.given = {**module.given, **wanted}
        yield list(readers)
    finally:
        for name, module in readers.items():
            module.given = before[name]
