"""Streaming long tuning: distillation on videos that are longer than memory allows (LongLive 1.0, arXiv 2509.22622).

A *stream* is one rollout of the student that goes on from step to step. A step makes the next `clip_frames` from the
cache that the step before has left, and learns from these frames alone. After `max_frames` the stream is over, and the
next step begins one of other prompts. So the student learns from its own long videos, under the window and sinks that
it will have in generation, in the memory of one clip: of what came before, a stream keeps what window and sinks show,
detached. What is settled here:

**Prompts.** A stream follows the prompts that it began with to its end: a batch holds the prompts of `max_frames`, and
the data brings it for as many steps as a stream has clips (`clip_frames`, `data.position`). So the place in the data
is a function of the step, and no prompt is passed over; other samples in the middle of a stream are an error.

**Who learns.** There is one stream, and a step has one clip of it. The critic learns from every clip; in its turn the
student learns first, and the critic then from the same clip. (The source too has one sequence, which moves on with
every update.) The student's turns must come to every place of a stream, so `student_every` and the number of clips may
have no common divisor.

**Scores.** Teacher and critic score a clip as a video that begins with it: they ask whether it is a good clip, whatever
came before, as the source's teacher does, which is not autoregressive. So a stream that has drifted is pulled back.
With `score_past` they ask whether it is a good continuation, also of a past that has drifted: they score the clip's
noisy chunks given its clean ones and the past chunks that its first chunk sees in the rollout, at the positions of the
rollout. Past chunks are clean history and no targets. What they saw themselves is gone, so they see each other, as the
first chunks of a clip do in stage 1. (No later chunk of the clip sees an earlier one than these: `rollout.sinks`,
fact 1.) Each role makes keys and values of the past from the latents. The student's own stay as they were written,
partly by earlier weights, as in the source.

**Prompt switches.** With `prompt_switch=recache` and `score_past`, past chunks are scored under the prompts that they
are cached under when the clip begins. Inside a clip every chunk keeps its own, because a score has one clean copy of
each; so scores see just what the student sees where switches fall on the borders of clips.

**Checkpoints** hold the stream, sample by sample: it cannot be made again, since the weights that made it are gone. A
resumed run may have another number of data ranks, if the steps have the same samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy

from longlive.models.visibility import visible_history
from longlive.modules.conditions import Conditions, Continued
from longlive.parallel.checkpoint_directory import TreePath, map_tensors
from longlive.parallel.rows import of_all_ranks, over_ranks
from longlive.parallel.strategy import ShardedStrategy
from longlive.rollout.settings import RolloutSettings
from longlive.rollout.sinks import absolute_position, relative_positions
from longlive.rollout.state import Past, RolloutState
from longlive.rollout.student import Clip, StudentRollout
from longlive.rollout.switches import cached_prompts
from longlive.typing import Tensor

PURPOSE = "stream"
"""Names a stream's noise and exits, with the step at which it began."""

StartRollout = Callable[[int], RolloutState]
"""From the step that names its draws, a rollout that has made nothing yet."""


@dataclass(frozen=True)
class StreamingSettings:
    """How long streams are.

    Attributes:
        max_frames: of a stream, and of the videos that batches ask for.
        clip_frames: of a step.
        score_past: whether teacher and critic see the past of a clip that they score.

    Raises:
        ValueError: if a stream is not made of clips, or of one alone.
    """

    max_frames: int
    clip_frames: int
    score_past: bool = False

    def __post_init__(self) -> None:
        if self.clip_frames < 1 or self.max_frames % self.clip_frames or self.num_clips < 2:
            raise ValueError(
                f"max_frames={self.max_frames} is no multiple of clip_frames={self.clip_frames}, at least 2 times as "
                "long: a stream is made of several clips. Without streams, use streaming=null"
            )

    @property
    def num_clips(self) -> int:
        """Of a stream."""
        return self.max_frames // self.clip_frames

    def check(self, rollout: RolloutSettings, student_every: int) -> None:
        """Raise the `ValueError` for a module's other settings that streams do not go with."""
        if self.clip_frames % rollout.chunk_frames:
            raise ValueError(
                f"clip_frames={self.clip_frames} is no multiple of chunk_frames={rollout.chunk_frames}: clips are made "
                "of whole chunks"
            )
        if rollout.window is None:
            raise ValueError(
                f"streams of max_frames={self.max_frames} need a window: without, a chunk sees all that came before, "
                "and memory grows with the stream; set rollout.window (and sink_frames)"
            )
        common = gcd(student_every, self.num_clips)
        if common > 1:
            raise ValueError(
                f"student_every={student_every} and the {self.num_clips} clips of a stream have the common divisor "
                f"{common}: the student would learn at one in {common} places of a stream alone; change max_frames or "
                "student_every"
            )

    def check_data(self, num_frames: int, clip_frames: int | None) -> None:
        """Raise the `ValueError` for videos that are not as long as streams, or do not come for each of their clips."""
        if (num_frames, clip_frames) != (self.max_frames, self.clip_frames):
            raise ValueError(
                f"data.num_frames={num_frames} and data.clip_frames={clip_frames}, but streams have max_frames="
                f"{self.max_frames} and clip_frames={self.clip_frames}; set data.num_frames={self.max_frames} "
                f"data.clip_frames={self.clip_frames}"
            )


class Stream:
    """The rollout that goes on.

    Args:
        settings: how long.
        rollout: of the student.

    Attributes:
        state: between two clips; None: the next one begins a stream.
    """

    def __init__(self, settings: StreamingSettings, rollout: RolloutSettings) -> None:
        self.settings = settings
        self.rollout = rollout
        self.state: RolloutState | None = None
        self._stored: Mapping[str, Any] | None = None

    def check_strategy(self, strategy: Strategy, world_size: int) -> None:
        """Raise the `ValueError` for ranks that cannot score a clip, or whose checkpoints lack some of the streams."""
        if isinstance(strategy, ShardedStrategy):
            if strategy.sequence.size > 1:
                raise ValueError(
                    f"sequence_parallel_size={strategy.sequence.size}: a clip of a stream is scored on one rank, with "
                    "the past that it sees; use strategy=fsdp, or module.streaming=null"
                )
        elif world_size > 1:
            raise ValueError(
                f"streams on {world_size} devices need strategy=fsdp: the checkpoints of "
                f"{type(strategy).__name__} would hold those of one device"
            )

    def next_clip(self, videos: Conditions, step: int, start: StartRollout) -> Conditions:
        """What the next clip is asked for, and with which past.

        Args:
            videos: of the batch, whole.
            step: of training.
            start: begins a stream.

        Raises:
            ValueError: if the videos are not as long as a stream, or are others than those of the stream that goes on.
        """
        num_frames = videos.shot_index.shape[1] * self.rollout.chunk_frames
        if num_frames != self.settings.max_frames:
            raise ValueError(
                f"a batch asks for videos of {num_frames} frames, and streams have max_frames="
                f"{self.settings.max_frames}; set data.num_frames={self.settings.max_frames}"
            )
        if self._stored is not None:
            stored, self._stored = self._stored, None
            self.state = self._restored(stored, videos, start)
        if self.state is None:
            self.state = start(step)
        if self.state.sample_ids != videos.sample_ids:
            frame, num_clips = self.state.next_chunk * self.rollout.chunk_frames, self.settings.num_clips
            raise ValueError(
                f"the stream of the samples {list(self.state.sample_ids)} is at frame {frame} of "
                f"{self.settings.max_frames}, and the batch holds the samples {list(videos.sample_ids)}; a batch has "
                f"to come for {num_clips} steps in a row: data.clip_frames={self.settings.clip_frames}"
            )
        return self._clip_of(videos, self.state)

    def roll_out(self, rollout: StudentRollout, clip: Conditions) -> Clip:
        """Make the clip that `next_clip` has announced."""
        assert self.state is not None
        assert clip.continued is not None
        prompts, shots = (x[:, clip.num_past :] for x in (clip.prompt_index, clip.shot_index))
        final = self.state.next_chunk + shots.shape[1] == clip.continued.num_chunks
        made = rollout.clip(self.state, clip.prompt_embeds, prompts, shots, clip.given, final)
        if final:
            self.state = None
        return made

    def _clip_of(self, videos: Conditions, state: RolloutState) -> Conditions:
        chunk_frames, offset = self.rollout.chunk_frames, self.rollout.shot_rope_offset
        first = state.next_chunk
        clip = range(first, first + self.settings.clip_frames // chunk_frames)
        shots: list[list[int]] = videos.shot_index.tolist()
        past = state.past.of([visible_history(first, row, self.rollout.rule) for row in shots])
        if not self.settings.score_past:
            past = Past.empty(len(shots), state.latent_shape, past.latents.device)
        rows = [(*seen, *clip) for seen in past.chunks]
        starts = [
            relative_positions(row, of, chunk_frames, offset)
            if self.rollout.relative_rope or not self.settings.score_past
            else [absolute_position(chunk, of, chunk_frames, offset) for chunk in row]
            for row, of in zip(rows, shots, strict=True)
        ]
        return replace(
            videos,
            prompt_index=_picked(self._prompts_at(first, videos), rows).to(videos.prompt_index.device),
            shot_index=_picked(shots, rows),
            given=videos.given if first == 0 else None,
            continued=Continued(past, first, len(shots[0]), torch.tensor(starts, dtype=torch.float64)),
        )

    def _prompts_at(self, first: int, videos: Conditions) -> list[list[int]]:
        """The prompt of every chunk, of those before `first` the one that the cache has them under when it begins."""
        prompts: list[list[int]] = videos.prompt_index.tolist()
        if self.rollout.prompt_switch == "keep":
            return prompts
        return [
            [*cached_prompts(first, row, shots), *row[first:]]
            for row, shots in zip(prompts, videos.shot_index.tolist(), strict=True)
        ]

    def state_dict(self, like: Tensor) -> dict[str, Any] | None:
        """The stream that goes on, for `load_state_dict`; None: there is none.

        Args:
            like: a parameter of the network: tensors are sharded as it is (`parallel.rows`).
        """
        if self._stored is not None:
            return dict(self._stored)
        if self.state is None:
            return None
        cache, past = self.state.cache, self.state.past
        rows = {
            "sample_ids": torch.tensor(self.state.sample_ids),
            "tables": torch.tensor([[-1 if chunk is None else chunk for chunk in table] for table in cache.tables]),
            "chunks": torch.tensor(past.chunks),
            "latents": past.latents,
            "layers": [layer.tensors() for layer in cache.layers],
        }
        return {
            "next_chunk": self.state.next_chunk,
            "step": self.state.step,
            "rows": map_tensors(lambda path, tensor: over_ranks(tensor, like), rows),
        }

    def load_state_dict(self, stored: Mapping[str, Any] | None) -> None:
        """Go on with a stream. It is put in place when the next batch says which samples this rank has."""
        self.state, self._stored = None, stored

    def _restored(self, stored: Mapping[str, Any], videos: Conditions, start: StartRollout) -> RolloutState:
        """The stream of this rank's samples.

        Raises:
            ValueError: if it has none of one of them, or is of other settings.
        """
        state = start(int(stored["step"]))
        rows, next_chunk = dict(stored["rows"]), int(stored["next_chunk"])
        sample_ids = of_all_ranks(rows.pop("sample_ids")).tolist()
        mine = [sample_ids.index(sample) for sample in videos.sample_ids if sample in sample_ids]

        def of_this_rank(path: TreePath, tensor: Tensor) -> Tensor:
            whole = of_all_ranks(tensor)
            return whole[torch.tensor(mine, dtype=torch.int64, device=whole.device)]

        # Tensor by tensor: whole, they are the caches of all ranks. Everybody takes part before anybody raises.
        rows = map_tensors(of_this_rank, rows)
        if missing := set(videos.sample_ids) - set(sample_ids):
            raise ValueError(
                f"the checkpoint is in the middle of a stream of the samples {sample_ids}, and the next batch holds "
                f"{sorted(missing)}; continue with as many samples per step and the same data, or from a checkpoint "
                "between two streams"
            )
        slots = len(state.cache.tables[0])
        if next_chunk * self.rollout.chunk_frames % self.settings.clip_frames or rows["tables"].shape[1] != slots:
            raise ValueError(
                f"the checkpoint is in the middle of a stream, at chunk {next_chunk} with a window of "
                f"{rows['tables'].shape[1]} chunks; here clips have {self.settings.clip_frames} frames, and the window "
                f"{slots} chunks. Continue with the settings of that run, or from a checkpoint between two streams"
            )
        for layer, tensors in zip(state.cache.layers, rows["layers"], strict=True):
            layer.load(tensors)
        tables: list[list[int]] = rows["tables"].tolist()
        state.cache.tables = [tuple(None if chunk < 0 else chunk for chunk in table) for table in tables]
        state.past = Past(tuple(map(tuple, rows["chunks"].tolist())), rows["latents"].to(state.past.latents))
        state.prompts, state.shot_index = videos.prompt_index.tolist(), videos.shot_index.tolist()
        state.next_chunk = next_chunk
        return state


def _picked(values: Sequence[Sequence[int]], chunks: Sequence[Sequence[int]]) -> Tensor:
    """Of every sample's values, those of its chunks; int64 `[b chunk]`."""
    return torch.tensor([[row[chunk] for chunk in wanted] for row, wanted in zip(values, chunks, strict=True)])
