"""What is written reads back, comes out the same every time, and is never half there."""

import io

import pytest
import torch

from helpers.videos import numbered_frames, numbers
from longlive.data import video_writer
from longlive.data.video import open_video
from longlive.data.video_writer import write_mp4


def test_written_files_are_deterministic_and_read_back_close_to_lossless(tmp_path) -> None:
    frames = torch.nn.functional.interpolate(
        torch.randint(0, 256, (9, 3, 6, 8), generator=torch.Generator().manual_seed(0)).float(), size=(48, 64)
    ).to(torch.uint8)
    frames = frames[:1].expand(9, -1, -1, -1)
    first, second = io.BytesIO(), io.BytesIO()
    write_mp4(first, frames, 23.976, quality=10)
    write_mp4(second, frames, 23.976, quality=10)
    write_mp4(tmp_path / "clip.mp4", frames, 23.976, quality=10)
    assert first.getvalue() == second.getvalue() == (tmp_path / "clip.mp4").read_bytes()
    reader = open_video(first.getvalue())
    assert reader.codec == "h264"
    assert reader.fps == pytest.approx(23.976, abs=1e-3)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    difference = ((reader.read(range(9)).float() - frames.float()) * luma).sum(1)
    assert difference.abs().mean() < 4


def test_smooth_frames_give_the_same_bytes_every_time() -> None:
    """x264's fastest routines gave other bytes in one of five runs: a resumed shard then differs from one that was not
    interrupted."""
    coarse = torch.rand(29, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255
    frames = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear").round().to(torch.uint8)
    contents, in_memory = set(), [torch.zeros(1)]
    for number in range(80):
        # The encoder gets other memory every time.
        in_memory = [*in_memory[-(number % 7) :], torch.randn(1000 + 37 * number)]
        file = io.BytesIO()
        write_mp4(file, frames, 24)
        contents.add(file.getvalue())
    assert len(contents) == 1


def test_odd_sizes_are_written_as_they_are() -> None:
    file = io.BytesIO()
    write_mp4(file, numbered_frames(5, 35, 67), 24)
    reader = open_video(file.getvalue())
    assert (reader.height, reader.width) == (35, 67)
    assert numbers(reader.read(range(5))) == list(range(5))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(video_writer, "_encode_mp4", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        write_mp4(path, numbered_frames(2), 24)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("num_frames", "fps", "quality", "message"),
    [
        (0, 24.0, 18, "frames is empty"),
        (2, 0.0, 18, r"fps=0.0 must be positive"),
        (2, 24.0, 52, r"quality=52 .* use 0 \(lossless\) to 51"),
    ],
)
def test_writing_checks_its_arguments(num_frames: int, fps: float, quality: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_mp4(io.BytesIO(), numbered_frames(num_frames), fps, quality=quality)
