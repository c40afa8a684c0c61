"""What became of a run, from what lies in its directory: its record, curves, checkpoints and config.

A run that is training is only read. Whether it still trains is asked of the system, by number and start of its process:
a process that was killed could not write that it ended.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

from longlive.callbacks.non_finite import NON_FINITE
from longlive.callbacks.run_record import read_errors, read_starts, start_ticks, this_process
from longlive.config import to_plain
from longlive.data.order import samples_at
from longlive.data.shards import is_local, load_index
from longlive.parallel.checkpoint_directory import SUFFIX, ShardReader, is_complete, read_tree

Curve = Mapping[int, float]


@dataclass(frozen=True)
class StoredCheckpoint:
    """One that lies in the run's directory.

    Attributes:
        name: of the file or directory.
        step: optimizer steps that it has; None if it cannot be read.
        fault: why nobody can continue from it; None if one can.
        num_bytes: on the disk.
        samples_consumed: positions of the data before it.
    """

    name: str
    step: int | None
    fault: str | None
    num_bytes: int
    samples_consumed: int | None = None


@dataclass(frozen=True)
class RunState:
    """See `look_at`.

    Attributes:
        directory: the run's.
        config: resolved; empty if there is none.
        starts: entries of the record, oldest first.
        state: `finished`, `stopped`, `interrupted`, `failed`, `killed`, `running`, `unknown`.
        how: the same in a sentence.
        error: type, message, rank and step of what failed first.
        non_finite: content of the file about a loss or gradient that was no number, if the last start wrote it.
        curves: values by tag and step.
        checkpoints: oldest first, complete and not.
        silent_seconds: since anything was written.
    """

    directory: Path
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    state: str
    how: str
    error: dict[str, Any] | None
    non_finite: dict[str, Any] | None
    curves: dict[str, Curve]
    checkpoints: list[StoredCheckpoint] = field(default_factory=list)
    silent_seconds: float = 0.0

    @property
    def newest(self) -> StoredCheckpoint | None:
        """From which the run would continue."""
        complete = [checkpoint for checkpoint in self.checkpoints if checkpoint.fault is None]
        return max(complete, key=lambda checkpoint: checkpoint.step or 0, default=None)

    @property
    def last_step(self) -> int:
        """Optimizer steps that are known to have been taken."""
        known = [start["last_step"] for start in self.starts]
        known += [max(curve) + 1 for curve in self.curves.values() if curve]
        known += [checkpoint.step for checkpoint in self.checkpoints if checkpoint.step is not None]
        return max(known, default=0)

    @property
    def clips_per_step(self) -> int | None:
        """Over all ranks; None if it changed in the run, is not known, or steps make parts of videos."""
        if self.config.get("data", {}).get("clip_frames") is not None:
            return None
        known = {0: 0} | {
            each.step: each.samples_consumed
            for each in self.checkpoints
            if each.fault is None and each.step and each.samples_consumed is not None
        }
        # The same up to every checkpoint, and from each to the next: an average over a change would be of no step.
        rates = {
            divmod(clips - before, step - last) for (last, before), (step, clips) in pairwise(sorted(known.items()))
        }
        (clips, rest) = rates.pop() if len(rates) == 1 else (None, 0)
        return None if rest else clips


def look_at(directory: Path) -> RunState:
    """Read a run's directory.

    Raises:
        FileNotFoundError: if it is none of a run.
        ValueError: if its record cannot be read.
    """
    if not any((directory / name).exists() for name in ("run.json", "config.yaml", "checkpoints")):
        raise FileNotFoundError(f"{directory} is no directory of a run: it has no run.json, config.yaml or checkpoints")
    starts = read_starts(directory)
    silent = time.time() - max((file.stat().st_mtime for file in _files(directory)), default=time.time())
    state, how, error = _ending(directory, starts, silent)
    began = starts[-1]["began"] if starts else 0.0
    dump = directory / NON_FINITE
    is_recent = dump.exists() and dump.stat().st_mtime >= began
    config = directory / "config.yaml"
    return RunState(
        directory=directory,
        config=to_plain(OmegaConf.load(config)) if config.exists() else {},  # type: ignore[arg-type]
        starts=starts,
        state=state,
        how=how,
        error=error,
        non_finite=json.loads(dump.read_text()) if is_recent else None,
        curves=read_curves(directory),
        checkpoints=stored_checkpoints(directory / "checkpoints"),
        silent_seconds=silent,
    )


def _files(directory: Path) -> list[Path]:
    return [file for file in directory.rglob("*") if file.is_file()]


def _ending(directory: Path, starts: list[dict[str, Any]], silent: float) -> tuple[str, str, dict[str, Any] | None]:
    """State, the same in a sentence, and the error that came first."""
    if not starts:
        return "unknown", "no run.json tells how it ended: training never began, or with an earlier version", None
    last = starts[-1]
    errors = read_errors(directory, last["began"])
    error = errors[0] if errors else last["error"]
    state: str = last["state"]
    process = last["process"]
    who = f"process {process['pid']} on {process['host']}"
    if state == "running" and process["host"] != this_process()["host"]:
        how = f"it was running, as {who}, when it last wrote, {duration(silent)} ago; only {process['host']} can tell"
        return ("failed", _failure(error), error) if error else ("unknown", how, None)
    if state == "running" and process["ticks"] is not None and start_ticks(process["pid"]) == process["ticks"]:
        return "running", f"it is running, as {who}; it last wrote {duration(silent)} ago", error
    if error is not None and state in ("running", "failed"):
        return "failed", _failure(error), error
    if state == "running":
        how = f"{who} is gone without a word: killed (SIGKILL, out of memory, the machine), {duration(silent)} ago"
        return "killed", how, None
    if state == "stopped":
        return state, f"{last['signal']} stopped it after step {last['last_step']}, with a checkpoint", None
    if state == "interrupted":
        return state, f"it was interrupted from the keyboard in step {last['last_step']}", None
    return state, f"it finished at step {last['last_step']}", None


def _failure(error: Mapping[str, Any]) -> str:
    return f"it failed in step {error['step']}, on rank {error['rank']} first: {error['type']}: {error['message']}"


def read_curves(directory: Path) -> dict[str, Curve]:
    """Scalars of all event files under a directory: the last value of each step."""
    curves: dict[str, dict[int, float]] = {}
    for file in sorted(directory.rglob("events.out.tfevents.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    curves.setdefault(value.tag, {})[event.step] = float(make_ndarray(value.tensor))
    return {tag: dict(sorted(curve.items())) for tag, curve in curves.items()}


def stored_checkpoints(folder: Path) -> list[StoredCheckpoint]:
    """Everything that is or was to be a checkpoint, by step; what has no step comes last."""
    paths = sorted([*folder.glob(f"*{SUFFIX}"), *folder.glob(f".*{SUFFIX}.*")])
    return sorted(map(_stored, paths), key=lambda each: (each.step is None, each.step or 0))


def _stored(path: Path) -> StoredCheckpoint:
    files = _files(path) if path.is_dir() else [path]
    num_bytes = sum(file.stat().st_size for file in files)
    if path.name.endswith(".partial"):
        return StoredCheckpoint(path.name, None, "was being written or removed", num_bytes)
    if not is_complete(path):
        return StoredCheckpoint(path.name, None, "was not written to its end", num_bytes)
    try:
        tree = read_tree(path)
        if path.is_dir():
            ShardReader(path)  # looks whether all shards are there, in full
    except ValueError as error:
        return StoredCheckpoint(path.name, None, f"torn: {error}", num_bytes)
    data: dict[str, Any] = next((tree[name] for name in ("VideoDataModule", "PromptDataModule") if name in tree), {})
    step = int(tree.get("global_step", 0))
    return StoredCheckpoint(path.name, step, None, num_bytes, data.get("samples_consumed"))


def samples_of_step(run: RunState, step: int) -> list[tuple[int, str]]:
    """Ids and keys of the clips that an optimizer step (counted from 0) trained on, unreadable ones not replaced.

    Raises:
        ValueError: if they cannot be told from what is there.
    """
    clips, data = run.clips_per_step, run.config.get("data", {})
    if clips is None:
        raise ValueError("clips per step changed in this run, or no complete checkpoint tells them")
    positions = range(step * clips, (step + 1) * clips)
    if "train" not in data:
        return [(position, "") for position in positions]  # prompts are numbered by position
    locations = data["train"] if isinstance(data["train"], list) else [data["train"]]
    if data["reader"] == "streamed" or not all(map(is_local, locations)):
        raise ValueError("data.reader=streamed: its order follows from the shards of each rank; see its module's text")
    samples = [sample for location in locations for sample in load_index(location).samples]
    return [(sample, samples[sample].key) for sample in samples_at(positions, len(samples), data["seed"])]


def num_samples(run: RunState) -> int | None:
    """Of the training data, if their index can be read from here."""
    locations = run.config.get("data", {}).get("train")
    try:
        indices = [load_index(each) for each in (locations if isinstance(locations, list) else [locations])]
    except (OSError, ValueError, TypeError):
        return None
    return sum(len(index.samples) for index in indices)


def median_of_last(curve: Curve, number: int = 20) -> float:
    """The median of a curve's last values: one of them may be of a step that saved or drew samples."""
    return statistics.median(list(curve.values())[-number:])


def duration(seconds: float) -> str:
    """For people."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def continuation(run: RunState) -> str:
    """Where the same command would go on."""
    newest = run.newest
    if newest is None:
        return "no checkpoint is complete, so it begins at step 0"
    repeated = run.last_step - (newest.step or 0)
    again = f", and trains {repeated} steps again" if repeated > 0 else ""
    return f"it continues from {re.sub(r'^[.]|[.]replaced$', '', newest.name)}{again}"
