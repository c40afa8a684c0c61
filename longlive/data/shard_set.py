"""A shard set that is being written: by any number of processes at once or one after the other, each killed at any
moment.

A shard is written under a hidden name; when it is complete, the tar is renamed, then its part of the index becomes
visible (`.parts/`). Whoever comes later skips the shards whose part exists and whose tar is as long as the part says,
and writes the others again. A process holds a shard's lock while it writes it, so no two write the same one. Who finds
all parts there puts them together to `shards.json`, which comes last, and the parts go.

What was asked for is kept with the parts (`.parts/plan.json`), and then in the index: going on with other settings, or
another source, is an error and no mixture.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longlive.data.atomic import alone, write_aside
from longlive.data.shard_index import INDEX_NAME, ShardIndex, shard_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardSetWriter:
    """One process's view of the set.

    Attributes:
        directory: made if it does not exist.
        plan: what decides the content of the set, as JSON.
        num_shards: of the whole set.
    """

    directory: Path
    plan: Mapping[str, Any]
    num_shards: int

    def finished(self) -> ShardIndex | None:
        """The index, if the set is complete.

        Raises:
            ValueError: if it is one of another plan.
        """
        index = self.directory / INDEX_NAME
        if not index.exists():
            return None
        content = json.loads(index.read_text())
        self._check_plan(content.get("plan"), "holds finished shards")
        shutil.rmtree(self._parts, ignore_errors=True)
        return ShardIndex.from_json(content, str(index))

    def begin(self) -> None:
        """Say what is written here, or see that it is what others write.

        Raises:
            ValueError: if they write something else.
        """
        plan = self._parts / "plan.json"
        with alone(self._parts / "plan.lock"):
            if plan.exists():
                self._check_plan(json.loads(plan.read_text()), "holds an interrupted run")
            else:
                _write_json(plan, self.plan)

    def is_written(self, shard: int) -> bool:
        """Whether a shard is complete. A finished set has no parts any more, and all its shards."""
        part = self._read_part(shard)
        if part is None:
            return (self.directory / INDEX_NAME).exists()
        path = self.directory / shard_name(shard)
        ends = [member.offset + member.num_bytes for sample in part.samples for member in sample.members.values()]
        if path.exists() and path.stat().st_size >= max(ends, default=0):
            return True
        logger.warning("%s is missing or shorter than it was written; it is written again", path)
        return False

    def write(self, shard: int, make: Callable[[Path], ShardIndex], wait: bool = True) -> bool:
        """Write a shard, unless it is written.

        Args:
            shard: its number.
            make: writes the tar to a path, and returns its part of the index.
            wait: for a process that writes this very shard, and may die.

        Returns:
            Whether the shard is written: False only without `wait`, if another process is at it.
        """
        if self.is_written(shard):
            return True
        with alone(self._parts / f"{shard:06d}.lock", wait) as is_held:
            if is_held and not self.is_written(shard):
                with write_aside(self.directory / shard_name(shard)) as temporary:
                    part = make(temporary)
                _write_json(self._part(shard), part.to_json())
        return is_held

    def finish(
        self, check: Callable[[ShardIndex], None], latents: Mapping[str, Any] | None = None
    ) -> ShardIndex | None:
        """Put the parts together, if all are there.

        Args:
            check: raises for an index that is not to be.
            latents: what they are, in a set of latents.

        Returns:
            The index; None: other processes have to write their shards first.
        """
        with alone(self._parts / "finish.lock"):
            index = self.finished()
            if index is not None or self.num_written() < self.num_shards:
                return index
            parts = [part for shard in range(self.num_shards) if (part := self._read_part(shard)) is not None]
            index = ShardIndex(
                samples=tuple(sample for part in parts for sample in part.samples),
                skipped=tuple(clip for part in parts for clip in part.skipped),
                latents=latents,
            )
            check(index)
            _write_json(self.directory / INDEX_NAME, index.to_json() | {"plan": self.plan})
            shutil.rmtree(self._parts, ignore_errors=True)
        return index

    def num_written(self) -> int:
        """Complete shards so far, of all processes."""
        return sum(map(self.is_written, range(self.num_shards)))

    @property
    def _parts(self) -> Path:
        return self.directory / ".parts"

    def _part(self, shard: int) -> Path:
        return self._parts / f"{shard:06d}.json"

    def _read_part(self, shard: int) -> ShardIndex | None:
        part = self._part(shard)
        try:
            return ShardIndex.from_json(json.loads(part.read_text()), str(part))
        except FileNotFoundError:
            return None

    def _check_plan(self, found: Mapping[str, Any] | None, what: str) -> None:
        if found is None:
            raise ValueError(f"{self.directory} {what} that this writer did not make; choose another directory")
        different = [
            f"{name}: {found.get(name)} there, {value} now"
            for name, value in self.plan.items()
            if found.get(name) != value
        ]
        if different:
            raise ValueError(
                f"{self.directory} {what} of other settings or another source ({'; '.join(different)}); "
                "use the same ones to continue it, or choose another directory"
            )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with write_aside(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))
