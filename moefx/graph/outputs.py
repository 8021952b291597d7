"""What a forward returns, taken apart into tensors and put together again as the same classes."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.utils import _pytree as pytree


@dataclasses.dataclass
class Record:
    """The fields of a user's dataclass, which torch's pytrees would take for a leaf."""

    cls: type
    fields: dict[str, Any]

    def build(self) -> Any:
        """Return an instance of the user's class without calling its constructor."""
        made: Any = object.__new__(self.cls)
        for name, value in self.fields.items():
            object.__setattr__(made, name, value)
        return made


def _flatten(record: Record) -> tuple[list[Any], Any]:
    return list(record.fields.values()), (record.cls, tuple(record.fields))


def _unflatten(values: Any, context: Any) -> Record:
    cls, names = context
    return Record(cls, dict(zip(names, values, strict=True)))


pytree.register_pytree_node(Record, _flatten, _unflatten, serialized_type_name="moefx.graph.outputs.Record")


def take_apart(output: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Return the leaves of an output and its structure."""
    return pytree.tree_flatten(_to_records(output))


def put_together(leaves: list[Any], spec: pytree.TreeSpec) -> Any:
    """Return the output with ``leaves`` in it."""
    return _from_records(pytree.tree_unflatten(leaves, spec))


def _is_plain(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type) and type(value) not in pytree.SUPPORTED_NODES


def _to_records(tree: Any) -> Any:
    def convert(value: Any) -> Any:
        if not _is_plain(value):
            return value
        return Record(type(value), {f.name: _to_records(getattr(value, f.name)) for f in dataclasses.fields(value)})

    return pytree.tree_map(convert, tree, is_leaf=_is_plain)


def _from_records(tree: Any) -> Any:
    def convert(value: Any) -> Any:
        if not isinstance(value, Record):
            return value
        return Record(value.cls, {name: _from_records(inner) for name, inner in value.fields.items()}).build()

    return pytree.tree_map(convert, tree, is_leaf=lambda value: isinstance(value, Record))
