"""`longlive shards`: the clips of a source, written as WebDataset shards with an index beside them."""

from omegaconf import DictConfig

from longlive.config import instantiate
from longlive.data.shards import write_shards


def make_shards(config: DictConfig) -> None:
    """Write the shards that `conf/shards.yaml` describes; an interrupted run continues, a finished one is left alone.

    Raises:
        ValueError: if a setting is wrong, or the directory holds shards of other settings.
        UnreadableClipError: with `strict`, at the first clip that cannot be read; always, if none can be.
    """
    index = write_shards(
        instantiate(config.source),
        config.directory,
        clips_per_shard=config.clips_per_shard,
        quality=config.quality,
        strict=config.strict,
    )
    print(f"{len(index.samples)} clips in {config.directory}, {len(index.skipped)} unreadable ones skipped")
