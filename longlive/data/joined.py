"""Several video files read as one: the clips of a story, one after the other in time.

Files may differ in frame rate and size. Raw frames are counted through all of them; their time stamps continue where
the file before ends, and each file is cropped and scaled to the wanted size by itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import accumulate, groupby
from types import TracebackType

import numpy as np
import torch
from torch.nn.functional import interpolate

from longlive.data.video import open_video
from longlive.typing import Tensor, UInt8


class JoinedVideo:
    """Random access to the frames of one or more video files.

    Args:
        contents: of the files, in their order.
        decoder: as `open_video`'s.

    Raises:
        UnreadableVideoError: if one is no readable video.
    """

    def __init__(self, contents: Sequence[bytes], decoder: str = "pyav") -> None:
        self._stack = ExitStack()
        try:
            self.videos = [self._stack.enter_context(open_video(content, decoder)) for content in contents]
        except BaseException:
            self._stack.close()
            raise
        self._starts = list(accumulate((video.num_raw_frames for video in self.videos), initial=0))

    def __enter__(self) -> JoinedVideo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def num_raw_frames(self) -> int:
        """Of all files together."""
        return self._starts[-1]

    @property
    def last_fps(self) -> float:
        """Average rate of the last file: how long its last raw frame is shown."""
        return self.videos[-1].fps

    @property
    def timestamps(self) -> np.ndarray:
        """Seconds after the first raw frame, float64 `[num_raw_frames]`; a file's last one is shown for `1 / fps`."""
        pieces, start = [], 0.0
        for video in self.videos:
            pieces.append(start + video.index.timestamps)
            start = float(pieces[-1][-1]) + 1 / video.fps
        return np.concatenate(pieces)

    def read(self, indices: Sequence[int], height: int, width: int) -> UInt8[Tensor, "t 3 h w"]:
        """The raw frames at `indices`, in that order, cropped and scaled."""
        pieces = []
        for number, run in groupby(indices, key=lambda index: bisect_right(self._starts, index) - 1):
            video = self.videos[number]
            frames = video.read([index - self._starts[number] for index in run])
            pieces.append(centre_crop_and_resize(frames, height, width, video.index.pixel_aspect))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def centre_crop_and_resize(
    frames: UInt8[Tensor, "t 3 H W"], height: int, width: int, pixel_aspect: float = 1.0
) -> UInt8[Tensor, "t 3 h w"]:
    """Cut the largest centred window of the wanted aspect ratio, then scale it (antialiased bilinear).

    Args:
        frames: stored pixels.
        height, width: wanted size, of square pixels.
        pixel_aspect: width of a stored pixel over its height.
    """
    source_height, source_width = frames.shape[-2:]
    aspect = width / height / pixel_aspect
    crop_height = max(1, min(source_height, round(source_width / aspect)))
    crop_width = max(1, min(source_width, round(source_height * aspect)))
    top, left = (source_height - crop_height) // 2, (source_width - crop_width) // 2
    frames = frames[..., top : top + crop_height, left : left + crop_width]
    if (crop_height, crop_width) == (height, width):
        return frames.contiguous()
    return interpolate(frames, size=(height, width), mode="bilinear", antialias=True)
