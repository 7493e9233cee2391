"""`nestling status`: where a run stands, a stream above all, whether it is running or not."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import Annotated, Any

import typer

from nestling.config import from_yaml
from nestling.jobs.arguments import AsJson, Run, RunDir, found_run
from nestling.jobs.output import in_columns, verb
from nestling.tracking.files import read_json
from nestling.tracking.runs import RunFolder

KEYS = (
    *("run_id", "state", "steps", "tokens", "lag", "prequential_bits_per_byte", "probes", "levels", "drifts"),
    *("rollbacks", "snapshot", "tokens_per_second", "offsets", "window", "changes", "sources"),
)
#: Seconds from one look to the next.
EVERY = 2.0


@verb(*KEYS)
def status(
    reference: Run,
    overrides: RunDir = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every two seconds until the run ends.")] = False,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Where a run stands: position and lag, speed, losses, probes, levels, drift, the last snapshot."""
    folder = found_run(reference, overrides)
    while True:
        found = standing(folder)
        if not as_json:
            if watch:
                print("\033[H\033[2J", end="")
            print(report(folder, found), flush=True)
        if not watch or found["state"] != "running":
            return found
        time.sleep(EVERY)


def standing(folder: RunFolder) -> dict[str, Any]:
    """The figures by name; None for what is not known. Of a run at rest they are those that it goes on with: a person
    may have taken it back to a snapshot, or its log may be ahead of the last one."""
    info, position, saved = folder.info(), read_json(folder.position), dict[str, float]()
    if info.get("status") != "running":
        from nestling.training import snapshots  # torch takes seconds

        with suppress(OSError):  # a place of snapshots that does not answer leaves what the log says
            saved, at = snapshots.standing(folder)
            position = at or position
    last = folder.last_values(saved.get("step", math.inf)) | saved
    events = folder.happened()
    drifts = {event["step"]: event["window"] for event in events if event["kind"] == "drift"}
    rollbacks = [event for event in events if event["kind"] == "rolled-back"]
    tokens = last.get("train/tokens")
    offsets = position.get("offsets")
    return {
        "run_id": folder.run_id,
        "state": info.get("status"),
        "steps": None if "step" not in last else int(last["step"]),
        "tokens": None if tokens is None else int(tokens),
        "lag": None if offsets is None else _lag(folder, offsets),
        "prequential_bits_per_byte": last.get("prequential/bits_per_byte"),
        "probes": _named(last, "probe/", "/bits_per_byte"),
        "levels": {name: int(count) for name, count in _named(last, "levels/", "/updates").items()},
        "drifts": [{"step": step, "window": window} for step, window in sorted(drifts.items())],
        "rollbacks": len(rollbacks),
        "snapshot": _newest(events),
        "tokens_per_second": last.get("train/tokens_per_second"),
        "offsets": offsets,
        "window": position.get("window"),
        "changes": read_json(folder.changes).get("changes", []),
        "sources": _sources(folder, last),
    }


def report(folder: RunFolder, found: dict[str, Any]) -> str:
    """The same for people."""
    bits, rate, steps = found["prequential_bits_per_byte"], found["tokens_per_second"], found["steps"] or 0
    speed = f", {rate:,.0f} tokens/s" if rate else ""
    lines = {
        "run": f"{folder.run_id} ({folder.name}), {found['state']}",
        "steps": f"{steps:,}, {found['tokens'] or 0:,} tokens{speed}",
    }
    if found["offsets"] is not None:
        lag = found["lag"] or {}
        places = [
            f"{name}: {offset:,}" + (f" ({lag[name]:,} behind)" if name in lag else "")
            for name, offset in found["offsets"].items()
        ]
        lines["position"] = f"window {found['window']:,}; " + (", ".join(places) or "nothing was read yet")
        if found["lag"] is None:
            lines["lag"] = "unknown: the source does not answer"
    if found["sources"]:
        lines["sources"] = "; ".join(_in_words(name, source) for name, source in found["sources"].items())
    if bits is not None:
        lines["loss"] = f"{bits:.3f} bits per byte before learning (prequential)"
    if found["probes"]:
        lines["probes"] = ", ".join(f"{name} {loss:.3f}" for name, loss in found["probes"].items()) + " bits per byte"
    if found["levels"]:
        lines["levels"] = ", ".join(f"{name} moved {count:,} times" for name, count in found["levels"].items())
    lines["drift"] = ", ".join(f"step {drift['step']:,}" for drift in found["drifts"]) or "no alarm"
    if found["rollbacks"]:
        lines["undone"] = f"{found['rollbacks']} times back to a snapshot"
    lines["snapshot"] = found["snapshot"] or "none yet"
    if found["changes"]:
        lines["changes"] = ", ".join(f"{change['level']} every {change['period']}" for change in found["changes"])
        lines["changes"] += " at the next snapshot"
    return in_columns(lines)


def _named(values: dict[str, float], before: str, after: str) -> dict[str, float]:
    """What stands between the two in a metric's name, and its value."""
    return {
        key.removeprefix(before).removesuffix(after): value
        for key, value in values.items()
        if key.startswith(before) and key.endswith(after)
    }


def _lag(folder: RunFolder, offsets: dict[str, int]) -> dict[str, int] | None:
    """How far each partition reaches beyond what was learnt, in the source's own units; None if that is not known."""
    from nestling.data.streams import open_stream

    try:
        source = open_stream(from_yaml(folder.config.read_text(encoding="utf-8")))
        ends = source.ends(offsets)
        return {name: end - offsets.get(name, source.begins(name)) for name, end in ends.items()}
    except Exception:  # a function that makes records may raise anything
        return None


def _sources(folder: RunFolder, last: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Of each of several sources its records so far, and the levels that they may write (None: all)."""
    if not folder.config.exists():
        return {}
    policies = from_yaml(folder.config.read_text(encoding="utf-8")).stream.policies
    counts = _named(last, "stream/records/", "")
    return {name: {"records": int(counts.get(name, 0)), "levels": levels} for name, levels in policies.items()}


def _in_words(name: str, source: dict[str, Any]) -> str:
    """A source, its records and its policy in words."""
    levels = source["levels"]
    written = "every level" if levels is None else ", ".join(levels) or "no level"
    return f"{name}, {source['records']:,} records, writes {written}"


def _newest(events: list[dict[str, Any]]) -> str | None:
    saved = [event for event in events if event["kind"] in ("checkpoint", "restored")]
    return None if not saved else str(saved[-1]["message"]).rpartition(" saved to ")[2]
