"""Video codecs: three known frames are written and read back, and compared."""

import contextlib
import io
import math
import os
import sys
from collections.abc import Iterator

import numpy as np

from longlive.doctor.check import UnavailableError, reason

ENCODERS = {
    "h264": ("libx264", "h264_nvenc", "libopenh264"),
    "hevc": ("libx265", "hevc_nvenc"),
    "vp9": ("libvpx-vp9",),
    "av1": ("libsvtav1", "libaom-av1", "av1_nvenc"),
}
"""Video codecs that longlive reads, and the encoders that can write them, best first."""

MIN_PSNR = 25.0
"""Decibels under which a round trip has lost the picture."""


def probe_encode(codec: str) -> str:
    content, encoder = encode_video(codec)
    return f"{encoder} in mp4, {len(content)} bytes for 3 frames"


def probe_decode(codec: str) -> str:
    import av

    try:
        content, _ = encode_video(codec)
    except Exception as error:
        raise UnavailableError("not tried: nothing here could encode a file for it") from error
    with av.open(io.BytesIO(content), "r") as container:
        decoder = container.streams.video[0].codec_context.codec.name
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return f"{decoder}, 3 frames, {_psnr(frames):.0f} dB"


def probe_decord() -> str:
    import decord

    content, _ = encode_video("h264")
    frames = decord.VideoReader(io.BytesIO(content), num_threads=1).get_batch([0, 1, 2]).asnumpy()
    return f"h264 from memory, 3 frames, {_psnr(frames):.0f} dB"


def encode_video(codec: str) -> tuple[bytes, str]:
    """Three known frames as an mp4 in memory, and the encoder that wrote it.

    Raises:
        UnavailableError: if every encoder of the codec fails; the reasons by name.
    """
    import av

    reasons = []
    for encoder in ENCODERS[codec]:
        try:
            buffer = io.BytesIO()
            with _silenced_native_stderr(), av.open(buffer, "w", format="mp4") as container:
                # Its statistics come later, when the encoder is freed.
                options = {"x265-params": "log-level=none"} if encoder == "libx265" else {}
                stream = container.add_stream(encoder, rate=24, options=options)
                assert isinstance(stream, av.VideoStream)
                stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
                for pixels in _test_frames():
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                container.mux(stream.encode(None))
            return buffer.getvalue(), encoder
        except Exception as error:
            reasons.append(f"{encoder}: {reason(error)}")
    raise UnavailableError("; ".join(reasons))


def _test_frames() -> np.ndarray:
    """Three frames of 64 x 64: a smooth ramp that moves."""
    y, x = np.mgrid[:64, :64]
    frames = [np.stack((2 * x + 20 * i, 2 * y + 20 * i, x + y + 20 * i), axis=-1) for i in range(3)]
    return np.stack(frames).astype(np.uint8)


def _psnr(frames: np.ndarray) -> float:
    expected = _test_frames()
    if frames.shape != expected.shape:
        raise UnavailableError(f"frames came back as {frames.shape} instead of {expected.shape}")
    error = float(np.mean((frames.astype(np.float64) - expected) ** 2))
    psnr = 20 * math.log10(255) - 10 * math.log10(error) if error else math.inf
    if psnr < MIN_PSNR:
        raise UnavailableError(f"frames came back wrong, at {psnr:.0f} dB")
    return psnr


@contextlib.contextmanager
def _silenced_native_stderr() -> Iterator[None]:
    """Encoders write their banners straight to file descriptor 2."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
