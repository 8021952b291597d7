"""Quality of routed models on real images: one table per command, resumable; see ``--help``.

python benchmarks/quality.py upcycle --data digits --seeds 3
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `benchmarks` and `examples` are found

from benchmarks.quality_runs import report, runner, splits
from benchmarks.quality_runs.conditions import TABLES
from benchmarks.quality_runs.settings import SETTINGS

TABLES["split"] = splits.table
HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    """Run a table and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", nargs="?", choices=sorted(TABLES), help="which comparison; without it, list them")
    parser.add_argument("--data", choices=sorted(SETTINGS), default="digits")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--only", default="", help="only conditions with this in their name")
    parser.add_argument(
        "--remeasure",
        action="store_true",
        help="only measure sizes and times of finished runs anew (on an idle machine)",
    )
    parser.add_argument("--steps", type=int, help="steps of both stages, for a quick look")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the tables")
    parser.add_argument("--cache", type=Path, default=HERE / "cache", help="folder for trained dense models")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.table is None:
        for name, conditions in TABLES.items():
            print(f"{name}: {(conditions.__doc__ or '').splitlines()[0]}")
        return 0
    torch.set_num_threads(options.threads)
    setting = SETTINGS[options.data]
    if options.steps:
        setting = setting.shortened(options.steps)
    try:
        if options.remeasure:
            table = runner.remeasure(setting, options.table, options.out, options.cache)
        else:
            table = runner.run(setting, options.table, options.seeds, options.out, options.cache, options.only)
    except KeyboardInterrupt:
        print("interrupted: finished runs are kept; the same command goes on", file=sys.stderr)
        return 130
    print(report.write(table, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
