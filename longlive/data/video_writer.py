"""Writing video files: H.264 in mp4, the same bytes for the same frames, complete or absent."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av

from longlive.data.atomic import write_aside
from longlive.typing import Tensor, UInt8

KEY_FRAME_INTERVAL = 24
"""Raw frames from one key frame to the next, at most. A rank that reads a window of a clip decodes from the key frame
before it: with x264's default of 250, the last rank of a sequence group decodes nearly everything."""


def write_mp4(
    target: str | Path | io.BufferedIOBase, frames: UInt8[Tensor, "t 3 H W"], fps: float | int, *, quality: int = 18
) -> None:
    """Write H.264 in mp4. The same frames give the same bytes; a path is complete or absent.

    Args:
        target: a path, or a binary file that can seek.
        frames: `[t 3 H W]`, RGB. Odd sizes are stored without chroma subsampling, which 4:2:0 cannot.
        fps: raw frames per second.
        quality: x264's constant rate factor, 0 (lossless) to 51; 18 is visually lossless.

    Raises:
        ValueError: if there is no frame, or fps or quality is out of range.
    """
    if len(frames) == 0:
        raise ValueError("frames is empty; a video needs at least one frame")
    if not fps > 0:
        raise ValueError(f"fps={fps} must be positive, e.g. 24")
    if not 0 <= quality <= 51:
        raise ValueError(f"quality={quality} is x264's constant rate factor; use 0 (lossless) to 51, e.g. 18")
    if isinstance(target, str | Path):
        with write_aside(target) as temporary, temporary.open("w+b") as file:
            _encode_mp4(file, frames, fps, quality)
    else:
        _encode_mp4(target, frames, fps, quality)


def _encode_mp4(file: io.BufferedIOBase, frames: UInt8[Tensor, "t 3 H W"], fps: float | int, quality: int) -> None:
    height, width = frames.shape[-2:]
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        # By default, x264's fastest routines give other bytes from time to time, even in one process.
        parameters = f"keyint={KEY_FRAME_INTERVAL}:cpu-independent=1"
        stream.options = {"crf": str(quality), "x264-params": parameters}
        stream.codec_context.thread_count = 1
        for pixels in frames.permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
