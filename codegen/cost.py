"""What a schedule costs, as sympy expressions: tiles, waves, padding, work, traffic, time.

The expressions are the model, not a picture of it: they are compiled to functions and evaluated as they stand.  Sizes
are those of a load class (rows per expert), never a number of tokens.

Shapes: E experts of ``load`` rows each, K input and N output columns, tiles of BM rows and BN columns.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sympy

from moefx.codegen import store
from moefx.codegen.spec import ITEM_BYTES, LinearSpec
from moefx.codegen.targets import Target

if TYPE_CHECKING:
    from moefx.codegen.schedule import Schedule

logger = logging.getLogger(__name__)

#: Share of the peak that a tile of (rows, columns) reaches when nothing else limits it; a prior.
EFFICIENCY = {
    (128, 256): 1.0,
    (128, 128): 0.9,
    (64, 256): 0.85,
    (64, 128): 0.75,
    (128, 64): 0.7,
    (64, 64): 0.55,
    (32, 256): 0.4,
    (32, 128): 0.35,
    (32, 64): 0.3,
    (32, 32): 0.2,
    (16, 256): 0.25,
    (16, 128): 0.2,
    (16, 64): 0.15,
    (16, 32): 0.1,
}
#: The same for the form of a kernel. Until a device says otherwise, the one that asks least of the compiler goes first.
FORM_EFFICIENCY = {"pointer": 1.0, "swapped": 0.95, "tma": 0.95, "tma divided": 0.98}
#: A tile's share of the launch and of filling the pipeline before its first product, in seconds.
FILL_S = 1e-6
#: Seconds from asking for a line of memory to having it, on an idle device: what is asked for ahead hides it.
LATENCY_S = 7e-7
#: Expected rows of padding of an expert, as a share of a tile, under random loads (0.42 to 0.45 by simulation).
PADDING_SHARE = sympy.Rational(45, 100)


@dataclass(frozen=True)
class Constants:
    """What a device reaches of the vendor's peaks, and what a tile costs beside its products: priors until measured."""

    #: Shares of the peak rate of products and of the bandwidth.
    peak: float = 1.0
    bandwidth: float = 1.0
    fill_s: float = FILL_S
    latency_s: float = LATENCY_S


def constants_path(target: Target) -> Path:
    """Return where measured constants of a target are kept."""
    return store.cache_folder() / "calibration" / f"{target.name}.json"


@functools.cache
def constants_of(target: Target) -> Constants:
    """Return the constants of a target: measured ones if any are kept, else the priors."""
    path = constants_path(target)
    try:
        entry = json.loads(path.read_text())
        found = Constants(*(float(entry[field.name]) for field in dataclasses.fields(Constants)))
    except FileNotFoundError:
        return Constants()
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s cannot be read (%s); the cost model keeps its priors", path, error)
        return Constants()
    return found


_NAMES = "load E N K BM BN BK parts stages halves item P peak bandwidth eff blocks permuted fill latency"


def efficiency(rows: int, columns: int) -> float:
    """Return the share of the peak that a tile reaches; below the table it falls with the tile's area."""
    return EFFICIENCY.get((rows, columns), 0.55 * min(1.0, rows * columns / 4096) * (1.0 if rows >= 64 else 0.5))


@functools.cache
def expressions() -> dict[str, sympy.Expr]:
    """Return the model: one expression per quantity, in terms of the sizes, the tile and the target."""
    load, e, n, k, bm, bn, bk, parts, stages, halves, item, p, peak, bandwidth, eff, blocks, permuted, fill, latency = (
        sympy.symbols(_NAMES, positive=True)
    )
    # Where rows are few, some experts have none, and their weights are not read.
    touched = e * (1 - (1 - 1 / e) ** (load * e))
    row_tiles = sympy.Max(touched, e * (load / bm + PADDING_SHARE))
    column_tiles = sympy.ceiling(n / bn)
    tiles = sympy.ceiling(row_tiles) * column_tiles * parts
    steps = sympy.ceiling(k / (bk * parts))
    flops = 2 * load * e * n * halves * k
    traffic = item * (touched * n * halves * k + load * e * (k + n))
    tile_s = 2 * bm * bn * halves * k / parts * p / (peak * eff)
    # What a block does before its first and after its last product is hidden by other blocks of the same processor.
    edge_s = fill + item * bm * bn * p / bandwidth
    compute_s = sympy.ceiling(tiles / p) * (tile_s + edge_s / blocks)
    # A processor without a tile asks for nothing. Memory answers late: blocks that run together ask for so many bytes
    # ahead, and each waits for its steps; one stage alone asks only after it has multiplied.
    ahead = sympy.Max(sympy.Rational(1, 2), stages - 1)
    flight = sympy.Min(tiles, p * blocks) * sympy.Min(ahead, steps) * item * bk * (bm + bn * halves)
    waits_s = sympy.ceiling(tiles / (p * blocks)) * steps * latency / ahead
    streamed_s = traffic / (bandwidth * sympy.Min(1, tiles / p))
    memory_s = sympy.Max(streamed_s, traffic * latency / flight, waits_s) + fill
    permute_s = permuted * (2 * item * load * e * k / bandwidth + fill)
    # Parts of K are stored in float32 and added by a second launch.
    divided = sympy.Min(1, parts - 1)
    reduce_s = divided * (2 * 4 * parts * load * e * n * halves / bandwidth + fill)
    return {
        "tiles": tiles,
        "waves": tiles / p,
        "row_share": load * e / bm / row_tiles,
        "column_share": n / (column_tiles * bn),
        "flops": flops,
        "bytes": traffic,
        "flight_bytes": flight,
        "compute_s": compute_s,
        "memory_s": memory_s,
        "permute_s": permute_s,
        "reduce_s": reduce_s,
        "seconds": sympy.Max(compute_s, memory_s) + permute_s + reduce_s,
        "floor_s": sympy.Max(flops / peak, traffic / bandwidth),
    }


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    names = sympy.symbols(_NAMES, positive=True)
    return {name: sympy.lambdify(names, one, modules="math") for name, one in expressions().items()}


@dataclass(frozen=True)
class Estimate:
    """The model's numbers for one schedule; shares are at most 1, padding is what is missing."""

    tiles: float
    waves: float
    row_share: float
    column_share: float
    flops: float
    bytes: float
    #: Bytes asked for and not yet there, while every processor is busy.
    flight_bytes: float
    compute_s: float
    memory_s: float
    permute_s: float
    reduce_s: float
    seconds: float
    floor_s: float

    @property
    def is_memory_bound(self) -> bool:
        """Whether traffic, not products, sets the floor."""
        return self.memory_s > self.compute_s


def estimate(
    spec: LinearSpec,
    schedule: Schedule,
    target: Target,
    load: int,
    experts: int,
    blocks: int | None = None,
    constants: Constants | None = None,
) -> Estimate:
    """Return what the model says of a schedule.

    ``blocks`` is how many blocks share a processor; known from :func:`occupancy` once the kernel was compiled, else
    guessed from the tile. ``constants`` are those of the target unless given.
    """
    known = constants or constants_of(target)
    values = {
        "load": load,
        "E": experts,
        "N": spec.out_features,
        "K": spec.in_features,
        "BM": schedule.block_m,
        "BN": schedule.block_n,
        "BK": schedule.block_k,
        "parts": schedule.parts,
        "stages": schedule.num_stages,
        "halves": spec.halves,
        "item": ITEM_BYTES[spec.dtype],
        "P": target.processors,
        "peak": target.matrix_tflops * 1e12 * _dtype_share(spec) * known.peak,
        "bandwidth": target.memory_tb_per_s * 1e12 * known.bandwidth,
        "eff": efficiency(schedule.block_m, schedule.block_n) * FORM_EFFICIENCY[schedule.form],
        "blocks": blocks or _guessed_blocks(spec, schedule, target),
        "permuted": int(spec.gather and schedule.variant == "tma" and not schedule.descriptor_gather),
        "fill": known.fill_s,
        "latency": known.latency_s,
    }
    given = [values[name] for name in _NAMES.split()]
    return Estimate(**{name: float(function(*given)) for name, function in _functions().items()})


def _dtype_share(spec: LinearSpec) -> float:
    """Return the share of the 16-bit rate: TensorFloat-32 has half of it, and exact float32 no matrix instruction."""
    if spec.dtype != "float32":
        return 1.0
    return 0.5 if spec.precision == "tf32" else 1 / 16


def occupancy(target: Target, registers: int, shared_bytes: int, warps: int) -> int:
    """Return how many blocks of a compiled kernel one processor holds; at least one, or it could not run."""
    by_registers = target.registers // max(1, registers * warps * target.warp_size)
    by_shared = target.shared_per_processor_bytes // max(1, shared_bytes)
    return max(1, min(by_registers, by_shared, target.max_warps // warps))


def _guessed_blocks(spec: LinearSpec, schedule: Schedule, target: Target) -> int:
    if schedule.programs:
        return 2 if schedule.warp_specialize else 1  # loading warps run ahead into the next tile
    threads = schedule.num_warps * target.warp_size
    registers = 48 + schedule.block_m * schedule.block_n * spec.halves // threads
    return occupancy(target, registers, stage_bytes(spec, schedule) * schedule.num_stages, schedule.num_warps)


def stage_bytes(spec: LinearSpec, schedule: Schedule) -> int:
    """Return the shared memory of one stage of the pipeline: a tile of rows and one of each weight."""
    return (schedule.block_m + schedule.block_n * spec.halves) * schedule.block_k * ITEM_BYTES[spec.dtype]


def explain() -> str:
    """Return the model as text, one expression per line."""
    return "\n".join(f"{name} = {expression}" for name, expression in expressions().items())
