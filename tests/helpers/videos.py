"""Videos whose every frame says which one it is: eight vertical bars, dark or bright, spell its number in binary."""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

NUM_BARS = 8
DARK, BRIGHT = 40, 210


def numbered_frames(num_frames: int, height: int = 48, width: int = 80) -> Tensor:
    """uint8 `[t 3 H W]`; frame t spells t."""
    columns = torch.arange(width) * NUM_BARS // width
    bits = (torch.arange(num_frames)[:, None] >> columns) & 1
    brightness = torch.where(bits.bool(), BRIGHT, DARK).to(torch.uint8)
    return brightness[:, None, None, :].expand(num_frames, 3, height, width).contiguous()


def numbers(frames: Tensor) -> list[int]:
    """What frames `[t 3 H W]` spell."""
    width = frames.shape[-1]
    centres = [(2 * bar + 1) * width // (2 * NUM_BARS) for bar in range(NUM_BARS)]
    row = frames[:, :, frames.shape[-2] // 2].float().mean(1)[:, centres]
    bits = (row > (DARK + BRIGHT) / 2).long()
    return (bits << torch.arange(NUM_BARS)).sum(1).tolist()


def encode(
    frames: Tensor,
    codec: str = "libx264",
    container: str = "mp4",
    *,
    fps: float = 24,
    options: dict[str, str] | None = None,
    pixel_format: str = "yuv420p",
    rotation: int = 0,
    times: Sequence[float] | None = None,
    movflags: str = "",
    folder: Path | None = None,
) -> bytes:
    """A video file.

    `rotation` is stored as metadata; `times` (seconds) makes the frame rate variable; `movflags` such as "faststart"
    make ffmpeg read its own output again, for which it needs a `folder`.
    """
    file = io.BytesIO() if folder is None else str(folder / f"encoded.{container}")
    container_options = {"movflags": movflags} if movflags else {}
    with av.open(file, "w", format=container, options=container_options) as output:
        stream = output.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[-2:]
        stream.pix_fmt = pixel_format
        stream.options = {"libx265": {"x265-params": "log-level=none"}}.get(codec, {}) | (options or {})
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, pixels in enumerate(frames.permute(0, 2, 3, 1).contiguous().numpy()):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
