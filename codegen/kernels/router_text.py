"""The text of the router kernels, as jinja2 templates.

Shapes in the emitted code: T tokens of B samples, D width, E experts (padded to a power of two in a tile), K chosen.
"""

from __future__ import annotations

ORDER = '''@triton.jit
def _order(x):
    """Integers in the order of the floats: NaN above all, and zeros of both signs equal, as in a sort."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 2147483647, bits ^ ((bits >> 31) & 2147483647))'''

ROUTER = '''@triton.jit
def kernel(
    x_ptr,  # {{ dtype }} [T, D]
    weight_ptr,  # {{ weight_dtype }} [E, D], contiguous
{% for kind in operands %}
    z{{ loop.index }}_ptr,  # {{ shapes[kind] }}, contiguous
{% endfor %}
    index_ptr,  # int64 [T, K], the chosen experts, best first
{% for kind, _ in outputs %}
    out{{ loop.index0 }}_ptr,  # float32 {{ "[T, K]" if kind == "slot" else "[T, E]" }}
{% endfor %}
{% if keep %}
    kept_ptr,  # float32 [T, E], the product alone
{% endif %}
    x_stride,
    tokens,
{% if "sample" in operands %}
    sample_tokens,  # T / B
{% endif %}
    UPCAST: tl.constexpr,  # the interpreter has no arithmetic for bfloat16
):
    token = tl.program_id(0).to(tl.int64) * {{ block_m }} + tl.arange(0, {{ block_m }})
{% if lane == "expert" %}
    expert = tl.arange(0, {{ block_e }})
{% else %}
    # Every group has a power of two of columns, so that a row can be cut into its groups.
    lane = tl.arange(0, {{ block_e }})
    expert = lane // {{ limit.members }} * {{ limit.size }} + lane % {{ limit.members }}
{% endif %}
    # Tokens and experts that do not exist re-read existing ones; nothing of them is stored.
    source = tl.minimum(token, tokens - 1)
    column = tl.minimum(expert, {{ experts - 1 }})
    exists = (token < tokens)[:, None]
{% if lane == "expert" %}
    known = (expert < {{ experts }})[None, :]
{% else %}
    known = ((lane % {{ limit.members }} < {{ limit.size }}) & (expert < {{ experts }}))[None, :]
{% endif %}

    ks = tl.arange(0, {{ block_k }})
    x = x_ptr + source[:, None] * x_stride + ks[None, :]
    weight = weight_ptr + column[None, :] * {{ d }} + ks[:, None]
    z0 = tl.zeros(({{ block_m }}, {{ block_e }}), tl.float32)
    for {{ "k0" if mask_k else "_" }} in range(0, {{ d }}, {{ block_k }}):
{% if mask_k %}
        x_tile = tl.load(x, mask=(ks < {{ d }} - k0)[None, :], other=0.0)
        w_tile = tl.load(weight, mask=(ks < {{ d }} - k0)[:, None], other=0.0)
{% else %}
        x_tile = tl.load(x)
        w_tile = tl.load(weight)
{% endif %}
{% if parts %}
        if UPCAST:
            x_tile = x_tile.to(tl.float32)
        for _p in tl.static_range(3):  # a float32 is the sum of three bfloat16, so the products are exact
            part = w_tile.to(tl.bfloat16)
            w_tile -= part.to(tl.float32)
            if UPCAST:
                part = part.to(tl.float32)
            z0 = tl.dot(x_tile, part, z0)
{% elif same %}
        if UPCAST:
            x_tile = x_tile.to(tl.float32)
            w_tile = w_tile.to(tl.float32)
        z0 = tl.dot(x_tile, w_tile, z0{{ ', input_precision="ieee"' if dtype == "float32" }})
{% else %}
        z0 = tl.dot(x_tile.to(tl.float32), w_tile.to(tl.float32), z0, input_precision="ieee")
{% endif %}
        x += {{ block_k }}
        weight += {{ block_k }}
{% if rounded %}
    z0 = z0.to({{ rounded }}).to(tl.float32)  # as the product that this stands for
{% endif %}
{% for load in loads %}
    {{ load }}
{% endfor %}
{% if first %}

    # Scores.
{% for statement in first %}
    {{ statement }}
{% endfor %}
{% endif %}
{% if limit %}

    # Every group scores the sum of its {{ limit.best }} highest scores.
    score = tl.where(known, {{ scores }}, float("-inf"))
    parts = tl.reshape(score, ({{ block_m }}, {{ limit.groups }}, {{ limit.members }}))
    free = tl.where(known, _order(score), -2147483648)
    free = tl.reshape(free, ({{ block_m }}, {{ limit.groups }}, {{ limit.members }}))
    member = tl.arange(0, {{ limit.members }})[None, None, :]
    total = tl.zeros(({{ block_m }}, {{ limit.groups }}), tl.float32)
    for _ in range({{ limit.best }}):
        top = tl.max(free, 2)[:, :, None]
        first = member == tl.min(tl.where(free == top, member, {{ limit.members }}), 2)[:, :, None]
        total += tl.sum(tl.where(first, parts, 0.0), 2)
        free = tl.where(first, -2147483648, free)

    # The best {{ limit.keep }} groups are eligible; the lowest group among equals.
    group = tl.arange(0, {{ limit.groups }})[None, :]
    rest = tl.where(group < {{ limit.count }}, _order(total), -2147483648)
    eligible = tl.zeros(({{ block_m }}, {{ limit.groups }}), tl.int1)
    for _ in range({{ limit.keep }}):
        top = tl.max(rest, 1)[:, None]
        best = group == tl.min(tl.where(rest == top, group, {{ limit.groups }}), 1)[:, None]
        eligible = eligible | best
        rest = tl.where(best, -2147483648, rest)
    limited = tl.reshape(tl.where(eligible[:, :, None], parts, float("-inf")), ({{ block_m }}, {{ block_e }}))
{% endif %}

    # The best {{ k }}, one after another; the lowest expert among equals.
    key = tl.where(known, _order({{ "limited" if limit else scores }}), -2147483648)
    chosen = tl.zeros(({{ block_m }}, {{ block_e }}), tl.int1)
    rank = tl.zeros(({{ block_m }}, {{ block_e }}), tl.int32)
    for slot in range({{ k }}):
        top = tl.max(key, 1)[:, None]
        at = tl.min(tl.where(key == top, {{ lane }}[None, :], {{ block_e }}), 1)[:, None]
        hit = {{ lane }}[None, :] == at
        chosen = chosen | hit
        rank = tl.where(hit, slot, rank)
        key = tl.where(hit, -2147483648, key)
{% if rest %}

    # Gates; a value of a chosen expert stays in the column of the expert.
{% for statement in rest %}
    {{ statement }}
{% endfor %}
{% endif %}

    write = chosen & exists
    place = token[:, None] * {{ k }} + rank
{% if has_rows %}
    row = token[:, None] * {{ experts }} + expert[None, :]
{% endif %}
    tl.store(index_ptr + place, expert.to(tl.int64)[None, :], mask=write)
{% for kind, value in outputs %}
{% if kind == "slot" %}
    tl.store(out{{ loop.index0 }}_ptr + place, {{ value }}, mask=write)
{% else %}
    tl.store(out{{ loop.index0 }}_ptr + row, {{ value }}, mask=known & exists)
{% endif %}
{% endfor %}
{% if keep %}
    tl.store(kept_ptr + row, z0, mask=known & exists)
{% endif %}


def launch({{ (["x", "weight"] + names + ["index"] + results + ["upcast"]) | join(", ") }}):
    """Write {{ (["index"] + results) | join(", ") }}."""
    tokens = index.shape[0]
    kernel[(triton.cdiv(tokens, {{ block_m }}),)](
        x,
        weight,
{% for name in names + ["index"] + results %}
        {{ name }},
{% endfor %}
        x.stride(0),
        tokens,
{% if "sample" in operands %}
        tokens // z{{ operands.index("sample") + 1 }}.shape[0],
{% endif %}
        UPCAST=upcast,
        num_warps={{ num_warps }},
        num_stages={{ num_stages }},
    )
'''

ROUTER_GRAD = '''@triton.jit
def kernel(
    kept_ptr,  # float32 [T, E], the product that the forward pass kept
{% for kind in operands %}
    z{{ loop.index }}_ptr,  # {{ shapes[kind] }}, contiguous
{% endfor %}
    index_ptr,  # int64 [T, K]
{% for i, kind in seeds %}
    g{{ i }}_ptr,  # float32 {{ "[T, K]" if kind == "slot" else "[T, E]" }}, contiguous
{% endfor %}
{% for i in wanted %}
    d{{ i }}_ptr,  # float32 [T, E]
{% endfor %}
    tokens,
{% if "sample" in operands %}
    sample_tokens,  # T / B
{% endif %}
):
    token = tl.program_id(0).to(tl.int64) * {{ block_m }} + tl.arange(0, {{ block_m }})
    expert = tl.arange(0, {{ block_e }})
    source = tl.minimum(token, tokens - 1)
    column = tl.minimum(expert, {{ experts - 1 }})
    exists = (token < tokens)[:, None]
    known = (expert < {{ experts }})[None, :]
    z0 = tl.load(kept_ptr + source[:, None] * {{ experts }} + column[None, :])
{% for load in loads %}
    {{ load }}
{% endfor %}
    chosen = tl.zeros(({{ block_m }}, {{ block_e }}), tl.int1)
    rank = tl.zeros(({{ block_m }}, {{ block_e }}), tl.int32)
    for slot in range({{ k }}):
        hit = expert[None, :] == tl.load(index_ptr + source * {{ k }} + slot)[:, None]
        chosen = chosen | hit
        rank = tl.where(hit, slot, rank)
{% for i, kind in seeds %}
{% if kind == "slot" %}
    g{{ i }} = tl.load(g{{ i }}_ptr + source[:, None] * {{ k }} + rank, mask=chosen, other=0.0)
{% else %}
    g{{ i }} = tl.load(g{{ i }}_ptr + source[:, None] * {{ experts }} + column[None, :])
{% endif %}
{% endfor %}

    # The derivative of the forward kernel's steps.
{% for statement in statements %}
    {{ statement }}
{% endfor %}
    at = token[:, None] * {{ experts }} + expert[None, :]
{% for i in wanted %}
    tl.store(d{{ i }}_ptr + at, {{ grads[i] }}, mask=known & exists)
{% endfor %}


def launch({{ (["kept"] + names + ["index"] + seed_names + wanted_names) | join(", ") }}):
    """Write {{ wanted_names | join(", ") }}."""
    tokens = index.shape[0]
    kernel[(triton.cdiv(tokens, {{ block_m }}),)](
{% for name in ["kept"] + names + ["index"] + seed_names + wanted_names %}
        {{ name }},
{% endfor %}
        tokens,
{% if "sample" in operands %}
        tokens // z{{ operands.index("sample") + 1 }}.shape[0],
{% endif %}
        num_warps={{ num_warps }},
    )
'''
