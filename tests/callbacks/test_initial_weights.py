"""A sharded run that starts from another's weights: they are there before anything else starts from them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.distributed import RankError, run_on_ranks
from helpers.runs import assert_same
from helpers.sharded_runs import Stage, train, whole
from longlive.callbacks.ema import EMA, averaged_weights
from longlive.callbacks.initial_weights import InitialWeights
from longlive.parallel.checkpoint import load_checkpoint


def _started(path: Path, width: int = 7) -> tuple[Any, Any]:
    """Weights and average of a run of one step that moves nothing."""
    stage = Stage(partial(torch.optim.SGD, lr=0.0), width=width)
    state = train(range(1), stage=stage, callbacks=[InitialWeights(path), EMA(decay=0.9)])
    return state["weights"], state["average"]


@pytest.mark.parametrize("sharded", [True, False])
def test_weights_and_average_start_from_the_other_runs_average(tmp_path, sharded):
    """The average of a run that starts from its own initialisation is wrong for as long as it remembers."""
    path = tmp_path / "step-0000003.ckpt"
    save = partial(train, range(3), save=path, sharded=sharded)
    if sharded:
        run_on_ranks(save, 2, init_process_group=False)
    else:
        save()
    expected = whole(averaged_weights(load_checkpoint(path)))
    for weights, average in run_on_ranks(partial(_started, path), 2, init_process_group=False):
        assert_same(weights, expected)
        assert_same(average, {name: value for name, value in expected.items() if name in average})
        assert average.keys() == expected.keys() - {"network.scale"}


def test_weights_of_another_model_are_refused(tmp_path):
    path = tmp_path / "step-0000001.ckpt"
    train(range(1), save=path, sharded=False)
    with pytest.raises(RankError, match=r"of another model: .*\(7, 5\) in the checkpoint, \(8, 5\) in this model"):
        run_on_ranks(partial(_started, path, 8), 2, init_process_group=False)
