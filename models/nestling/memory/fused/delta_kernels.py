"""Triton kernels of `delta_scan`, by the equations of `nestling.memory.fused.learn`.

One program walks over all chunks of one row and head with a tile of rows of W in float32, so nothing is ever written
twice and results are the same to the bit from run to run. The inverse of I + L does not depend on W: `prepare` makes it
for all chunks at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nestling.memory.fused.learn import C, keep_inverse, learn, learn_backward, load_inverse, read, read_backward

_B = tl.constexpr(16)


@triton.jit
def _load_rows(tensor, row, t, width: tl.constexpr, columns, T):
    """Rows t of a (rows, T, width) tensor, zero outside."""
    inside = (t < T)[:, None] & (columns < width)[None, :]
    return tl.load(tensor + (row * T + t)[:, None] * width + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(tensor, row, t, width: tl.constexpr, columns, T, values):
    inside = (t < T)[:, None] & (columns < width)[None, :]
    place = tensor + (row * T + t)[:, None] * width + columns[None, :]
    tl.store(place, values.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def _gates(total, row, chunk, T):
    """log b_t and log b_{t-1} of a chunk, and log b of its last token, in float64; behind T as at its last token."""
    c = tl.arange(0, C)
    t = chunk * C + c
    inside = t < T
    last = tl.load(total + row * T + tl.minimum(chunk * C + C, T) - 1)
    now = tl.where(inside, tl.load(total + row * T + t, mask=inside, other=0.0), last)
    before = tl.load(total + row * T + t - 1, mask=inside & (c > 0), other=0.0)
    return now, tl.where(inside, before, last), last


@triton.jit
def _block(t, log_alpha, eta, keys, row, T, N: tl.constexpr, columns, SHUT: tl.constexpr):
    """Keys, steps and logarithms of gates of 16 tokens."""
    inside = t < T
    gate = tl.load(log_alpha + row * T + t, mask=inside, other=0.0).to(tl.float64)
    step = tl.load(eta + row * T + t, mask=inside, other=0.0)
    return _load_rows(keys, row, t, N, columns, T), step, tl.maximum(gate, SHUT)


@triton.jit
def prepare(
    keys,  # (rows, T, N)
    log_alpha,  # (rows, T) float32
    eta,  # (rows, T) float32
    total,  # out: (rows, T) float64, log b
    inverse,  # out: (rows, chunks, C, C) float32, (I + L)^-1
    T,
    N: tl.constexpr,
    NP: tl.constexpr,  # N, rounded up to a power of two
    ERASE: tl.constexpr,
    SHUT: tl.constexpr,  # logarithm of a gate that lets nothing through
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (chunks, rows)."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t = chunk * C + tl.arange(0, _B)
    columns = tl.arange(0, NP)
    k0, e0, g0 = _block(t, log_alpha, eta, keys, row, T, N, columns, SHUT)
    k1, e1, g1 = _block(t + 16, log_alpha, eta, keys, row, T, N, columns, SHUT)
    k2, e2, g2 = _block(t + 32, log_alpha, eta, keys, row, T, N, columns, SHUT)
    k3, e3, g3 = _block(t + 48, log_alpha, eta, keys, row, T, N, columns, SHUT)
    b0 = tl.cumsum(g0, 0)
    b1 = tl.cumsum(g1, 0) + tl.sum(g0, 0)
    b2 = tl.cumsum(g2, 0) + tl.sum(g0, 0) + tl.sum(g1, 0)
    b3 = tl.cumsum(g3, 0) + tl.sum(g0, 0) + tl.sum(g1, 0) + tl.sum(g2, 0)
    place = total + row * T + t
    tl.store(place, b0, mask=t < T)
    tl.store(place + 16, b1, mask=t + 16 < T)
    tl.store(place + 32, b2, mask=t + 32 < T)
    tl.store(place + 48, b3, mask=t + 48 < T)
    if ERASE:
        keep_inverse(
            k0, k1, k2, k3, e0, e1, e2, e3, b0 - g0, b1 - g1, b2 - g2, b3 - g3, b0, b1, b2, b3,
            inverse + (row * tl.num_programs(0) + chunk) * C * C, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def forward(
    keys,  # (rows, T, N)
    local_grads,  # (rows, T, M)
    queries,  # (rows, T, N)
    eta,  # (rows, T) float32
    total,  # of `prepare`
    inverse,  # of `prepare`
    initial,  # (rows, M, N)
    outputs,  # out: (rows, T, M)
    final,  # out: (rows, M, N) float32
    states,  # out: (rows, chunks, M, N), W before each chunk, in the keys' dtype
    T,
    M: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    TILE: tl.constexpr,  # rows of W in one program
    ERASE: tl.constexpr,
    READ: tl.constexpr,  # "before", "after" or "none"
    KEEP: tl.constexpr,  # whether `states` is written
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (tiles of W, rows)."""
    row = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * TILE + tl.arange(0, TILE)
    n = tl.arange(0, NP)
    here = m[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    weights = tl.load(initial + row * M * N + here, mask=inside, other=0.0).to(tl.float32)
    chunks = tl.cdiv(T, C)
    for chunk in range(chunks):
        t = chunk * C + tl.arange(0, C)
        if KEEP:
            place = states + (row * chunks + chunk) * M * N + here
            tl.store(place, weights.to(states.dtype.element_ty), mask=inside)
        now, before, last = _gates(total, row, chunk, T)
        a = _load_rows(keys, row, t, N, n, T)
        g = _load_rows(local_grads, row, t, M, m, T).to(tl.float32)
        step = tl.load(eta + row * T + t, mask=t < T, other=0.0)
        solved = load_inverse(inverse + (row * chunks + chunk) * C * C) if ERASE else 0.0
        written, after = learn(a, g, step, weights, now, before, last, solved, ERASE, PRECISION, UPCAST)
        if READ != "none":
            q = _load_rows(queries, row, t, N, n, T)
            z = read(a, written, weights, q, now, before, READ == "after", PRECISION, UPCAST)
            _store_rows(outputs, row, t, M, m, T, z)
        weights = after
    tl.store(final + row * M * N + here, weights, mask=inside)


@triton.jit
def backward(
    keys,
    local_grads,
    queries,
    eta,
    total,
    inverse,
    states,
    grad_outputs,  # (rows, T, M)
    grad_final,  # (rows, M, N) float32
    grad_keys,  # out: (tiles, rows, T, N) float32, each tile's part
    grad_local,  # out: (rows, T, M)
    grad_log,  # out: (tiles, rows, T) float32
    grad_eta,  # out: (tiles, rows, T) float32
    grad_queries,  # out: (tiles, rows, T, N) float32
    grad_initial,  # out: (rows, M, N) float32
    T,
    M: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    TILE: tl.constexpr,
    ERASE: tl.constexpr,
    READ: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (tiles of W, rows): from the last chunk to the first, with the gradient of the weights in registers."""
    row, rows = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    part = tl.program_id(0) * rows + row
    m = tl.program_id(0) * TILE + tl.arange(0, TILE)
    n = tl.arange(0, NP)
    here = m[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    grad = tl.load(grad_final + row * M * N + here, mask=inside, other=0.0)
    chunks = tl.cdiv(T, C)
    for back in range(chunks):
        chunk = chunks - 1 - back
        t = chunk * C + tl.arange(0, C)
        now, before, last = _gates(total, row, chunk, T)
        a = _load_rows(keys, row, t, N, n, T)
        g = _load_rows(local_grads, row, t, M, m, T).to(tl.float32)
        step = tl.load(eta + row * T + t, mask=t < T, other=0.0)
        place = states + (row * chunks + chunk) * M * N + here
        weights = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        solved = load_inverse(inverse + (row * chunks + chunk) * C * C) if ERASE else 0.0
        written, _ = learn(a, g, step, weights, now, before, last, solved, ERASE, PRECISION, UPCAST)
        grad_written = tl.zeros((C, TILE), tl.float32)
        if READ != "none":
            q = _load_rows(queries, row, t, N, n, T)
            z = _load_rows(grad_outputs, row, t, M, m, T).to(tl.float32)
            grad_a, grad_written, grad_weights, grad_q, grad_now, grad_before = read_backward(
                a, written, weights, q, z, now, before, READ == "after", PRECISION, UPCAST
            )
            _store_rows(grad_queries, part, t, N, n, T, grad_q)
        by_a, by_g, by_step, by_now, by_before, by_last, by_weights = learn_backward(
            a, g, step, weights, now, before, last, solved, written, grad_written, grad, ERASE, PRECISION, UPCAST
        )
        grad = by_weights
        if READ != "none":
            by_a += grad_a
            by_now += grad_now
            by_before += grad_before
            grad += grad_weights
        _store_rows(grad_local, row, t, M, m, T, by_g)
        _store_rows(grad_keys, part, t, N, n, T, by_a)
        tl.store(grad_eta + part * T + t, by_step, mask=t < T)
        # log b_t is the sum of the logarithms up to t.
        logs = tl.cumsum(by_now + by_before, 0, reverse=True) - by_before + by_last
        tl.store(grad_log + part * T + t, logs, mask=t < T)
    tl.store(grad_initial + row * M * N + here, grad, mask=inside)
