"""Videos from a real checkpoint: what is written, what a second run keeps, and what is refused before any work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.adapters import fill_adapter
from helpers.generating import PROMPTS, make, note_calls, read, train_visibly
from helpers.runs import assert_same, checkpoint
from longlive import generate as generation
from longlive.adapters.lora import LoRASettings, add_adapter, wrapped_layers
from longlive.callbacks.ema import averaged_weights
from longlive.config import compose, instantiate
from longlive.data.toyworld import random_prompts
from longlive.data.video import open_video
from longlive.generate import requests_of
from longlive.modules.base import LongLiveModule
from longlive.trained import load_module, load_trained

FILES = ["000-a-red-circle-moves-slowly-right-over-a-dark-ground.mp4", "001-a-blue-square.mp4", "002-a-cyan-cross.mp4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of 12 steps with a visible learning rate: at its start the network answers zero to everything."""
    return train_visibly(tmp_path_factory)


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The three videos, made once."""
    directory = tmp_path_factory.mktemp("made")
    return directory, make(trained, directory, "batch_size=1")


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.glob("*.mp4"))}


@pytest.fixture
def calls(monkeypatch) -> list[SimpleNamespace]:
    """Engine, prompts, shots, sample ids and videos of every call of `generate_videos`."""
    return note_calls(monkeypatch)


def test_a_video_per_prompt_a_sheet_and_a_record_are_written(made):
    directory, _ = made
    assert sorted(file.name for file in directory.iterdir()) == [*FILES, "contact_sheet.png", "generation.json"]
    for name in FILES:
        with open_video(directory / name) as reader:
            assert (reader.num_raw_frames, float(reader.fps)) == (29, 24.0)
            assert reader.read([0]).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(("num_frames", "num_raw_frames"), [(4, 13), (16, 61)])
def test_videos_have_any_whole_number_of_chunks(trained, tmp_path, num_frames, num_raw_frames):
    """Longer than in training, above all."""
    record = make(trained, tmp_path, f"num_frames={num_frames}", "fps=12", prompts="prompts=a red circle")
    with open_video(tmp_path / "000-a-red-circle.mp4") as reader:
        assert (reader.num_raw_frames, float(reader.fps)) == (num_raw_frames, 12.0)
    assert record["timings"]["raw_frames"] == num_raw_frames


def test_another_size_than_in_training_is_possible(trained, tmp_path):
    make(trained, tmp_path, "height=48", "width=64", prompts="prompts=a red circle")
    assert read(tmp_path / "000-a-red-circle.mp4").shape[-2:] == (48, 64)


def test_the_contact_sheet_has_a_row_of_frames_per_video(made):
    directory, _ = made
    cell, gap, caption = 96, 4, 16
    with Image.open(directory / "contact_sheet.png") as image:
        assert (image.format, image.size) == ("PNG", (8 * (cell + gap), 3 * (cell + gap + caption)))
        sheet = torch.from_numpy(np.array(image))
    for row, name in enumerate(FILES):
        frames = read(directory / name)
        top = row * (cell + gap + caption)
        assert (sheet[top : top + caption] < 128).any(), "the prompt"
        for column, place in ((0, 0), (1, 4), (7, 28)):
            left = column * (cell + gap)
            shown = sheet[top + caption : top + caption + cell : 3, left : left + cell : 3].permute(2, 0, 1)
            assert torch.equal(shown, frames[place])


def test_the_sheet_shows_no_more_rows_than_asked_for(trained, tmp_path):
    make(trained, tmp_path, "sheet_rows=2", "num_frames=4")
    with Image.open(tmp_path / "contact_sheet.png") as image:
        assert image.height == 2 * (96 + 4 + 16)


def test_the_record_says_how_the_videos_were_made(made, trained):
    directory, record = made
    assert json.loads((directory / "generation.json").read_text()) == json.loads(json.dumps(record))
    settings = record["settings"]
    assert settings["checkpoint"] == str(trained / "checkpoints" / "step-0000012.ckpt")
    assert (settings["step"], settings["seed"], settings["precision"]) == (12, 0, "32-true")
    assert (settings["num_frames"], settings["height"], settings["width"], settings["fps"]) == (8, 32, 32, 24.0)
    assert settings["prompts"] == list(PROMPTS)
    expected = {"chunk_frames": 4, "num_steps": 2, "solver": "unipc", "guidance_scale": 3.0, "window": 8}
    assert expected.items() <= settings["rollout"].items()
    assert record["torch"] == torch.__version__
    assert record["device"] == generation.device_name()


def test_the_three_timings_contain_each_other(made):
    """The loop alone is often published as the speed of the whole."""
    timings = made[1]["timings"]
    assert 0 < timings["loop"] <= timings["streaming"] <= timings["whole"]
    assert timings["raw_frames"] == 3 * 29
    assert timings["videos_generated"] == 3
    for name in ("loop", "streaming"):
        assert timings[f"{name}_raw_frames_per_second"] == pytest.approx(3 * 29 / timings[name])


def test_a_second_run_keeps_what_is_finished_and_remakes_what_is_not(made, trained, tmp_path, calls):
    """An interrupted run is started again: its finished videos cost nothing, the others come out as they would have."""
    directory, record = made
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = contents(tmp_path)
    (tmp_path / FILES[1]).unlink()
    kept = {name: (tmp_path / name).stat().st_mtime_ns for name in (FILES[0], FILES[2])}
    again = make(trained, tmp_path, "batch_size=1")
    assert contents(tmp_path) == before
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept
    assert [call.sample_ids for call in calls] == [[1]]
    assert again["timings"]["videos_generated"] == 1

    calls.clear()
    once_more = make(trained, tmp_path)
    assert not calls
    assert once_more["timings"] == again["timings"]
    assert once_more["settings"] == record["settings"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["seed=1"], "seed"),
        (["rollout.num_steps=3"], "rollout"),
        (["num_frames=4", "fps=12"], "num_frames, fps"),
        (["negative_prompt=blurred"], "negative_prompt"),
        (["checkpoint={trained}/checkpoints/step-0000008.ckpt"], "checkpoint, step"),
        (["prompts=[another]"], "prompts"),
    ],
)
def test_videos_of_other_settings_are_never_mixed(made, trained, change, named):
    """Half of the videos from each of two checkpoints, and one record for both."""
    directory, _ = made
    before, record = contents(directory), (directory / "generation.json").read_text()
    with pytest.raises(ValueError, match=f"holds videos made with another {named}; nothing already written is"):
        make(trained, directory, *(each.format(trained=trained) for each in change))
    assert contents(directory) == before
    assert (directory / "generation.json").read_text() == record


@pytest.mark.parametrize("batch_size", [2, 3])
def test_the_batch_size_does_not_change_a_video(trained, tmp_path, calls, batch_size):
    """Sums are rounded otherwise in other batches: by a level at most, before the file is compressed."""
    make(trained, tmp_path / "one", "batch_size=1")
    assert [call.sample_ids for call in calls] == [[0], [1], [2]]
    alone = torch.cat([call.videos for call in calls])
    calls.clear()
    make(trained, tmp_path / "several", f"batch_size={batch_size}")
    assert [call.sample_ids for call in calls] == ([[0, 1], [2]] if batch_size == 2 else [[0, 1, 2]])
    together = torch.cat([call.videos for call in calls])
    assert (together.int() - alone.int()).abs().max() <= 1


def test_seed_and_prompt_change_a_video(made, trained, tmp_path):
    make(trained, tmp_path / "seed", "seed=1")
    make(trained, tmp_path / "prompt", prompts="prompts=[a green triangle]")
    first = read(made[0] / FILES[0])
    assert not torch.equal(read(tmp_path / "seed" / FILES[0]), first)
    assert not torch.equal(read(tmp_path / "prompt" / "000-a-green-triangle.mp4"), first)


def test_rollout_settings_replace_those_of_training_and_reach_the_engine(trained, tmp_path, calls):
    """A setting that is parsed, recorded and ignored."""
    changes = {
        "num_steps": 3,
        "solver": "euler",
        "guidance_scale": 1.0,
        "window": 8,
        "sink_frames": 4,
        "shot_sink": False,
        "relative_rope": True,
        "shot_rope_offset": 8.0,
        "prompt_switch": "recache",
        "cache_dtype": "bfloat16",
    }
    assert changes.keys() == compose("generate").rollout.keys()
    given = [f"rollout.{name}={value}" for name, value in changes.items()]
    record = make(trained, tmp_path, "num_frames=4", *given, prompts="prompts=a red circle")
    (call,) = calls
    for name, value in changes.items():
        assert getattr(call.engine.settings, name) == value
    assert record["settings"]["rollout"] == {"chunk_frames": 4} | changes


def test_the_record_says_how_many_bytes_the_cache_takes(made, trained, tmp_path):
    """Two chunks of 16 tokens with 2 heads of 16 features, keys and values, with and without guidance's second half."""
    assert made[1]["kv_cache_bytes"] == 2 * 2 * 2 * 16 * 2 * 16 * 4
    one = ("rollout.guidance_scale=1.0", "rollout.cache_dtype=nvfp4", "num_frames=8")
    packed = make(trained, tmp_path, *one, prompts="prompts=[a red circle,a blue square]")
    matrices, mean = 2 * 2 * 2, 2 * 16
    assert packed["kv_cache_bytes"] == matrices * (2 * (16 * 16 * 9 // 16 + 4) + mean)
    assert json.loads((tmp_path / "generation.json").read_text())["kv_cache_bytes"] == packed["kv_cache_bytes"]


def test_the_network_of_a_checkpoint_has_its_averaged_weights(trained):
    """The weights of the last step alone make worse videos."""
    saved = checkpoint(trained, 12)
    module = load_module(saved, trained)
    assert_same(dict(module.state_dict()), averaged_weights(saved))
    assert any(not torch.equal(value, saved["state_dict"][name]) for name, value in module.state_dict().items())
    assert not module.training
    assert not module.trained_network.training


def test_a_checkpoint_says_what_it_is_wherever_it_lies(trained, tmp_path, monkeypatch):
    """Network, codec and text encoder come from the checkpoint, not from today's defaults or its directory."""
    copy = tmp_path / "model.ckpt"
    copy.write_bytes((trained / "checkpoints" / "step-0000012.ckpt").read_bytes())
    monkeypatch.chdir(tmp_path)
    record = make(Path("model.ckpt"), tmp_path / "videos", "num_frames=4", prompts="prompts=a red circle")
    assert record["settings"]["checkpoint"] == "model.ckpt"
    assert (tmp_path / "videos" / "000-a-red-circle.mp4").exists()


def test_the_metric_measures_the_files_as_written(trained, tmp_path, capsys):
    settings = ("metric=toyworld", "height=64", "width=64")
    record = make(trained, tmp_path, *settings, prompts=f"prompts=[{PROMPTS[0]}]")
    assert {"colour", "shape", "direction", "ground"} <= record["metrics"].keys()
    metric = instantiate(compose("generate", ["metric=toyworld"]).metric)
    expected = generation.measure(metric, [tmp_path / FILES[0]], [PROMPTS[0]])
    assert record["metrics"] == expected
    assert "colour" in capsys.readouterr().out
    again = make(trained, tmp_path, "height=64", "width=64", prompts=f"prompts=[{PROMPTS[0]}]")
    assert again["metrics"] == record["metrics"]


def test_prompts_are_a_text_a_list_a_file_or_a_set(tmp_path):
    def prompts(*overrides: str) -> list[str]:
        return [request.prompt for request in requests_of(compose("generate", overrides))]

    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n  a blue square \nüber, mit Komma\n", encoding="utf-8")
    assert prompts(f"prompts={file}") == ["a red circle", "a blue square", "über, mit Komma"]
    assert prompts("prompts=a red circle") == ["a red circle"]
    assert prompts("prompts='a red circle, slowly'") == ["a red circle, slowly"]
    assert prompts("prompts=[a red circle,'a blue square, slowly',1]") == ["a red circle", "a blue square, slowly", "1"]
    assert prompts("prompt_set=toyworld") == random_prompts(48, 1000003)
    assert prompts("prompt_set=toyworld", "prompts.num_prompts=3", "prompts.seed=5") == random_prompts(3, 5)


def test_the_same_prompt_twice_makes_two_videos(trained, tmp_path):
    make(trained, tmp_path, "num_frames=4", prompts="prompts=[a red circle,a red circle]")
    first, second = (read(tmp_path / f"00{index}-a-red-circle.mp4") for index in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "given", ["prompts=null", "prompts=[]", "prompts=''", "prompts=[a,'']", "prompts={empty}", "prompts='  '"]
)
def test_without_a_prompt_nothing_is_made(trained, tmp_path, given):
    """In public code a set without prompts makes no video, and no error."""
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"no prompt: give prompts='a text', .*prompt_set=toyworld"):
        make(trained, tmp_path / "videos", prompts=given.format(empty=tmp_path / "empty.txt"))
    assert not (tmp_path / "videos").exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (("prompts=nowhere.txt",), ValueError, r"prompts='nowhere\.txt': there is no such file"),
        (("checkpoint=nowhere",), FileNotFoundError, "no checkpoint at nowhere: give a .ckpt file, a run's directory"),
        (("num_frames=6",), ValueError, "num_frames=6"),
        (("height=36",), ValueError, "height=36, width=32 are no multiples of the codec's spatial_ratio=8"),
        (("height=40",), ValueError, "latent height=5, width=4 are no multiples of patch_size"),
        (("rollout.window=6",), ValueError, "window=6"),
        (("rollout.solver=heun",), ValueError, "solver='heun' is unknown; use one of"),
        (("rollout.guidance_scale=-1.0",), ValueError, "guidance_scale=-1.0 is negative"),
        (("rollout.chunk_frames=2",), ValueError, r"unknown key 'rollout\.chunk_frames'"),
        (("rollout.num_step=2",), ValueError, r"unknown key 'rollout\.num_step'.*did you mean rollout\.num_steps\?"),
        (("metric=toyworld", "+metric.colour=1"), ValueError, "metric: .*unexpected keyword argument 'colour'"),
    ],
)
def test_bad_input_is_one_clear_message_before_any_work(
    trained, tmp_path, monkeypatch, calls, settings, error, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        make(trained, tmp_path / "videos", *settings)
    assert not calls
    assert not (tmp_path / "videos").exists()


def test_settings_of_another_type_are_named_before_anything_is_read(tmp_path):
    for setting, rule in (
        ("seed=x", "seed='x' is no int"),
        ("scene_cuts=2", "scene_cuts=2 is no bool"),
        ("rollout.window=abc", "rollout.window='abc' is no int or None"),
        ("rollout.guidance_scale=high", "rollout.guidance_scale='high' is no float or None"),
    ):
        with pytest.raises(ValueError, match=f"^{rule}$"):
            make(tmp_path / "nowhere", tmp_path / "videos", setting)


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("num_frames=0", "a whole number of at least 1, or null"),
        ("height=-64", "a whole number of at least 1, or null: as in training"),
        ("height=0", "a whole number of at least 1, or null"),
        ("width=31.5", "a whole number of at least 1, or null"),
        ("fps=0", "positive, or null: as in training"),
        ("fps=-5", "positive, or null"),
        ("fps=nan", "positive, or null"),
        ("fps=inf", "positive, or null"),
        ("batch_size=0", "a whole number of at least 1$"),
        ("batch_size=None", "a whole number of at least 1$"),
        ("sheet_rows=-1", "a whole number of at least 1$"),
    ],
)
def test_a_wrong_number_is_known_before_anything_is_read(tmp_path, setting, rule):
    """A wrong fps would be found when the first video is written, after the whole rollout, and the record of it would
    refuse the corrected command; a zero would be taken for null."""
    with pytest.raises(ValueError, match=f"^{setting} must be {rule}"):
        make(tmp_path / "nowhere", tmp_path / "videos", setting.replace("None", "null"))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_does_not_say_what_it_is_is_refused(trained, tmp_path):
    saved = checkpoint(trained, 12)
    torch.save(saved | {"config": {}}, tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"plain\.ckpt holds no config, .* not written by `longlive train`"):
        make(tmp_path / "plain.ckpt", tmp_path / "videos")


def test_a_checkpoint_whose_weights_are_of_another_network_is_refused(trained, tmp_path):
    """With the misfits left out, the network is partly random, and so are the videos."""
    saved = checkpoint(trained, 12)
    saved["config"]["module"]["model"]["num_layers"] = 2
    torch.save(saved, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"another model: network\.blocks\.1\.[\w.]+: missing in the checkpoint; "):
        make(tmp_path / "other.ckpt", tmp_path / "videos")
    assert not (tmp_path / "videos").exists()


def with_adapter(trained: Path) -> LongLiveModule:
    """The module of a run, with an adapter that does something."""
    module = load_trained(trained).module
    add_adapter(module.trained_network, "student", LoRASettings(rank=2, alpha=4))
    fill_adapter(module.trained_network, "student", 0)
    module.hold(module.trained_network, "student")
    return module


def rolled_out(module: LongLiveModule) -> torch.Tensor:
    index = torch.zeros(1, 2, dtype=torch.int64)
    engine = module.rollout_engine(replace(module.rollout, num_steps=2, guidance_scale=1.0))
    return engine.generate(module.text_encoder.encode(["a blue square"]), index, index, (16, 4, 4), 0, [0]).latents


def test_an_adapter_is_merged_into_weights_that_are_not_packed(trained):
    """Beside them it costs every product of a rollout two more; packed ones would lose most of it."""
    module, cpu = with_adapter(trained), torch.device("cpu")
    beside, network = rolled_out(module), module.trained_network
    assert (beside - rolled_out(load_trained(trained).module)).abs().max() > 0.01
    generation.place(module, "32-true", cpu)
    assert module.adapter is None
    assert not wrapped_layers(module.trained_network)
    merged = {name: value.clone() for name, value in network.state_dict().items()}
    torch.testing.assert_close(rolled_out(module), beside, rtol=0, atol=1e-4)
    generation.place(module, "bf16-mixed", cpu)
    assert_same(dict(module.trained_network.state_dict()), merged)

    packed = with_adapter(trained)
    generation.place(packed, instantiate(compose("generate", ["precision=nvfp4"]).precision), cpu)
    assert packed.adapter == "student"
    assert wrapped_layers(packed.trained_network)


def test_a_run_initialised_from_foreign_weights_generates_without_them(trained, tmp_path):
    """The checkpoint holds the weights; the file that they once started from may be gone."""
    saved = checkpoint(trained, 12)
    saved["config"]["module"]["weights"] = "/no/longer/there.safetensors"
    torch.save(saved, tmp_path / "model.ckpt")
    make(tmp_path / "model.ckpt", tmp_path / "videos", "num_frames=4", prompts="prompts=a red circle")
    assert (tmp_path / "videos" / "000-a-red-circle.mp4").exists()
