"""What every training stage shares: how a network comes into being, and what is refused before any work."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from helpers.distributed import run_on_ranks
from longlive.codecs.base import to_unit_range
from longlive.codecs.wan import WanVideoCodec
from longlive.data.batch import VideoBatch
from longlive.models.wan.config import WanConfig
from longlive.models.wan.weights import save_weights
from longlive.modules.base import LongLiveModule, codec_device
from longlive.modules.teacher_forcing import TeacherForcingModule
from longlive.parallel.mesh import ALONE, SequenceShare
from longlive.rollout.engine import RolloutSettings
from longlive.text.toy import ToyTextEncoder


def test_the_network_is_built_by_configure_model_and_once(settings: dict[str, Any]) -> None:
    """Lightning calls it again for validation: a second network would drop what was learned."""
    module = TeacherForcingModule(**settings)
    with pytest.raises(RuntimeError, match=r"built by configure_model\(\)"):
        _ = module.trained_network
    assert not list(module.parameters())
    module.configure_model()
    network = module.trained_network
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    module.configure_model()
    assert module.trained_network is network
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
        assert tensor.isfinite().all(), name
        assert tensor.device.type == "cpu", name


def test_a_default_device_changes_nothing_in_how_the_network_is_built(settings: dict[str, Any]) -> None:
    """Lightning builds it with the accelerator as torch's default device; meta stands in for one here."""
    plain, within = (TeacherForcingModule(**settings) for _ in range(2))
    plain.configure_model()
    with torch.device("meta"):
        within.configure_model()
    for name, tensor in within.trained_network.state_dict().items():
        assert torch.equal(tensor, plain.trained_network.state_dict()[name]), name


def test_initial_weights_are_a_function_of_the_seed(settings: dict[str, Any]) -> None:
    modules = [TeacherForcingModule(**(settings | {"seed": seed})) for seed in (3, 3, 4)]
    for number, module in enumerate(modules):
        torch.manual_seed(number)
        module.configure_model()
    first, same, other = (module.trained_network.blocks[0].ffn[0].weight for module in modules)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_weights_start_from_a_file(settings: dict[str, Any], make_module: Callable[..., Any], tmp_path: Path) -> None:
    """Catches a network that is initialised after it was loaded."""
    network = make_module().trained_network
    for naming in ("original", "diffusers"):
        save_weights(network.state_dict(), network.config, tmp_path / naming, naming)
        module = TeacherForcingModule(**settings, weights=str(tmp_path / naming))
        module.configure_model()
        for name, tensor in module.trained_network.state_dict().items():
            assert torch.equal(tensor, network.state_dict()[name]), name


def test_codec_and_text_encoder_are_frozen_and_not_part_of_the_module(settings: dict[str, Any]) -> None:
    """In the state, 700 million of codec parameters would be in every checkpoint, average and optimizer."""
    codec = WanVideoCodec.tiny().train().requires_grad_(True)
    text_encoder = ToyTextEncoder(embed_dim=32)
    text_encoder.scale = torch.nn.Parameter(torch.ones(1))
    model = replace(settings["model"], in_channels=4, out_channels=4)
    module = TeacherForcingModule(**(settings | {"codec": codec, "text_encoder": text_encoder, "model": model}))
    module.configure_model()
    module.train()
    ours = {f"network.{name}" for name, _ in module.trained_network.named_parameters()}
    assert set(module.state_dict()) == ours == {name for name, _ in module.named_parameters()}
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert len(optimizer.param_groups[0]["params"]) == len(ours)
    assert module.codec is codec
    assert module.text_encoder is text_encoder
    for frozen in (codec, text_encoder):
        assert not frozen.training
        assert list(frozen.parameters())
        assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_the_codec_follows_the_module_to_its_device(settings: dict[str, Any]) -> None:
    """It is no submodule, so `module.to` alone does not move it."""
    module = TeacherForcingModule(**settings)
    assert codec_device(module.codec) == torch.device("cpu")
    module.to("meta")
    assert codec_device(module.codec) == torch.device("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": WanConfig.tiny(in_channels=4, text_dim=32)}, "in_channels=4, but the codec makes latents of 16"),
        ({"text_encoder": ToyTextEncoder(embed_dim=64)}, "text_dim=32, but .* have 64 features; set model.text_dim=64"),
        ({"chunk_frames": 0}, "chunk_frames=0 must be at least 1"),
        ({"rollout": RolloutSettings(chunk_frames=4)}, "rollout.chunk_frames=4 differs from chunk_frames=2"),
        ({"rollout": RolloutSettings(chunk_frames=2, cache_dtype="nvfp4")}, "head_dim=24 is no multiple of it"),
        ({"weights": "/nowhere/model.safetensors"}, "/nowhere/model.safetensors does not exist; give a folder"),
        ({"prompt_dropout": 1.0}, "prompt_dropout=1.0 must be at least 0 and below 1"),
        ({"noise_augmentation": -0.1}, "noise_augmentation=-0.1 must be at least 0 and below 1"),
        ({"window": 5}, "window=5 is no multiple of chunk_frames=2; use 4 or 6"),
        ({"sink_frames": 2}, "no effect without a window"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit_are_refused_before_any_work(
    settings: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherForcingModule(**(settings | change))


def test_unknown_settings_are_refused(settings: dict[str, Any]) -> None:
    """Known mistake 13: a setting that is parsed and ignored."""
    with pytest.raises(TypeError, match="chunk_size"):
        TeacherForcingModule(**settings, chunk_size=3)


def test_a_module_rolls_out_in_its_own_chunks_and_settings(make_module: Callable[..., Any]) -> None:
    assert make_module().rollout == RolloutSettings(chunk_frames=2)
    settings = RolloutSettings(chunk_frames=2, num_steps=3, window=4)
    module = make_module(rollout=settings)
    engine = module.rollout_engine()
    assert engine.settings is settings
    assert engine.model is module.trained_network
    assert engine.schedule is module.schedule
    other = replace(settings, num_steps=1)
    assert module.rollout_engine(other).settings is other


def test_ranks_that_do_not_divide_a_chunk_make_the_whole_of_every_rollout(make_module: Callable[..., Any]) -> None:
    """Three ranks can train on chunks of two frames; their sample videos must not end the run."""

    class OfThree(TeacherForcingModule):
        share = ALONE

        @property
        def sequence(self) -> SequenceShare:
            return self.share

    module = make_module(OfThree)
    module.share = SequenceShare(1, 3)
    engine = module.rollout_engine()
    assert engine.model is module.trained_network
    assert engine.num_cached_heads == module.model_config.num_heads


def test_raw_frames_are_encoded_and_latents_passed_on(make_module: Callable[..., Any], batch: VideoBatch) -> None:
    module = make_module()
    generator = torch.Generator().manual_seed(0)
    raw_frames = torch.randint(256, (2, 21, 3, 32, 32), generator=generator).to(torch.uint8)
    latents = module.encode(replace(batch, latents=None, raw_frames=raw_frames))
    assert latents.shape == (2, 6, 16, 4, 4)
    assert torch.equal(latents, module.codec.encode(raw_frames.float() / 127.5 - 1))
    assert batch.latents is not None
    passed = module.encode(replace(batch, latents=batch.latents.bfloat16()))
    assert passed.dtype == torch.float32
    torch.testing.assert_close(passed, batch.latents, atol=0.02, rtol=0.01)
    with pytest.raises(ValueError, match=r"num_raw_frames=20 .* use 17 or 21"):
        module.encode(replace(batch, latents=None, raw_frames=raw_frames[:, :20]))


def test_pixels_fill_the_range_from_minus_one_to_one() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(1, 1, 3, 16, 16)
    video = to_unit_range(values)
    assert video.dtype == torch.float32
    assert (float(video.min()), float(video.max())) == (-1, 1)
    torch.testing.assert_close(video[0, 0, 0].flatten().diff(), torch.full((255,), 2 / 255))


def test_prompts_are_encoded_once_each_and_indexed_per_chunk(make_module: Callable[..., Any]) -> None:
    module = make_module()
    embeds, index = module.embed([["red", "blue", "red"], ["blue", "", "red"]])
    assert index.tolist() == [[0, 1, 0], [1, 2, 0]]
    assert torch.equal(embeds, module.text_encoder.encode(["red", "blue", ""]))
    with pytest.raises(ValueError, match="no prompt"):
        module.embed([])


def test_the_learning_rate_steps_once_per_optimizer_step(
    settings: dict[str, Any], batch: VideoBatch, make_trainer: Callable[..., Trainer]
) -> None:
    """Lightning's default is once per epoch, which for an endless stream is never."""
    halving = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    module = TeacherForcingModule(**settings, learning_rate=halving)
    run = make_trainer(max_steps=3, accumulate_grad_batches=2)
    run.fit(module, DataLoader([batch] * 6, batch_size=None))
    assert run.global_step == 3
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 2**3)


def test_mixed_precision_trains_float32_weights(
    settings: dict[str, Any], batch: VideoBatch, make_trainer: Callable[..., Trainer]
) -> None:
    module = TeacherForcingModule(**settings)
    make_trainer(precision="bf16-mixed", max_steps=1).fit(module, DataLoader([batch], batch_size=None))
    assert {parameter.dtype for parameter in module.trained_network.parameters()} == {torch.float32}
    assert module.trained_network.head.head.weight.abs().sum() > 0, "it has trained"


def test_a_checkpoint_holds_the_config_and_the_trained_weights_alone(
    settings: dict[str, Any], batch: VideoBatch, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    module = TeacherForcingModule(**settings)
    module.run_config = {"model": {"dim": 48}}
    loader = DataLoader([batch], batch_size=None)
    run = make_trainer(max_steps=1)
    run.fit(module, loader)
    run.save_checkpoint(tmp_path / "step.ckpt")
    checkpoint = torch.load(tmp_path / "step.ckpt", weights_only=True)
    assert checkpoint["config"] == {"model": {"dim": 48}}
    assert all(name.startswith("network.") for name in checkpoint["state_dict"])

    other = TeacherForcingModule(**(settings | {"model": replace(settings["model"], num_layers=1)}))
    other.configure_model()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"network.blocks.1.modulation: not in this model"):
        make_trainer(max_steps=2).fit(other, loader, ckpt_path=tmp_path / "step.ckpt", weights_only=True)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def _sum_over_ranks() -> tuple[list[float], list[float]]:
    values = torch.tensor([1.0, 10.0 * dist.get_rank()])
    summed = LongLiveModule.sum_over_ranks(LongLiveModule.__new__(LongLiveModule), values)
    return summed.tolist(), values.tolist()


def test_sums_over_ranks_leave_the_values_alone(make_module: Callable[..., Any]) -> None:
    """A sum in place would double a number that is summed twice, e.g. by two callbacks."""
    assert run_on_ranks(_sum_over_ranks, 2) == [([2.0, 10.0], [1.0, 0.0]), ([2.0, 10.0], [1.0, 10.0])]
    alone = torch.tensor([1.0, 2.0])
    assert torch.equal(make_module().sum_over_ranks(alone), torch.tensor([1.0, 2.0]))
