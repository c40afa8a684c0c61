"""Videos of several shots, and from images: what is asked of the rollout, and what is written about it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from helpers.generating import make, note_calls, read, train_visibly
from helpers.runs import checkpoint
from longlive.codecs.base import to_unit_range
from longlive.codecs.dct import DCTCodec
from longlive.config import compose
from longlive.data.requests import VideoRequest
from longlive.data.toyworld import random_prompts, random_scene, render
from longlive.generate import requests_of
from longlive.rollout.video import to_uint8


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train_visibly(tmp_path_factory)


@pytest.fixture
def calls(monkeypatch) -> list[SimpleNamespace]:
    return note_calls(monkeypatch)


STORY = {"name": "b", "captions": ["a red circle", "a blue square"], "durations": [2, 1], "scene_cuts": True}
PHRASE = "The scene transitions. "


@pytest.fixture
def stories(tmp_path) -> Path:
    """Two cases in the public layout: one of three chunks, one that says nothing about its length."""
    folder = tmp_path / "stories"
    for case, captions in (("a", ("a cyan cross", "a green circle")), ("b", STORY["captions"])):
        (folder / case).mkdir(parents=True)
        for number, caption in enumerate(captions):
            (folder / case / f"{number}.json").write_text(json.dumps({"caption": caption}))
    (folder / "b" / "shot_durations.txt").write_text("2 1")
    return folder


def test_stories_are_rolled_out_shot_by_shot(trained, stories, tmp_path, calls):
    """Videos of several lengths, each with the prompts and shots of its chunks, the phrase at the cut."""
    record = make(trained, tmp_path / "videos", "rollout.shot_rope_offset=8.0", prompts=f"prompts={stories}")
    first, second = calls
    assert (first.sample_ids, second.sample_ids) == ([0], [1])
    assert first.prompts == (("a cyan cross", f"{PHRASE}a green circle"),)
    assert first.shot_index.tolist() == [[0, 1]]
    assert second.prompts == (("a red circle", "a red circle", f"{PHRASE}a blue square"),)
    assert second.shot_index.tolist() == [[0, 0, 1]]
    assert read(tmp_path / "videos" / "000-a.mp4").shape[0] == 29, "as long as in training"
    assert read(tmp_path / "videos" / "001-b.mp4").shape[0] == 45, "as long as its shots say"
    settings = record["settings"]
    assert (settings["num_frames"], settings["scene_cut_phrase"]) == ([8, 12], PHRASE)
    assert json.loads((tmp_path / "videos" / "generation.json").read_text())["settings"]["prompts"][1] == STORY
    assert record["timings"]["raw_frames"] == 29 + 45


def test_captions_may_follow_one_another_within_a_shot(trained, stories, tmp_path, calls):
    """Then there is no cut and no phrase of one, and the cache may be rebuilt."""
    record = make(
        trained, tmp_path / "videos", "scene_cuts=false", "rollout.prompt_switch=recache", prompts=f"prompts={stories}"
    )
    assert calls[1].prompts == (("a red circle", "a red circle", "a blue square"),)
    assert calls[1].shot_index.tolist() == [[0, 0, 0]]
    assert record["settings"]["rollout"]["prompt_switch"] == "recache"
    assert "scene_cut_phrase" not in record["settings"]


def test_the_phrase_at_a_cut_is_the_one_of_training(trained, stories, tmp_path, calls):
    """Known mistake 12. A checkpoint from before there was a phrase was trained without one."""
    saved = checkpoint(trained, 12)
    for phrase, expected in (("Cut to: ", "Cut to: a blue square"), (None, "a blue square")):
        saved["config"]["data"].pop("scene_cut_phrase", None)
        if phrase is not None:
            saved["config"]["data"]["scene_cut_phrase"] = phrase
        torch.save(saved, tmp_path / "model.ckpt")
        make(tmp_path / "model.ckpt", tmp_path / f"with-{phrase is None}", prompts=f"prompts={stories / 'b'}")
        assert calls[-1].prompts[0][2] == expected


def test_the_second_shot_has_its_prompt_and_its_place_in_time(trained, stories, tmp_path, calls):
    """A cut that only the file name knows of: the shots, and the offset at a cut, must change the later chunks."""
    make(trained, tmp_path / "offset", "rollout.shot_rope_offset=8.0", prompts=f"prompts={stories / 'b'}")
    make(trained, tmp_path / "none", prompts=f"prompts={stories / 'b'}")
    cut, without = (call.videos[0].int() for call in calls)
    assert torch.equal(cut[:29], without[:29])
    assert not torch.equal(cut[29:], without[29:])


def test_stories_of_one_length_are_generated_together(trained, stories, tmp_path, calls):
    """Known mistake 9: rows with cuts at different places, each as if alone."""
    (stories / "a" / "shot_durations.txt").write_text("1 2")
    settings = ("rollout.shot_rope_offset=8.0", "rollout.window=8", "rollout.shot_sink=true")
    make(trained, tmp_path / "alone", "batch_size=1", *settings, prompts=f"prompts={stories}")
    make(trained, tmp_path / "together", "batch_size=2", *settings, prompts=f"prompts={stories}")
    assert [call.sample_ids for call in calls] == [[0], [1], [0, 1]]
    assert calls[-1].shot_index.tolist() == [[0, 1, 1], [0, 0, 1]]
    alone = torch.cat([call.videos for call in calls[:2]])
    assert (calls[-1].videos.int() - alone.int()).abs().max() <= 1
    assert not torch.equal(alone[0], alone[1])


def test_a_story_that_does_not_fit_the_video_is_refused(trained, stories, tmp_path):
    for num_frames, message in ((8, r"'b' last 2 \+ 1 = 3 chunks, but the video has 2"), (4, "'a' has 2 shots")):
        with pytest.raises(ValueError, match=message):
            make(trained, tmp_path / "videos", f"num_frames={num_frames}", prompts=f"prompts={stories}")
    assert not (tmp_path / "videos").exists()


def test_a_metric_of_stories_measures_them(trained, tmp_path):
    settings = ("metric=toyworld_stories", "height=64", "width=64", "prompts.num_prompts=1", "prompts.num_chunks=4")
    record = make(trained, tmp_path, *settings, prompts="prompt_set=toyworld_stories")
    assert {"cut", "identity", "colour/shot_3", "false_cuts"} <= record["metrics"].keys()


@pytest.fixture
def image(tmp_path) -> Path:
    """A first frame, larger than the videos and not as wide as them."""
    file = tmp_path / "first.png"
    Image.fromarray(render(random_scene(1, 2), 1)[0].permute(1, 2, 0).numpy()).resize((64, 96)).save(file)
    return file


def test_a_video_begins_with_its_image(trained, image, tmp_path, calls):
    record = make(trained, tmp_path / "videos", f"image={image}", "num_frames=4")
    (call,) = calls
    given = VideoRequest("x", image).first_frame(32, 32)
    assert torch.equal(call.first_raw_frames, to_unit_range(given[None]).expand(3, -1, -1, -1, -1))
    codec = DCTCodec()
    known = codec.decode(codec.encode(to_unit_range(given[None])))
    assert (to_uint8(known).int() - call.videos[:, :1].int()).abs().max() <= 1
    error = (to_uint8(known)[0].double() - given.double()).square().mean()
    assert record["first_frame"]["codec_psnr"] == pytest.approx(float(10 * torch.log10(255**2 / error)), abs=1e-3)
    assert record["first_frame"]["psnr"] > record["first_frame"]["codec_psnr"] - 1
    assert not torch.equal(call.videos[0, 1:], call.videos[1, 1:]), "prompts and noise still differ"


def test_images_and_prompts_of_a_folder_go_together(trained, tmp_path, calls):
    """In batches of any size; a folder's names become the videos'."""
    folder = tmp_path / "asked"
    (folder / "prompts").mkdir(parents=True)
    (folder / "images").mkdir()
    for number, name in enumerate(("zebra", "ant")):
        (folder / "prompts" / f"{name}.txt").write_text(f"a {name}")
        pixels = render(random_scene(3, number), 1)[0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
    make(trained, tmp_path / "together", "num_frames=4", prompts=f"prompts={folder}")
    make(trained, tmp_path / "alone", "num_frames=4", "batch_size=1", prompts=f"prompts={folder}")
    assert sorted(file.name for file in (tmp_path / "alone").glob("*.mp4")) == ["000-ant.mp4", "001-zebra.mp4"]
    alone = torch.cat([call.videos for call in calls[1:]])
    assert (alone.int() - calls[0].videos.int()).abs().max() <= 1
    assert (alone[0, 0].int() - alone[1, 0].int()).abs().float().mean() > 5


def test_a_kept_video_has_the_image_that_is_there_now(trained, image, tmp_path):
    """Another picture under the same name would be mixed into the set."""
    settings = (f"image={image}", "num_frames=4")
    before = make(trained, tmp_path / "videos", *settings, prompts="prompts=a red circle")
    assert make(trained, tmp_path / "videos", *settings, prompts="prompts=a red circle") == before
    Image.new("RGB", (8, 8)).save(image)
    with pytest.raises(ValueError, match="made with another first_frames"):
        make(trained, tmp_path / "videos", *settings, prompts="prompts=a red circle")


def test_a_network_that_never_saw_an_image_says_so(trained, image, tmp_path, caplog):
    make(trained, tmp_path / "new", f"image={image}", "num_frames=4", prompts="prompts=a red circle")
    assert "was trained without given frames (module.given_frames=0)" in caplog.text
    caplog.clear()
    saved = checkpoint(trained, 12)
    saved["config"]["module"]["given_frames"] = 1
    torch.save(saved, tmp_path / "model.ckpt")
    for number, settings in enumerate(((f"image={image}",), ())):
        make(tmp_path / "model.ckpt", tmp_path / str(number), "num_frames=4", *settings, prompts="prompts=a red circle")
        assert ("was trained to be given its first frame" in caplog.text) == (not settings)


def test_a_broken_image_is_refused_before_any_work(trained, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"x\.png cannot be read as an image"):
        make(trained, tmp_path / "videos", f"image={tmp_path / 'x.png'}")
    with pytest.raises(ValueError, match=r"image=nowhere: there is no such file or folder"):
        make(trained, tmp_path / "videos", "image=nowhere")
    assert not (tmp_path / "videos").exists()


def test_first_frames_of_the_toy_world_belong_to_their_prompts():
    requests = requests_of(compose("generate", ["prompt_set=toyworld_images", "prompts.num_prompts=5"]))
    assert [request.prompt for request in requests] == random_prompts(5, 1000003)
    for number, request in enumerate(requests):
        assert torch.equal(request.first_frame(64, 64), render(random_scene(1000003, number), 1))
