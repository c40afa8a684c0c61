"""Clips before they are shards: what a folder may hold, and what is named when it holds something else."""

import json
from pathlib import Path

import pytest
import torch

from helpers.videos import encode, numbered_frames
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
