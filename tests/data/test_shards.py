"""Shards: what is written, that a kill at any moment changes nothing, and what a reader may rely on."""

import json
import logging
import multiprocessing
import os
import signal
import tarfile
import time
from pathlib import Path

import pytest
import torch
import webdataset

from helpers.clips import NumberedSource
from helpers.folders import contents, in_a_process
from helpers.videos import encode, numbered_frames, numbers
from longlive.data import atomic
from longlive.data.indexed import IndexedShards
from longlive.data.sample import ClipSpec, UnreadableSampleError, decode_sample
from longlive.data.shards import load_index, video_members, write_shards
from longlive.data.shots import Shot
from longlive.data.sources import SourceClip, UnreadableClipError
from longlive.data.video import open_video


def test_the_index_points_at_every_member_of_every_sample(pristine_shards: Path) -> None:
    index = load_index(pristine_shards)
    assert [sample.key for sample in index.samples] == [f"clip-{clip:03d}" for clip in range(11)]
    assert [sample.shard for sample in index.samples] == [f"shard-{clip // 3:06d}.tar" for clip in range(11)]
    assert sorted(path.name for path in pristine_shards.iterdir()) == [
        *(f"shard-{shard:06d}.tar" for shard in range(4)),
        "shards.json",
    ]
    for clip, sample in enumerate(index.samples):
        content = (pristine_shards / sample.shard).read_bytes()
        members = {
            suffix: content[member.offset : member.offset + member.num_bytes]
            for suffix, member in sample.members.items()
        }
        assert all(member.holds(members[suffix]) for suffix, member in sample.members.items())
        assert not any(member.holds(members[suffix][:-1] + b"?") for suffix, member in sample.members.items())
        assert json.loads(members["json"]) == {
            "fps": 24,
            "num_raw_frames": 9 + clip % 3,
            "shots": [
                {"start": 0, "end": 5 + clip % 3, "caption": f"clip {clip} begins"},
                {"start": 5 + clip % 3, "end": 9 + clip % 3, "caption": f"clip {clip} ends"},
            ],
        }
        frames = open_video(members["mp4"]).read(range(sample.num_raw_frames))
        assert numbers(frames) == [16 * clip + frame for frame in range(9 + clip % 3)]


def test_plain_webdataset_reads_the_shards(pristine_shards: Path) -> None:
    urls = sorted(str(path) for path in pristine_shards.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"clip-{clip:03d}" for clip in range(11)]
    assert all({"mp4", "json"} <= set(sample) for sample in samples)


def test_a_kill_before_any_visible_step_and_a_restart_give_the_same_bytes(
    pristine_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file becomes visible by a rename; the process is killed (-9) right before each of them in turn."""
    num_renames = 1 + 2 * 4 + 1  # the plan, a tar and its part four times, the index
    replace = os.replace

    for kill_at in range(num_renames + 1):
        directory = tmp_path / str(kill_at)
        count = 0

        def kill_or_replace(source: Path, target: Path, kill_at: int = kill_at) -> None:
            nonlocal count
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            replace(source, target)

        def write(directory: Path = directory) -> None:
            write_shards(NumberedSource(), directory, clips_per_shard=3, progress=False)

        with monkeypatch.context() as patched:
            patched.setattr(atomic.os, "replace", kill_or_replace)
            assert in_a_process(write) == (-signal.SIGKILL if kill_at < num_renames else 0)
        write()
        assert contents(directory) == contents(pristine_shards)


def test_repeated_kills_at_random_moments_lose_nothing(pristine_shards: Path, tmp_path: Path) -> None:
    def write() -> None:
        class Slow(NumberedSource):
            def __getitem__(self, index: int) -> SourceClip:
                time.sleep(0.02)
                return super().__getitem__(index)

        write_shards(Slow(), tmp_path / "shards", clips_per_shard=3, progress=False)

    for seconds in (0.05, 0.12, 0.15):
        process = multiprocessing.get_context("fork").Process(target=write)
        process.start()
        time.sleep(seconds)
        process.kill()
        process.join()
    write()
    assert contents(tmp_path / "shards") == contents(pristine_shards)


def test_a_restart_does_not_write_finished_shards_again(tmp_path: Path) -> None:
    class Dying(NumberedSource):
        def __getitem__(self, index: int) -> SourceClip:
            if index == 7:
                raise RuntimeError("power cut")
            return super().__getitem__(index)

    with pytest.raises(RuntimeError, match="power cut"):
        write_shards(Dying(), tmp_path, clips_per_shard=3, progress=False)
    asked = []

    class Noting(NumberedSource):
        def __getitem__(self, index: int) -> SourceClip:
            asked.append(index)
            return super().__getitem__(index)

    write_shards(Noting(), tmp_path, clips_per_shard=3, progress=False)
    assert asked == [0, 10, 6, 7, 8, 9, 10]  # the first and the last clip tell whether it is the same source


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (NumberedSource(), {"clips_per_shard": 4}, "clips_per_shard: 3 there, 4 now"),
        (NumberedSource(), {"quality": 30}, "quality: 18 there, 30 now"),
        (NumberedSource(10), {}, "num_clips: 11 there, 10 now"),
        (NumberedSource(unreadable=(10,)), {}, "last_clip"),
    ],
)
@pytest.mark.parametrize("state", ["interrupted", "finished"])
def test_other_settings_are_an_error_and_no_mixture(
    tmp_path: Path, source: NumberedSource, settings: dict[str, int], message: str, state: str
) -> None:
    class Dying(NumberedSource):
        def __getitem__(self, index: int) -> SourceClip:
            if index == 7 and state == "interrupted":
                raise RuntimeError("power cut")
            return super().__getitem__(index)

    if state == "interrupted":
        with pytest.raises(RuntimeError, match="power cut"):
            write_shards(Dying(), tmp_path, clips_per_shard=3, progress=False)
    else:
        write_shards(Dying(), tmp_path, clips_per_shard=3, progress=False)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        write_shards(source, tmp_path, **({"clips_per_shard": 3, "progress": False} | settings))
    assert contents(tmp_path) == before


def test_unreadable_clips_are_named_counted_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        index = write_shards(NumberedSource(unreadable=(3, 4, 5, 7)), tmp_path, clips_per_shard=3, progress=False)
    assert [key for key, _ in index.skipped] == ["clip-003", "clip-004", "clip-005", "clip-007"]
    assert "skipped an unreadable clip: clip-003: made so" in caplog.text
    assert "4 of 11 clips were skipped" in caplog.text
    assert len(load_index(tmp_path).samples) == 7
    assert load_index(tmp_path).skipped == index.skipped


def test_strict_makes_an_unreadable_clip_fatal(tmp_path: Path) -> None:
    with pytest.raises(UnreadableClipError, match="clip-003: made so"):
        write_shards(NumberedSource(unreadable=(3,)), tmp_path, clips_per_shard=3, strict=True, progress=False)


def test_strict_refuses_a_finished_set_that_lacks_a_clip(tmp_path: Path) -> None:
    """A run that was asked to be whole would report success over another run's holes."""
    source = NumberedSource(unreadable=(3,))
    write_shards(source, tmp_path, clips_per_shard=3, progress=False)
    with pytest.raises(UnreadableClipError, match="clip-003: made so"):
        write_shards(source, tmp_path, clips_per_shard=3, strict=True, progress=False)
    assert len(write_shards(source, tmp_path, clips_per_shard=3, progress=False).samples) == 10


def test_a_source_without_a_readable_clip_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnreadableClipError, match="none of the 2 clips is readable"):
        write_shards(NumberedSource(2, unreadable=(0, 1)), tmp_path, progress=False)
    assert not (tmp_path / "shards.json").exists()
    with pytest.raises(ValueError, match="the source holds no clip"):
        write_shards(NumberedSource(0), tmp_path, progress=False)
    with pytest.raises(ValueError, match="clips_per_shard=0 must be at least 1"):
        write_shards(NumberedSource(), tmp_path, clips_per_shard=0, progress=False)


def test_encoded_files_pass_through_unchanged_under_their_own_suffix(tmp_path: Path) -> None:
    content = encode(numbered_frames(9), "libvpx-vp9", "webm", options={"cpu-used": "8"})
    clips = [
        SourceClip("good", 24, (Shot(0, 9, "x"),), video_bytes=content, suffix="webm"),
        SourceClip("too-long-a-shot", 24, (Shot(0, 10, "x"),), video_bytes=content, suffix="webm"),
        SourceClip("no-video", 24, (Shot(0, 9, "x"),), video_bytes=b"?"),
    ]
    index = write_shards(clips, tmp_path, progress=False)
    assert [key for key, _ in index.skipped] == ["too-long-a-shot", "no-video"]
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert tar.getnames() == ["good.json", "good.webm"]
        assert tar.extractfile("good.webm").read() == content


@pytest.mark.parametrize("clips_per_shard", [1, 2])
def test_two_clips_with_one_key_are_refused(tmp_path: Path, clips_per_shard: int) -> None:
    clip = NumberedSource()[0]
    with pytest.raises(ValueError, match="share the key 'clip-000'"):
        write_shards([clip, clip], tmp_path, clips_per_shard=clips_per_shard, progress=False)


def test_a_missing_or_broken_index_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is no directory; `longlive shards` writes one"):
        load_index(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"holds no shards.json"):
        load_index(tmp_path)
    for text, message in (
        ("{", "is no json"),
        ("{}", "format_version=None"),
        ('{"format_version": 99}', "format_version=99, this release reads 1"),
        ('{"format_version": 1}', "is no index of shards"),
        ('{"format_version": 1, "samples": [], "skipped": []}', "the shard set is empty"),
    ):
        (tmp_path / "shards.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_index(tmp_path)


class Stories:
    """One story of three files, frames 0-4, 10-15 and 20-24."""

    frames = numbered_frames(32, 16, 32)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> SourceClip:
        files = tuple(encode(self.frames[start : start + 5 + start % 4 // 2]) for start in (0, 10, 20))
        shots = (Shot(0, 5, "a"), Shot(5, 11, "b"), Shot(11, 16, "c"))
        return SourceClip("story", 24, shots, video_bytes=files)


def test_a_story_of_several_files_is_one_sample(tmp_path: Path) -> None:
    """As other readers of WebDataset see it, and as ours decodes it."""
    index = write_shards(Stories(), tmp_path, progress=False)
    (sample,) = index.samples
    assert set(sample.members) == {"0.mp4", "1.mp4", "2.mp4", "json"}
    assert sample.num_raw_frames == 16
    (plain,) = webdataset.WebDataset([str(tmp_path / "shard-000000.tar")], shardshuffle=False)
    spec = ClipSpec(num_frames=4, chunk_frames=1, height=16, width=32, fps=24)
    reader = IndexedShards([tmp_path], spec, seed=0, shuffle=False)
    assert numbers(reader[0].raw_frames) == [*range(5), *range(10, 14), *range(20, 24)]
    assert reader[0].prompts == ("a", "a", "The scene transitions. b", "The scene transitions. c")
    members = {name: plain[name] for name in sample.members}
    again = decode_sample(members, spec, seed=0, epoch=0, sample_id=0)
    assert torch.equal(again.raw_frames, reader[0].raw_frames)
    with pytest.raises(UnreadableSampleError, match="the video has 15 raw frames, its json says 16"):
        decode_sample(members | {"1.mp4": members["0.mp4"]}, spec, seed=0, epoch=0, sample_id=0)


def test_files_of_a_story_come_in_the_order_of_their_numbers() -> None:
    assert video_members(["10.mp4", "json", "2.mp4", "txt"]) == ["2.mp4", "10.mp4"]
    assert video_members(["json", "webm"]) == ["webm"]
    assert video_members({"json": b"", "caption.mp4": b""}) == []
