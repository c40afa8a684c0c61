"""Latents of the numbered clips, and what must equal them: the same clips as online training would encode them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from longlive.codecs.base import VideoCodec, to_unit_range
from longlive.codecs.dct import DCTCodec
from longlive.data.latent_shards import LatentShards, VideoShards
from longlive.data.latents import LatentSettings
from longlive.data.sample import ClipSpec, VideoSample
from longlive.encode_shards import OnlineEncoder
from longlive.text.base import TextEncoder, without_padding
from longlive.text.toy import ToyTextEncoder
from longlive.typing import Tensor

SEED = 5


class SilentTextEncoder(ToyTextEncoder):
    """One that cannot be asked."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        raise AssertionError(f"the embeddings of {list(prompts)} were to come from the shards")


class Encoder(OnlineEncoder):
    """On the CPU; calls `before` before every clip."""

    def __init__(
        self,
        codec: VideoCodec | None = None,
        text_encoder: TextEncoder | None = None,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(codec or DCTCodec(), text_encoder or ToyTextEncoder(), torch.device("cpu"), torch.float32)
        self.before = before

    def latents(self, pieces: Iterable[Tensor]) -> Tensor:
        self.before()
        return super().latents(pieces)


def settings_of(spec: ClipSpec, encoder: OnlineEncoder, **changes: Any) -> LatentSettings:
    fields = {
        "seed": SEED,
        "num_epochs": 1,
        "dtype": "float32",
        "codec": encoder.codec.fingerprint,
        "text_encoder": encoder.text_encoder.fingerprint,
        "device": "cpu",
        "versions": {"torch": torch.__version__},
    }
    return LatentSettings.of(spec, **fields | changes)


def latent_shards(
    videos: Path | Sequence[Path], directory: Path, spec: ClipSpec, encoder: OnlineEncoder, **changes: Any
) -> LatentShards:
    """A set to be written."""
    return LatentShards(VideoShards(videos).open(spec, SEED), directory, settings_of(spec, encoder, **changes))


def online(sample: VideoSample, encoder: OnlineEncoder) -> VideoSample:
    """What a training makes of a sample of a video shard."""
    with torch.no_grad():
        latents = encoder.codec.encode(to_unit_range(sample.raw_frames[None]))[0]
    prompts = [*sample.prompts, ""]
    embeds = map(without_padding, encoder.text_encoder.encode(prompts))
    return VideoSample(
        latents=latents,
        prompts=sample.prompts,
        prompt_embeds=dict(zip(prompts, embeds, strict=True)),
        shot_index=sample.shot_index,
        num_valid_frames=sample.num_valid_frames,
        sample_id=sample.sample_id,
    )


def kill_at(call: int) -> Callable[[], None]:
    """A function that kills its process (-9) when it is called for the time number `call`, counted from 1."""
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)

    return count
