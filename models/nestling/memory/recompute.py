"""A scan over blocks of tokens whose backward pass recomputes instead of remembering, unless that is little.

The forward pass keeps the carried state at the start of every group of blocks, and nothing else beside the inputs; the
backward pass runs each group again, last one first, and differentiates it. Memory grows with the number of groups times
the state, never with tokens times the state, and gradients are written into slices, so that time stays linear in T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
#: Numbers in the first input up to which nothing is recomputed: about 100 MB of what autograd keeps, and a fifth of the
#: time less. With more of them the caches are too small, and little is gained.
LITTLE = 1 << 18
_sparing = ContextVar("sparing", default=False)
#: (block number, carry, this block's inputs, constants) -> (outputs of the block, new carry)
Body = Callable[[int, Tensors, Tensors, tuple[Tensor | None, ...]], tuple[Tensor, Tensors]]


def scan(
    body: Body,
    spans: Sequence[tuple[int, int]],
    carry: Tensors,
    inputs: Tensors,
    constants: tuple[Tensor | None, ...],
    blocks_per_state: int | None,
) -> tuple[Tensor, Tensors]:
    """Run `body` over `spans` of tokens (axis -2 of every input).

    Args:
        body: a pure function of tensors; it must not keep or change what it is given.
        spans: (start, end) of each block, abutting, at least one.
        carry: the state before the first block.
        inputs: tensors (..., T, width).
        constants: tensors (or None) that every block sees whole.
        blocks_per_state: blocks between two kept states; None: one, and where the inputs are small nothing is
            recomputed.

    Returns:
        The blocks' outputs, joined along axis -2, and the carry after the last block.
    """
    if not torch.is_grad_enabled():
        blocks_per_state = len(spans)  # nothing will be recomputed: keep no state on the way
    elif blocks_per_state is None:
        blocks_per_state = 0 if inputs[0].numel() <= LITTLE and not _sparing.get() else 1
    result = _Scan.apply(body, spans, blocks_per_state, len(carry), len(inputs), *carry, *inputs, *constants)
    return result[0], tuple(result[1:])


@contextmanager
def sparing() -> Iterator[None]:
    """Recompute even where little would be kept: what is inside is itself going to be recomputed."""
    before = _sparing.set(True)
    try:
        yield
    finally:
        _sparing.reset(before)


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
        """With 0 blocks per state the whole scan is one group whose graph is kept."""
        carry, inputs = tensors[:n_carry], tensors[n_carry : n_carry + n_inputs]
        constants = tensors[n_carry + n_inputs :]
        ctx.plan = (body, spans, blocks_per_state or len(spans), n_carry, n_inputs, len(constants))
        ctx.group = None
        if blocks_per_state == 0:
            ctx.save_for_backward(*inputs, *constants, *carry)
            leaves = [_leaf(tensor, want) for tensor, want in zip(tensors, ctx.needs_input_grad[5:], strict=True)]
            own = leaves[:n_carry], leaves[n_carry : n_carry + n_inputs], leaves[n_carry + n_inputs :]
            ctx.group = _Group(body, range(len(spans)), spans, *map(tuple, own))
            return ctx.group.joined.detach(), *(t.detach().clone() for t in ctx.group.carry)
        kept: list[Tensor] = []
        outputs = []
        for block, (start, end) in enumerate(spans):
            if block % blocks_per_state == 0:
                kept.extend(carry)
            output, carry = body(block, carry, tuple(t[..., start:end, :] for t in inputs), constants)
            outputs.append(output)
        ctx.save_for_backward(*inputs, *constants, *kept)
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
            group, ctx.group = ctx.group, None  # what it holds is free behind this; a second pass makes it again
            if group is not None:
                return None, None, None, None, None, *group.gradients(grad_outputs, grad_carry)
            return _backward(ctx, grad_outputs, *grad_carry)


class _Group:
    """Consecutive blocks with a graph of their own, from leaves.

    Args:
        carry, inputs, constants: leaves; the inputs are of these blocks alone.

    Attributes:
        joined: the outputs.
        carry: after the blocks.
    """

    def __init__(
        self,
        body: Body,
        blocks: range,
        spans: Sequence[tuple[int, int]],
        carry: Tensors,
        inputs: Tensors,
        constants: tuple[Tensor | None, ...],
    ) -> None:
        self._leaves = (*carry, *inputs, *constants)
        sizes = [spans[block][1] - spans[block][0] for block in blocks]
        outputs = []
        with torch.enable_grad():
            for block, *pieces in zip(blocks, *(tensor.split(sizes, dim=-2) for tensor in inputs), strict=True):
                output, carry = body(block, carry, tuple(pieces), constants)
                outputs.append(output)
            self.joined = torch.cat(outputs, dim=-2)
        self.carry = carry

    def gradients(self, grad_outputs: Tensor, grad_carry: Sequence[Tensor]) -> list[Tensor | None]:
        """Of carry, inputs and constants, None for those that want none."""
        asked = [leaf for leaf in self._leaves if leaf is not None and leaf.requires_grad]
        results = [
            (result, grad)
            for result, grad in zip((self.joined, *self.carry), (grad_outputs, *grad_carry), strict=True)
            if result.requires_grad
        ]
        found = iter(
            torch.autograd.grad(
                [result for result, _ in results],
                asked,
                [grad for _, grad in results],
                allow_unused=True,
                materialize_grads=True,
            )
        )
        return [next(found) if leaf is not None and leaf.requires_grad else None for leaf in self._leaves]


def _backward(ctx: Any, grad_outputs: Tensor, *grad_carry: Any) -> Any:
    body, spans, blocks_per_state, n_carry, n_inputs, n_constants = ctx.plan
    saved = ctx.saved_tensors
    inputs, constants = saved[:n_inputs], saved[n_inputs : n_inputs + n_constants]
    kept = saved[n_inputs + n_constants :]
    wants = ctx.needs_input_grad[5:]
    wants_inputs, wants_constants = wants[n_carry : n_carry + n_inputs], wants[n_carry + n_inputs :]

    grad_inputs = [torch.zeros_like(t) if want else None for t, want in zip(inputs, wants_inputs, strict=True)]
    constants = tuple(_leaf(t, want) for t, want in zip(constants, wants_constants, strict=True))
    grad_constants = [torch.zeros_like(t) if want else None for t, want in zip(constants, wants_constants, strict=True)]

    for first in reversed(range(0, len(spans), blocks_per_state)):
        blocks = range(first, min(first + blocks_per_state, len(spans)))
        offset = first // blocks_per_state * n_carry
        carry = tuple(_leaf(t, True) for t in kept[offset : offset + n_carry])
        here = slice(spans[blocks[0]][0], spans[blocks[-1]][1])
        pieces = tuple(_leaf(t[..., here, :], want) for t, want in zip(inputs, wants_inputs, strict=True))
        group = _Group(body, blocks, spans, carry, pieces, constants)
        grads = group.gradients(grad_outputs[..., here, :], grad_carry)
        grad_carry = tuple(grads[:n_carry])
        for grad_input, grad in zip(grad_inputs, grads[n_carry : n_carry + n_inputs], strict=True):
            if grad_input is not None and grad is not None:
                grad_input[..., here, :] = grad
        for total, grad in zip(grad_constants, grads[n_carry + n_inputs :], strict=True):
            if total is not None and grad is not None:
                total += grad
    return None, None, None, None, None, *grad_carry, *grad_inputs, *grad_constants


def _leaf(tensor: Tensor | None, want: bool) -> Any:
    return None if tensor is None else tensor.detach().requires_grad_(want)
