"""The experiments of the 5B model: composed in every precision and length, built on meta, planned; and two layers of
it, as wide as they are, trained from shards on the disk."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from helpers.distributed import run_on_ranks
from helpers.runs import write_toyworld
from longlive.callbacks.ema import EMA
from longlive.callbacks.rank_measure import memory
from longlive.config import check_complete, compose, config_directory, recipe_directory
from longlive.doctor.plan import make_plan
from longlive.doctor.plan_config import Machine, codec_of, module_of
from longlive.models.wan.model import CausalWan
from longlive.modules.distillation import DistillationModule
from longlive.train import make_trainer, train

FOLDER = config_directory() / "experiment"
TUNING = ["wan5b_i2v", "wan5b_multi_shot", "wan5b_teacher_forcing"]
DISTILLATION = ["wan5b_distill_2step", "wan5b_distill_4step"]
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("wan5b*.yaml"))
PRECISIONS = ["bf16-mixed", "fp8", "nvfp4"]
CLIPS = {"5s": (32, 1), "16s": (96, 4), "32s": (192, 8), "64s": (384, 8)}
"""Frames, and ranks that share them."""


def test_these_are_all() -> None:
    assert sorted(TUNING + DISTILLATION) == EXPERIMENTS
    assert set(CLIPS) == {path.stem for path in (config_directory() / "clip").glob("*.yaml")}


def test_a_strategy_that_shares_no_clips_is_told_what_to_leave_out() -> None:
    """Clips say how many GPUs share them."""
    settings = ["experiment=wan5b_teacher_forcing", "data.global_batch_size=32", "strategy=fsdp"]
    with pytest.raises(ValueError, match=r"'sequence_parallel_size'; .* left out by (~\S+)$") as refused:
        make_plan(compose("train", settings), Machine(32))
    plan = make_plan(compose("train", [*settings, str(refused.value).split()[-1]]), Machine(32))
    assert (plan.strategy, plan.sequence_size) == ("ShardedStrategy", 1)


def cases() -> list[tuple[str, str, str]]:
    """Every experiment in every length and in every precision: the two touch no common setting, so not all pairs."""
    clips = list(CLIPS)
    return [
        (experiment, clip, PRECISIONS[(number + shift) % len(PRECISIONS)])
        for shift, experiment in enumerate(EXPERIMENTS)
        for number, clip in enumerate(clips)
    ]


@pytest.mark.parametrize(("experiment", "clip", "precision"), cases())
def test_an_experiment_is_built_on_meta_and_planned_in_every_length_and_precision(
    experiment: str, clip: str, precision: str
) -> None:
    # A clip per data rank: 5 s are on one GPU each, and the source's 16 clips on 16.
    batch = ["data.global_batch_size=32"] if (experiment in TUNING and clip == "5s") else []
    config = compose("train", [f"experiment={experiment}", f"clip={clip}", f"precision={precision}", *batch])
    plan = make_plan(config, Machine(32, gpu_memory=178.0), pre_encoded=True)
    work = plan.workload
    assert (work.num_frames, plan.sequence_size) == CLIPS[clip]
    assert (work.chunk_frames, work.height, work.width, work.tokens_per_frame) == (8, 44, 80, 880)
    assert (plan.num_parameters, plan.precision) == (4_999_787_712, precision)
    assert [rank.tokens for rank in plan.ranks] == [
        2 * work.num_frames * 880 // plan.sequence_size
    ] * plan.sequence_size
    assert plan.step_flops > 1e15
    assert plan.fits


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_source_is_followed(experiment: str, tmp_path: Path) -> None:
    given = ["trainer.accelerator=cpu", "trainer.devices=1", f"directory={tmp_path}"]
    config = compose("train", [f"experiment={experiment}", *given])
    data = "data.train" if experiment in TUNING else "data.prompts.path"
    missing = rf"must be given: codec\.folder=\.\.\., {re.escape(data)}=\.\.\.$"
    with pytest.raises(ValueError, match=missing):
        check_complete(config)
    assert config.data.num_frames == (96 if experiment in TUNING else 32), "without clip="
    module = module_of(config, codec_of(config.codec))
    with torch.device("meta"):
        network = CausalWan(module.model_config)
    (group,) = module.make_optimizer(list(network.named_parameters())).param_groups
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"], len(group["params"])) == (
        1e-5,
        (0.0, 0.999),
        0.0,
        825,
    )
    trainer = make_trainer(config)
    (average,) = (callback for callback in trainer.callbacks if isinstance(callback, EMA))
    rollout = module.rollout
    if isinstance(module, DistillationModule):
        assert (average.decay, average.start_step) == (0.99, 200)
        assert (trainer.max_steps, trainer.gradient_clip_val) == (5000, None)
        (critic,) = module.make_critic_optimizer(list(network.named_parameters())).param_groups
        assert (critic["lr"], tuple(critic["betas"])) == (2e-6, (0.0, 0.999))
        assert {(settings.rank, settings.alpha) for settings in module.lora.values()} == {(128, 128)}
        assert (module.student_every, module.guidance) == (5, 3.0)
        assert (rollout.window, rollout.sink_frames, rollout.guided) == (32, 8, False)
        assert rollout.num_steps == int(experiment.removeprefix("wan5b_distill_")[0])
    else:
        assert (average.decay, average.start_step) == (0.99, 100)
        assert (trainer.max_steps, trainer.gradient_clip_val) == (600, 10.0)
        assert (rollout.num_steps, rollout.guidance_scale) == (50, 5.0)
        assert config.data.global_batch_size == 16
        assert module.given_frames == (experiment == "wan5b_i2v")
    assert rollout.shot_rope_offset == (0.0 if experiment in ("wan5b_i2v", "wan5b_teacher_forcing") else 8.0)


def test_one_folder_gives_all_weights_and_every_number_has_its_source() -> None:
    numbers = []
    for path in (FOLDER / "base" / "wan5b.yaml", *(FOLDER / f"{name}.yaml" for name in EXPERIMENTS)):
        for line in path.read_text().splitlines():
            if re.match(r"^ +\w+: *\[?[\d.]", line):
                numbers.append((path.name, line))
    assert len(numbers) > 50
    assert [number for number in numbers if not re.search(r"# \[(2|W|F|S|ours)\]", number[1])] == []
    config = compose("train", ["experiment=wan5b_distill_2step", "codec.folder=/models/wan"])
    assert config.module.weights == config.text.encoder.folder == "/models/wan"


def _train(overrides: list[str]) -> tuple[int, float]:
    """Steps, and GiB that the process held at most."""
    trainer: Trainer = train(compose("train", overrides))
    return trainer.global_step, memory("VmHWM") / 2**30


def test_two_layers_of_the_true_widths_train_from_shards(tmp_path: Path) -> None:
    """400 million parameters: what no layer of a toy's width shows. Small are the clips alone, their codec and text;
    and there is no optimizer's state, nor an average, for this to fit where tests run."""
    shards = write_toyworld(tmp_path / "shards", num_clips=2, num_raw_frames=61)
    overrides = [
        "experiment=wan5b_teacher_forcing",
        f"data.train={shards}",
        f"directory={tmp_path / 'run'}",
        "model.num_layers=2",
        *("codec=dct", "model.in_channels=16", "model.out_channels=16", "module.weights=null"),
        *("text=toy", "~text.encoder", "text.num_tokens=8"),
        *("data.num_frames=16", "data.height=32", "data.width=32", "data.num_workers=0", "data.global_batch_size=1"),
        *("optimizer._target_=torch.optim.SGD", "~optimizer.betas", "callbacks.ema=null"),
        "module.error_recycling.budget_mib=64",
        "strategy.sequence_parallel_size=1",
        *("trainer.accelerator=cpu", "trainer.devices=1", "trainer.max_steps=2", "trainer.log_every_n_steps=1"),
        *("callbacks.checkpoint=null", "callbacks.samples=null", "callbacks.progress=null", "logger.tensorboard=null"),
        *("+trainer.enable_checkpointing=false", "+trainer.enable_progress_bar=false"),
    ]
    ((steps, held),) = run_on_ranks(_train, 1, overrides, init_process_group=False, timeout=300)
    assert steps == 2
    assert held < 5.5
    widths, trained = (compose("train", given).model for given in (["model=ti2v_5b"], overrides))
    assert {name for name in widths if widths[name] != trained[name]} == {"num_layers", "in_channels", "out_channels"}


def commands() -> list[list[str]]:
    """The words of every command of the recipes of these experiments, as a shell would split them."""
    found = []
    for path in sorted(recipe_directory().glob("wan5b_*.md")):
        for block in re.findall(r"^```\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [words for line in lines if (words := shlex.split(line, comments=True))]
    return found


def test_the_commands_of_the_recipes_are_commands() -> None:
    """A setting that was renamed since fails on somebody's cluster."""
    composed = set()
    for program, command, *arguments in commands():
        if program == "longlive" and command in ("train", "shards", "generate", "export"):
            check_complete(compose(command, arguments))
            composed |= {argument for argument in arguments if argument.startswith("experiment=")}
        else:
            assert (program, command) in {("hf", "download"), ("longlive", "doctor")}
    assert composed == {f"experiment={experiment}" for experiment in EXPERIMENTS}
