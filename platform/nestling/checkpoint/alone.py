"""Checkpoints and hashes that one process makes without a training: where weights come from elsewhere.

Tensors pass through one at a time, so a model larger than memory is no matter.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from nestling.checkpoint.manifest import Checkpoint
from nestling.checkpoint.pieces import write_tensors
from nestling.checkpoint.store import SHARD, Store


def commit_tensors(
    store: Store,
    step: int,
    sizes: Mapping[str, tuple[torch.dtype, int]],
    tensors: Iterable[Tensor],
    documents: Mapping[str, str],
    metric: float | None = None,
) -> Checkpoint:
    """Make a checkpoint of whole tensors; one of the same step that is there stays until this one replaces it.

    Args:
        store: where the checkpoints lie.
        step: optimizer steps done.
        sizes: dtype and elements of each tensor, by its name.
        tensors: the tensors in the order of `sizes`.
        documents: texts by file name.
        metric: what the best checkpoints are chosen by.
    """
    draft, shard = store.draft(step, secrets.token_hex(4)), f"rank-00000{SHARD}"
    try:
        draft.folder.mkdir(parents=True, exist_ok=True)
        entries = {f"{name}@0": (dtype, torch.Size([size])) for name, (dtype, size) in sizes.items()}
        write_tensors(draft.folder / shard, entries, tensors)
        for name, text in documents.items():
            (draft.folder / name).write_text(text, encoding="utf-8")
        files = {}
        for name in (shard, *documents):
            path = draft.folder / name
            with path.open("rb") as file:
                files[name] = {
                    "bytes": path.stat().st_size,
                    "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                }
            draft.deliver(name)
        checkpoint = draft.commit(files, metric)
    except BaseException:
        draft.drop()
        raise
    finally:
        if draft.remote:
            draft.leave([shard, *documents])
    return checkpoint


class WeightsHash:
    """SHA-256 over names, shapes and float32 bytes of weights, in the order in which they pass `through`."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def through(self, shapes: Mapping[str, torch.Size], tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """The tensors, one for each of `shapes`, each counted in as it is taken."""
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            self._digest.update(f"{name} {list(shape)}\n".encode())
            self._digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            yield tensor

    def hexdigest(self) -> str:
        """The sum of all that has passed."""
        return self._digest.hexdigest()
