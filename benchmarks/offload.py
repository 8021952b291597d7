"""Time an offloaded model against the resident one: ``python benchmarks/offload.py --json out.json``.

A stack of routed FFNs with an attention-sized dense product between them, in the proportions of a diffusion
transformer. Each variant holds a part of the experts' weights in memory; the rest lies in safetensors files. All
variants run interleaved in one process; each result is compared with the resident one, bit by bit, first. ``--cold``
drops the files from the operating system's cache before each run, so that every load comes from the disk.

``thread_s`` is the CPU time of the computing thread: what the wall clock would show on a machine with a core left for
the loading thread, apart from ``waited_s``. On a busy machine it is the number to compare.

What is asked of each share of resident experts is printed below the table: the ratio to the resident model's time, the
hit rate, and how much less an LRU cache of the same size does. One run ends in less than five minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moefx.offloading import offload, offload_stats
from moefx.routing import Experts, LinearRouter, RoutedFFN, random_weights

RESIDENT = "resident"


class Blocks(nn.Module):
    """Blocks of one dense product of four widths, which stands for attention, and a routed FFN."""

    def __init__(self, depth: int, width: int, experts: int) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.mix, self.ffns = nn.ModuleList(), nn.ModuleList()
        for _ in range(depth):
            self.mix.append(nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)))
            weights = random_weights(width, 4 * width, num_experts=experts, generator=draws)
            self.ffns.append(
                RoutedFFN(LinearRouter(width, experts, std=0.5, generator=draws), Experts(weights, nn.GELU()), top_k=2)
            )

    def forward(self, x: Tensor) -> Tensor:
        for mix, ffn in zip(self.mix, self.ffns, strict=True):
            x = x + mix(x)
            x = x + ffn(x)
        return x


def build(options: argparse.Namespace) -> Blocks:
    """Return the same model each time."""
    torch.manual_seed(0)
    return Blocks(options.depth, options.width, options.experts).eval()


def variants(options: argparse.Namespace, folder: Path) -> dict[str, nn.Module]:
    """Return the resident model, and offloaded ones by share of the experts' bytes and policy."""
    found: dict[str, nn.Module] = {RESIDENT: build(options)}
    stacked = sum(p.nbytes for f in found[RESIDENT].ffns for n, p in f.experts.named_parameters() if n != "b_out")
    rest = sum(t.nbytes for t in (*found[RESIDENT].parameters(), *found[RESIDENT].buffers())) - stacked
    for share in options.shares:
        for policy in ("schedule", "lru"):
            budget = rest + int(share * stacked)
            found[f"{share:.0%} {policy}"] = offload(build(options), budget, folder=folder, policy=policy)
    return found


def drop_caches(folder: Path) -> None:
    """Ask the operating system to forget the files."""
    for path in folder.glob("*/*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@torch.no_grad()
def measure(
    models: dict[str, nn.Module], tokens: int, options: argparse.Namespace, folder: Path
) -> dict[str, dict[str, float]]:
    """Return the fastest seconds per forward on the clock and on the computing thread, and counts of the timed runs."""
    x = torch.randn(1, tokens, options.width, generator=torch.Generator().manual_seed(1))
    wanted = models[RESIDENT](x)
    unequal = [name for name, model in models.items() if not torch.equal(model(x), wanted)]
    assert not unequal, f"{unequal} differ from the resident model"
    times: dict[str, list[float]] = {name: [] for name in models}
    threads: dict[str, list[float]] = {name: [] for name in models}
    before = {name: vars(offload_stats(model)).copy() for name, model in models.items() if name != RESIDENT}
    for _ in range(options.rounds):
        for name, model in models.items():
            if options.cold:
                drop_caches(folder)
            start, on_thread = time.perf_counter(), time.thread_time()
            model(x)
            times[name].append(time.perf_counter() - start)
            threads[name].append(time.thread_time() - on_thread)
    rows = {}
    for name, model in models.items():
        rows[name] = {"best_s": min(times[name]), "median_s": statistics.median(times[name])}
        rows[name]["thread_s"] = min(threads[name])
        rows[name]["ratio"] = rows[name]["best_s"] / min(times[RESIDENT])
        rows[name]["thread_ratio"] = rows[name]["thread_s"] / min(threads[RESIDENT])
        if name != RESIDENT:
            stats, since = offload_stats(model), before[name]
            delta = {key: getattr(stats, key) - value for key, value in since.items()}
            accesses = delta["resident"] + delta["ahead"] + delta["late"]
            rows[name] |= {
                "hit_rate": delta["resident"] / accesses,
                "ahead": delta["ahead"] / accesses,
                "late": delta["late"] / accesses,
                "waited_s": delta["wait_s"] / options.rounds,
                "read_MB": delta["read_bytes"] / options.rounds / 1e6,
            }
    return rows


def show(rows: dict[str, dict[str, float]], title: str) -> None:
    """Print one table."""
    columns = ["best_s", "ratio", "thread_s", "thread_ratio", "hit_rate", "ahead", "late", "waited_s", "read_MB"]
    table = Table(title=title)
    for column in ("variant", *columns):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[c]:.3f}" if c in row else "" for c in columns))
    Console(width=120).print(table)


def verdicts(rows: dict[str, dict[str, float]], shares: list[float]) -> list[str]:
    """Return one line for each share: streamed by schedule against resident, and against LRU."""
    lines = []
    for share in shares:
        ours, lru = rows[f"{share:.0%} schedule"], rows[f"{share:.0%} lru"]
        lines.append(
            f"{share:.0%} resident: {ours['ratio']:.2f} times the resident model's time ({ours['thread_ratio']:.2f} on "
            f"the computing thread), hit rate {ours['hit_rate']:.2f}, {ours['late']:.1%} late; LRU {lru['ratio']:.2f} "
            f"times ({lru['thread_ratio']:.2f}), hit rate {lru['hit_rate']:.2f}, {lru['late']:.1%} late"
        )
    return lines


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512], help="tokens per forward")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25], help="of the experts' bytes in memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="read from the disk each time")
    parser.add_argument("--folder", type=Path, help="a disk for the files")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, object] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {options.threads} thread",
        "asked": {k: str(v) for k, v in vars(options).items() if k not in ("json", "folder")},
        "load_average": os.getloadavg(),
    }
    with TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        models = variants(options, folder)
        for tokens in options.tokens:
            rows = measure(models, tokens, options, folder)
            show(rows, f"{tokens} tokens, {'cold' if options.cold else 'warm'} files")
            print("\n".join(verdicts(rows, options.shares)))
            result[f"{tokens} tokens"] = rows
        models.clear()
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
