"""Run a model on data and collect the statistics of its feed-forward networks, attention heads and tokens.

The model's graph is run instead of its forward: the inputs of every network, inline and gated ones too, are values of
the graph, so no hook is ever set and an interruption leaves nothing behind.

Legend: B samples, N tokens, D width, D_o output width.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from tqdm import tqdm

from moefx.errors import GuardError, InputError, OptionError
from moefx.graph import Graph, trace
from moefx.graph.outputs import put_together
from moefx.graph.signature import normalise_inputs
from moefx.passes.analysis import Facts, Site, analyse
from moefx.passes.analysis.conditioning import TIMESTEP
from moefx.passes.calibration.calibration import Calibration
from moefx.passes.calibration.layer import LayerStatistics
from moefx.passes.calibration.modality import JOINT, modality, text_tokens
from moefx.passes.calibration.part_sites import PartSites
from moefx.passes.rewrite.dense import dense_weights, hidden_function

Batch = Any
Loss = Callable[[Any, Batch], Tensor]


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch] | Mapping[str, Iterable[Batch]],
    *,
    inputs: Callable[[Batch], Any] | None = None,
    loss: Loss | None = None,
    buckets: int = 8,
    timesteps: tuple[float, float] | None = None,
    samples: int = 2048,
    active: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Return the statistics of every feed-forward network, attention head and block's tokens of a model on data.

    Give what the model meets when it samples: all noise levels, both branches of guidance, all resolutions. Memory is
    bounded by ``samples`` tokens and a few vectors per layer, however many batches there are.

    Args:
        model: a dense model; run in evaluation mode and given back as it was.
        batches: inputs of the model, as for :func:`moefx.transform`; or batches by branch, such as
            ``{"conditional": …, "unconditional": …}``.
        inputs: maps a batch to the model's inputs, if it holds more than those.
        loss: maps the model's output and the batch to a scalar; its gradient gives the Taylor statistics.
        buckets: number of equal parts of the range of timesteps.
        timesteps: that range; by default 0 to 1 if the first batch's timesteps lie there, else 0 to 1000.
        samples: tokens kept per layer.
        active: neurons per token that count as used.
        seed: of the sample; give each process another one.
        progress: show a bar.

    Raises:
        InputError: no batch, no network, a batch the model cannot run on, or a loss without gradient.
        CaptureError: the model cannot be traced faithfully.
    """
    if buckets < 1 or samples < 1 or active < 1:
        raise OptionError("calibrate", found=f"buckets={buckets}, samples={samples}, active={active}", do="at least 1")
    by_branch = batches if isinstance(batches, Mapping) else {"all": batches}
    runner = _Runner(model, inputs, loss, seed, {"samples": samples, "active": active})
    made: Calibration | None = None
    with _evaluating(model):
        for i, (branch, items) in enumerate(by_branch.items()):
            for batch in tqdm(items, desc=f"calibrate ({branch})", unit="batch", disable=not progress):
                run = runner.run(batch)
                if made is None:
                    span = timesteps or _span(run.timestep)
                    made = Calibration(type(model).__name__, buckets, span, tuple(by_branch))
                runner.add(made, run, i)
    if made is None:
        raise InputError(f"calibrate {type(model).__name__}", found="no batch", do="pass at least one")
    return made


class _Run:
    """One forward pass: the values that enter the networks, and the gradients of what leaves them."""

    def __init__(
        self,
        graph: Graph,
        sites: dict[str, list[Site]],
        parts: PartSites,
        values: dict[Node, Any],
        timestep: Tensor | None,
    ) -> None:
        self.graph, self.sites, self.parts, self.values, self.timestep = graph, sites, parts, values, timestep
        self.gradients: dict[Node, Tensor] = {}
        self.text = {site.name: text_tokens(analyse(graph), site) for calls in sites.values() for site in calls}


class _Runner:
    """Runs batches through graphs of the model, one per kind of call."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Callable[[Batch], Any] | None,
        loss: Loss | None,
        seed: int,
        options: dict[str, int],
    ) -> None:
        self.model, self.inputs, self.loss, self.seed, self.options = model, inputs, loss, seed, options
        self.graphs: list[Graph] = []
        self.draws: dict[str, torch.Generator] = {}

    def run(self, batch: Batch) -> _Run:
        """Run one batch, on a graph that admits it."""
        args, kwargs = normalise_inputs(self.model, batch if self.inputs is None else self.inputs(batch))
        for graph in self.graphs:
            try:
                return self._run(graph, args, kwargs, batch)
            except GuardError:
                continue
        self.graphs.append(trace(self.model, (args, kwargs)))
        return self._run(self.graphs[-1], args, kwargs, batch)

    def _run(self, graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch) -> _Run:
        facts = analyse(graph)
        sites = networks(facts)
        if not sites:
            raise InputError(
                f"calibrate {type(self.model).__name__}", found="no feed-forward network", do="see moefx.sites(model)"
            )
        every = [site for group in sites.values() for site in group]
        parts = PartSites(facts)
        ends = [*(site.output for site in every), *parts.ends] if self.loss else []
        (output,) = (n for n in reversed(graph.fx.nodes) if n.op == "output")
        leaves = [n for n in output.all_input_nodes if self.loss]
        clock = [n for n, kind in facts.context.classes.inputs.items() if kind == TIMESTEP][:1]
        wanted = dict.fromkeys([*(s.operands["x"] for s in every), *parts.needs, *ends, *leaves, *clock])
        with torch.set_grad_enabled(self.loss is not None):
            values = graph.values(wanted, *args, **kwargs)
            run = _Run(graph, sites, parts, values, values[clock[0]] if clock else None)
            if self.loss is not None:
                tree = map_arg(output.args[0], lambda n: values[n])
                result = put_together(list(tree), graph.out_spec) if graph.out_spec is not None else tree
                run.gradients = _gradients(self.loss(result, batch), {n: values[n] for n in ends})
        return run

    def add(self, calibration: Calibration, run: _Run, branch: int) -> None:
        """Add a forward pass to the statistics."""

        def group_of(x: Tensor) -> Tensor:
            return branch * calibration.buckets + _token_buckets(calibration, run.timestep, x)

        groups = calibration.buckets * len(calibration.branches)
        run.parts.add(calibration.parts, groups, group_of, run.values, run.gradients)
        for name, calls in run.sites.items():
            why = _unsuitable(calls[0])
            if why:
                calibration.skipped[name] = why
                continue
            layer = calibration.layers.get(name) or self._layer(calibration, name, run)
            calibration.layers[name] = layer
            weights, act = dense_weights(calls[0], run.graph), hidden_function(calls[0])
            draws = self.draws.setdefault(name, self._generator(name))
            for site in calls:
                axis = int(site.shapes["axis"])
                x = run.values[site.operands["x"]].detach().movedim(axis, -1)
                kind = modality(run.text[site.name], x.shape[0], x[0].numel() // x.shape[-1], x.device)
                place = branch * len(layer.modalities) + kind
                group = place * calibration.buckets + _token_buckets(calibration, run.timestep, x)
                gradient = run.gradients.get(site.output)
                if gradient is not None:
                    gradient = gradient.movedim(axis, -1).reshape(-1, gradient.shape[axis])
                layer.add(x.reshape(-1, x.shape[-1]), group, weights, act, draws, gradient)

    def _layer(self, calibration: Calibration, name: str, run: _Run) -> LayerStatistics:
        site = run.sites[name][0]
        kinds = JOINT if run.text[site.name] else (site.role,)
        sizes = (int(site.shapes["D"]), int(site.shapes["F"]), int(site.shapes["D_out"]))
        return LayerStatistics(
            name,
            site.role,
            sizes,
            "w_gate" in site.operands,
            len(calibration.branches) * len(kinds) * calibration.buckets,
            self.options["samples"],
            self.options["active"],
            modalities=kinds,
        )

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))


def networks(facts: Facts) -> dict[str, list[Site]]:
    """Return the feed-forward sites by name; all calls of one module under the name of its first."""
    found: dict[str, list[Site]] = {}
    names: dict[str, str] = {}
    for site in facts.sites:
        if site.kind == "ffn":
            key = site.path if site.region_is_module else f":{site.name}"
            found.setdefault(names.setdefault(key, site.name), []).append(site)
    return found


def _unsuitable(site: Site) -> str:
    if any(name.startswith("w_depth") for name in site.operands):
        return "a depthwise convolution between its projections: its hidden layer is no function of one token"
    return "its result feeds nothing that is returned" if site.dead else ""


def _gradients(loss: Tensor, ends: dict[Node, Tensor]) -> dict[Node, Tensor]:
    reached = {node: value for node, value in ends.items() if value.requires_grad}
    if loss.ndim or not loss.requires_grad or not reached:
        raise InputError(
            "take the gradient of a calibration loss",
            found=f"a loss of shape {tuple(loss.shape)} with requires_grad = {loss.requires_grad}",
            do="return a scalar of the model's output, and let some parameters require gradients",
        )
    found = torch.autograd.grad(loss, list(reached.values()), allow_unused=True)
    return {node: g for node, g in zip(reached, found, strict=True) if g is not None}


def _span(timestep: Tensor | None) -> tuple[float, float]:
    if timestep is None or not timestep.is_floating_point():
        return 0.0, 1000.0
    return 0.0, 1.0 if float(timestep.max()) <= 1 else 1000.0


def _token_buckets(calibration: Calibration, timestep: Tensor | None, x: Tensor) -> Tensor:
    """Return the bucket of every token of ``x [B, ..., D]``; folded batches such as frames repeat their sample's."""
    tokens, rows = x.numel() // x.shape[-1], x.shape[0]
    if timestep is None:
        return torch.zeros(tokens, dtype=torch.int64, device=x.device)
    clock = timestep.reshape(-1) if timestep.ndim < 2 else timestep.flatten(1).to(torch.float64).mean(1)
    known = clock.numel()
    if known > 1 and rows % known:
        raise InputError(
            "calibrate by timestep",
            found=f"{known} timesteps, and {rows} rows entering a network",
            do="give one timestep per sample",
        )
    return calibration.bucket(clock).repeat_interleave(tokens // known)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
