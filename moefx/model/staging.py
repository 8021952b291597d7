"""Replacing a folder as a whole: staged beside it, synced, and put in its place by one rename.

Whatever interrupts a save, the folder holds either all of the older files or all of the newer ones.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moefx.errors import InputError

try:
    import fcntl

    _flock: Callable[[int, int], object] | None = fcntl.flock
    _LOCK = fcntl.LOCK_EX
except ImportError:  # not on Windows
    _flock, _LOCK = None, 0

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def stage_prefix(name: str) -> str:
    """Return how the hidden siblings of a folder of that name begin."""
    return f".{name}.moefx-"


def find_backup(folder: Path) -> Path | None:
    """Return the older save that an interrupted replacement left beside ``folder``, where a swap is not atomic."""
    found = sorted(folder.parent.glob(f"{stage_prefix(folder.name)}old-*"))
    return found[0] if found and not folder.exists() else None


@contextmanager
def replacing(folder: Path, owned: Callable[[str], bool]) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``folder`` when the block ends without an exception.

    Files of the older folder that are not ``owned`` by a save are kept.

    Raises:
        InputError: the folder cannot be replaced; it and its files are as they were.
    """
    folder = Path(os.path.realpath(folder))
    try:
        _check_target(folder, owned)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent) as alone:
            if alone:
                _remove_stale(folder)
            stage = Path(tempfile.mkdtemp(prefix=f"{stage_prefix(folder.name)}new-", dir=folder.parent))
            try:
                yield stage
                _keep_others(folder, stage, owned)
                _sync_folder(stage)
                stage.chmod(folder.stat().st_mode & 0o7777 if folder.exists() else 0o777 & ~_umask())
                _swap(stage, folder)
                _sync(folder.parent)
            finally:
                shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        what = error.strerror or str(error)
        raise InputError(
            f"save into {str(folder)!r}", found=what, do="choose a folder that can be written, with enough space"
        ) from error


def _check_target(folder: Path, owned: Callable[[str], bool]) -> None:
    asked = f"save into {str(folder)!r}"
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(asked, found="a file of that name", do="choose a folder")
    if folder == Path.cwd() or folder in Path.cwd().parents:
        raise InputError(asked, found="the working directory lies in it", do="choose another folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(asked, found="a read-only folder", do="choose a folder that can be written")
    subfolders = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.is_symlink())
    if subfolders:
        raise InputError(
            asked, found=f"other folders in it: {', '.join(subfolders[:5])}", do="choose a new folder for the model"
        )


def _keep_others(folder: Path, stage: Path, owned: Callable[[str], bool]) -> None:
    """Copy files that are no part of a save, such as a model card."""
    for path in folder.iterdir() if folder.exists() else ():
        if not owned(path.name):
            shutil.copy2(path, stage / path.name, follow_symlinks=False)


def _remove_stale(folder: Path) -> None:
    """Remove what killed saves left; the only copy of an older save is put back first."""
    backup = find_backup(folder)
    if backup is not None:
        backup.rename(folder)
    for path in folder.parent.glob(f"{stage_prefix(folder.name)}*"):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(parent: Path) -> Iterator[bool]:
    """Let one save at a time work in ``parent``; False where the file system has no locks."""
    if _flock is None:
        yield False
        return
    handle = os.open(parent, os.O_RDONLY)
    try:
        yield _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    assert _flock is not None
    try:
        _flock(handle, _LOCK)
    except OSError:
        return False
    return True


def _swap(stage: Path, folder: Path) -> None:
    """Put ``stage`` in the place of ``folder``; afterwards ``stage`` is the older folder, or gone."""
    if not folder.exists():
        stage.rename(folder)
    elif not _exchange(stage, folder):
        backup = folder.parent / stage.name.replace("moefx-new-", "moefx-old-")
        folder.rename(backup)
        try:
            stage.rename(folder)
        except OSError:
            backup.rename(folder)
            raise
        shutil.rmtree(backup, ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Exchange two folders in one step; False if the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(two))


def _sync_folder(folder: Path) -> None:
    for path in folder.iterdir():
        if not path.is_symlink():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
