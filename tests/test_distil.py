"""Distillation: its losses by hand, its loop against one written out, and what it leaves behind."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moefx.errors import InputError
from moefx.training.distil import Features, distil, feature_loss, output_loss
from tests.split_support import batch, convert, small_dit


def stream() -> Iterator[tuple[Tensor, ...]]:
    return (batch(i) for i in itertools.count())


def test_losses_by_hand() -> None:
    a, b = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0])
    assert float(output_loss({"x": a, "n": 3}, {"x": b, "n": 3})) == 2.5
    student = {"one": a, "two": a}
    teacher = {"one": b, "two": 10 * b}
    # Norms are 1 and 10 times |b|; their mean is 5.5: weights 5.5 and 0.55.
    squares = [2.5, float((a - 10 * b).square().mean())]
    assert float(feature_loss(student, teacher)) == pytest.approx((5.5 * squares[0] + 0.55 * squares[1]) / 2)
    assert float(feature_loss(student, teacher, balance=False)) == pytest.approx(sum(squares) / 2)
    with pytest.raises(InputError, match="same modules"):
        feature_loss(student, {"one": b})
    with pytest.raises(InputError, match="same inputs"):
        output_loss(a, b[:1])


def test_the_loop_is_the_one_written_out() -> None:
    teacher = small_dit().train()
    torch.manual_seed(1)
    student = small_dit()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    plain = copy.deepcopy(student)

    def task(output: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        return (output - inputs[0]).square().mean()

    losses = distil(
        student,
        teacher,
        stream(),
        steps=4,
        rate=1e-2,
        task=task,
        task_weight=0.5,
        features=["blocks.0"],
        feature_weight=2.0,
        progress=False,
    )
    optimiser = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    expected = []
    for step, inputs in zip(range(4), stream(), strict=False):
        optimiser.param_groups[0]["lr"] = 1e-2 * (1 - step / 4)
        with torch.no_grad():
            c = teacher.t_embedder(inputs[1]) + teacher.y_embedder(inputs[2])
            wanted = teacher.blocks[0](teacher.x_embedder(inputs[0]) + teacher.pos_embed, c)
            target = teacher(*inputs)
        c = plain.t_embedder(inputs[1]) + plain.y_embedder(inputs[2])
        feature = plain.blocks[0](plain.x_embedder(inputs[0]) + plain.pos_embed, c)
        output = plain(*inputs)
        loss = (output - target).square().mean() + 0.5 * task(output, inputs) + 2 * (feature - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimiser.step()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, rel=1e-6)
    assert teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())


def test_a_split_model_gets_closer_to_its_teacher() -> None:
    teacher, student = convert("moefx-split", experts=12, shared=4, top_k=4)
    few = [batch(i % 4) for i in range(60)]
    before = output_loss(student(*batch(0)), teacher(*batch(0)))
    distil(student, teacher, few, steps=60, rate=3e-3, features=["blocks.0", "blocks.1"], progress=False)
    assert output_loss(student.eval()(*batch(0)), teacher(*batch(0))) < 0.7 * before


def test_interruption_and_too_few_batches_leave_no_hooks() -> None:
    teacher, student = small_dit(), small_dit()
    with pytest.raises(InputError, match="1 batches for 3 steps"):
        distil(student, teacher, [batch(0)], steps=3, features=["blocks.0"], progress=False)
    with pytest.raises(TypeError), Features(student, ["blocks.0", "blocks.1"]) as found:
        student(*batch(0), "one too many")
    with Features(student, ["blocks.0", "blocks.1"]) as found:
        student(*batch(0))
    assert set(found) == {"blocks.0", "blocks.1"}
    assert not any(m._forward_hooks for m in student.modules())
