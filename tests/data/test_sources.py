"""Clips before they are shards: what a folder may hold, and what is named when it holds something else."""

import json
from pathlib import Path

import pytest
import torch

from helpers.videos import encode, numbered_frames, numbers
from longlive.data.joined import JoinedVideo
from longlive.data.shots import Shot
from longlive.data.sources import FolderSource, SourceClip, UnreadableClipError, shots_from_caption


def add_clip(root: Path, name: str, caption: object, content: bytes | None = None, suffix: str = "mp4") -> None:
    video, text = (root / kind / name for kind in ("video", "caption"))
    for file in (video, text):
        file.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{video}.{suffix}").write_bytes(encode(numbered_frames(9)) if content is None else content)
    if caption is not None:
        Path(f"{text}.json").write_text(caption if isinstance(caption, str) else json.dumps(caption))


def test_a_folder_yields_its_clips_sorted_and_unchanged(tmp_path: Path) -> None:
    """Directory listings come in the file system's order, which differs between machines."""
    content = encode(numbered_frames(9), "libvpx-vp9", "webm", options={"cpu-used": "8"})
    add_clip(tmp_path, "b/2", {"caption": "second"})
    add_clip(tmp_path, "b/10.take.1", {"caption": "with dots"})
    add_clip(
        tmp_path, "a/9", {"shots": [{"start": 0, "end": 4, "caption": "x"}, {"start": 4, "end": 9, "caption": "y"}]}
    )
    add_clip(tmp_path, "b/3", {"caption": "third"}, content, "webm")
    source = FolderSource(tmp_path)
    clips = [source[index] for index in range(len(source))]
    assert [clip.key for clip in clips] == ["a/9", "b/10_take_1", "b/2", "b/3"]
    assert clips[0].shots == (Shot(0, 4, "x"), Shot(4, 9, "y"))
    assert clips[2].shots == (Shot(0, 9, "second"),)
    assert (clips[3].video_bytes, clips[3].suffix) == (content, "webm")
    assert clips[0].fps == 24


@pytest.mark.parametrize(
    ("caption", "content", "message"),
    [
        (None, None, "FileNotFoundError"),
        ("{broken", None, "JSONDecodeError"),
        ({"text": "?"}, None, "holds either 'caption' or 'shots'"),
        ({"shots": [{"start": 0, "end": 99, "caption": "?"}]}, None, "ends at raw frame 99, but the clip has 9"),
        ({"shots": [{"start": 0, "caption": "?"}]}, None, "every shot needs 'start', 'end' and 'caption'"),
        ([1, 2], None, "holds either"),
        ({"caption": "fine"}, b"no video", "UnreadableVideoError"),
    ],
)
def test_a_clip_that_cannot_be_a_sample_is_named(
    tmp_path: Path, caption: object, content: bytes | None, message: str
) -> None:
    add_clip(tmp_path, "a/1", caption, content)
    with pytest.raises(UnreadableClipError, match=message) as caught:
        FolderSource(tmp_path)[0]
    assert caught.value.key == "a/1"


def test_a_folder_without_clips_is_an_error_that_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected video/<name>/\*.mp4 and caption/<name>/\*.json"):
        FolderSource(tmp_path)
    (tmp_path / "video").mkdir()
    with pytest.raises(ValueError, match="holds no clip"):
        FolderSource(tmp_path)


def test_two_files_that_would_share_a_key_are_refused(tmp_path: Path) -> None:
    add_clip(tmp_path, "a/1", {"caption": "one"})
    add_clip(tmp_path, "a/1", {"caption": "one"}, suffix="mkv")
    with pytest.raises(ValueError, match="share the key 'a/1'; rename one"):
        FolderSource(tmp_path)


def add_story(root: Path, name: str, numbers: range | tuple[int, ...]) -> None:
    frames = numbered_frames(256)
    for number in numbers:
        caption = {"caption": f"{name} {number}"}
        add_clip(root, f"{name}/{number}", caption, encode(frames[10 * number : 10 * number + 5 + number % 2]))


def test_the_clips_of_a_story_are_the_shots_of_one_sample(tmp_path: Path) -> None:
    """By number: by name, the tenth comes after the first."""
    add_story(tmp_path, "b", range(11))
    add_story(tmp_path, "a", (3, 7))
    source = FolderSource(tmp_path, stories=True)
    assert [source[index].key for index in range(len(source))] == ["a", "b"]
    assert source[0].shots == (Shot(0, 6, "a 3"), Shot(6, 12, "a 7"))
    assert [shot.caption for shot in source[1].shots] == [f"b {number}" for number in range(11)]
    assert source[1].shots[2] == Shot(11, 16, "b 2")
    with JoinedVideo(source[0].files) as video:
        assert numbers(video.read(range(12), 48, 80)) == [*range(30, 36), *range(70, 76)]
    assert len(FolderSource(tmp_path)) == 13, "without stories, every clip is a sample"


def test_one_broken_clip_breaks_its_story(tmp_path: Path) -> None:
    """Left out, the next shot would follow on the one before it under the wrong number."""
    add_story(tmp_path, "a", (0, 1))
    add_clip(tmp_path, "a/2", {"caption": "fine"}, b"no video")
    with pytest.raises(UnreadableClipError, match="UnreadableVideoError"):
        FolderSource(tmp_path, stories=True)[0]


def test_a_story_of_two_containers_is_refused(tmp_path: Path) -> None:
    add_clip(tmp_path, "a/0", {"caption": "x"})
    add_clip(tmp_path, "a/1", {"caption": "y"}, suffix="mov")
    with pytest.raises(UnreadableClipError, match="its files are mov and mp4; the files of a story need one container"):
        FolderSource(tmp_path, stories=True)[0]


def caption_shots(root: Path, *captions: str, durations: str | None = None) -> None:
    add_clip(root, "a/1", None, encode(numbered_frames(50)))
    folder = root / "caption" / "a" / "1"
    folder.mkdir()
    for number, caption in enumerate(captions):
        (folder / f"{number}.json").write_text(json.dumps({"caption": caption}))
    if durations is not None:
        (folder / "shot_durations.txt").write_text(durations)


def test_a_clip_may_have_a_caption_per_shot(tmp_path: Path) -> None:
    caption_shots(tmp_path, "x", "y", "z")
    assert FolderSource(tmp_path)[0].shots == (Shot(0, 16, "x"), Shot(16, 33, "y"), Shot(33, 50, "z"))


def test_durations_in_chunks_become_raw_frames_of_the_codec(tmp_path: Path) -> None:
    """Chunks of 2 frames are 5, 8, 8, ... raw frames: a video made from this folder is cut there."""
    caption_shots(tmp_path, "x", "y", "z", durations="2 1 3")
    source = FolderSource(tmp_path, chunk_frames=2)
    assert source[0].shots == (Shot(0, 13, "x"), Shot(13, 21, "y"), Shot(21, 50, "z"))
    with pytest.raises(UnreadableClipError, match=r"counts chunks, .* give source\.chunk_frames"):
        FolderSource(tmp_path)[0]
    with pytest.raises(UnreadableClipError, match=r"begin at \[0, 61, 93\]; the video has 50 raw frames"):
        FolderSource(tmp_path, chunk_frames=8)[0]


def test_a_caption_with_both_forms_is_refused() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        shots_from_caption({"caption": "x", "shots": []}, 9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"key": "a.b"}, "without dots"),
        ({"key": ""}, "non-empty name"),
        ({"frames": None}, "exactly one"),
        ({"video_bytes": b"x"}, "exactly one"),
        ({"suffix": "avi"}, "not one of mp4, mkv, webm, mov"),
    ],
)
def test_a_clip_checks_its_fields(fields: dict[str, object], message: str) -> None:
    valid = {"key": "a", "fps": 24.0, "shots": (Shot(0, 2, "x"),), "frames": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=message):
        SourceClip(**(valid | fields))
