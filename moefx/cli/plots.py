"""Pictures of traces and placements, by matplotlib, which is optional."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moefx.errors import InputError

if TYPE_CHECKING:
    from moefx.passes.placement import Placement, RoutingTrace
    from moefx.passes.placement.predict import Prediction


def _figure(rows: int, columns: int, width: float, height: float) -> Any:
    """Return a figure that needs no display."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        do = "pip install 'moefx[viz]'"
        raise InputError("draw a picture", found="matplotlib is not installed", do=do) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.subplots(rows, columns, squeeze=False)
    return figure


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"draw to {str(path)!r}", found=str(error), do="name a .png or .svg file") from error


def draw_trace(trace: RoutingTrace, path: Path) -> None:
    """Draw the share of rows of each expert by noise level, a map per layer.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    depth = len(trace.layers)
    columns = min(depth, 4)
    figure = _figure(-(-depth // columns), columns, 3.2 * columns, 2.6 * -(-depth // columns))
    for i, axes in enumerate(figure.axes):
        if i >= depth:
            axes.set_visible(False)
            continue
        load = trace.layer(i)
        shares = load / np.maximum(load.sum(axis=1, keepdims=True), 1)
        image = axes.imshow(shares.T, aspect="auto", origin="lower", vmin=0)
        figure.colorbar(image, ax=axes)
        axes.set_title(trace.layers[i], fontsize=8)
        axes.set_xlabel(f"noise level {trace.sigmas[0]:.3g} to {trace.sigmas[-1]:.3g}", fontsize=7)
        axes.set_ylabel("expert", fontsize=7)
    _save(figure, path)


def draw_placement(placement: Placement, trace: RoutingTrace, seen: Prediction, path: Path) -> None:
    """Draw who holds what in each layout, and the imbalance and time of each step.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    layouts = placement.layouts
    figure = _figure(1, len(layouts) + 2, 3.2 * (len(layouts) + 2), 4.0)
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    axes, devices = figure.axes, len(placement.devices)
    colours = colormaps["tab20" if devices <= 20 else "viridis"].resampled(devices)
    for w, layout in enumerate(layouts):
        image = axes[w].imshow(_homes(layout), aspect="auto", cmap=colours, vmin=-0.5, vmax=devices - 0.5)
        axes[w].yaxis.set_major_locator(MaxNLocator(integer=True))
        for r in layout.replicas:
            axes[w].text(r.expert, r.layer, f"+{r.device}", ha="center", va="center", fontsize=5)
        start = "" if w == 0 else f" from sigma {placement.windows[w - 1].sigma:.3g}"
        axes[w].set_title(f"device of each expert{start}", fontsize=8)
        axes[w].set_xlabel("expert", fontsize=7)
        axes[w].set_ylabel("layer", fontsize=7)
        figure.colorbar(image, ax=axes[w], ticks=MaxNLocator(integer=True))
    axes[-2].plot(trace.sigmas, seen.imbalance, marker=".")
    axes[-2].set_title("busiest device against the mean", fontsize=8)
    axes[-1].plot(trace.sigmas, seen.compute_s * 1e3, marker=".", label="compute")
    axes[-1].plot(trace.sigmas, seen.exchange_s * 1e3, marker=".", label="exchange")
    axes[-1].set_title("predicted ms per step", fontsize=8)
    axes[-1].legend(fontsize=7)
    for plotted in axes[len(layouts) : len(layouts) + 2]:
        plotted.set_xlabel("noise level", fontsize=7)
        plotted.invert_xaxis()
    _save(figure, path)


def _homes(layout: Placement) -> Any:
    """Return the primary of each expert by layer, NaN where a layer has fewer experts."""
    homes = np.full((len(layout.layers), max(len(row) for row in layout.primary)), np.nan)
    for i, row in enumerate(layout.primary):
        homes[i, : len(row)] = row
    return homes
