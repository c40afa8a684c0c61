"""What every training stage shares: a causal network, a codec, a text encoder, an optimizer, and in which order they
are built.

`build` is the one place where a network comes into being. Its body is the order of the steps; a stage that adds one
adds it there, and one that has several networks builds each of them so.

Codec and text encoder are frozen and not part of the module's state: no optimizer, no average and no checkpoint sees
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from longlive.adapters.adapted import AdaptedNetwork
from longlive.adapters.lora import LoRASettings, add_adapter, initialise_adapter, train_only
from longlive.codecs.base import VideoCodec, to_unit_range
from longlive.data.batch import VideoBatch
from longlive.data.position import PositionDataModule
from longlive.data.sample import ClipWindow
from longlive.diffusion.schedule import FlowSchedule
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.models.wan.weights import check_weights, open_weights
from longlive.parallel.checkpoint import check_same_shapes, with_frozen
from longlive.parallel.codec_halo import clip_window, encode_window
from longlive.parallel.layout import check_heads
from longlive.parallel.materialise import materialise
from longlive.parallel.mesh import ALONE, SequenceShare
from longlive.parallel.strategy import ShardedStrategy
from longlive.precision.frozen import freeze
from longlive.precision.plugin import LinearPrecision
from longlive.rollout.engine import RolloutEngine, RolloutSettings
from longlive.text.base import TextEncoder, TokenEmbeds, with_padding
from longlive.text.cache import unique_prompts
from longlive.typing import Bool, Int, Latents, PromptEmbeds, Tensor

OptimizerFactory = Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer]
LearningRateFactory = Callable[[Optimizer], LRScheduler]


class LongLiveModule(LightningModule):
    """Base of the training stages.

    Args:
        model: sizes of the network.
        codec: raw frames <-> latents.
        text_encoder: prompts -> embeddings.
        schedule: noise levels of training and rollout.
        chunk_frames: frames denoised together.
        optimizer: makes the optimizer from the named trainable parameters, as torch's optimizers take them.
        learning_rate: makes the learning-rate schedule, stepped once per optimizer step; None: constant.
        weights: where the network's weights start from: a downloaded folder or a file of one, of Wan, diffusers or
            LongLive; see `longlive.models.wan.weights`. None: `init_weights(seed)`. This is not how a run is resumed.
        rollout: how this network is meant to be rolled out; samples during training use it, and `generate` starts from
            it.
        seed: names every random draw of the run.
    """

    network: CausalWan | None

    def __init__(
        self,
        *,
        model: WanConfig,
        codec: VideoCodec,
        text_encoder: TextEncoder,
        schedule: FlowSchedule,
        chunk_frames: int,
        optimizer: OptimizerFactory,
        learning_rate: LearningRateFactory | None = None,
        weights: str | None = None,
        rollout: RolloutSettings | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if model.in_channels != codec.latent_channels:
            raise ValueError(
                f"model.in_channels={model.in_channels}, but the codec makes latents of {codec.latent_channels} "
                f"channels; set model.in_channels and model.out_channels to {codec.latent_channels}"
            )
        if model.text_dim != text_encoder.embed_dim:
            raise ValueError(
                f"model.text_dim={model.text_dim}, but the text encoder's embeddings have {text_encoder.embed_dim} "
                f"features; set model.text_dim={text_encoder.embed_dim}"
            )
        if chunk_frames < 1:
            raise ValueError(f"chunk_frames={chunk_frames} must be at least 1")
        if rollout is not None and rollout.chunk_frames != chunk_frames:
            raise ValueError(
                f"rollout.chunk_frames={rollout.chunk_frames} differs from chunk_frames={chunk_frames}; a model "
                "rolls out in the chunks that it was trained on"
            )
        if weights is not None:
            with torch.device("meta"):
                sizes = CausalWan(model)
            check_weights(sizes, open_weights(weights), weights)
        self.model_config = model
        # In a tuple, so that they are no submodules.
        self._frozen = (codec.eval().requires_grad_(False), text_encoder.eval().requires_grad_(False))
        self.schedule = schedule
        self.chunk_frames = chunk_frames
        self.make_optimizer = optimizer
        self.make_learning_rate = learning_rate
        self.weights = weights
        self.rollout = rollout or RolloutSettings(chunk_frames=chunk_frames)
        self.rollout.check_network(model)
        self.seed = seed
        self.run_config: dict[str, Any] = {}
        """The resolved config, as plain containers: kept in every checkpoint, so that a checkpoint says what it is."""
        self.on_phase: Callable[[str], None] = lambda phase: None
        """Called at the start of the phases `encode` and `forward`; throughput measurement listens."""
        self.network = None
        self.adapter: str | None = None
        """The adapter that a rollout multiplies by; None: the network alone."""
        self.precision_of_network: Precision | str | None = None

    @property
    def codec(self) -> VideoCodec:
        """On the module's device."""
        codec = self._frozen[0]
        return codec if codec_device(codec) == self.device else codec.to(self.device)

    @property
    def text_encoder(self) -> TextEncoder:
        return self._frozen[1]

    def configure_model(self) -> None:
        """Build the network. Called again for validation, it finds nothing to do."""
        if self.network is None:
            self.check_sequence()
            self.hold(self.build())

    def build(
        self, precision: Precision | str | None = None, adapters: Mapping[str, LoRASettings] | None = None
    ) -> CausalWan:
        """A network: on meta -> adapters -> precision -> shard -> weights.

        Args:
            precision: its own; None: the run's.
            adapters: all of it that learns, by name; None: the network itself learns.
        """
        network = on_meta(self.model_config, self.precision_of_run if precision is None else precision, adapters)
        device: torch.device | str = "cpu"
        strategy = None if self._trainer is None else self._trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            network, device = strategy.shard(network), strategy.root_device
        materialise(network, device, self.weights, self.seed)
        for name in adapters or ():
            initialise_adapter(network, name, self.seed)
        return network

    @property
    def precision_of_run(self) -> Precision | str | None:
        """The plugin, or Lightning's name; None: there is no Trainer yet."""
        if self._trainer is None:
            return None
        plugin = self._trainer.precision_plugin
        return plugin if isinstance(plugin, LinearPrecision) else str(plugin.precision)

    def networks_of_run(self) -> Sequence[nn.Module]:
        """Those that have the run's precision."""
        return [self.trained_network]

    def hold(self, network: CausalWan, adapter: str | None = None, precision: Precision | str | None = None) -> None:
        """Take a network: the one that `configure_model` built, or in its place a finished one from elsewhere.

        Args:
            network: of this module's sizes.
            adapter: of it, that a rollout multiplies by.
            precision: its own; None: the run's.
        """
        self.network = network
        self.adapter = adapter
        self.precision_of_network = precision

    @property
    def trained_network(self) -> CausalWan:
        """The network.

        Raises:
            RuntimeError: before `configure_model`.
        """
        if self.network is None:
            raise RuntimeError("the network is built by configure_model(); call it first (a Trainer does)")
        return self.network

    def configure_optimizers(self) -> OptimizerLRScheduler:
        trainable = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        optimizer = self.make_optimizer(trainable)
        if self.make_learning_rate is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_learning_rate(optimizer), "interval": "step"},
        }

    @property
    def sequence(self) -> SequenceShare:
        """This process's place in its sequence group; under strategies without such groups, it is alone."""
        strategy = self._trainer.strategy if self._trainer is not None else None
        return strategy.sequence if isinstance(strategy, ShardedStrategy) else ALONE

    def check_sequence(self) -> None:
        """Raise the `ValueError` for a number of sequence ranks, or a way of splitting, that this stage cannot have."""
        check_heads(self.model_config.num_heads, self.sequence.size)

    def check_data(self, data: PositionDataModule) -> None:
        """Raise the `ValueError` for data that this stage cannot train on, before a network is built."""
        if data.num_clips > 1:
            raise ValueError(
                f"data.clip_frames={data.clip_frames} brings every batch {data.num_clips} times, for videos that are "
                "made clip by clip; use data.clip_frames=null, or set module.streaming in distillation"
            )

    def clip_window(self, num_frames: int) -> ClipWindow | None:
        """The raw frames of a clip of `num_frames` that this process reads; None: all of them.

        Raises:
            ValueError: if the sequence ranks do not divide the clip, or what a stage shares among them.
        """
        sequence = self.sequence
        if sequence.size == 1:
            return None
        self.check_sequence()
        frames = self.frames(num_frames // self.chunk_frames)
        if len(frames) == num_frames:
            return None
        return clip_window(self.codec, frames, sequence.codec_context)

    def frames(self, num_chunks: int) -> range:
        """The frames of a clip whose latents this process holds."""
        return self.sequence.layout(num_chunks).frames(self.sequence.rank, self.chunk_frames)

    @torch.no_grad()
    def encode(self, batch: VideoBatch) -> Latents:
        """The latents of this process's frames, float32; encodes raw frames.

        Raises:
            ValueError: if the raw frames are none that the codec takes, or are not those of this process.
        """
        frames = self.frames(batch.shot_index.shape[1])
        latents = self._encode(batch, frames) if batch.latents is None else batch.latents.float()
        num_frames = batch.shot_index.shape[1] * self.chunk_frames
        if latents.shape[1] == num_frames and batch.frame_offset == 0:
            # The whole clip, as batches of latents may hold it: this process takes its own frames.
            latents = latents[:, frames.start : frames.stop]
        if latents.shape[1] != len(frames):
            raise ValueError(
                f"the batch holds {latents.shape[1]} frames; its {batch.shot_index.shape[1]} chunks of "
                f"{self.chunk_frames} are {num_frames}, {len(frames)} of them on this rank"
            )
        return latents

    def _encode(self, batch: VideoBatch, frames: range) -> Latents:
        assert batch.raw_frames is not None
        video, sequence = to_unit_range(batch.raw_frames), self.sequence
        # Latents are data: the precision of the network's products is not theirs.
        with torch.autocast(self.device.type, enabled=False):
            if len(frames) == batch.shot_index.shape[1] * self.chunk_frames:
                return self.codec.encode(video).float()
            return encode_window(self.codec, video, frames, sequence.codec_context, sequence.group).float()

    @torch.no_grad()
    def embed(
        self, prompts: Sequence[Sequence[str]], known: Mapping[str, TokenEmbeds] | None = None
    ) -> tuple[PromptEmbeds, Int[Tensor, "b p"]]:
        """The distinct prompts' embeddings and which of them each chunk has, on the module's device.

        Args:
            prompts: `prompts[sample][chunk]`.
            known: embeddings of prompts that came with a batch. Only others reach the text encoder.
        """
        distinct, index = unique_prompts(prompts)
        known, encoder = known or {}, self.text_encoder
        stored = [prompt for prompt in distinct if prompt in known]
        missing = [prompt for prompt in distinct if prompt not in known]
        padded = with_padding((known[prompt] for prompt in stored), encoder.num_tokens, encoder.embed_dim)
        embeds = dict(zip(stored, padded.to(self.device), strict=True))
        if missing:
            embeds |= zip(missing, encoder.encode(missing).to(self.device), strict=True)
        return torch.stack([embeds[prompt] for prompt in distinct]), index.to(self.device)

    def encoder_fingerprints(self) -> dict[str, str]:
        """Of codec and text encoder: latents and embeddings by others are refused."""
        return {"codec": self.codec.fingerprint, "text_encoder": self.text_encoder.fingerprint}

    def agreed(self, batch: VideoBatch) -> Bool[Tensor, " b"]:
        """Whether all ranks of the sequence group read the same clip at each place of the batch. They differ where a
        clip is unreadable in the part of one rank only, which then took the next one."""
        group = self.sequence.group
        if group is None:
            return torch.ones(batch.batch_size, dtype=torch.bool)
        ours = batch.sample_ids.to(self.device)
        theirs = [torch.empty_like(ours) for _ in range(group.size())]
        torch.distributed.all_gather(theirs, ours, group=group)
        return (torch.stack(theirs) == ours).all(dim=0).cpu()

    def rollout_engine(self, settings: RolloutSettings | None = None) -> RolloutEngine:
        """An engine over this network as it is now, with its adapter; `settings` default to the module's own.

        The ranks of a sequence group share its rollouts. Where they do not divide the frames of a chunk, which training
        on clips does not ask for, every rank makes the whole of them.
        """
        network, settings = self.trained_network, settings or self.rollout
        rolled_out = (
            network if self.adapter is None else AdaptedNetwork(network, self.adapter, self.precision_of_network)
        )
        sequence = ALONE if settings.chunk_frames % self.sequence.size else self.sequence
        return RolloutEngine(rolled_out, settings, self.schedule, sequence)

    def room_for(self, checkpoint: Mapping[str, Any]) -> AbstractContextManager[None]:
        """In which the weights of another run's checkpoint are loaded."""
        return nullcontext()

    def weights_of(self, stored: Mapping[str, Tensor], is_part: bool = False) -> dict[str, Tensor]:
        """This module's weights as another run stored them.

        Args:
            stored: the run's.
            is_part: whether it stored what it trained alone (`trainable_only`): frozen weights stay as they are.
        """
        return with_frozen(self, stored) if is_part else dict(stored)

    def linear_precisions(self) -> list[LinearPrecision]:
        """The plugins that the networks' linear layers follow."""
        plugin = None if self._trainer is None else self._trainer.precision_plugin
        return [plugin] if isinstance(plugin, LinearPrecision) else []

    def place_tokens(self, positions: Int[Tensor, "b l"]) -> None:
        """Number the tokens that the next backward goes through, in the network's order, for what is random there: the
        same number for a token whichever rank has it."""
        for plugin in self.linear_precisions():
            plugin.place_tokens(positions.to(self.device))

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum over all ranks; with one rank, the values."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            values = values.clone()
            torch.distributed.all_reduce(values)
        return values

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.run_config

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another network before anything is overwritten."""
        if "state_dict" in checkpoint:  # a sharded strategy has checked and loaded the weights itself
            checkpoint["state_dict"] = with_frozen(self, checkpoint["state_dict"])
            check_same_shapes(self.state_dict(), checkpoint["state_dict"])


def on_meta(
    model: WanConfig, precision: Precision | str | None = None, adapters: Mapping[str, LoRASettings] | None = None
) -> CausalWan:
    """A network before it has memory; arguments as `LongLiveModule.build`. With adapters it is frozen, and holds no
    more than its precision reads."""
    with torch.device("meta"):
        network = CausalWan(model)
        if adapters is not None:
            for name, settings in adapters.items():
                add_adapter(network, name, settings)
            train_only(network, list(adapters))
    if isinstance(precision, Precision):
        # Lightning calls this after configure_model again, and finds nothing left to convert.
        network = precision.convert_module(network)  # type: ignore[assignment]
    if adapters is not None:
        freeze(network, precision)
    return network


def codec_device(codec: VideoCodec) -> torch.device:
    """Where a codec is; one without weights or buffers is on the CPU."""
    for tensor in (*codec.parameters(), *codec.buffers()):
        return tensor.device
    return torch.device("cpu")
