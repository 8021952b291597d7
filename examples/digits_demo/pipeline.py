"""The demo from data to report."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moefx
from examples.digits_demo import dense, plots, report, sparse
from examples.digits_demo.config import Config
from examples.digits_demo.cost import cost, routed_layers
from examples.digits_demo.data import Digits, load
from examples.digits_demo.files import write_text
from examples.digits_demo.flow import Batch, sample
from examples.digits_demo.judge import Judge, bucket_errors, paired_difference
from examples.digits_demo.train import Curve, Trainee, train

FILES = (
    "report.md",
    "report.json",
    "loss_curves.png",
    "samples.png",
    "expert_utilisation.png",
    "graph_before.txt",
    "graph_after.txt",
)
SHEET_ROWS = 3


class Stages:
    """Say on stderr what is going on, and keep the wall time of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def run(config: Config, folder: Path, *, fresh: bool = False) -> dict[str, Any]:
    """Do everything, write all files into ``folder``, and return the facts that are in report.json."""
    stage, data = Stages(), load(config.validation_share, config.seed)
    with stage("dense pre-training"):
        model, pretraining, cached = dense.trained(config, data, folder, fresh=fresh)
    with stage("transform and proof"):
        routed, facts = convert(config, data, model, folder)
    start = {"dense": model, "routed": routed}
    losses = {name: errors(config, data, each) for name, each in start.items()}
    with stage("judging the dense model"):
        judge = Judge(data, config.judge)
        images = {"dense": draw(config, model)}
    with stage("fine-tuning, dense and routed"):
        curves = {"pretraining": pretraining} | finetune(config, data, model, routed)
    losses |= {"dense_tuned": errors(config, data, model), "routed_tuned": errors(config, data, routed)}
    with stage("judging the fine-tuned models"):
        images |= {"dense_tuned": draw(config, model), "routed_tuned": draw(config, routed)}
        facts["samples"] = {name: judge.score(each, labels(config)) for name, each in images.items()}
        facts["yardsticks"] = judge.yardsticks()
    with stage("report"):
        load_LBE = sparse.expert_load(routed, data, config.judge.timestep_buckets, config.seed + 3)
        facts["experts"] = expert_facts(routed, load_LBE)
        facts["validation_loss"] = loss_facts(losses)
        facts["curves"] = {name: dataclasses.asdict(curve) for name, curve in curves.items()}
        draw_curves(folder, curves)
        draw_samples(folder, config, data, images, facts)
        plots.utilisation(folder / "expert_utilisation.png", load_LBE, [each["layer"] for each in facts["experts"]])
    facts = header(config, cached) | facts | {"seconds": stage.seconds, "files": list(FILES)}
    report.write(folder, facts)
    return facts


def header(config: Config, cached: bool) -> dict[str, Any]:
    """Return what identifies a run."""
    return {
        "schema": 1,
        "versions": report.versions(),
        "threads": torch.get_num_threads(),
        "config": config.as_dict(),
        "dense_from_cache": cached,
    }


def convert(config: Config, data: Digits, model: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the routed model and the facts about the conversion; write the graphs before and after."""
    inputs = sparse.example_inputs(data)
    one_image = tuple(value[:1] for value in inputs)
    write_text(folder / "graph_before.txt", moefx.dump(model, inputs))
    routed = sparse.transform(model, data, config.routing, config.seed)
    write_text(folder / "graph_after.txt", moefx.dump(routed, inputs))
    routed.eval()
    costs = {"dense": cost(model, one_image), "routed": cost(routed, one_image)}
    return routed, {
        "equality": sparse.prove_equal(model, routed, data),
        "cost": {name: dataclasses.asdict(each) for name, each in costs.items()},
        "receipt": str(routed.moefx.report),
    }


def finetune(config: Config, data: Digits, model: nn.Module, routed: nn.Module) -> dict[str, Curve]:
    """Train both models side by side, in place, on the same batches; they end with averaged weights."""

    def balance(model: nn.Module, _: Batch) -> Tensor:
        penalty: Tensor = moefx.aux_loss(model, balance=config.routing.balance_weight)
        return penalty

    trainees = {
        "dense": Trainee(model, config.finetune),
        "routed": Trainee(routed, config.finetune, balance),
    }
    train(list(trainees.values()), data, config.finetune, config.model.classes, config.seed + 1, "fine-tuning")
    for trainee in trainees.values():
        trainee.finish()
    return {name: trainee.curve for name, trainee in trainees.items()}


def errors(config: Config, data: Digits, model: nn.Module) -> Tensor:
    """Return the validation errors [bucket, image] on noise that is the same for every model."""
    return bucket_errors(model, data, config.judge, config.seed + 2)


def labels(config: Config) -> Tensor:
    """Return the labels that samples are asked for: all classes, again and again."""
    return torch.arange(config.model.classes).repeat(config.judge.samples_per_class)


def draw(config: Config, model: nn.Module) -> Tensor:
    """Sample from a model; the same initial noise for every model."""
    judge = config.judge
    return sample(
        model,
        labels(config),
        config.model.classes,
        steps=judge.sampler_steps,
        guidance=judge.guidance,
        seed=config.seed + 4,
    )


def loss_facts(losses: dict[str, Tensor]) -> dict[str, Any]:
    """Return mean and per-bucket losses of every model, and the paired gap of the two fine-tuned ones."""
    facts: dict[str, Any] = {
        name: {"mean": each.mean().item(), "by_bucket": each.mean(dim=1).tolist()} for name, each in losses.items()
    }
    return facts | {"routed_minus_dense": paired_difference(losses["routed_tuned"], losses["dense_tuned"])}


def expert_facts(routed: nn.Module, load_LBE: Tensor) -> list[dict[str, Any]]:
    """Return per layer the share of tokens of each expert, over all times and by time."""
    return [
        {"layer": name, "load": by_time.mean(dim=0).tolist(), "load_by_time": by_time.tolist()}
        for (name, _), by_time in zip(routed_layers(routed), load_LBE, strict=True)
    ]


def draw_curves(folder: Path, curves: dict[str, Curve]) -> None:
    """Draw the losses of pre-training and of both fine-tunings."""
    start = curves["dense"].validation[0]
    plots.loss_curves(folder / "loss_curves.png", curves["pretraining"], curves["dense"], curves["routed"], start)


def draw_samples(folder: Path, config: Config, data: Digits, images: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Draw the first samples of every model under real digits."""
    classes = config.model.classes
    sheet = {"real validation digits": real_rows(data, classes)}
    for name, title in report.MODELS.items():
        sheet[f"{title} ({score(facts, name)})"] = images[name][: SHEET_ROWS * classes]
    plots.sample_sheet(folder / "samples.png", sheet, classes)


def score(facts: dict[str, Any], name: str) -> str:
    """Return the agreement of a model's samples, for a title."""
    found = facts["samples"][name]
    return f"kNN agreement {found['knn_agreement']}/{found['samples']}"


def real_rows(data: Digits, classes: int) -> Tensor:
    """Return the first validation images of each class, a column per class."""
    chosen = [torch.nonzero(data.validation_y == label).flatten()[:SHEET_ROWS] for label in range(classes)]
    return data.validation_x[torch.stack(chosen, dim=1).flatten()]
