"""All ranks agree before any of them changes anything: a refusal on one is an error on every one.

Without this a rank that raises leaves the others waiting in their next collective.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moefx.errors import MoefxError, PlanError

_DIGEST_BYTES, _MESSAGE_BYTES = 32, 1024
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def agree(
    asked: str, facts: dict[str, bytes], problem: MoefxError | None, device: str, group: dist.ProcessGroup
) -> None:
    """Raise on every rank if one has a problem, or if their facts differ.

    Args:
        asked: what was asked, for the message.
        facts: 32-byte digests by name; the same names on all ranks.
        problem: what this rank found, or None.
        device: device type of the group.
        group: the ranks.

    Raises:
        MoefxError: ``problem`` on the ranks that have one.
        PlanError: on the others.
    """
    text = str(problem).encode()[:_MESSAGE_BYTES] if problem else b""
    line = b"".join(facts.values()) + text.ljust(_MESSAGE_BYTES, b"\0")
    mine = torch.frombuffer(bytearray(line), dtype=torch.uint8).to(device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    lines = [bytes(row.tolist()) for row in everyone]
    if problem is not None:
        raise problem
    _raise_for_others(asked, lines)
    for i, name in enumerate(facts):
        values = [row[i * _DIGEST_BYTES : (i + 1) * _DIGEST_BYTES] for row in lines]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise PlanError(
                asked,
                found=f"{name}: rank {other} differs from rank 0",
                do="build model and placement alike on all ranks: same seed or checkpoint, plan made once and loaded",
            )


def _raise_for_others(asked: str, lines: list[bytes]) -> None:
    for rank, line in enumerate(lines):
        text = line[-_MESSAGE_BYTES:].rstrip(b"\0").decode(errors="replace")
        if text:
            raise PlanError(asked, found=f"rank {rank} refused: {text}", do="see what rank " + str(rank) + " was given")


def text_digest(text: str) -> bytes:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).digest()


def structure_digest(model: nn.Module) -> bytes:
    """Return a digest of the names, shapes and dtypes of everything in the model's state."""
    state = model.state_dict()
    text = "\n".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in state.items() if isinstance(t, Tensor))
    return text_digest(text)


def weights_digest(model: nn.Module) -> bytes:
    """Return a digest of all values: sums of their bits, which do not depend on the order of summation."""
    sums = [_bit_sum(t) for t in model.state_dict().values() if isinstance(t, Tensor) and not t.is_meta]
    return text_digest(repr(sums))


def _bit_sum(tensor: Tensor) -> int:
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGERS[min(tensor.element_size(), 8)])
    return int(bits.sum(dtype=torch.int64))
