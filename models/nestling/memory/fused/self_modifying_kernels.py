"""Triton kernels of `self_modifying_scan`: the whole layer in one launch, forward and backward.

One program walks over the blocks (at most 64 tokens, none crosses a chunk boundary) of one row of the batch and head.
The five memories lie in global memory, which for one program is its L2 cache, in float32; each block they are loaded
memory by memory, and only the tokens' own tiles stay on chip. Memories are packed in the order key, value, eta, alpha,
memory: w1 (rows, 5, D, N), of eta and alpha only the first row counts; w2 (rows, 5, N, D). The backward pass keeps the
memories at the start of every group of blocks, makes those of one group again, and goes back through it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nestling.memory.fused.learn import C, dot, keep_inverse, learn, learn_backward, load_inverse, read, read_backward

MEMORY = tl.constexpr(4)


@triton.jit
def _silu(z):
    return z * tl.sigmoid(z)


@triton.jit
def _silu_slope(z):
    s = tl.sigmoid(z)
    return s * (1 + z * (1 - s))


@triton.jit
def _silu_curve(z):
    s = tl.sigmoid(z)
    return s * (1 - s) * (2 + z - 2 * z * s)


@triton.jit
def _unit(z):
    """z / |z| of each token; vectors shorter than 1e-6 are divided by that."""
    return z / tl.maximum(tl.sqrt(tl.sum(z * z, 1)), 1e-6)[:, None]


@triton.jit
def _unit_backward(z, grad):
    norm = tl.sqrt(tl.sum(z * z, 1))
    size = tl.maximum(norm, 1e-6)[:, None]
    y = z / size
    along = tl.where(norm > 1e-6, tl.sum(grad * y, 1), 0.0)[:, None]
    return (grad - y * along) / size


@triton.jit
def _tokens(tensor, row, start, stop, T, D: tl.constexpr, DP: tl.constexpr):
    """Tokens start to stop of a (rows, T, D) tensor as (C, DP), zero elsewhere."""
    t, d = start + tl.arange(0, C), tl.arange(0, DP)
    inside = (t < stop)[:, None] & (d < D)[None, :]
    return tl.load(tensor + (row * T + t)[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def _keep_tokens(tensor, row, start, stop, T, D: tl.constexpr, DP: tl.constexpr, values):
    t, d = start + tl.arange(0, C), tl.arange(0, DP)
    inside = (t < stop)[:, None] & (d < D)[None, :]
    tl.store(tensor + (row * T + t)[:, None] * D + d[None, :], values.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def _place(height: tl.constexpr, width: tl.constexpr, HP: tl.constexpr, WP: tl.constexpr):
    i, j = tl.arange(0, HP), tl.arange(0, WP)
    return i[:, None] * width + j[None, :], (i < height)[:, None] & (j < width)[None, :]


@triton.jit
def _load(
    weights,
    box,
    D: tl.constexpr,
    N: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    HP: tl.constexpr,
    WP: tl.constexpr,
):
    """A layer of one memory, (HP, WP) float32; `weights` points at the program's own five."""
    place, inside = _place(height, width, HP, WP)
    return tl.load(weights + box * D * N + place, mask=inside, other=0.0)


@triton.jit
def _save(
    weights,
    box,
    D: tl.constexpr,
    N: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    HP: tl.constexpr,
    WP: tl.constexpr,
    values,
):
    place, inside = _place(height, width, HP, WP)
    tl.store(weights + box * D * N + place, values, mask=inside)


@triton.jit
def _column(values):
    """The first column of (C, 16)."""
    return tl.sum(tl.where(tl.arange(0, 16)[None, :] == 0, values, 0.0), 1)


@triton.jit
def _as_column(values):
    """(C,) as the first column of (C, 16)."""
    return tl.where(tl.arange(0, 16)[None, :] == 0, values[:, None], 0.0)


@triton.jit
def _inverse(
    a, step, before, now, keys, numbers, inverse, WP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):
    """(I + L)^-1 of a chunk; what one block of 16 tokens needs of it takes the way through the program's scratch."""
    c, j, b = tl.arange(0, C), tl.arange(0, WP), tl.arange(0, 16)
    tl.debug_barrier()
    tl.store(keys + c[:, None] * WP + j[None, :], a)
    tl.store(numbers + c, step.to(tl.float64))
    tl.store(numbers + 64 + c, before)
    tl.store(numbers + 128 + c, now)
    tl.debug_barrier()
    part = keys + b[:, None] * WP + j[None, :]
    k0, k1, k2, k3 = tl.load(part), tl.load(part + 16 * WP), tl.load(part + 32 * WP), tl.load(part + 48 * WP)
    steps, befores, nows = numbers + b, numbers + 64 + b, numbers + 128 + b
    e0, e1 = tl.load(steps).to(tl.float32), tl.load(steps + 16).to(tl.float32)
    e2, e3 = tl.load(steps + 32).to(tl.float32), tl.load(steps + 48).to(tl.float32)
    p0, p1, p2, p3 = tl.load(befores), tl.load(befores + 16), tl.load(befores + 32), tl.load(befores + 48)
    b0, b1, b2, b3 = tl.load(nows), tl.load(nows + 16), tl.load(nows + 32), tl.load(nows + 48)
    keep_inverse(k0, k1, k2, k3, e0, e1, e2, e3, p0, p1, p2, p3, b0, b1, b2, b3, inverse, PRECISION, UPCAST)
    tl.debug_barrier()
    return load_inverse(inverse)


@triton.jit
def _through(z, w1, w2, box, D: tl.constexpr, N: tl.constexpr, DP: tl.constexpr, NP: tl.constexpr,
             OUT: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """w2 z (C, NP) and w1 silu(w2 z) (C, OP) of one memory, without the skip."""
    second = _load(w2, box, D, N, N, D, NP, DP).to(z.dtype)
    first = _load(w1, box, D, N, OUT, N, OP, NP).to(z.dtype)
    pre = dot(z, tl.trans(second), PRECISION, UPCAST)
    return pre, dot(_silu(pre).to(z.dtype), tl.trans(first), PRECISION, UPCAST)


@triton.jit
def _logsigmoid(z):
    return tl.minimum(z, 0.0) - tl.log(1 + tl.exp(-tl.abs(z)))


@triton.jit
def _step(eta, z, PROXIMAL: tl.constexpr):
    return eta / (1 + eta * tl.sum(z * z, 1)) if PROXIMAL else eta


@triton.jit
def _write(
    k, v, eta, queries, now, before, last, solved, w1, w2, f1, f2, b1, b2, box, keys, numbers, inverse,
    READS: tl.constexpr, OUT: tl.constexpr, OP: tl.constexpr, D: tl.constexpr, N: tl.constexpr, DP: tl.constexpr,
    NP: tl.constexpr, L2: tl.constexpr, ERASE1: tl.constexpr, ERASE2: tl.constexpr, PROXIMAL: tl.constexpr,
    READ: tl.constexpr, BASED: tl.constexpr, WRITE2: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One memory after the chunk, in its place, and what it makes of the queries (C, OP) if it READS, without the skip.

    Args:
        k, v: (C, DP) float32 units.
        solved: the inverse for the keys k, of the layer that reads them.
    """
    dtype = queries.dtype
    kd, vd = k.to(dtype), v.to(dtype)
    second, first = _load(f2, box, D, N, N, D, NP, DP).to(dtype), _load(f1, box, D, N, OUT, N, OP, NP).to(dtype)
    pre = dot(kd, tl.trans(second), PRECISION, UPCAST)
    h = _silu(pre)
    inner = -_silu(dot(vd, tl.trans(second), PRECISION, UPCAST))
    if L2:
        inner += h
    error = dot(inner.to(dtype), tl.trans(first), PRECISION, UPCAST)
    if OUT == D:
        error += k - v if L2 else -v
    if READS and READ == "boundary":
        output = dot(
            _silu(dot(queries, tl.trans(second), PRECISION, UPCAST)).to(dtype), tl.trans(first), PRECISION, UPCAST
        )
    weights2 = _load(w2, box, D, N, N, D, NP, DP)
    if WRITE2:
        delta = dot(error.to(dtype), first, PRECISION, UPCAST) * _silu_slope(pre)
        base2 = weights2
        if BASED:
            base2 = _load(b2, box, D, N, N, D, NP, DP)
            weights2 -= base2
            if ERASE2:
                delta += dot(kd, tl.trans(base2.to(dtype)), PRECISION, UPCAST)
        written2, after2 = learn(
            kd, delta, _step(eta, k, PROXIMAL), weights2, now, before, last, solved, ERASE2, PRECISION, UPCAST
        )
        if READS and READ != "boundary":
            pre_q = read(kd, written2, weights2, queries, now, before, READ == "after", PRECISION, UPCAST)
            if BASED:
                pre_q += dot(queries, tl.trans(base2.to(dtype)), PRECISION, UPCAST)
        if BASED:
            after2 += base2
        _save(w2, box, D, N, N, D, NP, DP, after2)
    elif READS and READ != "boundary":
        pre_q = dot(queries, tl.trans(weights2.to(dtype)), PRECISION, UPCAST)

    a = h if PROXIMAL else _unit(h)
    ad, step = a.to(dtype), _step(eta, h, PROXIMAL)
    solved1 = solved
    if ERASE1:
        solved1 = _inverse(ad, step, before, now, keys, numbers, inverse, NP, PRECISION, UPCAST)
    weights1 = _load(w1, box, D, N, OUT, N, OP, NP)
    base1 = weights1
    if BASED:
        base1 = _load(b1, box, D, N, OUT, N, OP, NP)
        weights1 -= base1
        if ERASE1:
            error += dot(ad, tl.trans(base1.to(dtype)), PRECISION, UPCAST)
    written1, after1 = learn(ad, error, step, weights1, now, before, last, solved1, ERASE1, PRECISION, UPCAST)
    if READS and READ != "boundary":
        h_q = _silu(pre_q).to(dtype)
        output = read(ad, written1, weights1, h_q, now, before, READ == "after", PRECISION, UPCAST)
        if BASED:
            output += dot(h_q, tl.trans(base1.to(dtype)), PRECISION, UPCAST)
    if BASED:
        after1 += base1
    _save(w1, box, D, N, OUT, N, OP, NP, after1)
    return output if READS else error


@triton.jit
def _refresh(frozen, current, box, D: tl.constexpr, N: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
             HP: tl.constexpr, WP: tl.constexpr):  # fmt: skip
    _save(frozen, box, D, N, height, width, HP, WP, _load(current, box, D, N, height, width, HP, WP))


@triton.jit
def _block(
    x, queries, outputs, row, start, stop, fresh, T, w1, w2, f1, f2, b1, b2, eta_max, eta_bias, alpha_bias,
    keys, numbers, inverse, D: tl.constexpr, N: tl.constexpr, DP: tl.constexpr, NP: tl.constexpr, L2: tl.constexpr,
    ERASE1: tl.constexpr, ERASE2: tl.constexpr, PROXIMAL: tl.constexpr, READ: tl.constexpr, BASED: tl.constexpr,
    WRITE2: tl.constexpr, SHUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of tokens: the memories w1, w2 and snapshots f1, f2 move on in their places.

    Args:
        fresh: 1 where the snapshots of the projections are taken after the block, 2 for `memory`, 3 for both.
        READ: as of `self_modifying_scan`; "none" where only the state is made again.
    """
    inside = start + tl.arange(0, C) < stop
    z, q = _tokens(x, row, start, stop, T, D, DP), _tokens(queries, row, start, stop, T, D, DP)
    _, y = _through(z, f1, f2, 0, D, N, DP, NP, D, DP, PRECISION, UPCAST)
    k = _unit(z + y)
    _, y = _through(z, f1, f2, 1, D, N, DP, NP, D, DP, PRECISION, UPCAST)
    v = _unit(z + y)
    _, y = _through(z, f1, f2, 2, D, N, DP, NP, 1, 16, PRECISION, UPCAST)
    eta = tl.where(inside, eta_max * tl.sigmoid(_column(y) + eta_bias), 0.0)
    _, y = _through(z, f1, f2, 3, D, N, DP, NP, 1, 16, PRECISION, UPCAST)
    log = tl.where(inside, tl.maximum(_logsigmoid(_column(y) + alpha_bias), SHUT), 0.0).to(tl.float64)
    now, last = tl.cumsum(log, 0), tl.sum(log, 0)
    before = now - log
    kd, solved = k.to(z.dtype), tl.zeros((C, C), tl.float32)
    if WRITE2 and ERASE2:
        solved = _inverse(kd, _step(eta, k, PROXIMAL), before, now, keys, numbers, inverse, DP, PRECISION, UPCAST)
    for box in range(2):
        _write(
            k, v, eta, q, now, before, last, solved, w1, w2, f1, f2, b1, b2, box, keys, numbers, inverse,
            False, D, DP, D, N, DP, NP, L2, ERASE1, ERASE2, PROXIMAL, READ, BASED, WRITE2, PRECISION, UPCAST,
        )  # fmt: skip
    for box in range(2, 4):
        _write(
            k, v, eta, q, now, before, last, solved, w1, w2, f1, f2, b1, b2, box, keys, numbers, inverse,
            False, 1, 16, D, N, DP, NP, L2, ERASE1, ERASE2, PROXIMAL, READ, BASED, WRITE2, PRECISION, UPCAST,
        )  # fmt: skip
    y = _write(
        k, v, eta, q, now, before, last, solved, w1, w2, f1, f2, b1, b2, 4, keys, numbers, inverse,
        READ != "none", D, DP, D, N, DP, NP, L2, ERASE1, ERASE2, PROXIMAL, READ, BASED, WRITE2, PRECISION, UPCAST,
    )  # fmt: skip
    if READ != "none":
        _keep_tokens(outputs, row, start, stop, T, D, DP, q + y)
    tl.debug_barrier()
    if fresh % 2 == 1:
        for box in range(4):
            _refresh(f2, w2, box, D, N, N, D, NP, DP)
            _refresh(f1, w1, box, D, N, D, N, DP, NP)  # of eta and alpha the rows that are filled up, too
    if fresh >= 2:
        _refresh(f2, w2, 4, D, N, N, D, NP, DP)
        _refresh(f1, w1, 4, D, N, D, N, DP, NP)
    tl.debug_barrier()


@triton.jit
def _copy(source, target, size, STEP: tl.constexpr):
    for first in range(0, size, STEP):
        place = first + tl.arange(0, STEP)
        tl.store(target + place, tl.load(source + place, mask=place < size, other=0.0), mask=place < size)
    tl.debug_barrier()


@triton.jit
def forward(
    x,  # (rows, T, D)
    queries,  # (rows, T, D)
    state,  # in and out: (rows, 4, 5 D N) float32: w1, w2 and the snapshots of both
    base,  # (rows, 2, 5 D N) float32
    scalars,  # (H, 3) float32: eta_max, eta_bias, alpha_bias
    spans,  # (blocks, 3) int32: start, stop and fresh of `_block`
    outputs,  # out: (rows, T, D)
    kept,  # out: (rows, groups, 4, 5 D N) float32, the state before each group of blocks
    keys,  # scratch: (rows, C, WP) in x's dtype
    numbers,  # scratch: (rows, 3, C) float64
    inverse,  # scratch: (rows, C, C) float32
    T,
    H,
    BLOCKS,
    GROUP: tl.constexpr,  # blocks of a group; 0: nothing is kept
    D: tl.constexpr,
    N: tl.constexpr,
    DP: tl.constexpr,
    NP: tl.constexpr,
    WP: tl.constexpr,
    L2: tl.constexpr,
    ERASE1: tl.constexpr,
    ERASE2: tl.constexpr,
    PROXIMAL: tl.constexpr,
    READ: tl.constexpr,
    BASED: tl.constexpr,
    WRITE2: tl.constexpr,
    SHUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = 5 * D * N
    state += row * 4 * SIZE
    base += row * 2 * SIZE
    keys += row * C * WP
    numbers += row * 3 * C
    inverse += row * C * C
    scalars += row % H * 3
    eta_max, eta_bias, alpha_bias = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    for block in range(BLOCKS):
        if GROUP:
            if block % GROUP == 0:
                group = row * ((BLOCKS + GROUP - 1) // GROUP) + block // GROUP
                _copy(state, kept + group * 4 * SIZE, 4 * SIZE, 1024)
        start, stop, fresh = tl.load(spans + block * 3), tl.load(spans + block * 3 + 1), tl.load(spans + block * 3 + 2)
        _block(
            x, queries, outputs, row, start, stop, fresh, T, state, state + SIZE, state + 2 * SIZE, state + 3 * SIZE,
            base, base + SIZE, eta_max, eta_bias, alpha_bias, keys, numbers, inverse, D, N, DP, NP, L2, ERASE1, ERASE2,
            PROXIMAL, READ, BASED, WRITE2, SHUT, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def _add(
    weights,
    box,
    D: tl.constexpr,
    N: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    HP: tl.constexpr,
    WP: tl.constexpr,
    values,
):
    _save(weights, box, D, N, height, width, HP, WP, _load(weights, box, D, N, height, width, HP, WP) + values)


@triton.jit
def _through_backward(
    z, grad, w1, w2, grad1, grad2, box, D: tl.constexpr, N: tl.constexpr, DP: tl.constexpr, NP: tl.constexpr,
    OUT: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient of z by what `_through` gives (C, OP); those of the two layers are added to grad1 and grad2."""
    second = _load(w2, box, D, N, N, D, NP, DP).to(z.dtype)
    first = _load(w1, box, D, N, OUT, N, OP, NP).to(z.dtype)
    pre = dot(z, tl.trans(second), PRECISION, UPCAST)
    down = grad.to(z.dtype)
    _add(grad1, box, D, N, OUT, N, OP, NP, dot(tl.trans(down), _silu(pre).to(z.dtype), PRECISION, UPCAST))
    lower = (dot(down, first, PRECISION, UPCAST) * _silu_slope(pre)).to(z.dtype)
    _add(grad2, box, D, N, N, D, NP, DP, dot(tl.trans(lower), z, PRECISION, UPCAST))
    return dot(lower, second, PRECISION, UPCAST)


@triton.jit
def _step_backward(eta, z, grad, PROXIMAL: tl.constexpr):
    """Gradients of eta (C,) and z by that of `_step`."""
    if PROXIMAL:
        share = 1 / (1 + eta * tl.sum(z * z, 1))
        return grad * share * share, (-2 * grad * eta * eta * share * share)[:, None] * z
    else:
        return grad, tl.zeros_like(z)


@triton.jit
def _write_backward(
    k, v, eta, queries, grad_output, now, before, last, solved, w1, w2, f1, f2, b1, b2, gw1, gw2, gf1, gf2, gb1, gb2,
    box, keys, numbers, inverse,
    READS: tl.constexpr, OUT: tl.constexpr, OP: tl.constexpr, D: tl.constexpr, N: tl.constexpr, DP: tl.constexpr,
    NP: tl.constexpr, L2: tl.constexpr, ERASE1: tl.constexpr, ERASE2: tl.constexpr, PROXIMAL: tl.constexpr,
    READ: tl.constexpr, BASED: tl.constexpr, WRITE2: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of `_write`: of k, v, eta, log b, log b', log b of the last token and the queries.

    w1, w2, f1 and f2 are as before the block; gw1, gw2, gf1, gf2 and gb1, gb2 are their gradients and those of the
    bases, and go from after the block to before it in their places.
    """
    dtype = queries.dtype
    kd, vd, z = k.to(dtype), v.to(dtype), grad_output.to(dtype)
    second, first = _load(f2, box, D, N, N, D, NP, DP).to(dtype), _load(f1, box, D, N, OUT, N, OP, NP).to(dtype)
    pre, pre_v = dot(kd, tl.trans(second), PRECISION, UPCAST), dot(vd, tl.trans(second), PRECISION, UPCAST)
    h = _silu(pre)
    inner = -_silu(pre_v)
    if L2:
        inner += h
    error = dot(inner.to(dtype), tl.trans(first), PRECISION, UPCAST)
    if OUT == D:
        error += k - v if L2 else -v

    # What the layers did. w2:
    weights2 = _load(w2, box, D, N, N, D, NP, DP)
    base2, step2 = weights2, _step(eta, k, PROXIMAL)
    if WRITE2:
        by_first = dot(error.to(dtype), first, PRECISION, UPCAST)
        delta = by_first * _silu_slope(pre)
        if BASED:
            base2 = _load(b2, box, D, N, N, D, NP, DP)
            weights2 -= base2
            if ERASE2:
                delta += dot(kd, tl.trans(base2.to(dtype)), PRECISION, UPCAST)
        written2, _ = learn(kd, delta, step2, weights2, now, before, last, solved, ERASE2, PRECISION, UPCAST)
        if READS and READ != "boundary":
            pre_q = read(kd, written2, weights2, queries, now, before, READ == "after", PRECISION, UPCAST)
            if BASED:
                pre_q += dot(queries, tl.trans(base2.to(dtype)), PRECISION, UPCAST)
    elif READS and READ != "boundary":
        pre_q = dot(queries, tl.trans(weights2.to(dtype)), PRECISION, UPCAST)
    # w1:
    a = h if PROXIMAL else _unit(h)
    ad, step1, solved1 = a.to(dtype), _step(eta, h, PROXIMAL), solved
    if ERASE1:
        solved1 = _inverse(ad, step1, before, now, keys, numbers, inverse, NP, PRECISION, UPCAST)
    weights1, aimed = _load(w1, box, D, N, OUT, N, OP, NP), error
    base1 = weights1
    if BASED:
        base1 = _load(b1, box, D, N, OUT, N, OP, NP)
        weights1 -= base1
        if ERASE1:
            aimed += dot(ad, tl.trans(base1.to(dtype)), PRECISION, UPCAST)
    written1, _ = learn(ad, aimed, step1, weights1, now, before, last, solved1, ERASE1, PRECISION, UPCAST)

    # Back through w1.
    grad_end1 = _load(gw1, box, D, N, OUT, N, OP, NP)
    grad_r1, grad_q = tl.zeros_like(written1), tl.zeros((C, DP), tl.float32)
    if READS and READ != "boundary":
        h_q = _silu(pre_q).to(dtype)
        ga, grad_r1, gr, grad_h_q, gn, gb = read_backward(
            ad, written1, weights1, h_q, grad_output, now, before, READ == "after", PRECISION, UPCAST
        )
    grad_a, grad_error, grad_step1, grad_now, grad_before, grad_last, grad_start1 = learn_backward(
        ad, aimed, step1, weights1, now, before, last, solved1, written1, grad_r1, grad_end1, ERASE1, PRECISION, UPCAST
    )
    if READS and READ != "boundary":
        grad_a += ga
        grad_start1 += gr
        grad_now += gn
        grad_before += gb
    if BASED:
        grad_base = grad_end1 - grad_start1
        if ERASE1:
            grad_base += dot(tl.trans(grad_error.to(dtype)), ad, PRECISION, UPCAST)
            grad_a += dot(grad_error.to(dtype), base1.to(dtype), PRECISION, UPCAST)
        if READS and READ != "boundary":
            grad_base += dot(tl.trans(z), h_q, PRECISION, UPCAST)
            grad_h_q += dot(z, base1.to(dtype), PRECISION, UPCAST)
        _add(gb1, box, D, N, OUT, N, OP, NP, grad_base)
    _save(gw1, box, D, N, OUT, N, OP, NP, grad_start1)
    grad_h = grad_a if PROXIMAL else _unit_backward(h, grad_a)
    grad_eta, by_step = _step_backward(eta, h, grad_step1, PROXIMAL)
    grad_h += by_step

    # Back through w2.
    grad_k, grad_v = tl.zeros((C, DP), tl.float32), tl.zeros((C, DP), tl.float32)
    grad_first, grad_second = tl.zeros((OP, NP), tl.float32), tl.zeros((NP, DP), tl.float32)
    grad_pre = tl.zeros((C, NP), tl.float32)
    if READS and READ != "boundary":
        grad_pre_q = grad_h_q * _silu_slope(pre_q)
        low_q = grad_pre_q.to(dtype)
    if WRITE2:
        grad_end2 = _load(gw2, box, D, N, N, D, NP, DP)
        grad_r2 = tl.zeros_like(written2)
        if READS and READ != "boundary":
            ga, grad_r2, gr, grad_q, gn, gb = read_backward(
                kd, written2, weights2, queries, grad_pre_q, now, before, READ == "after", PRECISION, UPCAST
            )
            grad_k += ga
            grad_now += gn
            grad_before += gb
        ga, grad_delta, grad_step2, gn, gb, gl, grad_start2 = learn_backward(
            kd,
            delta,
            step2,
            weights2,
            now,
            before,
            last,
            solved,
            written2,
            grad_r2,
            grad_end2,
            ERASE2,
            PRECISION,
            UPCAST,
        )
        grad_k += ga
        grad_now += gn
        grad_before += gb
        grad_last += gl
        if READS and READ != "boundary":
            grad_start2 += gr
        if BASED:
            grad_base = grad_end2 - grad_start2
            if ERASE2:
                grad_base += dot(tl.trans(grad_delta.to(dtype)), kd, PRECISION, UPCAST)
                grad_k += dot(grad_delta.to(dtype), base2.to(dtype), PRECISION, UPCAST)
            if READS and READ != "boundary":
                grad_base += dot(tl.trans(low_q), queries, PRECISION, UPCAST)
                grad_q += dot(low_q, base2.to(dtype), PRECISION, UPCAST)
            _add(gb2, box, D, N, N, D, NP, DP, grad_base)
        _save(gw2, box, D, N, N, D, NP, DP, grad_start2)
        by_eta, by_step = _step_backward(eta, k, grad_step2, PROXIMAL)
        grad_eta += by_eta
        grad_k += by_step
        by_delta = (grad_delta * _silu_slope(pre)).to(dtype)
        grad_pre += grad_delta * by_first * _silu_curve(pre)
        grad_error += dot(by_delta, tl.trans(first), PRECISION, UPCAST)
        grad_first += dot(tl.trans(error.to(dtype)), by_delta, PRECISION, UPCAST)
    elif READS and READ != "boundary":
        grad_q = dot(low_q, weights2.to(dtype), PRECISION, UPCAST)
        _add(gw2, box, D, N, N, D, NP, DP, dot(tl.trans(low_q), queries, PRECISION, UPCAST))
    if READS and READ == "boundary":
        pre_q = dot(queries, tl.trans(second), PRECISION, UPCAST)
        grad_first += dot(tl.trans(z), _silu(pre_q).to(dtype), PRECISION, UPCAST)
        low = (dot(z, first, PRECISION, UPCAST) * _silu_slope(pre_q)).to(dtype)
        grad_second += dot(tl.trans(low), queries, PRECISION, UPCAST)
        grad_q = dot(low, second, PRECISION, UPCAST)

    # Back through the snapshots.
    down = grad_error.to(dtype)
    grad_inner = dot(down, first, PRECISION, UPCAST)
    grad_first += dot(tl.trans(down), inner.to(dtype), PRECISION, UPCAST)
    if L2:
        grad_h += grad_inner
    if OUT == D:
        grad_v -= grad_error
        if L2:
            grad_k += grad_error
    low_k = (grad_pre + grad_h * _silu_slope(pre)).to(dtype)
    low_v = (-grad_inner * _silu_slope(pre_v)).to(dtype)
    grad_k += dot(low_k, second, PRECISION, UPCAST)
    grad_v += dot(low_v, second, PRECISION, UPCAST)
    grad_second += dot(tl.trans(low_k), kd, PRECISION, UPCAST) + dot(tl.trans(low_v), vd, PRECISION, UPCAST)
    _add(gf1, box, D, N, OUT, N, OP, NP, grad_first)
    _add(gf2, box, D, N, N, D, NP, DP, grad_second)
    return grad_k, grad_v, grad_eta, grad_now, grad_before, grad_last, grad_q


@triton.jit
def _refresh_backward(frozen, current, box, D: tl.constexpr, N: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
                      HP: tl.constexpr, WP: tl.constexpr):  # fmt: skip
    grad = _load(frozen, box, D, N, height, width, HP, WP)
    _add(current, box, D, N, height, width, HP, WP, grad)
    _save(frozen, box, D, N, height, width, HP, WP, tl.zeros((HP, WP), tl.float32))


@triton.jit
def _block_backward(
    x, queries, grad_outputs, grad_x, grad_queries, row, start, stop, fresh, T, w1, w2, f1, f2, b1, b2,
    gw1, gw2, gf1, gf2, gb1, gb2, eta_max, eta_bias, alpha_bias, keys, numbers, inverse,
    D: tl.constexpr, N: tl.constexpr, DP: tl.constexpr, NP: tl.constexpr, L2: tl.constexpr, ERASE1: tl.constexpr,
    ERASE2: tl.constexpr, PROXIMAL: tl.constexpr, READ: tl.constexpr, BASED: tl.constexpr, WRITE2: tl.constexpr,
    SHUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Back through one block; gradients of eta_max, eta_bias and alpha_bias."""
    tl.debug_barrier()
    if fresh % 2 == 1:
        for box in range(4):
            _refresh_backward(gf2, gw2, box, D, N, N, D, NP, DP)
            _refresh_backward(gf1, gw1, box, D, N, D, N, DP, NP)
    if fresh >= 2:
        _refresh_backward(gf2, gw2, 4, D, N, N, D, NP, DP)
        _refresh_backward(gf1, gw1, 4, D, N, D, N, DP, NP)
    tl.debug_barrier()
    inside = start + tl.arange(0, C) < stop
    z, q = _tokens(x, row, start, stop, T, D, DP), _tokens(queries, row, start, stop, T, D, DP)
    grad_y = _tokens(grad_outputs, row, start, stop, T, D, DP).to(tl.float32)
    _, y = _through(z, f1, f2, 0, D, N, DP, NP, D, DP, PRECISION, UPCAST)
    raw_k = z + y
    _, y = _through(z, f1, f2, 1, D, N, DP, NP, D, DP, PRECISION, UPCAST)
    raw_v = z + y
    k, v = _unit(raw_k), _unit(raw_v)
    _, y = _through(z, f1, f2, 2, D, N, DP, NP, 1, 16, PRECISION, UPCAST)
    open_eta = tl.sigmoid(_column(y) + eta_bias)
    eta = tl.where(inside, eta_max * open_eta, 0.0)
    _, y = _through(z, f1, f2, 3, D, N, DP, NP, 1, 16, PRECISION, UPCAST)
    raw_alpha = _column(y) + alpha_bias
    shut = _logsigmoid(raw_alpha)
    log = tl.where(inside, tl.maximum(shut, SHUT), 0.0).to(tl.float64)
    now, last = tl.cumsum(log, 0), tl.sum(log, 0)
    before = now - log
    kd, solved = k.to(z.dtype), tl.zeros((C, C), tl.float32)
    if WRITE2 and ERASE2:
        solved = _inverse(kd, _step(eta, k, PROXIMAL), before, now, keys, numbers, inverse, DP, PRECISION, UPCAST)
    grad_k, grad_v, grad_eta, grad_now, grad_before, grad_last, grad_q = _write_backward(
        k, v, eta, q, grad_y, now, before, last, solved, w1, w2, f1, f2, b1, b2, gw1, gw2, gf1, gf2, gb1, gb2,
        4, keys, numbers, inverse, True, D, DP, D, N, DP, NP, L2, ERASE1, ERASE2, PROXIMAL, READ, BASED, WRITE2,
        PRECISION, UPCAST,
    )  # fmt: skip
    _keep_tokens(grad_queries, row, start, stop, T, D, DP, grad_y + grad_q)
    for box in range(2):
        a, b, c, d, e, f, _ = _write_backward(
            k, v, eta, q, grad_y, now, before, last, solved, w1, w2, f1, f2, b1, b2, gw1, gw2, gf1, gf2, gb1, gb2,
            box, keys, numbers, inverse, False, D, DP, D, N, DP, NP, L2, ERASE1, ERASE2, PROXIMAL, READ, BASED, WRITE2,
            PRECISION, UPCAST,
        )  # fmt: skip
        grad_k += a
        grad_v += b
        grad_eta += c
        grad_now += d
        grad_before += e
        grad_last += f
    for box in range(2, 4):
        a, b, c, d, e, f, _ = _write_backward(
            k, v, eta, q, grad_y, now, before, last, solved, w1, w2, f1, f2, b1, b2, gw1, gw2, gf1, gf2, gb1, gb2,
            box, keys, numbers, inverse, False, 1, 16, D, N, DP, NP, L2, ERASE1, ERASE2, PROXIMAL, READ, BASED, WRITE2,
            PRECISION, UPCAST,
        )  # fmt: skip
        grad_k += a
        grad_v += b
        grad_eta += c
        grad_now += d
        grad_before += e
        grad_last += f
    tl.debug_barrier()
    grad_log = tl.cumsum(grad_now + grad_before, 0, reverse=True) - grad_before + grad_last
    grad_alpha = tl.where(inside & (shut >= SHUT), grad_log * tl.sigmoid(-raw_alpha), 0.0)
    grad_open = tl.where(inside, grad_eta * open_eta, 0.0)
    grad_raw_eta = eta_max * grad_open * (1 - open_eta)
    grad_k, grad_v = _unit_backward(raw_k, grad_k), _unit_backward(raw_v, grad_v)
    grad = grad_k + grad_v
    grad += _through_backward(z, grad_k, f1, f2, gf1, gf2, 0, D, N, DP, NP, D, DP, PRECISION, UPCAST)
    grad += _through_backward(z, grad_v, f1, f2, gf1, gf2, 1, D, N, DP, NP, D, DP, PRECISION, UPCAST)
    grad += _through_backward(z, _as_column(grad_raw_eta), f1, f2, gf1, gf2, 2, D, N, DP, NP, 1, 16, PRECISION, UPCAST)
    grad += _through_backward(z, _as_column(grad_alpha), f1, f2, gf1, gf2, 3, D, N, DP, NP, 1, 16, PRECISION, UPCAST)
    _keep_tokens(grad_x, row, start, stop, T, D, DP, grad)
    tl.debug_barrier()
    return tl.sum(grad_open, 0), tl.sum(grad_raw_eta, 0), tl.sum(grad_alpha, 0)


@triton.jit
def backward(
    x,
    queries,
    kept,  # of `forward`
    base,
    scalars,
    spans,
    grad_outputs,  # (rows, T, D)
    grad_state,  # in: of the state after all blocks, out: of the one before them; (rows, 4, 5 D N) float32
    grad_base,  # out, zero before: (rows, 2, 5 D N) float32
    grad_scalars,  # out: (rows, 3) float32
    grad_x,  # out: (rows, T, D)
    grad_queries,  # out: (rows, T, D)
    again,  # scratch: (rows, GROUP + 1, 4, 5 D N) float32
    keys,
    numbers,
    inverse,
    T,
    H,
    BLOCKS,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    DP: tl.constexpr,
    NP: tl.constexpr,
    WP: tl.constexpr,
    L2: tl.constexpr,
    ERASE1: tl.constexpr,
    ERASE2: tl.constexpr,
    PROXIMAL: tl.constexpr,
    READ: tl.constexpr,
    BASED: tl.constexpr,
    WRITE2: tl.constexpr,
    SHUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (rows,): group by group from the last one; the states of a group's blocks are made again in `again`."""
    row = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = 5 * D * N
    groups = (BLOCKS + GROUP - 1) // GROUP
    kept += row * groups * 4 * SIZE
    base += row * 2 * SIZE
    grad_state += row * 4 * SIZE
    grad_base += row * 2 * SIZE
    again += row * (GROUP + 1) * 4 * SIZE
    keys += row * C * WP
    numbers += row * 3 * C
    inverse += row * C * C
    scalars += row % H * 3
    eta_max, eta_bias, alpha_bias = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    grad_max, grad_eta_bias, grad_alpha_bias = 0.0, 0.0, 0.0
    for back in range(groups):
        first = (groups - 1 - back) * GROUP
        count = tl.minimum(GROUP, BLOCKS - first)
        _copy(kept + (groups - 1 - back) * 4 * SIZE, again, 4 * SIZE, 1024)
        for i in range(count - 1):
            block, state = first + i, again + (i + 1) * 4 * SIZE
            _copy(state - 4 * SIZE, state, 4 * SIZE, 1024)
            start, stop = tl.load(spans + block * 3), tl.load(spans + block * 3 + 1)
            _block(
                x, queries, grad_x, row, start, stop, tl.load(spans + block * 3 + 2), T, state, state + SIZE,
                state + 2 * SIZE, state + 3 * SIZE, base, base + SIZE, eta_max, eta_bias, alpha_bias, keys, numbers,
                inverse, D, N, DP, NP, L2, ERASE1, ERASE2, PROXIMAL, "none", BASED, WRITE2, SHUT, PRECISION, UPCAST,
            )  # fmt: skip
        for j in range(count):
            i = count - 1 - j
            block, state = first + i, again + i * 4 * SIZE
            start, stop = tl.load(spans + block * 3), tl.load(spans + block * 3 + 1)
            a, b, c = _block_backward(
                x, queries, grad_outputs, grad_x, grad_queries, row, start, stop, tl.load(spans + block * 3 + 2), T,
                state, state + SIZE, state + 2 * SIZE, state + 3 * SIZE, base, base + SIZE, grad_state,
                grad_state + SIZE, grad_state + 2 * SIZE, grad_state + 3 * SIZE, grad_base, grad_base + SIZE, eta_max,
                eta_bias, alpha_bias, keys, numbers, inverse, D, N, DP, NP, L2, ERASE1, ERASE2, PROXIMAL, READ, BASED,
                WRITE2, SHUT, PRECISION, UPCAST,
            )  # fmt: skip
            grad_max += a
            grad_eta_bias += b
            grad_alpha_bias += c
    tl.store(grad_scalars + row * 3, grad_max)
    tl.store(grad_scalars + row * 3 + 1, grad_eta_bias)
    tl.store(grad_scalars + row * 3 + 2, grad_alpha_bias)
