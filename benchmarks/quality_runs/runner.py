"""Run conditions, one seed after the other; every finished run is written at once, so that a table can be resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import moefx
from benchmarks.quality_runs.conditions import TABLES, Condition, Start
from benchmarks.quality_runs.judge import Judge
from benchmarks.quality_runs.settings import Setting
from examples.digits_demo import dense as pretraining
from examples.digits_demo.config import Config, StageConfig
from examples.digits_demo.data import Digits
from examples.digits_demo.files import write_text
from examples.digits_demo.train import Trainee, train
from examples.dit import DiT

Facts = dict[str, Any]


class Table:
    """The runs of one table on one data set, in one JSON file."""

    def __init__(self, path: Path, setting: Setting, name: str) -> None:
        self.path, self.setting, self.name = path, setting, name
        self.key = _key(setting)
        self.runs: dict[str, dict[str, Facts]] = {}
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["setting"] == self.key:
                self.runs = kept["runs"]

    def done(self, condition: Condition, seed: int) -> bool:
        """Whether this run is in the file."""
        return str(seed) in self.runs.get(condition.name, {})

    def elsewhere(self, condition: Condition, seed: int, steps: int) -> Facts | None:
        """Return the same run from another table of these data: a name with as many steps means one run in all."""
        for path in sorted(self.path.parent.glob(f"quality_*_{self.setting.name}.json")):
            kept = json.loads(path.read_text(encoding="utf-8"))
            facts: Facts = kept["runs"].get(condition.name, {}).get(str(seed), {})
            if kept["setting"] == self.key and facts.get("steps") == steps:
                return facts
        return None

    def add(self, condition: Condition, seed: int, facts: Facts) -> None:
        """Keep a finished run."""
        self.runs.setdefault(condition.name, {})[str(seed)] = facts
        data = {
            "schema": 1,
            "table": self.name,
            "data": self.setting.name,
            "setting": self.key,
            "versions": {"torch": torch.__version__, "moefx": moefx.__version__},
            "runs": self.runs,
        }
        write_text(self.path, json.dumps(data, indent=1) + "\n")


def _key(setting: Setting) -> str:
    """Hash what every run of a setting depends on: other settings are other tables."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(setting), sort_keys=True).encode()).hexdigest()[:12]


def run(setting: Setting, name: str, seeds: int, results: Path, cache: Path, only: str = "") -> Table:
    """Run what is missing of a table and return all of it; ``only`` picks conditions by a part of their name."""
    console = Console(stderr=True)
    table = Table(results / f"quality_{name}_{setting.name}.json", setting, name)
    for seed in range(seeds):
        missing = [c for c in TABLES[name](setting) if only in c.name and not table.done(c, seed)]
        if not missing:
            continue
        data = setting.data(seed)
        judge = Judge(setting, data, seed)
        model = dense_model(setting, data, seed, cache)
        for condition in missing:
            facts = table.elsewhere(condition, seed, condition.length(setting)) or run_condition(
                setting, condition, Start(model, data, seed), judge
            )
            table.add(condition, seed, facts)
            console.print(f"seed {seed}  {condition.name}: loss {facts['loss']:.4f}", highlight=False)
    return table


def remeasure(setting: Setting, name: str, results: Path, cache: Path) -> Table:
    """Measure sizes and times of the finished runs of a table anew, on models that are built but not trained."""
    table = Table(results / f"quality_{name}_{setting.name}.json", setting, name)
    for seed in sorted({int(seed) for runs in table.runs.values() for seed in runs}):
        data = setting.data(seed)
        judge = Judge(setting, data, seed)
        start = Start(dense_model(setting, data, seed, cache), data, seed)
        for condition in TABLES[name](setting):
            if table.done(condition, seed):
                model = condition.build(start)
                new = {**_size(model, start.dense), **judge.time_ratio(model, start.dense)}
                table.add(condition, seed, table.runs[condition.name][str(seed)] | new)
    return table


def dense_model(setting: Setting, data: Digits, seed: int, cache: Path) -> DiT:
    """Return the trained dense model, from the cache if it is there."""
    config = Config(seed=seed, model=setting.model, dense=setting.dense)
    folder = cache / setting.name
    model, _, _ = pretraining.trained(config, data, folder, fresh=False)
    return model


def run_condition(setting: Setting, condition: Condition, start: Start, judge: Judge) -> Facts:
    """Build, judge, train and judge one model."""
    if condition.scratch:
        start = dataclasses.replace(start, dense=_fresh(setting, start.seed))
    torch.manual_seed(start.seed)
    model = condition.build(start)
    before = judge.loss(model)
    stage = setting.dense if condition.scratch else setting.extra
    steps = condition.length(setting)
    seconds = 0.0
    if steps:
        stage = dataclasses.replace(stage, steps=steps, warmup_steps=min(stage.warmup_steps, max(1, steps // 4)))
        model, seconds = _trained(setting, condition, model, start, stage)
    after = judge.loss(model)
    return {
        "loss": sum(after) / len(after),
        "loss_before": sum(before) / len(before),
        "loss_by_bucket": after,
        "steps": steps,
        "train_seconds": seconds,
        **_size(model, start.dense),
        **judge.samples(model),
        **judge.time_ratio(model, start.dense),
    }


def _trained(
    setting: Setting, condition: Condition, model: nn.Module, start: Start, stage: StageConfig
) -> tuple[nn.Module, float]:
    if condition.train is not None:
        return model, condition.train(model, start, stage)
    trainee = Trainee(model, stage, condition.penalty(model) if condition.penalty else None)
    train([trainee], start.data, stage, setting.model.classes, start.seed + 1, f"{condition.name}, seed {start.seed}")
    return trainee.finish(), trainee.curve.seconds


def _fresh(setting: Setting, seed: int) -> DiT:
    return pretraining.build(Config(seed=seed, model=setting.model))


def _size(model: nn.Module, dense: nn.Module) -> dict[str, float]:
    """Return parameters and active FLOPs against the dense model's, as the plans of the model count them."""
    ratio = 1.0
    handle = getattr(model, "moefx", None)
    for plan in handle.plans if handle is not None else ():
        ratio *= plan.cost.flops_ratio
    count = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in dense.parameters())
    return {"flops_ratio": ratio, "parameters_ratio": count}
