"""Pictures of traces and placements, by matplotlib, which is optional."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moefx.errors import InputError

STREAM_NAMES = {"compute": "computing", "comm": "exchanging", "copy": "copying"}

if TYPE_CHECKING:
    from moefx.passes.placement import Placement, RoutingTrace
    from moefx.passes.placement.predict import Prediction
    from moefx.passes.schedule import Timeline


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


def draw_schedules(timelines: Mapping[str, Timeline], path: Path, *, device: int = 0) -> None:
    """Draw what the streams of one device do, one picture above another on one clock.

    Args:
        timelines: by title.
        path: ``.png`` or ``.svg``.
        device: whose.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    figure = _figure(len(timelines), 1, 11.0, 1.9 * len(timelines) + 0.4)
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    roles = sorted({task.role for line in timelines.values() for task in line.tasks})
    colour = {role: colormaps["tab10"](i % 10) for i, role in enumerate(roles)}
    streams = [s for s in STREAM_NAMES if any(t.stream == s for line in timelines.values() for t in line.tasks)]
    longest = max(line.total_s for line in timelines.values())
    unit, scale = ("ms", 1e3) if longest >= 1e-3 else ("µs", 1e6)
    for axes, (title, line) in zip(figure.axes, timelines.items(), strict=True):
        for n, task in enumerate(line.tasks):
            begin, end = line.start_s[n, device] * scale, line.end_s[n, device] * scale
            axes.barh(streams.index(task.stream), end - begin, left=begin, color=colour[task.role], height=0.8)
        axes.set_yticks(range(len(streams)), [STREAM_NAMES[s] for s in streams])
        axes.invert_yaxis()
        axes.set_xlim(0, longest * scale)
        axes.set_title(f"{title}: {line.total_s * scale:.4g} {unit}", fontsize=9, loc="left")
    figure.axes[-1].set_xlabel(unit, fontsize=8)
    shown = [Patch(color=colour[role], label=role) for role in roles]
    figure.legend(handles=shown, loc="outside right upper", fontsize=7)
    _save(figure, path)


def _homes(layout: Placement) -> Any:
    """Return the primary of each expert by layer, NaN where a layer has fewer experts."""
    homes = np.full((len(layout.layers), max(len(row) for row in layout.primary)), np.nan)
    for i, row in enumerate(layout.primary):
        homes[i, : len(row)] = row
    return homes
