"""From a composed config to the parts that a plan computes with, none of which holds weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import DictConfig, OmegaConf

from longlive.codecs.base import VideoCodec
from longlive.codecs.wan import WanVideoCodec, autoencoder_config
from longlive.config import instantiate
from longlive.data.order import accumulation
from longlive.data.sample import ClipSpec
from longlive.doctor.plan_memory import FLOAT32, Sharding
from longlive.modules.base import LongLiveModule
from longlive.parallel.strategy import ShardedStrategy
from longlive.text.base import TextEncoder
from longlive.typing import PromptEmbeds


@dataclass(frozen=True)
class Machine:
    """What a plan is made for.

    Attributes:
        num_gpus: processes, one per GPU (or per CPU worker).
        gpus_per_node: of them, in one machine.
        gpu_memory: GiB of each; None: not known, so nothing is said about fitting.
        device: `cuda` or `cpu`: their kernels save different things for backward.

    Raises:
        ValueError: for numbers below 1, GPUs that do not fill nodes, or another device.
    """

    num_gpus: int
    gpus_per_node: int = 8
    gpu_memory: float | None = None
    device: str = "cuda"

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise ValueError(f"num_gpus={self.num_gpus} must be at least 1")
        if self.gpus_per_node < 1 or (self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node):
            raise ValueError(
                f"gpus_per_node={self.gpus_per_node} does not divide num_gpus={self.num_gpus} into nodes; "
                f"use a num_gpus of whole nodes, or another gpus_per_node"
            )
        if self.gpu_memory is not None and not self.gpu_memory > 0:
            raise ValueError(f"gpu_memory={self.gpu_memory} must be positive (GiB)")
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"device={self.device!r} is unknown; use cuda or cpu")

    @property
    def ranks_per_node(self) -> int:
        return min(self.num_gpus, self.gpus_per_node)


def precision_of(config: DictConfig, machine: Machine) -> Precision | str:
    """The precision; `auto` is what it comes to on that machine, which need not be this one. So is the backend of a
    plugin, which is not asked whether it runs here."""
    settings = config.precision
    precision: Precision | str
    if "backend" in settings:
        precision = instantiate(settings, backend="auto")
    elif settings.precision == "auto":
        precision = {"cuda": "bf16-mixed", "cpu": "32-true"}[machine.device]
    else:
        precision = instantiate(settings)
    return precision


def reads_clips(config: DictConfig) -> bool:
    """Whether the data are clips, not prompts alone."""
    return "train" in list(config.data)  # which may be missing still


def strategy_of(config: DictConfig | str) -> ShardedStrategy | str:
    """The strategy, or Lightning's name of one that knows no sequence groups."""
    if isinstance(config, DictConfig):
        strategy = instantiate(config)
        return strategy if isinstance(strategy, ShardedStrategy | str) else type(strategy).__name__
    if config in StrategyRegistry:
        registered = StrategyRegistry.get(config)
        if isinstance(registered, type) and issubclass(registered, ShardedStrategy):
            return registered()
    return config


def sharding_of(strategy: ShardedStrategy | str, machine: Machine) -> Sharding:
    if isinstance(strategy, str):
        if strategy not in ("auto", "ddp", "SingleDeviceStrategy", "DDPStrategy"):
            raise ValueError(
                f"strategy={strategy} cannot be planned; use auto, ddp, or one of this library's: "
                "strategy=fsdp, strategy=balanced_sp, strategy=contiguous_sp"
            )
        return Sharding(num_replicas=machine.num_gpus)
    options = strategy.sharding
    hybrid = options.replicate_across_nodes
    num_shards = machine.ranks_per_node if hybrid else machine.num_gpus
    return Sharding(
        num_shards=num_shards,
        num_replicas=machine.num_gpus // num_shards,
        gathered_itemsize=2 if options.parameter_dtype == "bfloat16" else FLOAT32,
        reduced_itemsize=2 if options.reduce_dtype == "bfloat16" else FLOAT32,
        reshard_after_forward=options.reshard_after_forward,
        gathers=True,
        activation_checkpointing=int(options.activation_checkpointing),
    )


def clip_of(config: DictConfig) -> ClipSpec:
    data = config.data
    if data.batch_size < 1:
        raise ValueError(f"batch_size={data.batch_size} must be at least 1")
    return ClipSpec(data.num_frames, data.chunk_frames, data.height, data.width, data.fps)


def accumulation_of(config: DictConfig, data_size: int, by_hand: bool) -> int:
    """Micro-batches per optimizer step; one, if a module steps `by_hand`.

    Raises:
        ValueError: for a number that a training refuses.
    """
    asked, declared = config.trainer.accumulate_grad_batches, config.data.get("global_batch_size")
    if asked < 1:
        raise ValueError(f"trainer.accumulate_grad_batches={asked} must be at least 1")
    number = asked if declared is None else accumulation(declared, config.data.batch_size, data_size)
    if asked not in (1, number):
        raise ValueError(
            f"trainer.accumulate_grad_batches={asked} contradicts data.global_batch_size={declared}, which makes "
            f"{number} of it; leave one of the two out"
        )
    if by_hand and number != 1:
        raise ValueError(
            f"{number} micro-batches per step, but distillation steps its optimizers by hand, where Lightning "
            "accumulates nothing; use trainer.accumulate_grad_batches=1, and another data.batch_size"
        )
    return int(number)


def codec_of(config: DictConfig) -> VideoCodec:
    """The codec; Wan's without weights, and without its folder if that is not there."""
    if config._target_ != f"{WanVideoCodec.__module__}.WanVideoCodec.from_pretrained":
        codec: VideoCodec = instantiate(config)
        return codec
    with torch.device("meta"):
        if OmegaConf.is_missing(config, "folder"):
            return WanVideoCodec.ti2v_5b()
        return WanVideoCodec(AutoencoderKLWan.from_config(autoencoder_config(config.folder)))


class _NoText(TextEncoder):
    """Sizes of UMT5-XXL, which the plan does not load."""

    embed_dim = 4096

    def __init__(self, num_tokens: int = 512) -> None:
        super().__init__()
        self.num_tokens = num_tokens

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        return torch.zeros(len(prompts), self.num_tokens, self.embed_dim)

    @property
    def fingerprint(self) -> str:
        return "none"


def text_encoder_of(config: DictConfig) -> TextEncoder:
    if "encoder" in config:
        return _NoText(config.encoder.get("num_tokens") or _NoText().num_tokens)
    encoder: TextEncoder = instantiate(config)
    return encoder


def module_of(config: DictConfig, codec: VideoCodec) -> LongLiveModule:
    """The module, which checks that its parts fit together; its weights are taken as there."""
    module: LongLiveModule = instantiate(
        config.module, codec=codec, text_encoder=text_encoder_of(config.text), weights=None
    )
    return module
