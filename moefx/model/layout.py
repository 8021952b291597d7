"""What a saved folder holds: file names, the manifest, and the checks before anything in it is used.

``config.json``          the class's own config (diffusers) and a ``moefx`` block
``moefx_plan.json``      the plans that made the model, in order
``*.safetensors``        the weights, with an index if they are sharded
``moefx_manifest.json``  size and sha256 of every other file; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from moefx import __version__
from moefx.errors import UnsafeInputError
from moefx.model.plan import Plan
from moefx.model.staging import find_backup

SCHEMA = 1
CONFIG, PLANS, MANIFEST = "config.json", "moefx_plan.json", "moefx_manifest.json"
BUFFERS = "moefx_buffers.safetensors"
CALIBRATION = "moefx_calibration.safetensors"
JSON = dict[str, Any]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OWNED = re.compile(
    r"config\.json|moefx_.*|(diffusion_pytorch_model|model)[A-Za-z0-9._-]*\.(safetensors|bin|pt|msgpack|json)"
)
_LARGEST_JSON_bytes = 64 << 20  # a plan of 10,000 sites has 10 MB


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Data):
    """One file of a save."""

    bytes: int
    sha256: str


class Manifest(_Data):
    """Everything that belongs to a save.

    ``weights`` are the files that hold the state dict; ``shared`` names tensors that are stored under another name.
    """

    schema_version: int = SCHEMA
    moefx_version: str = __version__
    model: str
    library: str
    variant: str | None = None
    files: dict[str, FileEntry]
    weights: list[str]
    shared: dict[str, str] = {}


class Saved:
    """A folder whose files were compared with its manifest."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.config: JSON = _object(self.folder / CONFIG)
        self.plans = [Plan.from_json(json.dumps(p)) for p in _list(self.folder / PLANS)]
        if not self.plans:
            raise unsafe(folder, f"no plan in {PLANS}")

    @property
    def own_config(self) -> JSON:
        """The class's config as it was before the transform."""
        return {k: v for k, v in self.config.items() if k not in ("moefx", "quantization_config", "_class_name")}


def is_owned(name: str) -> bool:
    """Tell whether a file of that name is part of a save of diffusers or moefx, and goes when a new one comes."""
    return _OWNED.fullmatch(name) is not None


def unsafe(folder: Path, found: str, do: str = "save the model again, or copy the folder again") -> UnsafeInputError:
    """Return the error for a folder that must not be used."""
    return UnsafeInputError(f"load {str(folder)!r}", found=found, do=do)


def describe(folder: Path, name: str) -> FileEntry:
    """Return size and hash of one file."""
    with (folder / name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(bytes=os.fstat(file.fileno()).st_size, sha256=digest)


def write_manifest(stage: Path, manifest: Manifest) -> None:
    """Write the manifest with a hash of itself."""
    body = manifest.model_dump()
    text = json.dumps({**body, "sha256": _digest(body)}, indent=1, sort_keys=True) + "\n"
    (stage / MANIFEST).write_text(text, encoding="utf-8")


def read_folder(folder: str | os.PathLike[str]) -> Saved:
    """Open a saved folder: every file is there, is a plain file, and has the size and hash of the manifest.

    Nothing in the folder is executed or imported.

    Raises:
        UnsafeInputError: the folder is missing, damaged, incomplete, or written by a newer version.
    """
    path = Path(folder)
    path = find_backup(path) or path
    if not path.is_dir():
        raise unsafe(path, "no such folder", do="check the path")
    if not (path / MANIFEST).exists():
        raise unsafe(path, f"no {MANIFEST}", do="pass a folder that moefx.save or save_pretrained wrote")
    manifest = _manifest(path)
    for name, entry in manifest.files.items():
        _check_file(path, name, entry)
    missing = {CONFIG, PLANS, *manifest.weights} - set(manifest.files)
    if missing or not manifest.weights:
        raise unsafe(path, f"{MANIFEST} does not list {', '.join(sorted(missing)) or 'weights'}")
    return Saved(path, manifest)


def _manifest(folder: Path) -> Manifest:
    body = _object(folder / MANIFEST)
    version = body.get("schema_version")
    if isinstance(version, int) and version > SCHEMA:
        raise unsafe(
            folder,
            f"schema {version}, written by moefx {body.get('moefx_version')!r}; this is schema {SCHEMA}",
            do="upgrade moefx",
        )
    digest = body.pop("sha256", None)
    try:
        manifest = Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise unsafe(folder, f"{MANIFEST}, {where or 'text'}: {first['msg']}") from error
    if digest != _digest(body):
        raise unsafe(folder, f"{MANIFEST} was changed: its own hash differs")
    return manifest


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    if _NAME.fullmatch(name) is None:
        raise unsafe(folder, f"a file name that leaves the folder: {name!r}")
    path = folder / name
    real = path.resolve()
    if not any(root in real.parents for root in _roots(folder)):
        raise unsafe(folder, f"{name} is a link to a place outside the folder")
    if not real.is_file():
        raise unsafe(folder, f"no file {name}")
    size = real.stat().st_size
    if size != entry.bytes:
        raise unsafe(folder, f"{name} has {size} bytes, not the {entry.bytes} of the manifest")
    if describe(folder, name) != entry:
        raise unsafe(folder, f"{name} was changed: its sha256 differs from the manifest's")


def _roots(folder: Path) -> list[Path]:
    """Return where the files may lie: in the folder, or in the blobs beside a snapshot of the Hugging Face cache."""
    real = folder.resolve()
    caches = [p.parent / "blobs" for p in real.parents if p.name == "snapshots"]
    return [real, *caches]


def _digest(body: JSON) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _object(path: Path) -> JSON:
    found = _json(path)
    if not isinstance(found, dict):
        raise unsafe(path.parent, f"{path.name} is no JSON object")
    return found


def _list(path: Path) -> list[Any]:
    found = _json(path)
    if not isinstance(found, list):
        raise unsafe(path.parent, f"{path.name} is no JSON list")
    return found


def _json(path: Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST_JSON_bytes:
            raise unsafe(path.parent, f"{path.name} is larger than {_LARGEST_JSON_bytes >> 20} MB")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unsafe(path.parent, f"{path.name} cannot be read: {error}") from error
