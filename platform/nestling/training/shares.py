"""Where DeepSpeed keeps the float32 weights and the optimizer state of a parameter.

A *share* is the stretch of one flattened parameter that lives on this rank: ZeRO keeps stretches in flat partitions,
cut in another way by every stage and number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Elements [start, start + length) of the flattened parameter `name`, kept in `master` from `offset` on."""

    name: str
    start: int
    length: int
    offset: int
    #: What the optimizer moves: the parameter itself, or ZeRO's flat partition.
    master: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """The share's stretch of `master`, or of a state tensor of the same shape."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)


def masters(engine: Any) -> dict[str, Tensor]:
    """What the optimizer moves for each parameter. A rank has a partition for every group, if only of padding."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if not engine.zero_optimization():
        return {name: parameter for name, parameter in engine.module.named_parameters()}
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        groups, flats = zero.fp16_groups, zero.fp32_partitioned_groups_flat
    else:
        groups, flats = zero.bit16_groups, zero.single_partition_of_fp32_groups
    return {names[id(p)]: flat for group, flat in zip(groups, flats, strict=True) for p in group}


def shares(engine: Any) -> Iterator[Share]:
    """This rank's share of every parameter, in the order of the model's parameters; some have length 0."""
    held_in = masters(engine)
    for name, parameter in engine.module.named_parameters():
        start, length, offset = _place(engine, parameter)
        yield Share(name, start, length, offset, held_in[name])


def _place(engine: Any, parameter: Any) -> tuple[int, int, int]:
    """Start and length of this rank's stretch of a parameter, and where it begins in its flat partition."""
    if not engine.zero_optimization():
        return 0, parameter.numel(), 0
    if engine.zero_optimization_stage() == 3:
        _, offset, size = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
        start = min(engine.global_rank * size, parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start), offset
    mapping = parameter._hp_mapping  # None where another rank has it all
    if mapping is None:
        return 0, 0, 0
    return mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel, mapping.hp_fragment_address.start
