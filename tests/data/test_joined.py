"""Several files as one video: literal frame numbers and times, and measured pixels for space."""

import numpy as np
import pytest
import torch

from helpers.videos import encode, numbered_frames, numbers
from longlive.data.joined import JoinedVideo, centre_crop_and_resize
from longlive.data.video import UnreadableVideoError, open_video

FRAMES = numbered_frames(30)
FILES = [
    encode(FRAMES[:6]),
    encode(FRAMES[6:10], "libvpx-vp9", "webm", fps=12, options={"cpu-used": "8"}),
    encode(torch.nn.functional.interpolate(FRAMES[10:19], (96, 120))),
]
"""Frames 0-5 at 24 per second, 6-9 at 12 and 10-18 at 24 again, twice as high and less wide."""


def test_frames_are_counted_through_all_files() -> None:
    with JoinedVideo(FILES) as video:
        assert video.num_raw_frames == 19
        assert numbers(video.read(range(19), 48, 80)) == list(range(19))
        assert numbers(video.read([5, 6, 9, 10, 18, 18], 48, 80)) == [5, 6, 9, 10, 18, 18]
        assert numbers(video.read([17, 3, 8], 24, 40)) == [17, 3, 8]
        assert video.read([9, 10], 24, 40).shape == (2, 3, 24, 40)


def test_time_goes_on_where_the_file_before_ends() -> None:
    with JoinedVideo(FILES) as video:
        expected = [*np.arange(6) / 24, *(0.25 + np.arange(4) / 12), *(0.25 + 1 / 3 + np.arange(9) / 24)]
        assert video.timestamps == pytest.approx(expected, abs=2e-3), "webm counts in milliseconds"
        assert video.last_fps == 24


def test_one_file_is_that_file() -> None:
    with JoinedVideo(FILES[:1]) as video, open_video(FILES[0]) as alone:
        assert np.array_equal(video.timestamps, alone.index.timestamps)
        assert torch.equal(video.read(range(6), 48, 80), alone.read(range(6)))


def test_a_broken_file_makes_all_of_them_unreadable() -> None:
    with pytest.raises(UnreadableVideoError):
        JoinedVideo([*FILES, b"no video"])


def test_space_is_cropped_in_the_centre_and_never_squeezed() -> None:
    """Resizing without a crop distorts: a centred square must stay a square."""
    frames = torch.zeros(1, 3, 60, 100, dtype=torch.uint8)
    frames[..., 20:40, 40:60] = 255
    resized = centre_crop_and_resize(frames, 30, 30)
    bright = resized[0, 0] > 127
    assert resized.shape == (1, 3, 30, 30)
    assert (bright.any(1).sum(), bright.any(0).sum()) == (10, 10)
    assert bright[10:20, 10:20].all()
    tall = torch.zeros(1, 3, 100, 60, dtype=torch.uint8)
    tall[..., 41:61, 20:40] = 255
    bright = centre_crop_and_resize(tall, 15, 30)[0, 0] > 127
    assert (bright.any(1).sum(), bright.any(0).sum()) == (10, 10)
    assert bright[3:13, 10:20].all()


def test_anamorphic_pixels_become_square() -> None:
    frames = torch.zeros(1, 3, 60, 50, dtype=torch.uint8)
    frames[..., 20:40, 20:30] = 255  # a square on a screen whose pixels are twice as wide as high
    bright = centre_crop_and_resize(frames, 30, 30, pixel_aspect=2.0)[0, 0] > 127
    assert (bright.any(1).sum(), bright.any(0).sum()) == (10, 10)


def test_pixels_of_the_wanted_size_pass_unchanged() -> None:
    frames = numbered_frames(3)
    torch.testing.assert_close(centre_crop_and_resize(frames, 48, 80), frames, rtol=0, atol=0)
