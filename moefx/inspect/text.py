"""Strings in dumps: escaped names, short types and shapes, fitted lines; the same bytes for the same input."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

WIDTH = 120
_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c", "float8_": "f8_"}
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_SEPARATORS = re.compile(r"([.:#])")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def clean(text: object) -> str:
    r"""Return ``text`` with all that a terminal would obey (control, bidi, private) as escapes like ``\x1b``."""
    return "".join(c if unicodedata.category(c) not in _UNSAFE else _escape(c) for c in str(text))


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def literal(value: object) -> str:
    """Return ``repr(value)`` without memory addresses and without control characters."""
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, type):
        return clean(value.__qualname__)
    return clean(_ADDRESS.sub("", repr(value)))


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``f32`` for ``torch.float32``."""
    name = str(dtype).removeprefix("torch.")
    found = re.fullmatch(r"(bfloat|float|uint|int|complex)(\d+)", name)
    return f"{_DTYPES[found[1]]}{found[2]}" if found else name


def type_of(value: Any) -> str:
    """Return ``f32[2, 64, 128]`` for a tensor, the value of a number, the name of anything else's type."""
    if isinstance(value, torch.Tensor):
        return f"{dtype_name(value.dtype)}[{', '.join(str(int(size)) for size in value.shape)}]"
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return literal(value)
    if isinstance(value, list | tuple):
        return f"({', '.join(type_of(item) for item in value)})"
    return clean(type(value).__name__)


def tensor_types(values: Any) -> tuple[str, ...]:
    """Return the types of the tensors in a pytree."""
    return tuple(type_of(v) for v in pytree.tree_leaves(values) if isinstance(v, torch.Tensor))


def first_of(types: Sequence[str]) -> str:
    """Return the first of several types, and how many follow."""
    return "" if not types else types[0] if len(types) == 1 else f"{types[0]} +{len(types) - 1}"


def fit(text: str, width: int = WIDTH) -> str:
    """Cut ``text`` to ``width`` columns, with an ellipsis where something is missing."""
    text = text.rstrip()
    return text if len(text) <= width else text[: max(1, width - 1)] + "…"


def wrap(text: str, indent: str = "  ", width: int = WIDTH, *, cut: bool = True) -> list[str]:
    """Break ``text`` at spaces into lines of at most ``width``; later lines are indented, single long words cut."""
    start = len(text) - len(text.lstrip())
    lines, line = [], text[:start]
    for word in text[start:].split(" "):
        if line.strip() and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = indent + word
        else:
            line = f"{line} {word}" if line.strip() else line + word
    return [fit(part, width) if cut else part for part in (*lines, line)]


def numberless(name: str) -> str:
    """Return ``name`` with the numbers that stand alone between dots replaced, to compare names of repeated blocks."""
    return "".join("0" if part.isdigit() else part for part in _SEPARATORS.split(name))


def merge_names(names: Sequence[str]) -> str:
    """Return one name for several that differ in numbers: ``a.0.ff`` to ``a.2.ff`` give ``a.{0…2}.ff``."""
    if len(names) == 1:
        return names[0]
    split = [_SEPARATORS.split(name) for name in names]
    if len({len(parts) for parts in split}) > 1:
        return f"{names[0]} … {names[-1]}"
    return "".join(parts[0] if len(set(parts)) == 1 else _range(parts) for parts in zip(*split, strict=True))


def _range(parts: Iterable[str]) -> str:
    found = list(dict.fromkeys(parts))
    if all(part.isdigit() for part in found):
        numbers = sorted(int(part) for part in found)
        if len(numbers) == numbers[-1] - numbers[0] + 1:
            return f"{{{numbers[0]}…{numbers[-1]}}}" if len(numbers) > 2 else f"{{{numbers[0]},{numbers[1]}}}"
        return f"{{{','.join(str(n) for n in numbers)}}}"
    return f"{{{','.join(found)}}}"


def count(number: float) -> str:
    """Return 1234567 as ``1.23 M``."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
