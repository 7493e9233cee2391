"""The person's and the cluster's side of a training under way: stopping it, and what ended a group of workers."""

from __future__ import annotations

import signal
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from nestling.tracking import RunFolder

Result = TypeVar("Result")


def attended(work: Callable[[], Result], folder: RunFolder) -> Result:
    """Do the work in a thread of its own, so that this one can answer signals meanwhile.

    The first Ctrl-C or SIGTERM asks the workers, through a file in the run's folder, to save and stop; the second
    raises KeyboardInterrupt.
    """
    outcome: list[Any] = []

    def body() -> None:
        try:
            outcome.extend((work(), None))
        except BaseException as error:
            outcome.extend((None, error))

    thread = threading.Thread(target=body, daemon=True)
    with _stop_on_signal(folder):
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
    result, error = outcome
    if error is not None:
        raise error
    return result


@contextmanager
def _stop_on_signal(folder: RunFolder) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return

    def stop(number: int, frame: Any) -> None:
        if folder.stop.exists():
            raise KeyboardInterrupt
        folder.stop.touch()
        folder.event("stopping", "saving a checkpoint, then stopping; once more to leave at once")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ending(folder: RunFolder, max_failures: int) -> Any:
    """A Ray Train callback that notes in the run's events what ended a group of workers."""
    from ray.train import UserCallback

    class Ending(UserCallback):
        """Runs in Ray's controller process."""

        def __init__(self) -> None:
            self.failures = 0

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            self.failures += 1
            follows = (
                f"starting again from the last checkpoint ({self.failures} of {max_failures})"
                if self.failures <= max_failures
                else f"giving up after training.max_failures={max_failures}"
            )
            folder.event("failed", f"{_what_happened(worker_exceptions)}; {follows}")

    return Ending()


def _what_happened(worker_exceptions: dict[int, Exception]) -> str:
    """One line about the failure that came first: when a worker dies, others fail because it is gone."""
    texts = {rank: str(error).strip() or type(error).__name__ for rank, error in worker_exceptions.items()}
    for rank, text in texts.items():
        if "actor is dead" in text or "actor died" in text:
            return f"worker {rank} died (killed, or out of memory)"
    rank, text = next(iter(texts.items()))
    if "gloo" in text and "Connection" in text or "NCCL" in text:
        return f"worker {rank} lost its connection to another one, which has probably died"
    return f"worker {rank} failed: {textwrap.shorten(text.splitlines()[-1], 200, placeholder=' ...')}"
