"""A run's model learns documents that somebody hands it now, in one process and without Ray.

In context only, it reads them: weights stay, and what the memories have learnt is kept beside them. Or it takes
optimizer steps on them, by the run's own optimizer, levels and periods, which give a new snapshot: a stream goes on
from that where it stood, and its ledger is none the wiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nestling.checkpoint import CheckpointError, ResumeError, export_weights, load_final, run_store, trained_step
from nestling.checkpoint.fast import FastState, weights_sha256
from nestling.config import ConfigError, JobConfig
from nestling.config.schema import need_memory
from nestling.data import Tokenizer
from nestling.data.streams import Batch
from nestling.data.streams.content import batches
from nestling.evaluation.documents import Document, document_loss, known_before
from nestling.evaluation.heldout import Reader
from nestling.evaluation.reading import reading_model
from nestling.models.fast_state import beyond, leaves
from nestling.models.sampling import PREFILL
from nestling.tracking import RunFolder
from nestling.training.alone import form_group
from nestling.training.guard import Guard
from nestling.training.keeper import Keeper
from nestling.training.loop import TrainingLoop
from nestling.training.resume import job_of
from nestling.training.run import TrainingError
from nestling.training.stream_loop import hold

#: Share of its peak learning rate with which a run learns documents at least: many schedules end at next to nothing.
LEAST_RATE = 0.1


@dataclass(frozen=True)
class Learnt:
    """What came of it; losses are bits per byte before and after.

    Attributes:
        documents: the loss on each, by its name.
        probes: of each domain's probes, or of the held-out text of a training.
        step: of the weights as they are now.
        steps: optimizer steps that were taken.
        saved: the new snapshot, or the file with the fast state.
    """

    documents: dict[str, tuple[float, float]]
    probes: dict[str, tuple[float, float]]
    step: int
    steps: int
    saved: str


def read_in_context(folder: RunFolder, documents: Sequence[Document]) -> Learnt:
    """Read documents, after those that were read so before, and keep the fast state; no weight changes.

    Raises:
        ConfigError: the model has no memory, or its levels move while it reads.
        CheckpointError, DataError: what is missing, and how to fix it.
        TrainingError: the memories have diverged; the run is as it was.
        RunBusyError: the run is being trained.
    """
    with folder.claim():
        torch.set_num_threads(1)
        model, tokenizer, config = load_final(folder)
        _need_memory(config)
        before, kept = reading_model(folder, model, config.continuum)
        measure = _measure(folder, config, tokenizer, documents)
        losses = measure(before)
        state = None
        with torch.no_grad():
            for piece in torch.from_numpy(_read_as_one(documents, tokenizer)).split(PREFILL):
                _, state = before(piece[None], state)
            found = leaves(beyond(state, model.initial_state(1)))
        if not all(leaf.isfinite().all() for leaf in found.values() if isinstance(leaf, Tensor)):
            raise TrainingError("the memories diverged while they read; nothing is kept")
        step = trained_step(folder)
        assert step is not None
        fast = FastState(
            {name: leaf.contiguous() for name, leaf in found.items() if isinstance(leaf, Tensor)},
            {name: leaf for name, leaf in found.items() if isinstance(leaf, int)},
            [*(kept.documents if kept else []), *(document.about() for document in documents)],
            step,
            weights_sha256(model),
        )
        path = fast.save(folder)
        after, _ = reading_model(folder, model, config.continuum)
        names = ", ".join(document.name for document in documents)
        folder.event("read", f"read in context, at step {step}: {names}", step=step, documents=fast.documents)
        return Learnt(*_paired(losses, measure(after)), step, 0, str(path))


def learn_documents(folder: RunFolder, documents: Sequence[Document], passes: int) -> Learnt:
    """Take optimizer steps on documents, `passes` times through all of them, and save a snapshot.

    Position in the source, ledger, replay and carried state stay as they are.

    Raises:
        CheckpointError, DataError: what is missing, and how to fix it.
        TrainingError: nothing could be learnt or saved; the run is as it was.
        RunBusyError: the run is being trained.
    """
    with folder.claim(), _alone():
        config = _on_this_machine(job_of(folder))
        tokenizer = Tokenizer.load(folder.tokenizer, config.data.separator)
        training, store = Practice(config), run_store(config, folder)
        keeper = Keeper(training, store, None)
        first = _restored(keeper, folder)
        measure = _measure(folder, config, tokenizer, documents)
        before, length = measure(training.reader), config.data.sequence_length
        records = [record for document in documents for record in document.records]
        for _ in range(passes):
            for batch in batches(records, tokenizer, length, config.training.batch_tokens // length):
                training.learn(batch)
                if training.refused:
                    raise TrainingError(f"step {training.done} could not be used: {training.refused}; nothing is saved")
        about = [document.about() for document in documents]
        keeper.note(learnt=about, steps=training.done - first)
        keeper.save({})
        if problem := keeper.close():
            raise TrainingError(problem)
        after = measure(training.reader)
        saved = store.location(store.checkpoints()[0])
        if folder.log.exists():
            folder.cut_log(first)  # what stands behind that belongs to a history that was left
        names = ", ".join(document.name for document in documents)
        folder.event("checkpoint", f"step {training.done} saved to {saved}", step=training.done)
        folder.event(
            "learnt", f"steps {first + 1} to {training.done} learnt {names}", step=training.done, documents=about
        )
        if folder.status() == "finished":
            export_weights(store, config, folder.weights)
        folder.evaluation.unlink(missing_ok=True)  # it is about the weights before
        tokens = training.done * config.training.batch_tokens
        folder.update(steps=training.done, tokens=tokens, checkpoint=saved, heldout_bits_per_byte=None)
        return Learnt(*_paired(before, after), training.done, training.done - first, saved)


class Practice(TrainingLoop):
    """Steps on what is not the run's own data; what its snapshot holds beside weights and optimizer passes through.

    Args:
        config: the job, on the device of this process.
    """

    def __init__(self, config: JobConfig) -> None:
        super().__init__(config, torch.device(config.training.device), 0, 1)
        hold(self.levels, config.stream)
        self.guard = Guard(0.0)  # what is new may well be a spike
        self._state: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}

    def learn(self, batch: Batch) -> None:
        """One optimizer step."""
        self._rows = batch.inputs.astype(np.int64), batch.targets.astype(np.int64)
        self.passed_over -= 1  # so that the run's next batch is the one that it would have been
        self.step()

    def batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        return self._rows

    def state(self) -> dict[str, Any]:
        mine = super().state()
        return self._state | {key: mine[key] for key in ("step", "passed_over", "updates")}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self._state = dict(state)

    def tensors(self) -> dict[str, Tensor]:
        return self._tensors

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def _rate_factor(self) -> float:
        return max(super()._rate_factor(), LEAST_RATE)


#: Losses of documents and of what was known before.
_Losses = tuple[dict[str, float], dict[str, float]]
#: The same, before and after.
_Pairs = tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]


def _measure(
    folder: RunFolder, config: JobConfig, tokenizer: Tokenizer, documents: Sequence[Document]
) -> Callable[[Reader], _Losses]:
    known, length = known_before(folder, config, tokenizer), config.data.sequence_length
    return lambda model: (
        {document.name: document_loss(model, document, tokenizer, length) for document in documents},
        known(model),
    )


def _paired(before: _Losses, after: _Losses) -> _Pairs:
    documents, known = (
        {name: (loss, later[name]) for name, loss in earlier.items()}
        for earlier, later in zip(before, after, strict=True)
    )
    return documents, known


def _read_as_one(documents: Sequence[Document], tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of all texts, each between separators."""
    separator = np.array([tokenizer.separator], np.int64)
    texts = (text for document in documents for text in document.texts)
    return np.concatenate([separator, *(part for text in texts for part in (tokenizer.encode(text), separator))])


def _need_memory(config: JobConfig) -> None:
    try:
        need_memory("--fast", config.model)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _restored(keeper: Keeper, folder: RunFolder) -> int:
    try:
        step = keeper.restore()
    except ResumeError as error:
        raise CheckpointError(str(error)) from error
    if step is None:
        raise CheckpointError(f"run {folder.run_id} ({folder.name}) has no snapshot to learn from; train it first")
    return step


def _on_this_machine(config: JobConfig) -> JobConfig:
    gpu = config.training.device != "cpu" and torch.cuda.is_available()
    return replace(config, training=replace(config.training, device="cuda" if gpu else "cpu"))


@contextmanager
def _alone() -> Iterator[None]:
    """What DeepSpeed wants to see of a group of workers, where there is one process."""
    torch.set_num_threads(1)
    form_group()
    try:
        yield
    finally:
        dist.destroy_process_group()
