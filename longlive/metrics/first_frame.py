"""Image to video: how much of the given image is left in a video's first frame."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from longlive.codecs.base import VideoCodec, to_unit_range
from longlive.data.video import open_video
from longlive.modules.base import codec_device
from longlive.rollout.video import encode_given, to_uint8
from longlive.typing import Tensor, UInt8


def compare_first_frames(
    codec: VideoCodec, files: Sequence[Path], first_frames: Mapping[int, UInt8[Tensor, "1 3 H W"]]
) -> dict[str, float]:
    """How near the videos' first frames, as written, are to the images, and how near the codec alone comes to them:
    mean PSNR in dB."""
    ours, codecs = [], []
    for index, image in first_frames.items():
        with open_video(files[index]) as reader:
            ours.append(psnr(reader.read([0]), image))
        latents = encode_given(codec, to_unit_range(image[None]), codec_device(codec))
        codecs.append(psnr(to_uint8(codec.decode(latents))[0].cpu(), image))
    return {"psnr": round(sum(ours) / len(ours), 3), "codec_psnr": round(sum(codecs) / len(codecs), 3)}


def psnr(pixels: UInt8[Tensor, "1 3 H W"], other: UInt8[Tensor, "1 3 H W"]) -> float:
    """Peak signal-to-noise ratio in dB; 99 for equal pictures."""
    error = float((pixels.double() - other.double()).square().mean())
    return min(99.0, 10 * math.log10(255**2 / error)) if error else 99.0
