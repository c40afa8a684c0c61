"""Which networks can be rolled out with which cache."""

import pytest

from longlive.diffusion.schedule import FlowSchedule
from longlive.models.wan.model import CausalWan
from longlive.rollout.engine import RolloutEngine
from longlive.rollout.settings import CACHE_DTYPES, RolloutSettings


@pytest.mark.parametrize("cache_dtype", [None, *CACHE_DTYPES])
def test_every_cache_dtype_is_a_setting(network_for_blocks: CausalWan, cache_dtype: str | None) -> None:
    settings = RolloutSettings(chunk_frames=2, cache_dtype=cache_dtype)
    engine = RolloutEngine(network_for_blocks, settings, FlowSchedule())
    allocated = engine.start((4, 4, 6), 0, [0, 1], max_chunks=3).cache.num_bytes
    # 3 slots of 12 tokens of 64 features, keys and values, for 2 layers and 2 samples.
    numbers, matrices = 2 * 2 * 2 * 3 * 12 * 64, 2 * 2 * 2 * 3
    expected = {None: 4 * numbers, "float32": 4 * numbers, "bfloat16": 2 * numbers}
    assert allocated == expected.get(cache_dtype, numbers * 9 // 16 + matrices * (4 + 4 + 2 * 32))
    assert engine.cache_bytes((4, 6), num_samples=2, max_chunks=3) == allocated


def test_heads_that_are_no_whole_blocks_are_refused_before_any_work(network: CausalWan) -> None:
    """Not when the first chunk is written."""
    settings = RolloutSettings(chunk_frames=2, cache_dtype="nvfp4")
    with pytest.raises(ValueError, match=r"cache_dtype=nvfp4 .* head_dim=24 .* use cache_dtype=bfloat16"):
        RolloutEngine(network, settings, FlowSchedule())
