"""The dense model: trained once, then read back from a file named after all it depends on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from examples.digits_demo.config import Config, dense_key
from examples.digits_demo.data import Digits
from examples.digits_demo.files import replacing
from examples.digits_demo.train import Curve, Trainee, train
from examples.dit import DiT


def build(config: Config) -> DiT:
    """Return a freshly initialised denoiser."""
    torch.manual_seed(config.seed)
    return DiT(**dataclasses.asdict(config.model))


def trained(config: Config, data: Digits, folder: Path, *, fresh: bool) -> tuple[DiT, Curve, bool]:
    """Return the dense model with averaged weights, its curve, and whether it came from a file."""
    path = folder / f"dense-{dense_key(config)}.safetensors"
    model = build(config)
    curve = None if fresh else _load(model, path)
    if curve is not None:
        return model.eval(), curve, True
    trainee = Trainee(model, config.dense)
    train([trainee], data, config.dense, config.model.classes, config.seed, "dense pre-training")
    trainee.finish()
    _save(model, trainee.curve, path)
    return model, trainee.curve, False


def _load(model: DiT, path: Path) -> Curve | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            return Curve(**json.loads(file.metadata()["curve"]))
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise SystemExit(f"{path} is damaged ({error}); run again with --fresh to train anew") from error


def _save(model: DiT, curve: Curve, path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary, metadata={"curve": json.dumps(dataclasses.asdict(curve))})
