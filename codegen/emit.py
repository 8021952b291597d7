"""Print a spec and a schedule as a stand-alone Triton module.

Same spec and schedule, same bytes.  The module needs nothing but Triton: it can be read, copied and run by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jinja2

from moefx.codegen import _templates, _templates_linear
from moefx.codegen.pointwise import Pointwise
from moefx.codegen.schedule import Schedule, combine_columns
from moefx.codegen.spec import CombineSpec, Kernel, KernelSpec, LinearSpec, digest


@functools.cache
def _environment() -> jinja2.Environment:
    # The output is Python for a kernel compiler, not markup: nothing is to be escaped.
    return jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        loader=jinja2.DictLoader(_templates_linear.PARTS),
    )


@functools.cache
def _template(body: str) -> jinja2.Template:
    return _environment().from_string(_templates.HEADER + body)


def render(body: str, **values: Any) -> str:
    """Return a template with the common header, filled in."""
    return _template(body).render(**values)


def emit(spec: KernelSpec, schedule: Schedule | None = None) -> str:
    """Return the source of the kernel of ``spec``; a combine kernel needs no schedule."""
    if isinstance(spec, CombineSpec):
        return emit_combine(spec)
    if schedule is None:
        raise ValueError(f"{spec.name} is emitted for a schedule")
    if isinstance(spec, Kernel):
        return spec.emit(schedule)
    if schedule.variant == "tma":
        from moefx.codegen.tma import emit_tma  # which prints with the helpers of this module

        return emit_tma(spec, schedule)
    return emit_linear(spec, schedule)


def emit_linear(spec: LinearSpec, schedule: Schedule) -> str:
    """Return the source of a gather + grouped GEMM + bias + epilogue kernel, and of the sum over parts of K."""
    n, k = spec.out_features, spec.in_features
    weights, _ = operand_names(spec)
    return render(
        _templates_linear.GROUPED_LINEAR,
        title=f"{spec.name}: grouped projection of routed rows.",
        **linear_values(spec, schedule),
        **_product_values(spec, schedule),
        reads_order=spec.gather,
        weight_bases=bases(weights, "weight", n * k, spec.halves),
        precision=f', input_precision="{spec.precision}"' if spec.dtype == "float32" else "",
    )


def linear_values(spec: LinearSpec, schedule: Schedule) -> dict[str, Any]:
    """Return what the templates of a grouped projection print in any variant."""
    n = spec.out_features
    weights, biases = operand_names(spec)
    return {
        "meaning": meaning(spec),
        "facts": f"K = {spec.in_features}, N = {n}; {schedule.describe()}.",
        "helpers": [_templates.HELPERS[name] for name in spec.epilogue.helpers],
        "dtype": spec.dtype,
        "keep": spec.keep,
        "gather": spec.gather,
        "top_k": spec.top_k,
        "weight_names": weights,
        "bias_names": biases,
        "signature": call("def launch", linear_parameters(spec, schedule), ":"),
        "bias_bases": bases(biases, "bias", n, spec.halves),
        "halves": spec.halves,
        "n": n,
        "k": spec.in_features,
        "weight_rows": spec.weight_rows,
        "mask_n": n % schedule.block_n != 0,
        "column_tiles": -(-n // schedule.block_n),
        "block_m": schedule.block_m,
        "block_n": schedule.block_n,
        "block_k": schedule.block_k,
        "group_m": schedule.group_m,
        "num_warps": schedule.num_warps,
        "num_stages": schedule.num_stages,
        "statements": spec.epilogue.triton(),
        "result": printed(spec.epilogue),
    }


def linear_parameters(spec: LinearSpec, schedule: Schedule) -> list[str]:
    """Return the names of what ``launch`` of a grouped projection takes, in order."""
    weights, biases = operand_names(spec)
    order = ["order"] if spec.gather else []
    partial = ["partial"] if schedule.parts > 1 else []
    return ["x", *weights, *biases, *order, "tile_map", *partial, "out", *(["kept"] if spec.keep else []), "upcast"]


def _product_values(spec: LinearSpec, schedule: Schedule) -> dict[str, Any]:
    """Return how the loop over K is printed: how far it goes, which way tiles lie, and how the weights are read."""
    k, parts = spec.in_features, schedule.parts
    reach = k if parts == 1 else -(-k // (schedule.block_k * parts)) * schedule.block_k
    along, across = ("[None, :]", "[:, None]") if schedule.swapped else ("[:, None]", "[None, :]")
    sides = (schedule.block_n, schedule.block_m) if schedule.swapped else (schedule.block_m, schedule.block_n)
    return {
        "parts": parts,
        "planes": ["part"] if spec.halves == 1 else [f"part * {spec.halves}", f"(part * {spec.halves} + 1)"],
        "reach": reach,
        "mask_k": reach * parts != k or k % schedule.block_k != 0,
        "swapped": schedule.swapped,
        "weight_tile": f"weight_row{across} * {k} + ks{along}",
        "weight_axis": along,
        "z_shape": f"{sides[0]}, {sides[1]}",
        # Weights that no other tile reads are the first to leave the caches.
        "once": ', eviction_policy="evict_first"' if schedule.streams else "",
    }


def printed(program: Pointwise) -> str:
    """Return what a kernel stores: the result of a program, of the shape of its inputs."""
    return program.result if isinstance(program.result, str) else f"(z0 * 0.0 + {program.result!r})"


def call(head: str, arguments: Sequence[str], tail: str = "", indent: str = "") -> str:
    """Return ``head(arguments)tail`` as a formatter leaves it: in one line, or with one argument per line."""
    line = f"{indent}{head}({', '.join(arguments)}){tail}"
    if len(line) <= 120:
        return line
    return "\n".join([f"{indent}{head}(", *(f"{indent}    {one}," for one in arguments), f"{indent}){tail}"])


def operand_names(spec: LinearSpec) -> tuple[list[str], list[str]]:
    """Return the names of the weights and of the biases of a projection's kernel."""
    suffixes = [""] if spec.weights == 1 else ["0", "1"]
    return [f"weight{s}" for s in suffixes], [f"bias{s}" for s in suffixes] if spec.bias else []


def bases(names: list[str], offset: str, half_size: int, halves: int) -> list[str]:
    """Return where each accumulator's operand starts: in a tensor of its own, or in a half of the only one."""
    if len(names) == halves:
        return [f"{name}_ptr + {offset}" for name in names]
    return [f"{name}_ptr + {offset}{shift}" for name in names for shift in ("", f" + {half_size}")]


def meaning(spec: LinearSpec) -> str:
    """Return what a kernel computes, as the equations of its header."""
    source = ("order[r]" if spec.top_k == 1 else f"order[r] // {spec.top_k}") if spec.gather else "r"
    weights, biases = operand_names(spec)
    values = ["z"] if spec.weights == 1 else ["z0", "z1"]
    lines = [
        f"{z}[r] = {w}[e] @ x[{source}]{f' + {b}[e]' if b else ''}   with e the expert of row r"
        for z, w, b in zip(values, weights, biases or [""] * len(weights), strict=True)
    ]
    if spec.halves == 2 and spec.weights == 1:
        lines.append("z0, z1 = the two halves of z; weight is [E, 2 N, K]")
    if spec.epilogue.is_identity:
        return "\n".join([*lines, "out[r] = z[r]"])
    return "\n".join([*lines, f"out[r] = epilogue({', '.join(values)}), the program after the loop"])


def emit_combine(spec: CombineSpec) -> str:
    """Return the source of the weighted, deterministic sum over slots."""
    columns, warps = combine_columns(spec)
    tail = spec.tail
    factor = "weights[t, s] * " if spec.weighted else ""
    z = [f"z{i + 1}" for i in range(len(spec.operands))]
    more = [*(["weights"] if spec.weighted else []), *z, "out", *(["kept"] if spec.keep else [])]
    last = [*(["sample_tokens"] if "sample" in spec.operands else []), f"num_warps={warps}"]
    return render(
        _templates.COMBINE,
        title=f"{spec.name}: {'weighted ' if spec.weighted else ''}sum of the {spec.top_k} rows of each token.",
        meaning=f"out[t] = sum over slots s of {factor}rows[position[t * {spec.top_k} + s]], in float32",
        facts=f"D = {spec.features}; {columns} columns per program, {warps} warps.",
        helpers=[_templates.HELPERS[name] for name in tail.helpers],
        operands=spec.operands,
        loads=operand_loads(
            spec.operands, spec.features, "token", "token // sample_tokens", spec.features % columns != 0
        ),
        statements=tail.triton(),
        result=printed(tail),
        dtype=spec.dtype,
        keep=spec.keep,
        kept_too=" and ``kept``" if spec.keep else "",
        signature=call("def launch", ["rows", "order", "position", *more], ":"),
        start=call(
            f"kernel[(out.shape[0], {-(-spec.features // columns)})]", ["rows", "position", *more, *last], "", "    "
        ),
        weighted=spec.weighted,
        top_k=spec.top_k,
        n=spec.features,
        block_n=columns,
        mask_n=spec.features % columns != 0,
    )


def operand_loads(kinds: Sequence[str], n: int, row: str, sample: str, masked: bool) -> list[str]:
    """Return the loads of what joins a row of ``n`` columns ``col``, as ``z1, z2, ...`` in float32."""
    at = {"row": f"{row} * {n} + col", "sample": f"{sample} * {n} + col", "column": "col", "token": row}
    mask = f", mask=col < {n}, other=0.0" if masked else ""
    return [
        f"z{i} = tl.load(z{i}_ptr + {at[kind]}{'' if kind == 'token' else mask}).to(tl.float32)"
        for i, kind in enumerate(kinds, 1)
    ]


def emit_tile_map() -> str:
    """Return the source of the kernel that cuts sorted rows into row tiles of one expert each."""
    return render(
        _templates.TILE_MAP,
        title="tile_map: row tiles of a sorted batch.",
        meaning="tile i covers rows [row[i], end[i]) of expert[i]; expert E stands for the dropped rows",
        facts="One kernel for all models; a region builds its map once and every projection reads it.",
        helpers=[],
    )


def source_name(spec: KernelSpec, schedule: Schedule | None) -> str:
    """Return the file stem of an emitted kernel: readable, unique by content."""
    return f"{spec.name}_{digest(emit(spec, schedule))[:8]}"
