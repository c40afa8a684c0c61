"""`longlive shards stage=encode`: from the settings of a training to latents, and from these to the same training."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from helpers.runs import TINY, assert_same, checkpoint, curves, run, write_toyworld
from longlive.callbacks.provenance import versions
from longlive.codecs.wan import WanVideoCodec
from longlive.config import check_complete, compose, config_directory
from longlive.data.indexed import IndexedShards
from longlive.data.sample import ClipSpec
from longlive.data.shards import load_index
from longlive.data.shots import ShotRules
from longlive.data.sources import UnreadableClipError
from longlive.encode_shards import OnlineEncoder
from longlive.make_shards import make_shards

SILENT = "text._target_=helpers.latents.SilentTextEncoder"
SPEC = ClipSpec(num_frames=8, chunk_frames=4, height=32, width=32, fps=24)
"""The clips of the tiny run."""
STEPS = ("trainer.max_steps=4", "callbacks.checkpoint.every_n_train_steps=4", "module.prompt_dropout=0.3")


@cache
def composed(*overrides: str) -> DictConfig:
    """Composing takes as long as encoding."""
    return compose("shards", ["stage=encode", "source.path=???", "directory=???", *overrides])


def encode(videos: Path | str, latents: Path, *values: str, settings: tuple[str, ...] = TINY) -> None:
    """The command, after its line is parsed; `values` are overrides of values."""
    config = composed(*settings).copy()
    for value in (f"source.path={videos}", f"directory={latents}", *values):
        key, _, text = value.partition("=")
        OmegaConf.update(config, key.lstrip("+"), yaml.safe_load(text), force_add=key.startswith("+"))
    check_complete(config)
    make_shards(config)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Longer than a clip of the tiny run, which begins somewhere in them."""
    return write_toyworld(tmp_path_factory.mktemp("videos"), num_clips=4, num_raw_frames=33)


@pytest.fixture(scope="module")
def latents(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("latents")
    encode(videos, directory, "encode.epochs=2")
    return directory


def test_a_training_on_latents_is_the_training_on_videos(videos: Path, latents: Path, tmp_path: Path) -> None:
    """Losses, weights and optimizer bit by bit, over two epochs, in batches of two, with prompts dropped. The text
    encoder of the second run cannot encode."""
    ours = run(tmp_path / "latents", latents, *STEPS, SILENT)
    run(tmp_path / "videos", videos, *STEPS)
    assert ours.global_step == 4
    ours_curves, theirs_curves = (curves(tmp_path / name) for name in ("latents", "videos"))
    assert ours_curves["train/loss"] == theirs_curves["train/loss"]
    assert len(set(ours_curves["train/loss"].values())) == 4
    ours_state, theirs_state = (checkpoint(tmp_path / name, 4) for name in ("latents", "videos"))
    for name in ("state_dict", "optimizer_states"):
        assert_same(ours_state[name], theirs_state[name], name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fps": 12}, r"other clips than data asks for: fps=24.0 there, 12 here; set data to what is there, or"),
        ({"num_frames": 4}, "num_frames=8 there, 4 here"),
        ({"height": 64, "width": 48}, "height=32 there, 64 here; width=32 there, 48 here"),
        ({"shot_rules": ShotRules("Cut.")}, r"scene_cut_phrase='The scene transitions. ' there, 'Cut.' here"),
    ],
)
def test_a_training_refuses_latents_of_clips_that_it_would_not_have_read(
    latents: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        IndexedShards([latents], replace(SPEC, **change), seed=0, shuffle=True)


def test_a_training_refuses_latents_of_another_codec_or_text_encoder(
    videos: Path, latents: Path, tmp_path: Path
) -> None:
    WanVideoCodec.tiny().autoencoder.save_pretrained(tmp_path / "codec")
    wan = ("codec=wan", f"codec.folder={tmp_path / 'codec'}", "model.in_channels=4", "model.out_channels=4")
    with pytest.raises(ValueError, match=r"were made with codec dct-[0-9a-f]+, and this run's codec is wan-[0-9a-f]+"):
        run(tmp_path / "run", latents, *STEPS, *wan)
    encode(videos, tmp_path / "latents", settings=(*TINY, *wan))
    with pytest.raises(ValueError, match=r"toy-64-12-0.25-0, and this run's text_encoder is toy-64-5-0.25-0"):
        run(tmp_path / "run", tmp_path / "latents", *STEPS, *wan, "text.num_tokens=5")
    assert run(tmp_path / "run", tmp_path / "latents", *STEPS, "trainer.max_steps=1", *wan).global_step == 1


def test_a_batch_cannot_mix_latents_and_videos(videos: Path, latents: Path) -> None:
    with pytest.raises(ValueError, match=r"holds latents, .* videos; a batch cannot mix them"):
        IndexedShards([latents, videos], SPEC, seed=0, shuffle=True)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are forked, which takes no seconds for imports; what spawned ones would be sent is made to be sent."""
    start = torch.multiprocessing.start_processes

    def fork(function: Callable[..., object], args: tuple[Any, ...], start_method: str, **others: Any) -> Any:
        assert start_method == "spawn", "CUDA works in no forked process"
        config, *counters = args
        function, config = pickle.loads(pickle.dumps((function, config)))

        def run(process: int) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            function(process, config, *counters)

        return start(run, start_method="fork", **others)

    monkeypatch.setattr(torch.multiprocessing, "start_processes", fork)


@pytest.mark.usefixtures("forked")
def test_processes_of_a_task_write_what_one_writes_and_say_so(
    videos: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ("encode.epochs=2", "encode.num_tasks=2")
    encode(videos, tmp_path, *tasks, "encode.task_index=1")
    assert not (tmp_path / "shards.json").exists()
    assert (
        f"this task's shards are in {tmp_path}, 1 of all 2; the task that encodes the last" in capsys.readouterr().out
    )
    encode(videos, tmp_path, *tasks, "encode.task_index=0", "encode.num_processes=2")
    assert f"latents of 4 clips in {tmp_path}, 0 unreadable" in capsys.readouterr().out
    for file in latents.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in latents.iterdir()}


@pytest.mark.usefixtures("forked")
def test_an_error_in_a_process_ends_the_task(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that ends as if all were well leaves a hole in the data. A clip that cannot be read is named as by one
    process; of what nobody foresaw, the traceback is needed."""
    damaged = tmp_path / "videos"
    damaged.mkdir()
    for file in videos.iterdir():
        content = file.read_bytes()
        (damaged / file.name).write_bytes(bytes(len(content)) if file.name == "shard-000001.tar" else content)
    with pytest.raises(UnreadableClipError, match=r"^toyworld-00000003: .* checksum differs$"):
        encode(damaged, tmp_path / "latents", "strict=true", "encode.num_processes=2")
    monkeypatch.setattr(OnlineEncoder, "latents", lambda *_: 1 / 0)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="ZeroDivisionError"):
        encode(videos, tmp_path / "latents", "encode.num_processes=2", f"directory={tmp_path / 'others'}")
    assert not [*tmp_path.glob("*/shards.json")][1:], "there are the videos' alone"


def test_bfloat16_halves_the_latents_and_rounds_them(videos: Path, latents: Path, tmp_path: Path) -> None:
    encode(videos, tmp_path, "encode.dtype=bfloat16", "encode.epochs=2")
    exact, rounded = (IndexedShards([folder], SPEC, seed=0, shuffle=False)[0] for folder in (latents, tmp_path))
    assert exact.latents is not None
    assert rounded.latents is not None
    assert (exact.latents.dtype, rounded.latents.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(exact.latents.bfloat16(), rounded.latents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("encode.dtype=float8", "encode.dtype='float8' is unknown; use float32 or bfloat16"),
        ("encode.epochs=0", "encode.epochs=0 must be at least 1"),
        ("encode.num_processes=0", "encode.num_processes=0 must be at least 1"),
        ("encode.device=tpu", "encode.device='tpu' is unknown; use auto, cpu or cuda"),
        ("encode.task_index=8", "task_index=8 must be one of 0 .. 0, for num_tasks=1"),
        ("encode.piece_frames=0", "encode.piece_frames=0 must be at least 1"),
        ("encode.num_processes=two", "encode.num_processes='two' is no int"),
        ("encode.epochs=1.5", "encode.epochs=1.5 is no int"),
        ("strict=maybe", "strict='maybe' is no bool"),
        ("data.train=elsewhere", "data.train=elsewhere is not what is encoded; give source.path alone"),
        ("data.height=36", "height=36, width=32 are no multiples of the codec's spatial_ratio=8"),
        ("+data.temporal_ratio=2", "data.temporal_ratio=2, but the codec's is 4"),
    ],
)
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_wrong_setting_is_refused_before_any_work(
    videos: Path, tmp_path: Path, change: str, message: str, num_processes: int
) -> None:
    """By the command itself: what a process of it raises comes with the traceback of that process."""
    with pytest.raises(ValueError, match=message):
        encode(videos, tmp_path / "latents", f"encode.num_processes={num_processes}", change)
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_interrupted_run_of_other_settings_is_not_continued(
    videos: Path, tmp_path: Path, num_processes: int
) -> None:
    encode(videos, tmp_path, "encode.num_tasks=2")
    with pytest.raises(
        ValueError, match=r"holds an interrupted run of other settings .*dtype: float32 there, bfloat16"
    ):
        encode(videos, tmp_path, "encode.dtype=bfloat16", f"encode.num_processes={num_processes}")


def test_what_is_no_set_of_videos_is_refused(latents: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage=encode takes shards of videos"):
        encode(latents, tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="nowhere is no directory"):
        encode("nowhere", tmp_path / "new")
    with pytest.raises(ValueError, match="stage=encode takes shards of videos, not a ToyWorldSource; write its shards"):
        make_shards(compose("shards", ["source=toyworld", "stage=encode", f"directory={tmp_path / 'new'}", *TINY]))
    prompts = "experiment=toyworld_distill_4step"
    with pytest.raises(ValueError, match="data is a PromptDataModule, which reads no clips"):
        encode("nowhere", tmp_path / "new", settings=(prompts,))
    assert not (tmp_path / "new").exists()


def test_tasks_are_told_apart_by_slurms_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(**variables: int) -> tuple[Any, ...]:
        with monkeypatch.context() as patched:
            for name, value in variables.items():
                patched.setenv(f"SLURM_{name}", str(value))
            settings = OmegaConf.load(config_directory() / "stage" / "encode.yaml").encode
            return settings.task_index, settings.num_tasks, settings.first_gpu

    assert place() == (0, 1, 0)
    assert place(ARRAY_TASK_ID=3, ARRAY_TASK_COUNT=8, PROCID=0, STEP_NUM_TASKS=1, LOCALID=0) == (3, 8, 0)
    assert place(PROCID=5, STEP_NUM_TASKS=16, LOCALID=1) == (5, 16, 1)
    assert place(PROCID=0) == (0, 1, 0), "a batch script has a number, but is alone"


def test_what_is_encoded_are_the_clips_of_an_experiment() -> None:
    """With the one setting that its training needs too; nothing else must be given."""
    experiment = ["experiment=wan5b_teacher_forcing", "codec.folder=/models/wan"]
    config = compose("shards", ["stage=encode", "source.path=x", "directory=y", *experiment])
    check_complete(config)
    training = compose("train", [*experiment, "data.train=x", "directory=y"])
    for part in ("data", "codec", "text", "seed"):
        assert config[part] == training[part]
    with pytest.raises(ValueError, match="unknown key 'codec'"):
        compose("shards", ["source=toyworld", "directory=y", "codec=wan"])


def test_the_index_says_what_latents_are_of_and_what_made_them(latents: Path) -> None:
    described = load_index(latents).latents
    assert described is not None
    assert described["codec"].startswith("dct-")
    assert described["versions"]["torch"] == versions()["torch"]
    assert (described["num_epochs"], described["height"], described["dtype"]) == (2, 32, "float32")
