"""Prompts and images as users lay them out: who belongs to whom, and what is named when that cannot be told."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from longlive.data.prompts import StoryPrompt
from longlive.data.requests import VideoRequest, read_requests


def write(folder: Path, *names: str) -> Path:
    """Texts that say their own name, images of one pixel, and cases of two shots."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".txt":
            file.write_text(f"{file.stem} moves\n")
        elif file.suffix:
            Image.new("RGB", (1, 1)).save(file)
        else:
            file.mkdir()
            for number in range(2):
                (file / f"{number}.json").write_text(json.dumps({"caption": f"{file.name} {number}"}))
    return folder


def story(name: str) -> StoryPrompt:
    return StoryPrompt(name, (f"{name} 0", f"{name} 1"))


def test_texts_are_videos_of_one_shot() -> None:
    assert read_requests("a red circle ") == [VideoRequest("a red circle")]
    assert read_requests(["a", "b"]) == [VideoRequest("a"), VideoRequest("b")]
    assert read_requests([story("x"), "b"])[0].story == story("x")
    assert read_requests("a")[0].story == StoryPrompt("a", ("a",))
    assert read_requests([story("x")])[0].text == "x 0 | x 1"
    long = "a red circle moves slowly right over a dark ground, and then " * 20
    assert read_requests(long)[0].prompt == long.strip(), "longer than a file's name may be"


def test_a_folder_of_cases_holds_stories(tmp_path: Path) -> None:
    """The durations beside the captions are no prompt, nor is a text about the folder."""
    folder = write(tmp_path, "b", "a", "README.txt")
    (folder / "b" / "shot_durations.txt").write_text("1 3")
    with_durations = StoryPrompt("b", story("b").captions, (1, 3))
    assert read_requests(str(folder)) == [VideoRequest(story("a"), name="a"), VideoRequest(with_durations, name="b")]
    assert read_requests(str(folder / "b")) == [VideoRequest(with_durations, name="b")]


@pytest.mark.parametrize("layout", ["side by side", "two folders"])
def test_texts_and_images_belong_together_by_name(tmp_path: Path, layout: str) -> None:
    """By order alone, a missing file gives every later video another's image."""
    prompts, images = ("", "") if layout == "side by side" else ("prompts/", "images/")
    names = (f"{prompts}cat.txt", f"{images}cat.png", f"{images}ant.JPEG", f"{prompts}ant.txt")
    folder = write(tmp_path / "x", *names)
    assert read_requests(str(folder)) == [
        VideoRequest("ant moves", folder / f"{images}ant.JPEG", "ant"),
        VideoRequest("cat moves", folder / f"{images}cat.png", "cat"),
    ]
    write(folder, f"{prompts}dog.txt", f"{images}emu.png")
    with pytest.raises(ValueError, match="have only an image or only a prompt: dog, emu; give both, under one name"):
        read_requests(str(folder))


def test_a_folder_of_texts_needs_no_images(tmp_path: Path) -> None:
    expected = [VideoRequest("ant moves", name="ant"), VideoRequest("cat moves", name="cat")]
    assert read_requests(str(write(tmp_path / "one", "cat.txt", "ant.txt"))) == expected
    assert read_requests(str(write(tmp_path / "two", "prompts/cat.txt", "prompts/ant.txt"))) == expected


def test_images_given_beside_the_prompts(tmp_path: Path) -> None:
    images = write(tmp_path / "images", "b.png", "a.png", "notes.txt")
    a, b = images / "a.png", images / "b.png"
    assert read_requests(["x", "y"], a) == [VideoRequest("x", a), VideoRequest("y", a)]
    assert read_requests("x", images) == [VideoRequest("x", a, "a"), VideoRequest("x", b, "b")]
    assert read_requests(["x", "y"], images) == [VideoRequest("x", a, "a"), VideoRequest("y", b, "b")]
    cases = write(tmp_path / "cases", "b", "a")
    assert read_requests(str(cases), images) == [VideoRequest(story("a"), a, "a"), VideoRequest(story("b"), b, "b")]


def test_prompts_and_images_that_do_not_match_are_refused(tmp_path: Path) -> None:
    images = write(tmp_path / "images", "a.png", "b.png")
    with pytest.raises(ValueError, match="holds 2 images for 3 prompts; give one prompt for all of them"):
        read_requests(["x", "y", "z"], images)
    with pytest.raises(ValueError, match="have only an image or only a prompt: a, c; give both"):
        read_requests(str(write(tmp_path / "cases", "b", "c")), images)
    with pytest.raises(ValueError, match="the prompts' folder holds images too; give one of the two"):
        read_requests(str(write(tmp_path / "both", "a.txt", "a.png")), images)
    with pytest.raises(ValueError, match=r"image=nowhere\.png: there is no such file or folder"):
        read_requests("x", "nowhere.png")
    with pytest.raises(ValueError, match=r"holds no image; expected files in \.png, \.jpg"):
        read_requests("x", write(tmp_path / "empty", "a.txt"))
    write(images, "a.jpg")
    with pytest.raises(ValueError, match="have the same name; rename one of them"):
        read_requests("x", images)


@pytest.mark.parametrize("prompts", ["", "  ", [], ["a", " "]])
def test_without_a_prompt_there_is_nothing_to_make(prompts: object) -> None:
    with pytest.raises(ValueError, match="no prompt: give prompts='a text'"):
        read_requests(prompts)


def test_an_empty_folder_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no case; expected <case>/0\.json"):
        read_requests(str(tmp_path))


def test_a_first_frame_is_cropped_in_the_centre_as_training_does(tmp_path: Path) -> None:
    """A photo is seldom as wide as the video: squeezed, everything in it changes its shape."""
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = (10, 200, 30)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    frame = VideoRequest("x", tmp_path / "wide.png").first_frame(10, 10)
    assert frame.dtype == torch.uint8
    assert frame.shape == (1, 3, 10, 10)
    assert torch.equal(frame, torch.tensor([10, 200, 30], dtype=torch.uint8)[None, :, None, None].expand_as(frame))
    pixels_given = VideoRequest("x", torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.equal(pixels_given.first_frame(10, 10), frame)
    with pytest.raises(ValueError, match="no image is given for the video of 'x'"):
        VideoRequest("x").first_frame(10, 10)
    exact = VideoRequest("x", tmp_path / "wide.png").first_frame(20, 60)
    assert torch.equal(exact[0].permute(1, 2, 0), torch.from_numpy(pixels)), "of the right size: unchanged"


def test_an_image_of_any_mode_becomes_three_colours(tmp_path: Path) -> None:
    for mode, value in (("L", 90), ("P", 3), ("RGBA", (1, 2, 3, 128)), ("I;16", 500)):
        Image.new(mode, (4, 4), value).save(tmp_path / "x.png")
        assert VideoRequest("x", tmp_path / "x.png").first_frame(4, 4).shape == (1, 3, 4, 4)
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"x\.png cannot be read as an image"):
        VideoRequest("x", tmp_path / "x.png").first_frame(4, 4)
