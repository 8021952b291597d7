"""Train one or several models on the same batches, times and noise."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.digits_demo.config import StageConfig
from examples.digits_demo.data import Digits
from examples.digits_demo.flow import Batch, logit_normal, velocity_errors

Penalty = Callable[[nn.Module, Batch], Tensor]


@dataclass
class Curve:
    """Losses over training: per step on the batch, and now and then on validation data with averaged weights."""

    train: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Average:
    """An exponential moving average of a model's trainable parameters."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.live = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.mean = [parameter.detach().clone() for parameter in self.live]
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the live values, faster at the start, when the average still holds the initial ones."""
        self.updates += 1
        rate = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for mean, live in zip(self.mean, self.live, strict=True):
            mean.lerp_(live, rate)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averaged and live values."""
        for mean, live in zip(self.mean, self.live, strict=True):
            held = live.clone()
            live.copy_(mean)
            mean.copy_(held)


class Trainee:
    """A model with its optimizer, its average and its losses; ``penalty`` is added to the loss."""

    def __init__(self, model: nn.Module, stage: StageConfig, penalty: Penalty | None = None) -> None:
        self.model, self.penalty = model, penalty
        self.average, self.curve = Average(model, stage.ema_decay), Curve()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=stage.learning_rate, weight_decay=stage.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: cosine(step, stage))

    def step(self, batch: Batch) -> None:
        """Do one optimizer step."""
        started = time.perf_counter()
        self.model.train()
        loss = velocity_errors(self.model, batch).mean()
        self.curve.train.append(loss.item())
        total = loss if self.penalty is None else loss + self.penalty(self.model, batch)
        self.optimizer.zero_grad()
        torch.autograd.backward(total)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.average.update()
        self.curve.seconds += time.perf_counter() - started

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Lend the model in evaluation mode with averaged weights."""
        self.average.swap()
        self.model.eval()
        try:
            yield self.model
        finally:
            self.average.swap()

    def finish(self) -> nn.Module:
        """Keep the averaged weights for good."""
        self.average.swap()
        return self.model.eval()


def cosine(step: int, stage: StageConfig) -> float:
    """Return the share of the peak learning rate: a linear warm-up, then half a cosine down to 5 %."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    return 0.05 + 0.95 * (1 + math.cos(math.pi * min(1.0, done))) / 2


def draw(data: Digits, stage: StageConfig, null_class: int, generator: torch.Generator) -> Batch:
    """Draw a training batch; a share of the labels is replaced by the null class."""
    index = torch.randint(len(data.train_x), (stage.batch,), generator=generator)
    dropped = torch.rand(stage.batch, generator=generator) < stage.label_dropout
    return Batch(
        x=data.train_x[index],
        y=torch.where(dropped, null_class, data.train_y[index]),
        t=logit_normal(stage.batch, generator),
        noise=torch.randn(stage.batch, *data.train_x.shape[1:], generator=generator),
    )


def watched(data: Digits, seed: int) -> Batch:
    """Return the fixed validation batch behind the curves: every validation image once, times as in training."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(data.validation_x.shape, generator=generator)
    times = logit_normal(len(noise), generator)
    return Batch(data.validation_x, data.validation_y, times, noise)


def train(trainees: list[Trainee], data: Digits, stage: StageConfig, null_class: int, seed: int, title: str) -> None:
    """Train all models side by side: every step gives each of them the same batch."""
    generator = torch.Generator().manual_seed(seed)
    validation = watched(data, seed + 1)
    for trainee in trainees:
        evaluate(trainee, validation, 0)
    bar = tqdm(range(1, stage.steps + 1), desc=title, disable=not sys.stderr.isatty(), unit="step")
    for step in bar:
        batch = draw(data, stage, null_class, generator)
        for trainee in trainees:
            trainee.step(batch)
        if step % stage.evaluate_every == 0 or step == stage.steps:
            for trainee in trainees:
                evaluate(trainee, validation, step)
            bar.set_postfix_str(" ".join(f"{trainee.curve.validation[-1]:.4f}" for trainee in trainees))


@torch.no_grad()
def evaluate(trainee: Trainee, validation: Batch, step: int) -> None:
    """Append the validation loss of the averaged weights to the curve."""
    with trainee.averaged() as model:
        trainee.curve.validation.append(velocity_errors(model, validation).mean().item())
    trainee.curve.validation_steps.append(step)
