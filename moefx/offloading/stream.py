"""What is loaded when: staging slots that a thread fills ahead along the known order of layers, or an LRU cache.

Both hand out the halves of a layer's experts one by one. The cache is what is common elsewhere; it is here to be
compared with.

Legend: S staging slots.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moefx.errors import MoefxError
from moefx.offloading.layout import Layout
from moefx.offloading.store import Store, Weights


class Piece(NamedTuple):
    """What is loaded at once: ``half`` 0 is the first projection of an expert with its biases, 1 the second."""

    layer: int
    half: int
    expert: int


@dataclass
class OffloadStats:
    """Counts since :func:`moefx.offload`.

    An access is one half (first or second projection) of an expert that received rows, in one call of its layer.

    Attributes:
        resident: accesses to halves that were on the device without a load of their own.
        ahead: accesses to halves that were loaded for this access and ready when it came.
        late: accesses that had to wait for their load, ``wait_s`` seconds in all.
        read_bytes: loaded in all.
    """

    resident: int = 0
    ahead: int = 0
    late: int = 0
    wait_s: float = 0.0
    read_bytes: int = 0

    @property
    def accesses(self) -> int:
        """All accesses."""
        return self.resident + self.ahead + self.late

    @property
    def hit_rate(self) -> float:
        """Share of accesses that needed no load."""
        return self.resident / max(self.accesses, 1)

    def __str__(self) -> str:
        return (
            f"{self.accesses:,} accesses: {self.hit_rate:.1%} resident, {self.ahead:,} loaded ahead, "
            f"{self.late:,} late ({self.wait_s:.3f} s waited), {self.read_bytes:,} bytes read"
        )


class Stream(Protocol):
    """Hands out what is not pinned."""

    stats: OffloadStats

    def take(self, pieces: Sequence[Piece]) -> Generator[Weights]:
        """Yield pieces of one layer in this order; each is valid until the next one is asked for."""

    def close(self) -> None:
        """Stop loading for good."""


@dataclass
class _Slot:
    """A buffer on the device; on an accelerator with the events between the copying and the computing stream."""

    buffer: Tensor
    key: Piece | None = None
    ready: bool = False
    copied: Any = None
    used: Any = None
    views: dict[Piece, Weights] = field(default_factory=dict)

    def weights(self, layouts: Sequence[Layout]) -> Weights:
        """Return the buffer as tensors of its piece."""
        assert self.key is not None
        if self.key not in self.views:
            self.views[self.key] = layouts[self.key.layer].halves[self.key.half].views(self.buffer, self.key.expert)
        return self.views[self.key]


class _Slots:
    """Slots and the copy stream that fills them."""

    def __init__(self, store: Store, layouts: Sequence[Layout], count: int, device: torch.device) -> None:
        self.store, self.layouts, self.device = store, layouts, device
        size = max(layout.largest for layout in layouts)
        self.all = [_Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(count)]
        self._copies: Any = None if device.type == "cpu" else torch.Stream(device=device)

    def load(self, slot: _Slot) -> int:
        """Fill a slot; on an accelerator the copy waits for the last use of the slot, and the host for neither."""
        assert slot.key is not None
        with self._on_copy_stream():
            if self._copies is not None and slot.used is not None:
                self._copies.wait_event(slot.used)
            total = self.store.read(slot.key.layer, slot.key.expert, slot.weights(self.layouts))
            if self._copies is not None:
                slot.copied = self._copies.record_event()
        return total

    def before_use(self, slot: _Slot) -> Weights:
        """Let the computing stream wait for the copy and return the weights."""
        if slot.copied is not None:
            torch.accelerator.current_stream(self.device).wait_event(slot.copied)
        return slot.weights(self.layouts)

    def after_use(self, slot: _Slot) -> None:
        """Mark the point up to which the computing stream reads the slot."""
        if self._copies is not None:
            slot.used = torch.accelerator.current_stream(self.device).record_event()

    def _on_copy_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._copies is None else self._copies


class Scheduled:
    """S slots hold what is used next: the rest of this layer, then the streamed experts of the layers that follow.

    A thread loads the first of these that is missing into a slot that holds none of them. The order of layers is that
    of the model until a forward pass shows another; an unexpected layer costs waiting and nothing else.

    Args:
        streamed: the pieces of each layer that are not pinned, in the order of their use.
    """

    def __init__(
        self,
        store: Store,
        layouts: Sequence[Layout],
        streamed: Sequence[Sequence[Piece]],
        count: int,
        device: torch.device,
    ) -> None:
        self.stats = OffloadStats()
        self._slots = _Slots(store, layouts, count, device)
        self._streamed = streamed
        self._following = {layer: (layer + 1) % len(layouts) for layer in range(len(layouts))}
        self._layer = len(layouts) - 1
        self._todo: deque[Piece] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._closed = False

    def take(self, pieces: Sequence[Piece]) -> Generator[Weights]:
        """Yield pieces of one layer; see :class:`Stream`."""
        if not pieces:
            return
        self._start()
        with self._wake:
            self._following[self._layer], self._layer = pieces[0].layer, pieces[0].layer
            self._todo = deque(pieces)
            self._wake.notify_all()
        try:
            for piece in pieces:
                slot = self._wait(piece)
                yield self._slots.before_use(slot)
                self._slots.after_use(slot)
                with self._wake:
                    self._todo.popleft()
                    self._wake.notify_all()
        finally:
            with self._wake:
                self._todo.clear()
                self._wake.notify_all()

    def close(self) -> None:
        """Stop the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()

    def _start(self) -> None:
        """Start the thread; again in a forked process, which has none."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="moefx-offload", daemon=True)
            self._thread.start()

    def _wait(self, key: Piece) -> _Slot:
        with self._wake:
            slot = self._find(key)
            if slot is not None:
                self.stats.ahead += 1
                return slot
            self.stats.late += 1
            begin = time.perf_counter()
            while slot is None:
                if self._failure is not None:
                    raise MoefxError(
                        f"load expert {key.expert} of routed layer {key.layer}",
                        found=f"{type(self._failure).__name__}: {self._failure}",
                        do="check the folder of the offloaded experts, and offload again",
                    ) from self._failure
                self._wake.wait()
                slot = self._find(key)
            self.stats.wait_s += time.perf_counter() - begin
            return slot

    def _find(self, key: Piece) -> _Slot | None:
        return next((slot for slot in self._slots.all if slot.key == key and slot.ready), None)

    def _window(self) -> list[Piece]:
        """Return the next S accesses as far as they are known."""
        return list(islice(self._accesses(), len(self._slots.all)))

    def _accesses(self) -> Iterator[Piece]:
        yield from self._todo
        layer = self._layer
        for _ in self._streamed:
            layer = self._following[layer]
            yield from self._streamed[layer]

    def _job(self) -> _Slot | None:
        """Return a slot to fill, with its key set, or None if everything is there."""
        window = list(dict.fromkeys(self._window()))
        held = {slot.key for slot in self._slots.all}
        free = (slot for slot in self._slots.all if slot.key not in window)
        for key in window:
            if key not in held:
                slot = next(free)  # S slots and at most S keys: a missing key leaves one free
                slot.key, slot.ready = key, False
                return slot
        return None

    def _run(self) -> None:
        while True:
            with self._wake:
                slot = None
                while not self._closed and (slot := self._job()) is None:
                    self._wake.wait()
                if slot is None:
                    return
            try:
                total = self._slots.load(slot)
            except Exception as error:  # raised again in the thread that waits for this load
                with self._wake:
                    self._failure = error
                    self._wake.notify_all()
                return
            with self._wake:
                slot.ready = True
                self.stats.read_bytes += total
                self._wake.notify_all()


class LeastRecentlyUsed:
    """A cache that loads what is asked for when it is asked for, in place of what was not used for longest."""

    def __init__(self, store: Store, layouts: Sequence[Layout], count: int, device: torch.device) -> None:
        self.stats = OffloadStats()
        self._slots = _Slots(store, layouts, count, device)
        self._free = list(self._slots.all)
        self._held: OrderedDict[Piece, _Slot] = OrderedDict()

    def take(self, pieces: Sequence[Piece]) -> Generator[Weights]:
        """Yield pieces of one layer; see :class:`Stream`."""
        for piece in pieces:
            slot = self._held.pop(piece, None)
            if slot is not None:
                self.stats.resident += 1
            else:
                slot = self._load(piece)
            self._held[piece] = slot
            yield self._slots.before_use(slot)
            self._slots.after_use(slot)

    def close(self) -> None:
        """Do nothing: there is no thread."""

    def _load(self, key: Piece) -> _Slot:
        begin = time.perf_counter()
        slot = self._free.pop() if self._free else self._held.popitem(last=False)[1]
        slot.key = key
        self.stats.read_bytes += self._slots.load(slot)
        self.stats.late += 1
        self.stats.wait_s += time.perf_counter() - begin
        return slot
