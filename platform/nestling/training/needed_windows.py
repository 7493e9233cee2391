"""Which planned windows a snapshot may still need: one in the middle of a window goes on with what was planned."""

from __future__ import annotations

from nestling.data.streams import WindowFolder


class NeededWindows:
    """Removes the plans that lie before every snapshot.

    Args:
        windows: where the plans are.
    """

    def __init__(self, windows: WindowFolder) -> None:
        self._windows = windows
        #: The window at which each snapshot begins that was saved here, by its step.
        self._begins: dict[int, int] = {}

    def saving(self, step: int, window: int) -> None:
        """A snapshot of this step, which goes on with this window, is on its way.

        A step may be saved twice, after a window without steps or one undone. Whether the second one arrives is not
        known, so the earlier window counts.
        """
        self._begins.setdefault(step, window)

    def forget(self, steps: set[int]) -> None:
        """Remove what none of the snapshots of these steps needs, if all of them were saved here."""
        if steps and steps <= self._begins.keys():
            self._begins = {step: window for step, window in self._begins.items() if step in steps}
            self._windows.forget(before=min(self._begins.values()))
