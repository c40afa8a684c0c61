"""One training batch: what the readers produce and the modules consume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from longlive import rng
from longlive.typing import Float, Int, Latents, RawFrames, Tensor


@dataclass(frozen=True)
class BatchSpec:
    """Sizes of a batch, enough to fake one, in latent units."""

    batch_size: int
    num_frames: int
    chunk_frames: int
    channels: int
    height: int
    width: int
    prompt: str = "a red circle moves right over a dark ground"

    @property
    def num_chunks(self) -> int:
        if self.num_frames % self.chunk_frames:
            raise ValueError(
                f"num_frames={self.num_frames} is no multiple of chunk_frames={self.chunk_frames}; use "
                f"{self.num_frames // self.chunk_frames * self.chunk_frames or self.chunk_frames}"
            )
        return self.num_frames // self.chunk_frames


@dataclass(frozen=True)
class VideoBatch:
    """A batch of clips: exactly one of `latents` and `raw_frames` is given.

    Under sequence parallelism, the ranks of a group hold parts of the same clips. Prompts, shots and padding are small
    and always those of the whole clip; latents or raw frames are this rank's part, from `frame_offset` on.

    Attributes:
        latents: pre-encoded `[b f c h w]`, the frames that this rank owns.
        prompt_embeds: of pre-encoded prompts, by text: `[token d]`, without padding. Others are encoded when they are
            needed.
        raw_frames: uint8 `[b t 3 H W]`, what this rank needs to encode the frames that it owns.
        prompts: `prompts[sample][chunk]`, of the whole clip.
        shot_index: shot of every chunk of the whole clip, `[b chunk]`, counted from 0 in each sample.
        num_valid_frames: frames of the whole clip before padding, `[b]`; later frames carry no loss.
        sample_ids: global ids, int64 `[b]`: they name the random draws of a sample. Ranks of one sequence group hold
            the same; where they do not, some of them could not read a sample and took the next one.
        frame_offset: the first frame of the clip that this rank owns.
    """

    prompts: tuple[tuple[str, ...], ...]
    shot_index: Int[Tensor, "b chunk"]
    num_valid_frames: Int[Tensor, " b"]
    sample_ids: Int[Tensor, " b"]
    latents: Latents | None = None
    raw_frames: RawFrames | None = None
    frame_offset: int = 0
    prompt_embeds: Mapping[str, Float[Tensor, "token d"]] | None = None

    def __post_init__(self) -> None:
        if (self.latents is None) == (self.raw_frames is None):
            raise ValueError("a VideoBatch holds either latents or raw_frames, exactly one of them")

    @property
    def batch_size(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> VideoBatch:
        """The same batch with its pixels or latents on a device. Integer tables stay on the CPU, to be read there."""
        media = {
            name: value.to(device, non_blocking=non_blocking)
            for name in ("latents", "raw_frames")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **media)

    def pin_memory(self) -> VideoBatch:
        """Called by the DataLoader."""
        media = {
            name: value.pin_memory() for name in ("latents", "raw_frames") if (value := getattr(self, name)) is not None
        }
        return replace(self, **media)

    @classmethod
    def fake(cls, spec: BatchSpec, seed: int = 0) -> VideoBatch:
        """Random latents with one prompt and one shot: smoke runs need no data."""
        shape = (spec.batch_size, spec.num_frames, spec.channels, spec.height, spec.width)
        return cls(
            latents=rng.normal(shape, seed, "fake_batch"),
            prompts=((spec.prompt,) * spec.num_chunks,) * spec.batch_size,
            shot_index=torch.zeros(spec.batch_size, spec.num_chunks, dtype=torch.int64),
            num_valid_frames=torch.full((spec.batch_size,), spec.num_frames, dtype=torch.int64),
            sample_ids=torch.arange(spec.batch_size, dtype=torch.int64),
        )
