"""The pictures of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from examples.digits_demo.files import replacing
from examples.digits_demo.train import Curve

DENSE, ROUTED, PALE = "#35608f", "#d1662e", 0.35
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def save(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all, and free it."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def loss_curves(path: Path, pretraining: Curve, dense: Curve, routed: Curve, start: float) -> None:
    """Draw dense pre-training, then dense and routed fine-tuning from the same weights."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
        _curve(left, pretraining, DENSE, "dense")
        left.set(
            title="Dense pre-training", xlabel="optimizer step", ylabel="velocity error (mean square)", yscale="log"
        )
        left.yaxis.set_major_formatter("{x:.3g}")
        left.yaxis.set_minor_formatter("{x:.3g}")
        _curve(right, dense, DENSE, "dense")
        _curve(right, routed, ROUTED, "routed")
        right.axhline(start, color="#777777", linewidth=1, linestyle=":", label="validation at the start")
        right.set(title="Fine-tuning, equal active FLOPs, same batches", xlabel="optimizer step")
        for axes in (left, right):
            axes.legend()
        save(figure, path)


def _curve(axes: Axes, curve: Curve, colour: str, name: str) -> None:
    window = max(1, min(100, len(curve.train) // 4))
    smooth = np.convolve(curve.train, np.ones(window) / window, mode="valid")
    steps = np.arange(window, len(curve.train) + 1)
    axes.plot(steps, smooth, color=colour, alpha=PALE, label=f"{name}: training, mean of {window} steps")
    axes.plot(
        curve.validation_steps,
        curve.validation,
        color=colour,
        marker="o",
        markersize=3,
        label=f"{name}: validation, EMA",
    )


def sample_sheet(path: Path, rows: dict[str, Tensor], classes: int) -> None:
    """Draw images [rows * classes, 1, H, W] of each model as one strip; a column is a class."""
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(len(rows), 1, figsize=(8.6, 2.45 * len(rows)))
        for axis, (title, images) in zip(np.atleast_1d(axes), rows.items(), strict=True):
            sheet = _tile(images, classes)
            axis.imshow(sheet, cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
            cell = sheet.shape[1] / classes
            axis.set_xticks([cell * (column + 0.5) - 0.5 for column in range(classes)], range(classes))
            axis.set_yticks([])
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            axis.set_title(title, loc="left")
        axes[-1].set_xlabel("class asked for")
        save(figure, path)


def _tile(images: Tensor, columns: int) -> NDArray[np.float32]:
    """Put images [N, 1, H, W] in rows of ``columns``, with a white gap around each."""
    padded = np.pad(images[:, 0].numpy(), ((0, 0), (1, 1), (1, 1)), constant_values=-1)
    count, height, width = padded.shape
    grid = padded.reshape(count // columns, columns, height, width).swapaxes(1, 2)
    return grid.reshape(count // columns * height, columns * width)


def utilisation(path: Path, load: Tensor, names: list[str]) -> None:
    """Draw the load [layer, bucket, expert] relative to an even one, a panel per layer."""
    layers, _, experts = load.shape
    relative = load.numpy() * experts
    top = max(2.0, float(relative.max()))
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, panels = plt.subplots(
            1, layers, figsize=(3.7 * layers + 1, 1.9 + 0.25 * experts), sharey=True, squeeze=False
        )
        for axis, values, name in zip(panels[0], relative, names, strict=True):
            image = axis.imshow(
                values.T,
                cmap="viridis",
                vmin=0,
                vmax=top,
                origin="lower",
                aspect="auto",
                extent=(0, 1, -0.5, experts - 0.5),
            )
            axis.set(title=name, xlabel="time t (0: data, 1: noise)", xticks=[0, 0.5, 1])
            _annotate(axis, values, top)
        panels[0][0].set(ylabel="expert", yticks=range(experts))
        figure.colorbar(image, ax=panels[0], label="load relative to an even one", pad=0.015)
        figure.suptitle("Expert load over time: validation images, after fine-tuning")
        save(figure, path)


def _annotate(axis: Axes, values: NDArray[np.float32], top: float) -> None:
    """Write the values [bucket, expert] into their cells, legibly on the colour of the cell."""
    for bucket, experts in enumerate(values):
        x = (bucket + 0.5) / len(values)
        for expert, value in enumerate(experts):
            colour = "white" if value < 0.6 * top else "black"
            axis.text(x, expert, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour)
