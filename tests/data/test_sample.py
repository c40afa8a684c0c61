"""From the members of a tar to the frames that training sees: literal indices for time, measured pixels for space."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from av.video.reformatter import VideoReformatter

from helpers.videos import encode, numbered_frames, numbers
from longlive import rng
from longlive.data import video
from longlive.data.sample import (
    ClipSpec,
    ClipWindow,
    UnreadableSampleError,
    collate,
    decode_sample,
    resample,
)
from longlive.data.shots import ShotRules

SPEC = ClipSpec(num_frames=6, chunk_frames=2, height=48, width=80, fps=24)


def members(num_frames: int = 50, **settings: object) -> dict[str, bytes]:
    fields = {"fps": 24, "num_raw_frames": num_frames, "shots": [{"start": 0, "end": num_frames, "caption": "bars"}]}
    return {"mp4": encode(numbered_frames(num_frames), **settings), "json": json.dumps(fields).encode()}


@pytest.mark.parametrize(
    ("source_fps", "num_frames", "fps", "expected"),
    [
        (24, 5, 24, [0, 1, 2, 3, 4]),
        (48, 6, 24, [0, 2, 4]),
        (30, 10, 24, [0, 1, 2, 4, 5, 6, 7, 9]),
        (12, 3, 24, [0, 0, 1, 1, 2, 2]),
        (16, 4, 24, [0, 1, 1, 2, 3, 3]),
        (24, 1, 24, [0]),
        (60, 1, 24, [0]),
        (24000 / 1001, 4, 24, [0, 1, 2, 3]),
    ],
)
def test_resampling_takes_the_nearest_frame(
    source_fps: float, num_frames: int, fps: float, expected: list[int]
) -> None:
    timestamps = np.arange(num_frames) / source_fps
    assert resample(timestamps, source_fps, fps).tolist() == expected
    assert resample(np.round(timestamps, 3), source_fps, fps).tolist() == expected  # as mkv stores them


def test_uneven_frames_are_resampled_by_their_time_stamps() -> None:
    """By the average rate, the second half of this clip would show twice as fast."""
    timestamps = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.8, 1.2])
    assert resample(timestamps, 5.0, 5.0).tolist() == [0, 2, 4, 4, 5, 5, 6]


def first_frame(num_frames: int, seed: int, epoch: int, sample_id: int) -> int:
    return numbers(decode_sample(LONG[num_frames], SPEC, seed=seed, epoch=epoch, sample_id=sample_id).raw_frames)[0]


LONG = {num_frames: members(num_frames) for num_frames in (23, 50)}


def test_a_clip_of_a_long_video_is_a_function_of_its_names() -> None:
    start = first_frame(50, seed=1, epoch=2, sample_id=3)
    assert start == first_frame(50, seed=1, epoch=2, sample_id=3)
    others = [first_frame(50, *names) for names in ((1, 3, 3), (1, 2, 4), (2, 2, 3))]
    assert len({start, *others}) > 2
    assert {first_frame(23, 0, epoch, 0) for epoch in range(15)} == {0, 1, 2}


def test_a_sample_is_a_part_of_its_video() -> None:
    sample = decode_sample(LONG[50], SPEC, seed=0, epoch=0, sample_id=7)
    start = rng.integer(50 - 21 + 1, 0, "crop", sample=7)
    assert numbers(sample.raw_frames) == list(range(start, start + 21))
    assert (sample.num_valid_frames, sample.sample_id, sample.prompts, sample.shot_index) == (
        6, 7, ("bars",) * 3, (0, 0, 0),
    )  # fmt: skip


def test_no_chunk_of_a_sample_straddles_a_cut() -> None:
    """Cuts at 10 and 24 of 40 frames at twice the rate: 5 and 12 of 20. Chunks take 5, 8 and 8."""
    shots = [{"start": a, "end": b, "caption": c} for a, b, c in ((0, 10, "x"), (10, 24, "y"), (24, 40, "z"))]
    content = members(40, fps=48) | {"json": json.dumps({"num_raw_frames": 40, "shots": shots}).encode()}
    spec = replace(SPEC, shot_rules=ShotRules("Cut. "))
    sample = decode_sample(content, spec, seed=0, epoch=0, sample_id=7)
    assert numbers(sample.raw_frames) == [*range(0, 10, 2), *range(24, 40, 2), *[38] * 8]
    assert (sample.prompts, sample.shot_index, sample.num_valid_frames) == (("x", "Cut. z", "z"), (0, 1, 1), 4)


def test_shots_longer_than_allowed_are_cut_by_force() -> None:
    """A margin of a quarter of a second: 6 raw frames at 24 per second, of a video at twice that rate."""
    spec = replace(SPEC, shot_rules=ShotRules("Cut. ", max_chunks_per_shot=1, forced_cut_margin=0.25))
    sample = decode_sample(members(66, fps=48), spec, seed=0, epoch=0, sample_id=7)
    assert numbers(sample.raw_frames) == [*range(0, 10, 2), *range(22, 38, 2), *range(50, 66, 2)]
    assert (sample.prompts, sample.shot_index) == (("bars", "Cut. bars", "Cut. bars"), (0, 1, 2))


@pytest.mark.parametrize(("num_frames", "num_valid"), [(1, 1), (4, 1), (5, 2), (20, 5), (21, 6)])
def test_a_short_clip_says_how_many_of_its_frames_are_real(num_frames: int, num_valid: int) -> None:
    """Frame f > 0 is valid when all of its four raw frames are."""
    sample = decode_sample(members(num_frames), SPEC, seed=0, epoch=0, sample_id=0)
    assert numbers(sample.raw_frames) == [min(frame, num_frames - 1) for frame in range(21)]
    assert sample.num_valid_frames == num_valid


def test_another_frame_rate_is_resampled() -> None:
    sample = decode_sample(members(42, fps=48), SPEC, seed=0, epoch=0, sample_id=0)
    assert numbers(sample.raw_frames) == list(range(0, 42, 2))


def test_a_variable_frame_rate_is_read_by_time() -> None:
    times = [frame / 24 for frame in range(10)] + [10 / 24 + frame / 12 for frame in range(6)]
    content = members(16) | {"mp4": encode(numbered_frames(16), "libx265", "matroska", times=times)}
    sample = decode_sample(content, SPEC, seed=0, epoch=0, sample_id=0)
    # 16 frames in 21 / 24 s; mkv does not store how long the last one lasts: the average is assumed
    assert numbers(sample.raw_frames)[:20] == [*range(10), 10, 10, 11, 11, 12, 12, 13, 13, 14, 14]


CLOSED_GROUPS = {"options": {"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"}}
SHOTS = [{"start": 0, "end": 5, "caption": "first"}, {"start": 5, "end": 20, "caption": "second"}]
CLIPS = {
    "B-frames": members(**CLOSED_GROUPS),
    "one group of pictures": members(),
    "twice the rate": members(60, fps=48, **CLOSED_GROUPS),
    "half the rate": members(14, fps=12),
    "shorter than the clip": members(10),
    "one frame": members(1),
    "two shots": members(20) | {"json": json.dumps({"num_raw_frames": 20, "shots": SHOTS}).encode()},
}
CLIPS["several files"] = {
    "0.mp4": members(8)["mp4"],
    "1.mp4": members(12, fps=48)["mp4"],
    "2.mp4": members(9)["mp4"],
    "json": json.dumps(
        {
            "num_raw_frames": 29,
            "shots": [{"start": a, "end": b, "caption": c} for a, b, c in ((0, 8, "x"), (8, 20, "y"), (20, 29, "z"))],
        }
    ).encode(),
}
WINDOWS = {
    1: [ClipWindow(0, 21, 0)],
    2: [ClipWindow(0, 9, 0), ClipWindow(9, 21, 3)],
    3: [ClipWindow(0, 5, 0), ClipWindow(5, 13, 2), ClipWindow(13, 21, 4)],
}


@pytest.mark.parametrize("num_ranks", WINDOWS)
@pytest.mark.parametrize("clip", CLIPS)
def test_the_windows_of_all_ranks_make_up_the_clip(clip: str, num_ranks: int) -> None:
    """Ranks that draw crops, or count padding and shots, by their own part train on clips that do not exist."""
    names = {"seed": 3, "epoch": 1, "sample_id": 7}
    whole = decode_sample(CLIPS[clip], SPEC, **names)
    parts = [decode_sample(CLIPS[clip], replace(SPEC, window=window), **names) for window in WINDOWS[num_ranks]]
    assert torch.equal(torch.cat([part.raw_frames for part in parts]), whole.raw_frames)
    assert [part.frame_offset for part in parts] == [window.frame_offset for window in WINDOWS[num_ranks]]
    for part in parts:
        assert vars(part) | {"raw_frames": None, "frame_offset": 0} == vars(whole) | {"raw_frames": None}


def test_windows_with_a_halo_overlap() -> None:
    whole, part = (
        decode_sample(CLIPS["B-frames"], replace(SPEC, window=window), seed=0, epoch=0, sample_id=0)
        for window in (None, ClipWindow(4, 21, 3))
    )
    assert torch.equal(part.raw_frames, whole.raw_frames[4:])
    assert part.frame_offset == 3


@pytest.mark.parametrize(
    ("clip", "converted"),
    [("B-frames", [9, 12]), ("twice the rate", [9, 12]), ("half the rate", [5, 7]), ("shorter than the clip", [9, 1])],
)
def test_only_the_raw_frames_of_the_window_are_converted(
    clip: str, converted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that decode whole clips and drop what is not theirs spend P times the work and the memory."""
    calls: list[int] = []

    class Counting:
        def __init__(self) -> None:
            self.inner = VideoReformatter()

        def reformat(self, *args: object, **settings: object) -> object:
            calls.append(1)
            return self.inner.reformat(*args, **settings)

    monkeypatch.setattr(video, "VideoReformatter", Counting)
    for window, number in zip(WINDOWS[2], converted, strict=True):
        calls.clear()
        decode_sample(CLIPS[clip], replace(SPEC, window=window), seed=0, epoch=0, sample_id=0)
        assert len(calls) == number


def test_a_batch_says_where_its_window_begins() -> None:
    spec = replace(SPEC, window=ClipWindow(9, 21, 3))
    batch = collate([decode_sample(CLIPS["two shots"], spec, seed=0, epoch=0, sample_id=number) for number in (4, 2)])
    assert batch.frame_offset == 3
    assert batch.raw_frames.shape == (2, 12, 3, 48, 80)
    assert batch.shot_index.tolist() == [[0, 1, 1]] * 2
    assert batch.prompts == (("first", "The scene transitions. second", "second"),) * 2
    assert batch.num_valid_frames.tolist() == [5, 5]


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ((0, 22, 0), r"stop=22.* reaches beyond the clip's 21 raw frames or 6 frames"),
        ((0, 21, 6), r"frame_offset=6\) reaches beyond the clip's 21 raw frames or 6 frames"),
        ((-1, 3, 0), r"raw frames -1 \.\. 2 is empty or begins before the clip; use 0 <= start < stop"),
        ((5, 5, 0), r"raw frames 5 \.\. 4 is empty or begins before the clip"),
        ((0, 5, -1), "frame_offset=-1 must be at least 0"),
    ],
)
def test_a_window_outside_the_clip_is_refused(window: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SPEC, window=ClipWindow(*window))


def broken(**changes: bytes | None) -> dict[str, bytes]:
    return {name: content for name, content in (members(9) | changes).items() if content is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (broken(mp4=None), r"needs a video and a json; it has \['json'\]"),
        (broken(json=None), r"it has \['mp4'\]"),
        (broken(mp4=members(9)["mp4"][:500]), "UnreadableVideoError"),
        (broken(mp4=b""), "UnreadableVideoError"),
        (broken(json=b'{"fps": 24'), "JSONDecodeError"),
        (broken(json=b"\xff\xfe\x00"), "UnicodeDecodeError"),
        (broken(json=b"[]"), "TypeError"),
        (broken(json=b"{}"), "num_raw_frames"),
        (broken(json=b'{"num_raw_frames": 9, "shots": []}'), "at least one shot"),
        (broken(json=members(8)["json"]), "the video has 9 raw frames, its json says 8"),
    ],
)
def test_broken_members_make_a_sample_unreadable(content: dict[str, bytes], message: str) -> None:
    with pytest.raises(UnreadableSampleError, match=message):
        decode_sample(content, SPEC, seed=0, epoch=0, sample_id=0)


def test_samples_of_one_size_make_a_batch() -> None:
    samples = [decode_sample(members(length), SPEC, seed=0, epoch=0, sample_id=length) for length in (9, 30)]
    batch = collate(samples)
    assert batch.raw_frames.dtype == torch.uint8
    assert batch.raw_frames.shape == (2, 21, 3, 48, 80)
    assert batch.num_valid_frames.tolist() == [3, 6]
    assert batch.sample_ids.tolist() == [9, 30]
    assert batch.shot_index.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert batch.prompts == (("bars",) * 3,) * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 7}, "num_frames=7 is no multiple of chunk_frames=2; use 6 or 8"),
        ({"num_frames": 1}, "num_frames=1 is no multiple of chunk_frames=2; use 2$"),
        ({"height": 0}, "height=0 must be positive"),
        ({"width": -3}, "width=-3 must be positive"),
        ({"fps": 0.0}, r"fps=0.0 must be positive"),
        ({"temporal_ratio": 0}, "temporal_ratio=0 must be positive"),
        ({"decoder": "ffmpeg"}, "decoder='ffmpeg' is unknown"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_any_work(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **changes)
