"""What a rollout is asked for, and whether it fits together: said before any work."""

from collections.abc import Sequence

from longlive.rollout.settings import RolloutSettings
from longlive.typing import Float, Int, PromptEmbeds, Tensor

NegativeEmbeds = Float[Tensor, "1 negative_s d"]
"""The prompt of the unconditional branch, with as many text tokens as the other prompts."""

GivenFrames = Float[Tensor, "b given c h w"]
"""Clean latents that a video starts with."""


def check_request(
    prompt_embeds: PromptEmbeds,
    prompt_index: Int[Tensor, "b p"],
    shot_index: Int[Tensor, "b chunk"],
    sample_ids: Sequence[int],
    negative_embeds: NegativeEmbeds | None,
    *,
    text_dim: int,
    settings: RolloutSettings,
) -> None:
    """Raise the `ValueError` for arguments of `RolloutEngine.rollout` that do not fit one another or the network."""
    if len(prompt_embeds) == 0 or prompt_index.numel() == 0:
        raise ValueError(
            "no prompt: a rollout needs at least one sample with at least one chunk, and a prompt for each"
        )
    if prompt_index.shape != shot_index.shape or len(sample_ids) != len(prompt_index):
        raise ValueError(
            f"prompt_index {tuple(prompt_index.shape)}, shot_index {tuple(shot_index.shape)} and {len(sample_ids)} "
            "sample_ids do not fit; give every chunk of every sample a prompt and a shot, and every sample an id"
        )
    lowest, highest = int(prompt_index.min()), int(prompt_index.max())
    if lowest < 0 or highest >= len(prompt_embeds):
        raise ValueError(f"prompt_index reaches from {lowest} to {highest}, but there are {len(prompt_embeds)} prompts")
    if prompt_embeds.shape[-1] != text_dim:
        raise ValueError(f"prompt_embeds of {prompt_embeds.shape[-1]} features: the network takes {text_dim}")
    if settings.guided != (negative_embeds is not None):
        need = "needs" if settings.guided else "takes no"
        raise ValueError(
            f"guidance_scale={settings.guidance_scale} {need} negative_embeds; give the embedding of the "
            "negative prompt (usually the empty one) exactly when the scale is not 1"
        )
    if negative_embeds is not None and negative_embeds.shape != (1, *prompt_embeds.shape[1:]):
        raise ValueError(
            f"negative_embeds {tuple(negative_embeds.shape)} must be {(1, *prompt_embeds.shape[1:])}: one prompt, "
            "with as many text tokens and features as the others"
        )


def check_given(given: GivenFrames | None, video_shape: tuple[int, ...]) -> None:
    """Raise the `ValueError` for frames that cannot begin videos `(b, f, c, h, w)`."""
    batch, num_frames, *frame_shape = video_shape
    if given is None:
        return
    if given.shape[0] != batch or list(given.shape[2:]) != frame_shape or not 1 <= given.shape[1] <= num_frames:
        raise ValueError(
            f"given {tuple(given.shape)} are no first frames of videos {video_shape}; give every sample as many, "
            f"at least 1 and at most {num_frames}, of the same size"
        )
