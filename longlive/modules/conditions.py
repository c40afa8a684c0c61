"""What a batch asks a distillation for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longlive.rollout.state import Past
from longlive.typing import Bool, Float, Int, Latents, PromptEmbeds, Tensor


@dataclass(frozen=True)
class Continued:
    """Where a clip goes on in a video.

    Attributes:
        past: the chunks before the clip that it may see.
        first_chunk: index in the video of the clip's first chunk.
        num_chunks: of the video.
        starts: RoPE position of the first frame of every chunk, the past ones first.
    """

    past: Past
    first_chunk: int
    num_chunks: int
    starts: Float[Tensor, "b chunk"]


@dataclass(frozen=True)
class Conditions:
    """What a batch asks for, on the module's device.

    Attributes:
        prompt_embeds, prompt_index: the distinct prompts, and which of them every chunk follows.
        shot_index: shot of every chunk.
        sample_ids: name the draws.
        latent_shape: (channels, height, width).
        given: first frames of the videos; None: none are given.
        counts: which samples carry loss: those that all ranks of the sequence group read alike.
        continued: of a clip that does not begin its videos: then prompts and shots are also those of the past chunks,
            which come first. None: the videos begin here.
    """

    prompt_embeds: PromptEmbeds
    prompt_index: Int[Tensor, "b chunk"]
    shot_index: Int[Tensor, "b chunk"]
    sample_ids: tuple[int, ...]
    latent_shape: tuple[int, int, int]
    given: Latents | None
    counts: Bool[Tensor, " b"]
    continued: Continued | None = None

    @property
    def num_past(self) -> int:
        """Past chunks."""
        return 0 if self.continued is None else self.continued.past.num_chunks

    @property
    def num_given(self) -> int:
        """Given frames."""
        return 0 if self.given is None else self.given.shape[1]

    @property
    def starts(self) -> Float[Tensor, "b chunk"] | None:
        """RoPE positions of the chunks' first frames; None: those of videos that begin here."""
        return None if self.continued is None else self.continued.starts

    def with_past(self, clip: Float[Tensor, "b new c h w"]) -> Latents:
        """A clip's frames, and before them the past ones."""
        return clip if self.continued is None else torch.cat([self.continued.past.latents.to(clip), clip], dim=1)

    def video_position(self, place: Float[Tensor, " f"]) -> Float[Tensor, " f"]:
        """Where in the whole videos frames are, in [0, 1).

        Args:
            place: where among these chunks, past ones included; 1.5 is the middle of the second.
        """
        if self.continued is None:
            return place / self.shot_index.shape[1]
        return (place - self.num_past + self.continued.first_chunk) / self.continued.num_chunks
