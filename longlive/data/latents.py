"""What a sample of a latent shard is: the latents and the prompts' embeddings that training would have made of a video
sample, stored. `latent_shards.py` writes them, the readers read them like any other shard.

Latents are those of a *clip*, not of a video. The codec encodes the first raw frame of what it is given by itself, and
the rest given what is to its left; so latents of a clip that begins at raw frame s are no part of the latents of the
whole video. Which clip of a longer video training reads is drawn by (seed, epoch, sample id). Those of the first
`num_epochs` epochs are stored, in the order of the epochs; epoch e then reads that of epoch `e mod num_epochs`. A
video that holds only one such clip is stored once, and is what training reads in every epoch.

    <key>.latents.safetensors         `latents` `[f c h w]` of epoch 0's clip; its prompts and shots are the metadata
    <key>.latents-1.safetensors       of epoch 1's clip, ...; only if the epochs' clips differ
    <key>.prompt_embeds.safetensors   `[token d]` of every prompt of these clips and of the empty one, without padding
    <key>.json                        as in the video shard

A sample whose video could not be read has its json alone: it keeps its place, so the order in which all others are read
is that of the video shards.

The index says of which clips and by what they were made (`LatentSettings`), and readers refuse latents of others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, runtime_checkable

from safetensors import SafetensorError
from safetensors.torch import load, save

from longlive.data.sample import ClipSpec, UnreadableSampleError, VideoSample
from longlive.data.shots import ClipPlan
from longlive.typing import Float, Tensor

LATENTS, PROMPT_EMBEDS = "latents.safetensors", "prompt_embeds.safetensors"
FORMAT = 1
_DESCRIPTION = "longlive"


@runtime_checkable
class EncodesClips(Protocol):
    """A module that would encode clips and prompts itself."""

    def encoder_fingerprints(self) -> Mapping[str, str]:
        """Of its `codec` and its `text_encoder`."""
        ...


@dataclass(frozen=True)
class LatentSettings:
    """Of which clips latents were made, and by what.

    Attributes:
        num_frames, chunk_frames, height, width, fps, temporal_ratio: as `ClipSpec`'s.
        scene_cut_phrase, max_chunks_per_shot, forced_cut_margin: as `ShotRules`'.
        seed: of the clips that were drawn.
        num_epochs: whose clips are there.
        dtype: of the latents; float32 holds what the codec made, bit by bit.
        codec, text_encoder: fingerprints.
        device: kind of device that encoded.
        versions: of Python and packages.
        format: of the samples.
    """

    num_frames: int
    chunk_frames: int
    height: int
    width: int
    fps: float | int
    temporal_ratio: int
    scene_cut_phrase: str
    max_chunks_per_shot: int | None
    forced_cut_margin: float | int
    seed: int
    num_epochs: int
    dtype: str
    codec: str
    text_encoder: str
    device: str
    versions: Mapping[str, str]
    format: int = FORMAT

    @classmethod
    def of(cls, spec: ClipSpec, **others: Any) -> LatentSettings:
        """Of clips that a spec describes; `others` are the fields that it does not have."""
        return cls(**_clip_settings(spec), **others)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"versions": dict(self.versions)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], origin: str) -> LatentSettings:
        """Parse; `origin` names the set in errors.

        Raises:
            ValueError: if the format is not ours, or a field is missing.
        """
        if content.get("format") != FORMAT:
            raise ValueError(
                f"the latents in {origin} have format={content.get('format')}, this release reads {FORMAT}; "
                "encode them again"
            )
        try:
            return cls(**{field.name: content[field.name] for field in fields(cls)})
        except KeyError as error:
            raise ValueError(f"the latents in {origin} do not say their {error}; encode them again") from error

    def check_clip(self, spec: ClipSpec, origin: str) -> None:
        """Raise a `ValueError` if a training wants other clips."""
        different = [
            f"{name}={getattr(self, name)!r} there, {wanted!r} here"
            for name, wanted in _clip_settings(spec).items()
            if getattr(self, name) != wanted
        ]
        if different:
            raise ValueError(
                f"the latents in {origin} are of other clips than data asks for: {'; '.join(different)}; set data to "
                "what is there, or encode the videos again with stage=encode"
            )

    def check_encoders(self, fingerprints: Mapping[str, str], origin: str) -> None:
        """Raise a `ValueError` if a module has another codec or text encoder than made the latents."""
        for name, ours in fingerprints.items():
            theirs = getattr(self, name)
            if theirs != ours:
                raise ValueError(
                    f"the latents in {origin} were made with {name} {theirs}, and this run's {name} is {ours}: other "
                    f"weights, settings or dtype; use that {name}, or encode the videos again with stage=encode"
                )

    def members(self, stored: Iterable[str], epoch: int) -> tuple[str, str]:
        """Which members of a sample an epoch reads: latents, embeddings."""
        own = latents_name(epoch % self.num_epochs)
        return (own if own in stored else LATENTS), PROMPT_EMBEDS


def latents_name(epoch: int) -> str:
    """Suffix of the member with an epoch's latents."""
    return f"latents-{epoch}.safetensors" if epoch else LATENTS


def pack_latents(latents: Float[Tensor, "f c h w"], plan: ClipPlan) -> bytes:
    """The member with a clip's latents."""
    clip = {"prompts": plan.prompts, "shot_index": plan.shot_index, "num_valid_frames": plan.num_valid_frames}
    return _pack({"latents": latents.contiguous()}, clip)


def prompts_of(plans: Sequence[ClipPlan]) -> list[str]:
    """Distinct prompts of clips, and the empty one, for which training may drop any."""
    return list(dict.fromkeys([*(prompt for plan in plans for prompt in plan.prompts), ""]))


def pack_prompt_embeds(embeds: Mapping[str, Float[Tensor, "token d"]]) -> bytes:
    """The member with prompts' embeddings."""
    tensors = {str(number): tokens.contiguous() for number, tokens in enumerate(embeds.values())}
    return _pack(tensors, {"prompts": list(embeds)})


def unpack_sample(
    members: Mapping[str, bytes], settings: LatentSettings, spec: ClipSpec, *, epoch: int, sample_id: int
) -> VideoSample:
    """The sample of an epoch: the latents of the window that `spec` wants.

    Raises:
        UnreadableSampleError: if a member is missing or broken.
    """
    names = settings.members(members, epoch)
    if missing := [name for name in names if name not in members]:
        raise UnreadableSampleError(f"it has no {' and no '.join(missing)}: its video could not be read")
    try:
        (stored, clip), (embeds, texts) = (_unpack(members[name]) for name in names)
        latents: Tensor = stored["latents"]
        if len(latents) != spec.num_frames:
            raise UnreadableSampleError(f"it has latents of {len(latents)} frames, not {spec.num_frames}")
        frames = spec.frames
        return VideoSample(
            latents=latents if len(frames) == len(latents) else latents[frames.start : frames.stop].clone(),
            prompt_embeds={text: embeds[str(number)] for number, text in enumerate(texts["prompts"])},
            prompts=tuple(clip["prompts"]),
            shot_index=tuple(clip["shot_index"]),
            num_valid_frames=clip["num_valid_frames"],
            sample_id=sample_id,
            frame_offset=frames.start,
        )
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UnreadableSampleError(f"{type(error).__name__}: {error}") from error


def _pack(tensors: dict[str, Tensor], described: Mapping[str, Any]) -> bytes:
    # In one field: the library writes several in any order, and equal work would give other bytes.
    return save(tensors, {_DESCRIPTION: json.dumps(described)})


def _unpack(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and their description. (The library reads the metadata of files alone.)"""
    length = int.from_bytes(content[:8], "little")
    return load(content), json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_DESCRIPTION])


def _clip_settings(spec: ClipSpec) -> dict[str, Any]:
    names = ("num_frames", "chunk_frames", "height", "width", "fps", "temporal_ratio")
    return {name: getattr(spec, name) for name in names} | asdict(spec.shot_rules)
