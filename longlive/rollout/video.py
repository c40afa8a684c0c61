"""From prompts to raw frames: the rollout engine and a codec's stream decoder, side by side.

Every finished chunk is decoded while the next one is still to come, so memory for pixels is the video and nothing
more. The three meanings of speed (`Timings`) are measured here, because only here are all three known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from longlive.codecs.base import StreamDecoder, VideoCodec
from longlive.rollout.engine import ChunkReport, RolloutEngine
from longlive.rollout.request import GivenFrames
from longlive.text.base import TextEncoder
from longlive.text.cache import unique_prompts
from longlive.typing import Float, Int, Latents, RawFrames, Tensor, Video

FirstRawFrames = Float[Tensor, "b first_t 3 H W"]
"""What videos begin with, RGB in [-1, 1]."""


def to_uint8(video: Video) -> RawFrames:
    """[-1, 1] to 0..255, rounded."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@torch.no_grad()
def encode_given(codec: VideoCodec, raw_frames: Video, device: torch.device) -> GivenFrames:
    """The latents of the first raw frames, float32. Each sample by itself, so that no batch rounds them otherwise."""
    # Latents are data: the precision of the network's products is not theirs.
    with torch.autocast(device.type, enabled=False):
        return torch.cat([codec.encode(one[None].to(device)).float() for one in raw_frames])


def decode_chunk(decoder: StreamDecoder, chunk: Latents) -> RawFrames:
    """The raw frames of the latents that come next, on the CPU."""
    # As in encoding. The network, which goes on between two chunks, keeps its precision.
    with torch.autocast(chunk.device.type, enabled=False):
        return to_uint8(decoder.push(chunk)).cpu()


@dataclass(frozen=True)
class Timings:
    """Seconds of one batch of videos.

    Attributes:
        loop: denoising and context passes alone.
        streaming: first noise to last decoded raw frame.
        raw_frames: made in that time, all videos together.
    """

    loop: float
    streaming: float
    raw_frames: int

    def to_json(self) -> dict[str, float]:
        """The seconds, and raw frames per second of each."""
        return asdict(self) | {
            "loop_raw_frames_per_second": self.raw_frames / self.loop,
            "streaming_raw_frames_per_second": self.raw_frames / self.streaming,
        }


def generate_videos(
    engine: RolloutEngine,
    codec: VideoCodec,
    text_encoder: TextEncoder,
    prompts: Sequence[Sequence[str]],
    latent_size: tuple[int, int],
    *,
    seed: int,
    sample_ids: Sequence[int],
    shot_index: Int[Tensor, "b chunk"] | None = None,
    negative_prompt: str = "",
    on_chunk: Callable[[ChunkReport], None] | None = None,
    first_raw_frames: FirstRawFrames | None = None,
) -> tuple[RawFrames, Timings]:
    """Generate one video per row of prompts.

    Args:
        prompts: one prompt per chunk of every video, all of one length.
        latent_size: height and width of the latents.
        seed, sample_ids: name the noise.
        shot_index: shot of every chunk; None: one shot.
        negative_prompt: of the unconditional branch, used with guidance only.
        on_chunk: progress.
        first_raw_frames: what every video begins with, in [-1, 1]; one is image to video. None: the network makes all.

    Returns:
        uint8 raw frames `[b t 3 H W]` on the CPU, and how long it took.

    Raises:
        ValueError: if there is no prompt, the rows differ in length, or the first raw frames are none that the codec
            takes or of another size than the videos.
    """
    if not prompts or not prompts[0]:
        raise ValueError("no prompt: give at least one")
    distinct, prompt_index = unique_prompts(prompts)
    embeds = text_encoder.encode(distinct).to(engine.device)
    negative = text_encoder.encode([negative_prompt]).to(engine.device) if engine.settings.guided else None
    if shot_index is None:
        shot_index = torch.zeros_like(prompt_index)
    given = None if first_raw_frames is None else encode_given(codec, first_raw_frames, engine.device)
    decoder = codec.stream_decoder()
    loop = 0.0

    def record(report: ChunkReport) -> None:
        nonlocal loop
        loop += report.seconds
        if on_chunk is not None:
            on_chunk(report)

    start = time.perf_counter()
    chunks = engine.rollout(
        embeds,
        prompt_index,
        shot_index,
        (codec.latent_channels, *latent_size),
        seed,
        sample_ids,
        negative,
        record,
        given,
    )
    video = torch.cat([decode_chunk(decoder, chunk) for chunk in chunks], dim=1)
    return video, Timings(loop, time.perf_counter() - start, video.shape[0] * video.shape[1])
