"""What a batch asks a distillation for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longlive.codecs.base import VideoCodec, num_raw_frames, to_unit_range
from longlive.data.batch import VideoBatch
from longlive.data.prompt_batches import PromptBatch
from longlive.modules.base import LongLiveModule
from longlive.parallel.collectives import gather_parts
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


def latent_shape(codec: VideoCodec, batch: VideoBatch | PromptBatch) -> tuple[int, int, int]:
    """(channels, height, width) of a batch's videos; nothing is encoded for it.

    Raises:
        ValueError: for a size in pixels that the codec does not divide.
    """
    if isinstance(batch, PromptBatch):
        height, width = batch.height, batch.width
    elif batch.raw_frames is not None:
        height, width = batch.raw_frames.shape[-2:]
    else:
        assert batch.latents is not None
        return batch.latents.shape[2], batch.latents.shape[3], batch.latents.shape[4]
    codec.check_size(height, width)
    return codec.latent_channels, height // codec.spatial_ratio, width // codec.spatial_ratio


@torch.no_grad()
def given_frames(module: LongLiveModule, batch: VideoBatch, num_given: int) -> Latents | None:
    """The first frames of a batch's clips, float32, on every rank of the sequence group; of none, None.

    Of raw frames no later ones are encoded: a codec is causal. The first rank has them, whatever the layout.

    Raises:
        ValueError: if the batch does not hold the frames of its clips that are this rank's.
    """
    if batch.latents is not None:
        given = module.encode(batch)[:, :num_given]
    else:
        assert batch.raw_frames is not None
        codec, raw_frames, num_chunks = module.codec, batch.raw_frames, batch.shot_index.shape[1]
        window = module.clip_window(num_chunks * module.chunk_frames)
        last = num_raw_frames(num_chunks * module.chunk_frames, codec.temporal_ratio)
        expected = last if window is None else window.stop - window.start
        if raw_frames.shape[1] != expected:
            raise ValueError(
                f"the batch holds {raw_frames.shape[1]} raw frames; its {num_chunks} chunks of {module.chunk_frames} "
                f"frames are of {expected}{'' if window is None else ' on this rank'}"
            )
        shape = latent_shape(codec, batch)
        given = torch.zeros(batch.batch_size, num_given, *shape, device=raw_frames.device)
        if num_given and module.sequence.rank == 0:
            first = raw_frames[:, : num_raw_frames(num_given, codec.temporal_ratio)]
            with torch.autocast(raw_frames.device.type, enabled=False):
                given = codec.encode(to_unit_range(first)).float()
    if not num_given:
        return None
    group = module.sequence.group
    return given if group is None else gather_parts(given, group)[0]
