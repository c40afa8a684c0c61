"""Prompt folders in the public layout: what they say, and what is named when they say something else."""

import json
from pathlib import Path

import pytest

from longlive.data.prompts import StoryPrompt, is_case, read_case, read_prompt_folder


def write_case(folder: Path, *captions: str, durations: str | None = None) -> Path:
    folder.mkdir(parents=True)
    for number, caption in enumerate(captions):
        (folder / f"{number}.json").write_text(json.dumps({"caption": caption}))
    if durations is not None:
        (folder / "shot_durations.txt").write_text(durations)
    return folder


def test_a_folder_of_cases_is_read_sorted(tmp_path: Path) -> None:
    write_case(tmp_path / "robot", "enters", "looks", "leaves", durations="2 2 4\n")
    write_case(tmp_path / "cat", *(f"shot {number}" for number in range(11)))
    (tmp_path / "README.md").write_text("about these")
    expected = [
        StoryPrompt("cat", tuple(f"shot {number}" for number in range(11))),
        StoryPrompt("robot", ("enters", "looks", "leaves"), (2, 2, 4)),
    ]
    assert read_prompt_folder(tmp_path) == expected
    assert read_prompt_folder(tmp_path / "robot") == expected[1:]
    assert is_case(tmp_path / "robot")
    assert not is_case(tmp_path)


def test_an_outer_caption_folder_is_read_too(tmp_path: Path) -> None:
    write_case(tmp_path / "caption" / "robot", "enters", "leaves", durations="1,3")
    assert read_prompt_folder(tmp_path) == [StoryPrompt("robot", ("enters", "leaves"), (1, 3))]


def test_every_chunk_gets_its_prompt_and_its_shot() -> None:
    assert StoryPrompt("x", ("a", "b"), (2, 3)).chunks("Cut. ") == (("a", "a", "Cut. b", "b", "b"), (0, 0, 1, 1, 1))
    assert StoryPrompt("x", ("a",), (2,)).chunks("Cut. ") == (("a", "a"), (0, 0))


def test_shots_without_durations_share_the_video_evenly() -> None:
    story = StoryPrompt("x", ("a", "b", "c"))
    assert story.num_chunks is None
    assert story.over(6).durations == (2, 2, 2)
    assert story.over(7).durations == (2, 2, 3)
    assert story.over(3).durations == (1, 1, 1)
    given = StoryPrompt("x", ("a", "b"), (2, 4))
    assert given.over(6) == given
    assert given.num_chunks == 6


def test_durations_that_do_not_make_up_the_video_are_refused() -> None:
    """Public code drops the last shots, or repeats the last caption, and says nothing."""
    with pytest.raises(ValueError, match=r"'x' last 2 \+ 4 = 6 chunks, but the video has 5; leave num_frames to"):
        StoryPrompt("x", ("a", "b"), (2, 4)).over(5)
    with pytest.raises(ValueError, match="'x' has 3 shots, a video of 2 chunks holds 2; make it longer"):
        StoryPrompt("x", ("a", "b", "c")).over(2)
    with pytest.raises(ValueError, match="says no durations"):
        StoryPrompt("x", ("a", "b", "c")).chunks("")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds no json; name the shots' files 0\.json, 1\.json"),
        ({"1.json": '{"caption": "a"}'}, r"holds 1\.json; name the shots' files"),
        ({"0.json": '{"caption": "a"}', "2.json": '{"caption": "c"}'}, r"0\.json, 2\.json; .* without a gap"),
        ({"0.json": '{"caption": "a"}', "global.json": "{}"}, "keep no other json beside them"),
        ({"0.json": "{"}, r"0\.json is no json"),
        ({"0.json": '{"text": "a"}'}, r'0\.json holds no caption; write \{"caption"'),
        ({"0.json": '{"caption": 3}'}, "holds no caption"),
        ({"0.json": '{"caption": " "}'}, "needs a caption for every shot"),
        ({"0.json": '{"caption": "a"}', "shot_durations.txt": "2 2"}, r"1 shots and the durations \[2, 2\]"),
        ({"0.json": '{"caption": "a"}', "shot_durations.txt": "0"}, r"durations \[0\]; .* at least 1"),
        ({"0.json": '{"caption": "a"}', "shot_durations.txt": "two"}, "'two'; write one number of chunks per shot"),
        ({"0.json": '{"caption": "a"}', "shot_durations.txt": ""}, "write one number of chunks per shot"),
    ],
)
def test_a_broken_case_is_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_case(tmp_path)


def test_a_folder_without_cases_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no case; expected <case>/0\.json"):
        read_prompt_folder(tmp_path)
