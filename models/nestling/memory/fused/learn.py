"""What both scans have in common, as functions of Triton kernels: one linear layer that learns along a chunk.

With A the keys of a chunk of C = 64 tokens (tokens are rows), G its local gradients, Q its queries, W the weights
before it, eta its steps, b_t the product of its retention gates up to token t and b'_t that up to t - 1,

    L_tj = eta_t (b'_t / b_j) a_t . a_j for j < t          the erase terms, a unit lower-triangular system I + L
    R    = -(I + L)^-1 eta (b' A W^T + G)                  what each token adds along its key; -eta G without erase
    Z    = b Q W^T + tril(b_t / b_j  Q A^T) R              a read after each token's step; before it, b'
    W    = b_C W + R^T (b_C / b  A)                        the weights after the chunk

The inverse is made by substitution in blocks of 16 and merges: Neumann series lose all digits for equal keys.
Logarithms of gates are summed in float64: a sum over shut gates leaves nothing of float32's digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Tokens of a chunk.
CHUNK = 64
C = tl.constexpr(CHUNK)
_B = tl.constexpr(16)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a @ b in float32; UPCAST is for Triton's interpreter, which multiplies the bits of bfloat16."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def since(start, total, INCLUSIVE: tl.constexpr):
    """exp(start_t - total_j) for j <= t, or j < t; zero elsewhere."""
    c = tl.arange(0, C)
    seen = c[:, None] >= c[None, :] if INCLUSIVE else c[:, None] > c[None, :]
    # Masked before the exponential: what lies in the future may overflow.
    return tl.exp(tl.where(seen, (start[:, None] - total[None, :]).to(tl.float32), float("-inf")))


@triton.jit
def learn(
    a, g, step, weights, now, before, last, solved, ERASE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):
    """R (C, m) and the weights after the chunk (m, n), both float32, of keys a (C, n) in the operands' dtype."""
    if ERASE:
        seen = tl.exp(before.to(tl.float32))[:, None] * dot(a, tl.trans(weights.to(a.dtype)), PRECISION, UPCAST)
        written = -dot(solved, step[:, None] * (seen + g), PRECISION, False)
    else:
        written = -step[:, None] * g
    left = (tl.exp((last - now).to(tl.float32))[:, None] * a).to(a.dtype)
    after = tl.exp(last.to(tl.float32)) * weights + dot(tl.trans(written.to(a.dtype)), left, PRECISION, UPCAST)
    return written, after


@triton.jit
def read(a, written, weights, q, now, before, INCLUSIVE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """What the queries q (C, n) read from the weights of their own token, (C, m)."""
    reading = now if INCLUSIVE else before
    share = since(reading, now, INCLUSIVE) * dot(q, tl.trans(a), PRECISION, UPCAST)
    kept = tl.exp(reading.to(tl.float32))[:, None] * dot(q, tl.trans(weights.to(a.dtype)), PRECISION, UPCAST)
    return kept + dot(share.to(a.dtype), written.to(a.dtype), PRECISION, UPCAST)


@triton.jit
def read_backward(
    a, written, weights, q, grad, now, before, INCLUSIVE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):
    """Gradients of `read`: of a, R, the weights, q, log b and log b'."""
    reading = now if INCLUSIVE else before
    ratio = since(reading, now, INCLUSIVE)
    share = ratio * dot(q, tl.trans(a), PRECISION, UPCAST)
    z = grad.to(a.dtype)
    grad_written = dot(tl.trans(share.to(a.dtype)), z, PRECISION, UPCAST)
    grad_share = dot(z, tl.trans(written.to(a.dtype)), PRECISION, UPCAST)
    mixed = (grad_share * ratio).to(a.dtype)
    kept = (tl.exp(reading.to(tl.float32))[:, None] * grad).to(a.dtype)
    by_weights = dot(kept, weights.to(a.dtype), PRECISION, UPCAST)
    grad_q = by_weights + dot(mixed, a, PRECISION, UPCAST)
    grad_a = dot(tl.trans(mixed), q, PRECISION, UPCAST)
    grad_weights = dot(tl.trans(kept), q, PRECISION, UPCAST)
    moved = grad_share * share
    grad_reading = tl.sum(moved, 1) + tl.sum(by_weights * q, 1)
    grad_now = -tl.sum(moved, 0)
    if INCLUSIVE:
        return grad_a, grad_written, grad_weights, grad_q, grad_now + grad_reading, tl.zeros_like(grad_now)
    else:
        return grad_a, grad_written, grad_weights, grad_q, grad_now, grad_reading


@triton.jit
def learn_backward(
    a, g, step, weights, now, before, last, solved, written, grad_written, grad_after,
    ERASE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of `learn`: of a, g, step, log b, log b', log b of the last token and the weights.

    Args:
        grad_written: of R by what was read.
        grad_after: of the weights after the chunk, float32.
    """
    r, start, grad_end = written.to(a.dtype), weights.to(a.dtype), grad_after.to(a.dtype)
    left, kept = tl.exp((last - now).to(tl.float32))[:, None], tl.exp(last.to(tl.float32))
    by_key = left * dot(a, tl.trans(grad_end), PRECISION, UPCAST)
    grad_written += by_key
    grad_a = left * dot(r, grad_end, PRECISION, UPCAST)
    at_end = tl.sum(written * by_key, 1)
    grad_last = tl.sum(at_end, 0) + kept * tl.sum(tl.sum(grad_after * weights, 1), 0)
    grad_now, grad_before = -at_end, tl.zeros_like(at_end)
    grad_weights = kept * grad_after
    column = step[:, None]
    if ERASE:
        kept_before = tl.exp(before.to(tl.float32))[:, None]
        seen = dot(a, tl.trans(start), PRECISION, UPCAST)
        aimed = kept_before * seen + g
        solved_grad = dot(tl.trans(solved), grad_written, PRECISION, False)
        grad_g = -column * solved_grad
        grad_seen = kept_before * grad_g
        down = grad_seen.to(a.dtype)
        grad_a += dot(down, start, PRECISION, UPCAST)
        grad_weights += dot(tl.trans(down), a, PRECISION, UPCAST)
        grad_before += tl.sum(grad_seen * seen, 1)
        # L, of which step and the gates are taken apart.
        ratio = since(before, now, False)
        overlap = ratio * dot(a, tl.trans(a), PRECISION, UPCAST)
        grad_triangle = -dot(solved_grad, tl.trans(written), PRECISION, False)
        grad_step = tl.sum(grad_triangle * overlap, 1) - tl.sum(solved_grad * aimed, 1)
        moved = column * grad_triangle * overlap
        grad_before += tl.sum(moved, 1)
        grad_now -= tl.sum(moved, 0)
        pairs = (column * grad_triangle * ratio).to(a.dtype)
        grad_a += dot(pairs, a, PRECISION, UPCAST) + dot(tl.trans(pairs), a, PRECISION, UPCAST)
    else:
        grad_g = -column * grad_written
        grad_step = -tl.sum(grad_written * g, 1)
    return grad_a, grad_g, grad_step, grad_now, grad_before, grad_last, grad_weights


@triton.jit
def _triangle(a, b, eta, before, total, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """A 16 x 16 block of L: rows of keys a, columns of keys b."""
    exponent = (before[:, None] - total[None, :]).to(tl.float32)
    if DIAGONAL:
        c = tl.arange(0, _B)
        exponent = tl.where(c[:, None] > c[None, :], exponent, float("-inf"))
    return eta[:, None] * tl.exp(exponent) * dot(a, tl.trans(b), PRECISION, UPCAST)


@triton.jit
def _invert(triangle):
    """(I + triangle)^-1 of a strictly lower 16 x 16 triangle, row by row."""
    c = tl.arange(0, _B)
    inverse = -triangle
    for i in tl.static_range(2, 16):
        this = c[:, None] == i
        row = -tl.sum(tl.where(this, triangle, 0.0), 0)
        row += tl.sum(row[:, None] * inverse, 0)
        inverse = tl.where(this, row[None, :], inverse)
    return inverse + tl.where(c[:, None] == c[None, :], 1.0, 0.0)


@triton.jit
def _merge(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _keep(inverse, i: tl.constexpr, j: tl.constexpr, block):
    c = tl.arange(0, _B)
    tl.store(inverse + (c[:, None] + i * _B) * C + c[None, :] + j * _B, block)


@triton.jit
def keep_inverse(
    k0, k1, k2, k3, e0, e1, e2, e3, p0, p1, p2, p3, b0, b1, b2, b3, inverse,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Store (I + L)^-1, of four blocks of 16 tokens: keys, steps, log b' and log b."""
    i0 = _invert(_triangle(k0, k0, e0, p0, b0, True, PRECISION, UPCAST))
    i1 = _invert(_triangle(k1, k1, e1, p1, b1, True, PRECISION, UPCAST))
    i2 = _invert(_triangle(k2, k2, e2, p2, b2, True, PRECISION, UPCAST))
    i3 = _invert(_triangle(k3, k3, e3, p3, b3, True, PRECISION, UPCAST))
    l10 = _triangle(k1, k0, e1, p1, b0, False, PRECISION, UPCAST)
    l20 = _triangle(k2, k0, e2, p2, b0, False, PRECISION, UPCAST)
    l21 = _triangle(k2, k1, e2, p2, b1, False, PRECISION, UPCAST)
    l30 = _triangle(k3, k0, e3, p3, b0, False, PRECISION, UPCAST)
    l31 = _triangle(k3, k1, e3, p3, b1, False, PRECISION, UPCAST)
    l32 = _triangle(k3, k2, e3, p3, b2, False, PRECISION, UPCAST)
    i10 = -_merge(i1, _merge(l10, i0))
    i21 = -_merge(i2, _merge(l21, i1))
    i32 = -_merge(i3, _merge(l32, i2))
    i20 = -_merge(i2, _merge(l20, i0) + _merge(l21, i10))
    i31 = -_merge(i3, _merge(l31, i1) + _merge(l32, i21))
    i30 = -_merge(i3, _merge(l30, i0) + _merge(l31, i10) + _merge(l32, i20))
    nothing = tl.zeros((16, 16), tl.float32)
    _keep(inverse, 0, 0, i0)
    _keep(inverse, 0, 1, nothing)
    _keep(inverse, 0, 2, nothing)
    _keep(inverse, 0, 3, nothing)
    _keep(inverse, 1, 0, i10)
    _keep(inverse, 1, 1, i1)
    _keep(inverse, 1, 2, nothing)
    _keep(inverse, 1, 3, nothing)
    _keep(inverse, 2, 0, i20)
    _keep(inverse, 2, 1, i21)
    _keep(inverse, 2, 2, i2)
    _keep(inverse, 2, 3, nothing)
    _keep(inverse, 3, 0, i30)
    _keep(inverse, 3, 1, i31)
    _keep(inverse, 3, 2, i32)
    _keep(inverse, 3, 3, i3)


@triton.jit
def load_inverse(inverse):
    c = tl.arange(0, C)
    return tl.load(inverse + c[:, None] * C + c[None, :])
