"""`longlive shards`: clips of a source, written as WebDataset shards with an index beside them."""

from pathlib import Path

from omegaconf import DictConfig

from longlive.config import instantiate
from longlive.data.shards import write_shards


def make_shards(config: DictConfig) -> None:
    """Write the shards that `conf/shards.yaml` describes; an interrupted run continues.

    Raises:
        ValueError: if a setting is wrong, or (with `strict`) if a clip cannot be read.
    """
    write_shards(
        instantiate(config.source),
        directory=Path(config.directory),
        clips_per_shard=config.clips_per_shard,
        strict=config.strict,
    )
