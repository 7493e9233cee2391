"""A scan over blocks of tokens whose backward pass recomputes instead of remembering.

The forward pass keeps the carried state at the start of every group of blocks, and nothing else beside the inputs; the
backward pass runs each group again, last one first, and differentiates it. Memory grows with the number of groups times
the state, never with tokens times the state, and gradients are written into slices, so that time stays linear in T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
#: (block number, carry, this block's inputs, constants) -> (outputs of the block, new carry)
Body = Callable[[int, Tensors, Tensors, tuple[Tensor | None, ...]], tuple[Tensor, Tensors]]


def scan(
    body: Body,
    spans: Sequence[tuple[int, int]],
    carry: Tensors,
    inputs: Tensors,
    constants: tuple[Tensor | None, ...],
    blocks_per_state: int,
) -> tuple[Tensor, Tensors]:
    """Run `body` over `spans` of tokens (axis -2 of every input).

    Args:
        body: a pure function of tensors; it must not keep or change what it is given.
        spans: (start, end) of each block, abutting, at least one.
        carry: the state before the first block.
        inputs: tensors (..., T, width).
        constants: tensors (or None) that every block sees whole.
        blocks_per_state: blocks between two kept states.

    Returns:
        The blocks' outputs, joined along axis -2, and the carry after the last block.
    """
    if not torch.is_grad_enabled():
        blocks_per_state = len(spans)  # nothing will be recomputed: keep no state on the way
    result = _Scan.apply(body, spans, blocks_per_state, len(carry), len(inputs), *carry, *inputs, *constants)
    return result[0], tuple(result[1:])


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        body: Body,
        spans: Sequence[tuple[int, int]],
        blocks_per_state: int,
        n_carry: int,
        n_inputs: int,
        *tensors: Any,
    ) -> Any:
        carry, inputs = tensors[:n_carry], tensors[n_carry : n_carry + n_inputs]
        constants = tensors[n_carry + n_inputs :]
        kept: list[Tensor] = []
        outputs = []
        for block, (start, end) in enumerate(spans):
            if block % blocks_per_state == 0:
                kept.extend(carry)
            output, carry = body(block, carry, tuple(t[..., start:end, :] for t in inputs), constants)
            outputs.append(output)
        ctx.save_for_backward(*inputs, *constants, *kept)
        ctx.plan = (body, spans, blocks_per_state, n_carry, n_inputs, len(constants))
        # A carried tensor may be passed on unchanged; autograd wants outputs that are not its inputs.
        return torch.cat(outputs, dim=-2), *(t.clone() for t in carry)

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor, *grad_carry: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "backend='chunked' has no second derivative (create_graph=True); backend='reference' has one, "
                "`nestling.models.hope.set_backend(model, 'reference')` puts it into a model"
            )
        # As in the forward pass, whatever the caller's autocast says now.
        with torch.autocast(grad_outputs.device.type, enabled=False):
            return _backward(ctx, grad_outputs, *grad_carry)


def _backward(ctx: Any, grad_outputs: Tensor, *grad_carry: Any) -> Any:
    body, spans, blocks_per_state, n_carry, n_inputs, n_constants = ctx.plan
    saved = ctx.saved_tensors
    inputs, constants = saved[:n_inputs], saved[n_inputs : n_inputs + n_constants]
    kept = saved[n_inputs + n_constants :]
    wants = ctx.needs_input_grad[5:]
    wants_inputs, wants_constants = wants[n_carry : n_carry + n_inputs], wants[n_carry + n_inputs :]

    grad_inputs = [torch.zeros_like(t) if want else None for t, want in zip(inputs, wants_inputs, strict=True)]
    constants = [_leaf(t, want) for t, want in zip(constants, wants_constants, strict=True)]
    trained = [t for t in constants if t is not None and t.requires_grad]
    grad_trained = [torch.zeros_like(t) for t in trained]

    for first in reversed(range(0, len(spans), blocks_per_state)):
        group = range(first, min(first + blocks_per_state, len(spans)))
        offset = first // blocks_per_state * n_carry
        leaves = tuple(_leaf(t, True) for t in kept[offset : offset + n_carry])
        start, end = spans[group[0]][0], spans[group[-1]][1]
        pieces = tuple(_leaf(t[..., start:end, :], want) for t, want in zip(inputs, wants_inputs, strict=True))
        with torch.enable_grad():
            carry, outputs = leaves, []
            for block in group:
                low, high = spans[block][0] - start, spans[block][1] - start
                output, carry = body(block, carry, tuple(t[..., low:high, :] for t in pieces), tuple(constants))
                outputs.append(output)
            joined = torch.cat(outputs, dim=-2)
        asked = [t for t in pieces if t.requires_grad]
        grads = torch.autograd.grad(
            [joined, *carry],
            [*leaves, *asked, *trained],
            [grad_outputs[..., start:end, :], *grad_carry],
            allow_unused=True,
        )
        grad_carry = tuple(
            torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads[:n_carry], strict=True)
        )
        piece_grads = iter(grads[n_carry : n_carry + len(asked)])
        for grad_input in grad_inputs:
            if grad_input is not None and (grad := next(piece_grads)) is not None:
                grad_input[..., start:end, :] = grad
        for total, grad in zip(grad_trained, grads[n_carry + len(asked) :], strict=True):
            if grad is not None:
                total += grad

    trained_grads = iter(grad_trained)
    grad_constants = [next(trained_grads) if want else None for want in wants_constants]
    return None, None, None, None, None, *grad_carry, *grad_inputs, *grad_constants


def _leaf(tensor: Tensor | None, want: bool) -> Any:
    return None if tensor is None else tensor.detach().requires_grad_(want)
