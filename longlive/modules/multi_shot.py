"""Stage 1 on clips of several shots, each with its own caption: rollout can then cut between scenes and come back to
the same subject.

How a network learns of a cut (LongLive-2.0, arXiv 2605.18739):

- *prompt*: every chunk has the caption of its shot; the first one of a later shot begins with the scene-cut phrase.
  `data.shots` writes both, for training and for rollout.
- *time*: the RoPE positions of shot k are shifted by k phi frames, a gap that is heard wherever two shots meet.
- *attention*, optional: under a window, the first chunks of the video and of the current shot stay visible
  (`models.visibility`), as in a rollout with these sinks.

A chunk never straddles a cut, so all of this is constant in a chunk, and teacher forcing needs nothing new. What is
added here are a rollout that agrees with the training, and losses by shot: a mean hides a network that is lost after
the first cut, or in the first chunk after every cut.
"""

from __future__ import annotations

from typing import Any

import torch

from longlive.data.batch import VideoBatch
from longlive.models.visibility import Role
from longlive.modules.teacher_forcing import TeacherForcingModule
from longlive.rollout.settings import RolloutSettings
from longlive.typing import Int, Tensor


class MultiShotModule(TeacherForcingModule):
    """Teacher forcing that knows of shots.

    Args:
        chunk_frames: frames denoised together.
        shot_rope_offset: phi, frames by which a cut moves the RoPE position.
        window, sink_frames, shot_sink: see `TeacherForcingModule`.
        rollout: None: with the attention and the offset of training.
        **settings: see `TeacherForcingModule`.

    Raises:
        ValueError: if the rollout has another offset at a cut.
    """

    def __init__(
        self,
        *,
        chunk_frames: int,
        shot_rope_offset: float = 8.0,
        window: int | None = None,
        sink_frames: int = 0,
        shot_sink: bool = False,
        rollout: RolloutSettings | None = None,
        **settings: Any,
    ) -> None:
        if rollout is None:
            rollout = RolloutSettings(
                chunk_frames=chunk_frames,
                window=window,
                sink_frames=sink_frames,
                shot_sink=shot_sink,
                shot_rope_offset=shot_rope_offset,
            )
        if rollout.shot_rope_offset != shot_rope_offset:
            raise ValueError(
                f"rollout.shot_rope_offset={rollout.shot_rope_offset} differs from shot_rope_offset="
                f"{shot_rope_offset}; a rollout cuts as training did"
            )
        super().__init__(
            chunk_frames=chunk_frames,
            shot_rope_offset=shot_rope_offset,
            window=window,
            sink_frames=sink_frames,
            shot_sink=shot_sink,
            rollout=rollout,
            **settings,
        )

    def training_step(self, batch: VideoBatch, batch_index: int) -> dict[str, Tensor]:
        """`TeacherForcingModule`'s, and of every target frame here its shot and its chunk in that shot, counted from 0,
        `[b f]`."""
        result = super().training_step(batch, batch_index)
        chunks = torch.tensor(self.chunks(batch, Role.NOISY), dtype=torch.int64)
        tables = {"shot": batch.shot_index, "chunk_of_shot": chunk_of_shot(batch.shot_index)}
        for name, table in tables.items():
            result[name] = table[:, chunks].repeat_interleave(self.chunk_frames, dim=1).to(result["loss"].device)
        return result


def chunk_of_shot(shot_index: Int[Tensor, "b chunk"]) -> Int[Tensor, "b chunk"]:
    """The number of every chunk in its shot, from 0."""
    chunk = torch.arange(shot_index.shape[1]).expand_as(shot_index)
    is_first = torch.ones_like(shot_index, dtype=torch.bool)
    is_first[:, 1:] = shot_index[:, 1:] != shot_index[:, :-1]
    return chunk - (chunk * is_first).cummax(dim=1).values
