"""Train a diffusion transformer on 8 x 8 digits, make it sparse with moefx, and compare; see ``--help``.

python examples/digits.py --out demo
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `examples` is found from anywhere

from examples.digits_demo import pipeline, report
from examples.digits_demo.config import Config


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for all files (default: demo)")
    parser.add_argument("--steps", type=positive, help="steps of each training stage, for a quick look")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--fresh", action="store_true", help="train the dense model even if it is in the folder")
    parser.add_argument("--json", action="store_true", help="print the report as JSON on stdout instead of a table")
    parser.add_argument(
        "--threads", type=positive, default=1, help="threads per operation; more rarely helps at this size (default: 1)"
    )
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """Read a whole number above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Run the demo and return the exit code."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    config = dataclasses.replace(Config(), seed=options.seed)
    if options.steps:
        config = config.shortened(options.steps)
    try:
        facts = pipeline.run(config, options.out, fresh=options.fresh)
    except KeyboardInterrupt:
        print("interrupted: finished files are whole; a finished dense model is used by the next run", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(facts))
    else:
        report.show(facts, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
