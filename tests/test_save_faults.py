"""Saves that are killed, run out of space or fail half way: the older save stays whole, nothing is ever mixed."""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from save_support import Plain, routed_plain, run_python, same_state

import moefx
from moefx.errors import InputError
from moefx.model import layout, save, staging
from moefx.model.layout import read_folder

SHARDS = 20_000  # bytes: many small files, so that an interruption falls between them


@pytest.fixture(scope="module")
def pair() -> tuple[Plain, Plain]:
    return routed_plain(0), routed_plain(1)


def _write(model: Plain, folder: Path) -> None:
    moefx.save(model, folder, max_shard_size=SHARDS)


def _holds(folder: Path, model: Plain) -> bool:
    return same_state(moefx.load(folder, Plain()), model)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("atomic", "kills"), [(True, 120), (False, 80)])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*fork.*:RuntimeWarning")
def test_killed_at_random_times(
    atomic: bool, kills: int, pair: tuple[Plain, Plain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not atomic:
        monkeypatch.setattr(staging, "_exchange", lambda one, two: False)
    folder = tmp_path / "model"
    _write(pair[0], folder)
    first = {p.read_bytes() for p in folder.iterdir()}
    _write(pair[1], tmp_path / "other")
    second = {p.read_bytes() for p in (tmp_path / "other").iterdir()}
    start = time.perf_counter()
    _write(pair[0], folder)
    longest = min(3 * (time.perf_counter() - start), 0.2)  # seconds
    chance = random.Random(0)
    seen = set()
    for i in range(kills):
        child = os.fork()
        if child == 0:
            _save_for_ever(pair if i % 2 else pair[::-1], folder)
        time.sleep(chance.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        place = read_folder(folder).folder
        content = {p.read_bytes() for p in place.iterdir()}
        assert content in (first, second)
        seen.add(content == first)
    _write(pair[0], folder)
    assert _holds(folder, pair[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "other"]
    assert seen == {True, False}


def _save_for_ever(pair: tuple[Plain, Plain], folder: Path) -> None:
    try:
        while True:
            _write(pair[1], folder)
            _write(pair[0], folder)
    finally:
        os._exit(1)


POINTS: list[tuple[Any, str]] = [
    (save, "save_file"),
    (save, "write_manifest"),
    (save, "describe"),
    (save, "_write_json"),
    (staging, "_sync"),
    (staging, "_swap"),
    (staging, "_keep_others"),
    (layout.Path, "write_text"),
]


@pytest.mark.parametrize(("owner", "name"), POINTS, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=repr)
def test_failing_half_way(
    owner: Any,
    name: str,
    error: BaseException,
    pair: tuple[Plain, Plain],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "model"
    _write(pair[0], folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    wanted = InputError if isinstance(error, OSError) else KeyboardInterrupt
    for calls in (0, 1):
        with monkeypatch.context() as patch:
            reached = _fail_after(patch, owner, name, error, calls)
            try:
                _write(pair[1], folder)
            except wanted:
                assert reached
                assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
            else:
                assert not reached, "the error was swallowed"
                assert _holds(folder, pair[1])
        assert [p.name for p in tmp_path.iterdir()] == ["model"]


def _fail_after(patch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException, calls: int) -> list[int]:
    real: Callable[..., Any] = getattr(owner, name)
    reached: list[int] = []
    left = [calls]

    def fail(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            reached.append(1)
            raise error
        return real(*args, **kwargs)

    patch.setattr(owner, name, fail)
    return reached


def test_no_space_says_so(pair: tuple[Plain, Plain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_after(monkeypatch, save, "save_file", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2)
    with pytest.raises(InputError, match=r"No space left on device.*\n.*enough space"):
        _write(pair[0], tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs limits on the size of files")
def test_a_disk_that_refuses_to_take_more(tmp_path: Path) -> None:
    code = """
import resource, signal, sys, moefx
from save_support import routed_plain, same_state, Plain
one, two = routed_plain(0), routed_plain(1)
moefx.save(one, sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
try:
    moefx.save(two, sys.argv[1])
except moefx.MoefxError as error:
    print("refused:", error)
assert same_state(moefx.load(sys.argv[1], Plain()), one)
"""
    done = run_python(code, tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_read_only_folder(pair: tuple[Plain, Plain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    _write(pair[0], folder)
    folder.chmod(0o555)
    # The superuser may write everywhere, so the system's answer is given in its place.
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and real(path, mode))
    with pytest.raises(InputError, match="a read-only folder"):
        _write(pair[1], folder)
    folder.chmod(0o755)
    assert _holds(folder, pair[0])


def test_a_read_only_parent(pair: tuple[Plain, Plain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(staging.tempfile, "mkdtemp", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        _write(pair[0], tmp_path / "model")


def test_without_an_atomic_exchange_an_interrupted_swap_is_found(
    pair: tuple[Plain, Plain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    _write(pair[0], folder)
    folder.rename(tmp_path / ".model.moefx-old-xyz")  # killed between the two renames
    assert _holds(folder, pair[0])
    _write(pair[1], folder)
    assert _holds(folder, pair[1])
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_second_rename_that_fails_puts_the_older_save_back(
    pair: tuple[Plain, Plain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    _write(pair[0], folder)
    monkeypatch.setattr(staging, "_exchange", lambda one, two: False)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if "moefx-new" in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(InputError, match="Input/output error"):
        _write(pair[1], folder)
    assert _holds(folder, pair[0])


def test_a_damaged_save_can_be_replaced(pair: tuple[Plain, Plain], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    _write(pair[0], folder)
    (folder / layout.MANIFEST).write_text("nonsense")
    _write(pair[1], folder)
    assert _holds(folder, pair[1])


def test_through_a_link(pair: tuple[Plain, Plain], tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    _write(pair[0], tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert _holds(tmp_path / "real", pair[0])


def test_weights_in_views_of_one_storage(tmp_path: Path) -> None:
    model = routed_plain()
    whole = torch.randn(2, 16)
    model.blocks[0].norm.weight = torch.nn.Parameter(whole[0])
    model.blocks[1].norm.weight = torch.nn.Parameter(whole[1])
    _write(model, tmp_path / "model")
    assert _holds(tmp_path / "model", model)
