"""Every file of conf/ is composed as the commands compose it, and what it describes is built."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

from helpers.runs import write_toyworld
from helpers.videos import encode, numbered_frames
from longlive.callbacks.checkpoint import RunCheckpoint
from longlive.callbacks.ema import EMA
from longlive.codecs.base import to_unit_range
from longlive.codecs.wan import WanVideoCodec
from longlive.config import check_complete, compose, config_directory, instantiate, to_plain
from longlive.data.datamodule import VideoDataModule
from longlive.data.prompt_batches import PromptDataModule
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.modules.base import LongLiveModule
from longlive.rollout.engine import RolloutSettings
from longlive.train import make_trainer

CONF = config_directory()
PRIMARY = {path.stem for path in CONF.glob("*.yaml")}
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
LARGE = [name for name in EXPERIMENTS if name.startswith("wan5b")]
"""Experiments of the 5B model, which no test allocates: `test_conf_wan5b.py`."""
OF_THE_WHOLE = {"clip", "experiment", "launcher", "stage"}
"""Groups whose files write at the top level."""
OPTIONS = sorted(
    (path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent.name not in OF_THE_WHOLE
)
OTHER_COMMAND = {"source": "shards", "prompt_set": "generate", "metric": "generate", "format": "export"}
"""Groups of another primary file than `train.yaml`."""
OF_PROMPTS = {name for name in EXPERIMENTS if "distill" in name or "long_tuning" in name}
"""Experiments that make their own videos and read none."""
NEEDS = {("module", "distillation"): ["rollout.guidance_scale=1.0"]}
"""What an option needs of others."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_toyworld(tmp_path_factory.mktemp("shards"), num_clips=2, num_raw_frames=45)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[tuple[str, str], str]:
    """Per option that asks for a folder, an override that gives one."""
    codec, source = tmp_path_factory.mktemp("codec"), tmp_path_factory.mktemp("source")
    text = tmp_path_factory.mktemp("text")
    WanVideoCodec.tiny().autoencoder.save_pretrained(codec)
    write_clip(source)
    write_text_encoder(text)
    return {
        ("codec", "wan"): f"codec.folder={codec}",
        ("source", "folder"): f"source.path={source}",
        ("source", "video_shards"): f"source.path={source}",
        ("text", "umt5"): f"text.encoder.folder={text}",
        ("data", "prompts"): f"data.prompts.path={write_prompts(text)}",
    }


def write_clip(folder: Path) -> None:
    for kind in ("video", "caption"):
        (folder / kind / "clips").mkdir(parents=True)
    (folder / "video" / "clips" / "one.mp4").write_bytes(encode(numbered_frames(2)))
    (folder / "caption" / "clips" / "one.json").write_text('{"caption": "numbers"}')


def write_prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("a red kite\na brown dog\n")
    return path


def write_text_encoder(folder: Path) -> None:
    """The parts of a text encoder's folder that are looked at before the first prompt."""
    (folder / "text_encoder").mkdir()
    (folder / "tokenizer").mkdir()
    (folder / "text_encoder" / "config.json").write_text('{"d_model": 64}')
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    save_file({"shared.weight": torch.zeros(4, 64)}, folder / "text_encoder" / "model.safetensors")


def experiment(name: str, shards: Path, directory: Path, *more: str) -> DictConfig:
    clips = [] if name in OF_PROMPTS else [f"data.train={shards}"]
    return compose("train", [f"experiment={name}", f"directory={directory}", *clips, *more])


def option(group: str, name: str, *more: str) -> DictConfig:
    """The group's part of the config that its command runs with."""
    choice = [] if name in PRIMARY else [f"{group}={name}"]
    config = compose(OTHER_COMMAND.get(group, "train"), [*choice, *more])
    part: DictConfig = config[{"prompt_set": "prompts"}.get(group, group)]
    return part


def build(part: DictConfig) -> dict[str, Any]:
    """The objects of a group: itself, or each of its named entries."""
    entries = {"": part} if "_target_" in part else {str(name): part[name] for name in part}
    return {name: instantiate(entry) for name, entry in entries.items()}


def test_there_is_something_to_test():
    assert {"train", "generate", "export", "shards"} == PRIMARY
    assert "toyworld" in EXPERIMENTS
    assert {"model", "data", "callbacks", "trainer"} < {group for group, _ in OPTIONS}


@pytest.mark.parametrize("name", sorted(set(EXPERIMENTS) - set(LARGE)))
def test_every_experiment_is_built(name, shards, tmp_path):
    """An experiment that nobody has started lately no longer starts."""
    config = experiment(name, shards, tmp_path / "run", "trainer.accelerator=cpu", "trainer.devices=1")
    check_complete(config)
    module = instantiate(config.module)
    assert isinstance(module, LongLiveModule)
    data = instantiate(config.data)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.batch_size == config.data.batch_size
    if name in OF_PROMPTS:
        assert isinstance(data, PromptDataModule)
        assert data.num_clips == (1 if module.stream is None else module.stream.settings.num_clips)
        assert config.trainer.gradient_clip_val is None, "Lightning clips nothing that a module steps by hand"
    else:
        assert isinstance(data, VideoDataModule)
        module.codec.check_video(to_unit_range(batch.raw_frames))
    assert len(batch.prompts[0]) * config.data.chunk_frames == config.data.num_frames
    trainer = make_trainer(config)
    assert trainer.max_steps == config.trainer.max_steps > 0
    callbacks = [type(callback) for callback in trainer.callbacks]
    assert {RunCheckpoint, EMA} <= set(callbacks)
    assert [Path(logger.log_dir) for logger in trainer.loggers] == [tmp_path / "run" / "tensorboard"]
    assert not (tmp_path / "run").exists()
    assert OmegaConf.create(to_plain(config)) == OmegaConf.create(OmegaConf.to_container(config, resolve=True))


@pytest.mark.parametrize("name", sorted(set(EXPERIMENTS) - set(LARGE)))
def test_every_experiment_can_be_built_as_a_network_with_its_optimizer(name, shards, tmp_path):
    """An optimizer is described by its arguments alone and made when the network exists: only then do they show."""
    module = instantiate(experiment(name, shards, tmp_path).module)
    module.configure_model()
    made = module.configure_optimizers()
    optimizers, schedulers = made if name in OF_PROMPTS else ([made["optimizer"]], [made["lr_scheduler"]["scheduler"]])
    parameters = [
        parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    ]
    learning = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    assert {id(parameter) for parameter in parameters} == learning
    assert len(parameters) == len(learning)
    assert [scheduler.optimizer for scheduler in schedulers] == optimizers
    assert name in OF_PROMPTS or made["lr_scheduler"]["interval"] == "step"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_says_how_it_is_run(name):
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    assert f"# longlive train experiment={name}" in text
    assert f"\nname: {name}\n" in text


@pytest.fixture(scope="module")
def parts(shards, folders, tmp_path_factory) -> dict[tuple[str, str], DictConfig]:
    """Every option's part of a config in which everything is given that must be."""
    directory = tmp_path_factory.mktemp("run")
    found = {}
    for group, name in OPTIONS:
        takes_clips = group not in OTHER_COMMAND and "prompts" not in name
        needed = [*NEEDS.get((group, name), []), *([f"data.train={shards}"] if takes_clips else [])]
        if (group, name) in folders:
            needed.append(folders[group, name])
        if OTHER_COMMAND.get(group) != "export":
            needed.append(f"directory={directory}")
        found[group, name] = option(group, name, *needed)
    return found


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_of_every_group_is_built(group, name, parts):
    part = parts[group, name]
    for key, made in build(part).items():
        target = part[key]._target_ if key else part._target_
        called = made.func if isinstance(made, partial) else made
        names = {getattr(called, "__name__", ""), type(made).__name__}
        assert names & set(target.split(".")) or target.endswith(
            ("random_prompts", "random_story_prompts", "random_image_prompts", "lightning_strategy", "choose_precision")
        )


@pytest.mark.parametrize(
    ("group", "name", "folder", "error", "message"),
    [
        ("codec", "wan", "codec.folder", ValueError, "codec: codec folder=nowhere holds no config.json"),
        ("text", "umt5", "text.encoder.folder", ValueError, "text.encoder: text encoder folder=nowhere lacks text_enc"),
        ("source", "folder", "source.path", FileNotFoundError, "nowhere/video is no folder; expected video/<name>/"),
    ],
)
def test_a_folder_that_does_not_exist_is_named(tmp_path, group, name, folder, error, message):
    with pytest.raises(error, match=message):
        instantiate(option(group, name, f"{folder}=nowhere", f"directory={tmp_path}"))


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_a_setting_that_an_option_does_not_have_is_refused_by_name(group, name, parts):
    """Options that are parsed and ignored: the run trains with the default, and its config says otherwise."""
    part = parts[group, name]
    entry = (part if "_target_" in part else next(iter(part.values()))).copy()
    OmegaConf.set_struct(entry, False)
    entry.no_such_setting = 1
    if group == "logger":
        # TensorBoard's writer gets what its logger does not know; Lightning opens it before anything else.
        with pytest.raises(TypeError, match="no_such_setting"):
            _ = instantiate(entry).experiment
    else:
        with pytest.raises(ValueError, match="no_such_setting"):
            instantiate(entry)


@pytest.mark.parametrize(
    ("command", "override", "near"),
    [
        ("train", "trainer.max_step=1", "trainer.max_steps"),
        ("train", "model.num_layer=1", "model.num_layers"),
        ("train", "num_layers=1", "model.num_layers"),
        ("train", "data.batchsize=1", "data.batch_size"),
        ("train", "optimizer.learning_rate=1", "learning_rate"),
        ("train", "callbacks.ema.deacy=1", "callbacks.ema.decay"),
        ("train", "module.prompt_drop_out=1", "module.prompt_dropout"),
        ("train", "initialize_from=x", "initialise_from"),
        ("train", "+seeds=1", "seed"),
        ("generate", "num_frame=1", "num_frames"),
        ("generate", "prompt=x", "prompts"),
        ("generate", "rollout.windows=1", "rollout.window"),
        ("shards", "clip_per_shard=1", "clips_per_shard"),
        ("export", "format.other=fp32", "format.others"),
    ],
)
def test_a_misspelt_setting_is_answered_with_the_one_that_exists(command, override, near):
    source = {"shards": ["source=toyworld"], "export": ["format=nvfp4"]}.get(command, [])
    with pytest.raises(ValueError, match=rf"unknown (top-level )?key .*did you mean .*\b{near}\b"):
        compose(command, [*source, override])


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("train", "data.train=..."),
        ("generate", "checkpoint=..., directory=..."),
        ("shards", "directory=..."),
        ("export", "checkpoint=..., output=..."),
    ],
)
def test_what_must_be_given_is_named(command, missing):
    source = {"shards": ["source=toyworld"], "export": ["format=bf16"]}.get(command, [])
    with pytest.raises(ValueError, match=f"^these settings must be given: {re.escape(missing)}$"):
        check_complete(compose(command, source))


@pytest.mark.parametrize(("name", "expected"), [("tiny", WanConfig.tiny), ("ti2v_5b", WanConfig.ti2v_5b)])
def test_the_models_have_the_sizes_of_their_names(name, expected: Callable[[], WanConfig]):
    assert instantiate(compose("train", [f"model={name}"]).model) == expected()


def test_the_5b_model_has_its_published_number_of_parameters():
    config = instantiate(compose("train", ["model=ti2v_5b"]).model)
    with torch.device("meta"):
        network = CausalWan(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_999_787_712


def test_a_model_and_a_codec_that_do_not_fit_are_refused(shards, tmp_path):
    config = experiment("toyworld", shards, tmp_path, "model=ti2v_5b")
    with pytest.raises(ValueError, match="in_channels=48, but the codec makes latents of 16 channels"):
        instantiate(config.module)


def test_generate_offers_every_rollout_setting_but_the_chunk():
    """A setting that is missing here cannot be changed after training."""
    names = {field.name for field in fields(RolloutSettings)} - {"chunk_frames"}
    assert set(compose("generate").rollout) == names
    assert set(compose("generate").rollout.values()) == {None}


def test_settings_that_must_agree_are_written_once():
    """Two copies of one number drift apart with the first override."""
    config = compose("train", ["data.chunk_frames=2", "data.height=128", "data.fps=8", "seed=7", "trainer.max_steps=9"])
    assert config.module.chunk_frames == config.rollout.chunk_frames == 2
    assert config.callbacks.samples.height == 128
    assert config.callbacks.samples.fps == 8
    assert config.module.seed == config.data.seed == 7
    assert config.learning_rate.num_training_steps == 9
    assert compose("train", ["model.text_dim=32"]).text.embed_dim == 32


def test_a_runs_files_all_lie_in_its_directory(shards):
    config = experiment("toyworld", shards, Path("/somewhere/run"))
    assert config.trainer.default_root_dir == "/somewhere/run"
    assert config.callbacks.checkpoint.dirpath == "/somewhere/run/checkpoints"
    assert config.callbacks.samples.directory == "/somewhere/run/samples"
    assert config.logger.tensorboard.save_dir == "/somewhere/run"


def test_lightning_splits_no_data_and_runs_no_epoch():
    """Its own sampler would replace the data's order; its sanity check would draw from the data before training."""
    config = compose("train", ["trainer.accelerator=cpu", "callbacks=default", "data.train=x"])
    trainer = instantiate(config.trainer, callbacks=[], logger=False)
    assert isinstance(trainer, Trainer)
    assert not trainer._accelerator_connector.use_distributed_sampler
    assert trainer.max_epochs == -1
    assert trainer.num_sanity_val_steps == 0
