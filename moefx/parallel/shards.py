"""Checkpoints of a parallel job: every process writes its experts, and any number of processes reads them.

``rank-i.safetensors``   the experts of rank i: stacked parameters, and what optimizers remember of them
``replicated.safetensors``  everything else, from rank 0
``moefx_shards.json``    which expert is in which file, sizes and hashes of the files; written last

The folder takes the place of an older one in one step, when all processes are done; so a job that dies while saving
leaves the older checkpoint whole.

Legend: E experts of a layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.optim import Optimizer

from moefx.errors import InputError, MoefxError, UnsafeInputError
from moefx.model.layout import FileEntry, describe
from moefx.model.staging import replacing
from moefx.parallel.agree import agree
from moefx.parallel.divided import DividedExperts
from moefx.parallel.parallelize import DATA_GROUP
from moefx.parallel.state import divided_like, whole
from moefx.passes.placement import routed_layers
from moefx.passes.placement.stacks import stack_of, stacked_parameters

MANIFEST, REPLICATED = "moefx_shards.json", "replicated.safetensors"
VERSION = 1
Optimizers = Optimizer | Iterable[Optimizer] | None


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: int = VERSION
    homes: dict[str, list[list[int]]]
    files: dict[str, FileEntry]
    extra: dict[str, Any]


def save_shards(
    model: nn.Module,
    folder: str | os.PathLike[str],
    optimizers: Optimizers = None,
    *,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint of a parallel model and its optimizers into a folder that all processes see. A collective.

    What FSDP2 divides is gathered and written as a whole, so that it can be read on any number of processes, divided
    or not.

    Args:
        model: from :func:`parallelize`.
        folder: replaced as a whole if it exists.
        optimizers: whose state is kept, in the order in which they will be given to :func:`load_shards`.
        extra: JSON of one's own, such as the number of steps; rank 0's is kept.

    Raises:
        InputError: a process cannot write. Raised on all ranks.
        PlanError: experts are streamed.
    """
    layers, held = _layers(model), _listed(optimizers)
    rank, world = dist.get_rank(), dist.get_world_size()
    first = next(iter(layers.values()))
    writes = not isinstance(first, DividedExperts) or _first_of_data(model)
    asked = f"save a checkpoint into {str(folder)!r}"
    for layer in layers.values():
        if isinstance(layer, DividedExperts):
            layer.need_weights(asked)  # on all ranks or on none
    with ExitStack() as stack:
        stage: list[str | None] = [None]
        problem: MoefxError | None = None
        if rank == 0:
            try:
                stage[0] = str(stack.enter_context(replacing(Path(folder), _is_owned)))
            except (MoefxError, OSError) as error:
                problem = _wrapped(asked, error)
        _agree(asked, problem)
        dist.broadcast_object_list(stage, src=0)
        target = Path(str(stage[0]))
        entries: dict[str, FileEntry] = {}
        rest = _rest(layers, held, model)
        try:
            if writes:
                entries |= _write(target, f"rank-{_index(first):05}.safetensors", _rows(layers, held, model))
            if rank == 0:
                entries |= _write(target, REPLICATED, rest)
        except (OSError, SafetensorError, MoefxError) as error:
            problem = _wrapped(asked, error)
        _agree(asked, problem)
        everyone: list[dict[str, Any]] = [{} for _ in range(world)]
        dist.all_gather_object(everyone, {name: entry.model_dump() for name, entry in entries.items()})
        if rank == 0:
            homes = {name: [list(home) for home in _homes(layer)] for name, layer in layers.items()}
            files = {name: FileEntry(**entry) for part in everyone for name, entry in part.items()}
            manifest = _Manifest(homes=homes, files=files, extra=extra or {})
            (target / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    dist.barrier()


def load_shards(model: nn.Module, folder: str | os.PathLike[str], optimizers: Optimizers = None) -> dict[str, Any]:
    """Read a checkpoint into a parallel model on any number of processes, and return ``extra``. A collective.

    Every file is compared with its hash first, each by one process; nothing is changed before all agree. Without
    ``torch.distributed`` it reads into a model that is not parallel.

    Raises:
        UnsafeInputError: the folder or a file in it is missing or damaged, or it is of another model. Raised on all
            ranks; the model is as it was.
    """
    path, held, asked = Path(folder), _listed(optimizers), f"load the checkpoint {str(folder)!r}"
    problem: MoefxError | None = None
    manifest: _Manifest | None = None
    pending: list[tuple[Any, Any, Tensor]] = []
    try:
        manifest = _read_manifest(path, asked)
        _check_files(path, manifest, asked)
        pending = list(_pending(model, path, manifest, held, asked))
    except (OSError, SafetensorError) as error:
        problem = UnsafeInputError(asked, found=str(error), do="use an older checkpoint")
    except MoefxError as error:
        problem = error
    _agree(asked, problem)
    assert manifest is not None
    with torch.no_grad():
        for owner, key, value in pending:
            if isinstance(owner, Tensor):
                owner.copy_(value)
            else:
                owner.state[key[0]][key[1]] = value
    for layer in _layers(model).values():
        if isinstance(layer, DividedExperts):
            layer.rehome(layer.roster)  # copies are sent their weights again
    return manifest.extra


def _pending(
    model: nn.Module, path: Path, manifest: _Manifest, optimizers: list[Optimizer], asked: str
) -> Iterator[tuple[Any, Any, Tensor]]:
    """Yield a tensor, None and its value; or an optimizer, a parameter with the name of its state, and the value."""
    layers = _layers(model)
    if {n: sum(map(len, h)) for n, h in manifest.homes.items()} != {n: e.num_experts for n, e in layers.items()}:
        raise UnsafeInputError(asked, found="other routed layers or numbers of experts", do="build the saved model")
    with ExitStack() as stack:
        files = {n: stack.enter_context(safe_open(path / n, framework="pt")) for n in manifest.files}
        places = {
            name: {e: (f"rank-{r:05}.safetensors", i) for r, home in enumerate(homes) for i, e in enumerate(home)}
            for name, homes in manifest.homes.items()
        }
        parameters = dict(model.named_parameters())
        cut = {f"{layer}.{name}": layer for layer, e in layers.items() for name in _stacked(e)}

        def read(key: str, name: str, like: Tensor) -> Tensor:
            if name not in cut:
                plain: Tensor = files[REPLICATED].get_tensor(key)
                return divided_like(plain.to(like.device), like)
            where = [places[cut[name]][e] for e in _homes(layers[cut[name]])[_index(layers[cut[name]])]]
            rows = [files[file].get_slice(key)[i : i + 1] for file, i in where]
            return (torch.cat(rows) if rows else like.new_empty(like.shape)).to(like.device)

        saved = {key for file in files.values() for key in file.keys()}  # noqa: SIM118 - no mapping
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name not in saved and not (name in cut and not len(tensor)):
                raise UnsafeInputError(asked, found=f"no {name}", do="build the model that was saved")
            value = read(name, name, tensor)
            if value.shape != tensor.shape:
                found = f"{name} is {list(value.shape)}, the model's is {list(tensor.shape)}"
                raise UnsafeInputError(asked, found=found, do="build the model that was saved")
            yield tensor, None, value
        for key in sorted(k for k in saved if k.startswith("optimizer.")):
            _, number, rows, state, name = key.split(".", 4)
            if int(number) < len(optimizers) and name in parameters:
                value = read(key, name if rows == "rows" else "", parameters[name])
                yield optimizers[int(number)], (parameters[name], state), value.cpu() if value.ndim == 0 else value


def _rows(layers: dict[str, Any], optimizers: list[Optimizer], model: nn.Module) -> dict[str, Tensor]:
    """Return what has one row per expert of this rank."""
    found = {}
    for prefix, layer in layers.items():
        for name in _stacked(layer):
            parameter = layer.get_parameter(name)
            found[f"{prefix}.{name}"] = parameter
            for i, optimizer in enumerate(optimizers):
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape:
                        found[f"optimizer.{i}.rows.{key}.{prefix}.{name}"] = value
    return found


def _rest(layers: dict[str, Any], optimizers: list[Optimizer], model: nn.Module) -> dict[str, Tensor]:
    """Return what all ranks hold alike; what FSDP divides is gathered, in the same order on all ranks."""
    cut = {f"{prefix}.{name}" for prefix, layer in layers.items() for name in _stacked(layer)}
    found = {name: tensor for name, tensor in model.state_dict().items() if name not in cut}
    for name, parameter in model.named_parameters():
        for i, optimizer in enumerate(optimizers):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and not (name in cut and value.ndim and value.shape == parameter.shape):
                    found[f"optimizer.{i}.plain.{key}.{name}"] = value
    return {name: whole(tensor) for name, tensor in found.items()}


def _write(folder: Path, name: str, tensors: dict[str, Tensor]) -> dict[str, FileEntry]:
    save_file({key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}, folder / name)
    return {name: describe(folder, name)}


def _read_manifest(path: Path, asked: str) -> _Manifest:
    try:
        manifest = _Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        raise UnsafeInputError(
            asked, found=f"no {MANIFEST} that can be used: {error}", do="pass a folder that save_shards wrote"
        ) from error
    if manifest.version != VERSION:
        raise UnsafeInputError(asked, found=f"version {manifest.version}", do=f"write it as {VERSION}")
    return manifest


def _check_files(path: Path, manifest: _Manifest, asked: str) -> None:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for i, (name, entry) in enumerate(sorted(manifest.files.items())):
        if Path(name).name != name or not (path / name).is_file():
            raise UnsafeInputError(asked, found=f"{name} is missing", do="use an older checkpoint")
        if i % world == rank and describe(path, name) != entry:
            raise UnsafeInputError(asked, found=f"{name} has another size or hash", do="use an older checkpoint")


def _agree(asked: str, problem: MoefxError | None) -> None:
    if not dist.is_initialized():
        if problem is not None:
            raise problem
        return
    world = dist.group.WORLD
    assert world is not None
    agree(asked, {}, problem, "cuda" if dist.get_backend() == "nccl" else "cpu", world)


def _wrapped(asked: str, error: Exception) -> MoefxError:
    return error if isinstance(error, MoefxError) else InputError(asked, found=str(error), do="use another folder")


def _layers(model: nn.Module) -> dict[str, Any]:
    stacks = {name: stack_of(layer) for name, layer in routed_layers(model).items()}
    return {f"{name}.{stack.path}": stack.experts for name, stack in stacks.items()}


def _stacked(layer: nn.Module) -> list[str]:
    return list(stacked_parameters(layer))


def _homes(layer: Any) -> tuple[tuple[int, ...], ...]:
    return layer.homes if isinstance(layer, DividedExperts) else (tuple(range(layer.num_experts)),)


def _index(layer: Any) -> int:
    return layer.rank if isinstance(layer, DividedExperts) else 0


def _first_of_data(model: nn.Module) -> bool:
    name = model.__dict__.get(DATA_GROUP)
    return name is None or dist.get_rank(_resolve_process_group(cast(Any, name))) == 0


def _listed(optimizers: Optimizers) -> list[Optimizer]:
    return [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers or ())


def _is_owned(name: str) -> bool:
    return name in (MANIFEST, REPLICATED) or (name.startswith("rank-") and name.endswith(".safetensors"))
