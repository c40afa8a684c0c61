"""`longlive shards`: the clips of a source as shards of videos (`stage=write`), and those as shards of latents
(`stage=encode`)."""

from __future__ import annotations

from omegaconf import DictConfig

from longlive.config import check_types, instantiate
from longlive.data.shards import write_shards


def make_shards(config: DictConfig) -> None:
    """Write the shards that `conf/shards.yaml` describes; an interrupted run continues, a finished one is left alone.

    Raises:
        ValueError: if a setting is wrong, or the directory holds shards of other settings.
        UnreadableClipError: with `strict`, at the first clip that cannot be read; always, if none can be.
    """
    if config.stage == "encode":
        # Here, because what a training is made of takes seconds to import.
        from longlive.encode_shards import encode_shards

        encode_shards(config)
        return
    check_types(config, {"clips_per_shard": int, "quality": int, "strict": bool})
    index = write_shards(
        instantiate(config.source),
        config.directory,
        clips_per_shard=config.clips_per_shard,
        quality=config.quality,
        strict=config.strict,
    )
    print(f"{len(index.samples)} clips in {config.directory}, {len(index.skipped)} unreadable ones skipped")
