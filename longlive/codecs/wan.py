"""Wan's video codec: diffusers' `AutoencoderKLWan` behind the codec contract.

The network of Wan2.2-TI2V-5B compresses 16 x 16 pixels and 4 raw frames into one latent of 48 channels. It is causal
in time: every temporal convolution looks only back, and the network is run on raw frame 0 alone and then on groups of
4, each convolution remembering its last two inputs. That memory, the *feature cache*, is all that one group hands to
the next.

diffusers keeps the feature cache on the autoencoder itself, so two decodes in turn would overwrite each other. Here it
is a value: `encode`, `decode` and every stream decoder hold their own and drive diffusers' encoder and decoder
networks with it. So an encode can also go on where another one stopped, on this process or on another
(`encode_next`). Nothing else differs from `AutoencoderKLWan.encode` and `.decode`, except that raw frames which are
not 1 + 4k are an error (diffusers drops the surplus silently), and that autocast does not reach inside: a latent must
not depend on who asked for it.

Latents are the posterior's mean, normalised per channel with the statistics that Wan publishes beside the weights:
`latents = (mean - latents_mean) / latents_std`. Statistics and results are float32, the networks run in their own
dtype.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, patchify, unpatchify
from torch import nn
from torch.func import functional_call

from longlive import rng
from longlive.codecs.base import FeatureCache, ResumableCodec, StreamDecoder, hash_of_weights
from longlive.codecs.halo import MeasuredHalo
from longlive.codecs.memory import LiveBytes
from longlive.codecs.wan_weights import ORIGINAL_FILE, load_original
from longlive.typing import Float, Latents, Tensor, Video

# fmt: off
LATENTS_MEAN = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
]
LATENTS_STD = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
]
# fmt: on

TI2V_5B: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],  # diffusers' spelling
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
    "latents_mean": LATENTS_MEAN,
    "latents_std": LATENTS_STD,
}
"""The published configuration of Wan2.2-TI2V-5B's codec (its `vae/config.json`): 704,688,668 parameters."""


class WanVideoCodec(ResumableCodec):
    """Raw frames <-> latents by a Wan autoencoder. Frozen, always in evaluation mode.

    Args:
        autoencoder: its configuration fixes ratios, channels and statistics. It may live on the meta device.
        dtype: dtype of the weights and of the work inside; by default the weights' own.

    Attributes:
        exact_halo_frames: the halo that the receptive field asks for; `halo_frames` may be a smaller, measured one.
    """

    def __init__(self, autoencoder: AutoencoderKLWan, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        config = autoencoder.config
        self.temporal_ratio = config["scale_factor_temporal"]
        self.spatial_ratio = config["scale_factor_spatial"]
        self.latent_channels = config["z_dim"]
        self.exact_halo_frames = exact_halo_frames(config["temperal_downsample"], config["num_res_blocks"])
        self.halo_frames = self.exact_halo_frames
        self.autoencoder = autoencoder.requires_grad_(False)
        self._patch_size: int = config["patch_size"] or 1
        self._dry_runs: dict[tuple[int, ...], tuple[tuple[tuple[int, ...] | None, ...], int]] = {}
        if dtype is not None:
            self.to(dtype)
        self.train(False)

    @classmethod
    def ti2v_5b(cls, dtype: torch.dtype | None = None) -> WanVideoCodec:
        """The codec of Wan2.2-TI2V-5B with untrained weights; meant for `torch.device("meta")`."""
        return cls(AutoencoderKLWan(**TI2V_5B), dtype)

    @classmethod
    def tiny(cls, seed: int = 0, num_res_blocks: int = 1, dtype: torch.dtype | None = None) -> WanVideoCodec:
        """A random codec with Wan2.2's structure and ratios, and 4 latent channels: a stand-in where no weights are."""
        channels = 4
        config = TI2V_5B | {
            "base_dim": 4,
            "decoder_base_dim": 4,
            "z_dim": channels,
            "num_res_blocks": num_res_blocks,
            "latents_mean": [0.1 * channel - 0.2 for channel in range(channels)],
            "latents_std": [0.2 + 0.1 * channel for channel in range(channels)],
        }
        with torch.device("meta"):
            autoencoder = AutoencoderKLWan(**config)
        autoencoder = autoencoder.to_empty(device="cpu")
        _init_weights(autoencoder, seed)
        return cls(autoencoder, dtype)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, config: Mapping[str, Any] | None = None
    ) -> WanVideoCodec:
        """Read the autoencoder of a download: Wan's `Wan2.2_VAE.pth`, in its folder or by itself; or diffusers', the
        autoencoder's own folder (`config.json`, `*.safetensors`) or a pipeline's, with `vae/`.

        `halo_frames` is the measured halo, if one lies beside the weights (`halo.json`, by `tools/measure_halo.py`),
        else the exact one.

        Args:
            folder: or file.
            dtype: of the weights.
            config: what differs from Wan2.2-TI2V-5B's settings, for a file of Wan's kind, which says nothing of them.

        Raises:
            ValueError: if there is no such folder, no autoencoder in it, its weights are not the configuration's, or
                its halo is none of this codec's.
        """
        source = autoencoder_folder(folder)
        original = original_file(folder)
        if original is None and config is not None:
            raise ValueError(f"{source} has a config.json of its own; give no config")
        autoencoder = _read_diffusers(source, dtype) if original is None else _read_original(original, dtype, config)
        codec = cls(autoencoder)
        measured = MeasuredHalo.read(source)
        if measured is not None:
            measured.check(codec.exact_halo_frames)
            codec.halo_frames = measured.halo_frames
        return codec

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the work inside."""
        return self.autoencoder.dtype

    def train(self, mode: bool = True) -> WanVideoCodec:
        """Stays in evaluation mode, whatever the module that owns the codec switches to."""
        return super().train(False)

    def encode(self, video: Video) -> Latents:
        """Latents, float32: the posterior's mean, normalised per channel.

        Raises:
            ValueError: if the raw frames are not `1 + 4k`, or height and width are no multiples of `spatial_ratio`.
        """
        self.check_video(video)
        # Clip by clip: kernels chosen for a batch round otherwise.
        return torch.cat([self.stream_encoder().push(clip) for clip in video.split(1)])

    @property
    def fingerprint(self) -> str:
        """Of the encoder: another decoder makes the same latents."""
        settings = {name: value for name, value in self.autoencoder.config.items() if not name.startswith("_")}
        encoder = nn.ModuleDict({"encoder": self.autoencoder.encoder, "quant_conv": self.autoencoder.quant_conv})
        return f"wan-{hash_of_weights(json.dumps(settings, sort_keys=True), encoder.named_parameters())}"

    def feature_cache(self) -> list[Any]:
        return _feature_cache(self.autoencoder.encoder)

    def encode_next(self, video: Video, cache: FeatureCache) -> Latents:
        num_raw_frames, ratio = video.shape[1], self.temporal_ratio
        if num_raw_frames < 1 or (num_raw_frames > 1 and num_raw_frames % ratio):
            raise ValueError(
                f"num_raw_frames={num_raw_frames} cannot follow: an encode begins with raw frame 0 alone and goes on "
                f"with whole groups of {ratio}"
            )
        self.check_size(*video.shape[-2:])
        with torch.autocast(video.device.type, enabled=False):
            pixels = patchify(video.transpose(1, 2).to(self.dtype), self._patch_size)
            features = self.autoencoder.encoder(pixels, feat_cache=cache, feat_idx=[0])
            posterior_mean = self.autoencoder.quant_conv(features).chunk(2, dim=1)[0]
        mean, std = self._statistics(video.device)
        return (posterior_mean.transpose(1, 2).float() - mean) / std

    def feature_shapes(
        self, batch_size: int, height: int, width: int, num_frames: int
    ) -> tuple[tuple[int, ...] | None, ...]:
        # After frame 0 the convolutions remember one input; from then on always as many as they look back.
        return self._dry_run(batch_size, 1 if num_frames == 1 else self.temporal_ratio, height, width)[0]

    def encode_bytes(self, batch_size: int, num_raw_frames: int, height: int, width: int) -> int:
        """Peak of the bytes of tensors alive inside; a convolution's workspace, which depends on its kernel, comes on
        top."""
        return self._dry_run(batch_size, num_raw_frames, height, width)[1]

    def _dry_run(
        self, batch_size: int, num_raw_frames: int, height: int, width: int
    ) -> tuple[tuple[tuple[int, ...] | None, ...], int]:
        """Shapes of the feature cache after an `encode_next`, and its peak in bytes: from the same code on the meta
        device, where tensors have no contents and the work costs milliseconds."""
        key = (batch_size, num_raw_frames, height, width)
        if key not in self._dry_runs:
            encoder, patch = self.autoencoder.encoder, self._patch_size
            weights = {name: torch.empty_like(weight, device="meta") for name, weight in encoder.named_parameters()}
            cache = self.feature_cache()

            def encode(num_raw_frames: int) -> None:
                shape = (batch_size, 3 * patch**2, num_raw_frames, height // patch, width // patch)
                pixels = torch.empty(shape, dtype=self.dtype, device="meta")
                functional_call(encoder, weights, (pixels,), {"feat_cache": cache, "feat_idx": [0]})

            if num_raw_frames > 1:
                encode(1)
            with LiveBytes() as live:
                encode(num_raw_frames)
            shapes = tuple(None if entry is None else tuple(entry.shape) for entry in cache)
            self._dry_runs[key] = shapes, live.peak
        return self._dry_runs[key]

    def decode(self, latents: Latents) -> Video:
        """RGB in [-1, 1], float32. A long video takes less memory through `stream_decoder`.

        Raises:
            ValueError: if the latents have another number of channels than the codec.
        """
        return self.stream_decoder().push(latents)

    def stream_decoder(self) -> WanStreamDecoder:
        return WanStreamDecoder(self)

    def _decode_frames(self, latents: Latents, cache: list[Any]) -> Iterator[Video]:
        """Decode frame by frame, reading and advancing `cache`; a fresh cache makes the first frame one raw frame."""
        channels = latents.shape[2]
        if channels != self.latent_channels:
            raise ValueError(
                f"latents have {channels} channels, this codec has latent_channels={self.latent_channels}; "
                "decode with the codec that encoded them"
            )
        autoencoder = self.autoencoder
        mean, std = self._statistics(latents.device)
        posterior_mean = (latents.float() * std + mean).transpose(1, 2).to(self.dtype)
        with torch.autocast(latents.device.type, enabled=False):
            for frame in autoencoder.post_quant_conv(posterior_mean).split(1, dim=2):
                first = cache[0] is None
                pixels = autoencoder.decoder(frame, feat_cache=cache, feat_idx=[0], first_chunk=first)
                pixels = unpatchify(pixels, self._patch_size)
                yield pixels.transpose(1, 2).float().clamp(-1.0, 1.0)

    def _statistics(self, device: torch.device) -> tuple[Float[Tensor, "c 1 1"], Float[Tensor, "c 1 1"]]:
        # Made on demand instead of kept as buffers: a buffer of a module built on meta holds garbage after to_empty(),
        # and a cast of the module to bfloat16 would round it.
        config = self.autoencoder.config
        mean = torch.tensor(config["latents_mean"], dtype=torch.float32, device=device)
        std = torch.tensor(config["latents_std"], dtype=torch.float32, device=device)
        return mean.view(-1, 1, 1), std.view(-1, 1, 1)


class WanStreamDecoder(StreamDecoder):
    """Decodes one video (or batch) as its latents come: the feature cache of the frames so far is its whole state."""

    def __init__(self, codec: WanVideoCodec) -> None:
        self._codec = codec
        self._cache = _feature_cache(codec.autoencoder.decoder)

    def push(self, latents: Latents) -> Video:
        """Decode the next frames: `1 + 4 (f - 1)` raw frames from the first push, `4 f` from later ones.

        Raises:
            ValueError: if there are no frames, or they have another number of channels than the codec.
        """
        if not latents.shape[1]:
            raise ValueError("num_frames=0: there is nothing to decode; push at least one frame")
        return torch.cat(list(self._codec._decode_frames(latents, self._cache)), dim=1)


def exact_halo_frames(temporal_downsample: list[bool], num_res_blocks: int) -> int:
    """Frames of left context after which encoding a window equals encoding the whole video: 27 for Wan2.2.

    A window that owns the frames from `a` on, with halo H, starts at raw frame `4 (a - H - 1)`: that raw frame stands
    alone, as raw frame 0 of a video does, and its latent is dropped together with the halo.

    The encoder's reach in raw frames is summed over its causal convolutions, of kernel 3: each looks back 2 frames of
    its own rate. There is one at the input, two in every residual block, one per temporal downsampling, four in the
    middle block, and one at the output.
    """
    stride = 1
    reach = 2
    for level in range(len(temporal_downsample) + 1):
        reach += 2 * 2 * num_res_blocks * stride
        if level < len(temporal_downsample) and temporal_downsample[level]:
            reach += 2 * stride
            stride *= 2
    reach += 2 * (4 + 1) * stride
    return math.ceil(reach / stride) - 1


def autoencoder_folder(folder: str | Path) -> Path:
    """Where a download keeps its autoencoder: itself, `vae/` of a diffusers pipeline, or where the given file lies.

    Raises:
        ValueError: if there is none.
    """
    original = original_file(folder)
    if original is not None:
        return original.parent
    for source in (Path(folder), Path(folder, "vae")):
        if _describes_autoencoder(source / "config.json"):
            return source
    raise ValueError(
        f"codec folder={folder} holds no config.json of an AutoencoderKLWan, neither itself nor in vae/, and no "
        f"{ORIGINAL_FILE}; point it at a downloaded Wan2.2-TI2V-5B or Wan2.2-TI2V-5B-Diffusers"
    )


def original_file(folder: str | Path) -> Path | None:
    """The codec's file in a download of Wan's kind, or the file itself; None: there is none."""
    path = Path(folder)
    candidate = path if path.is_file() else path / ORIGINAL_FILE
    return candidate if candidate.is_file() else None


def autoencoder_config(folder: str | Path) -> dict[str, Any]:
    """Sizes and statistics of a download's autoencoder, by diffusers' names; Wan2.2-TI2V-5B's for a file of Wan's kind.

    Raises:
        ValueError: if there is none.
    """
    source = autoencoder_folder(folder)
    return TI2V_5B if original_file(folder) is not None else AutoencoderKLWan.load_config(source)


def _describes_autoencoder(path: Path) -> bool:
    """A folder of Wan's has a `config.json` too, the network's."""
    return path.is_file() and json.loads(path.read_text()).get("_class_name", "AutoencoderKLWan") == "AutoencoderKLWan"


def _read_diffusers(source: Path, dtype: torch.dtype) -> AutoencoderKLWan:
    autoencoder, loading = AutoencoderKLWan.from_pretrained(
        source, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    # diffusers only logs these, and leaves a missing weight at its random initial value.
    if loading["missing_keys"] or loading["unexpected_keys"]:
        raise ValueError(
            f"the weights in {source} are not those of its config.json: missing "
            f"{sorted(loading['missing_keys'])[:3]}, unexpected {sorted(loading['unexpected_keys'])[:3]} (the "
            "first 3 of each); download the folder again"
        )
    return autoencoder


def _read_original(file: Path, dtype: torch.dtype, config: Mapping[str, Any] | None) -> AutoencoderKLWan:
    with torch.device("meta"):
        autoencoder = AutoencoderKLWan(**TI2V_5B | dict(config or {}))
    load_original(autoencoder, file, dtype)
    return autoencoder


def _feature_cache(network: nn.Module) -> list[Any]:
    # As diffusers sizes it: one entry per causal convolution, those without memory (kernel 1) stay unused at the end.
    return [None] * sum(isinstance(module, WanCausalConv3d) for module in network.modules())


def _init_weights(autoencoder: AutoencoderKLWan, seed: int) -> None:
    """Fill every parameter from a generator of its own: convolutions keep the variance, norms are 1, biases 0."""
    for index, (name, parameter) in enumerate(autoencoder.named_parameters()):
        with torch.no_grad():
            if name.endswith("gamma"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                std = parameter[0].numel() ** -0.5
                parameter.copy_(std * rng.normal(parameter.shape, seed, "tiny_codec", sample=index))
