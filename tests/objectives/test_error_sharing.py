"""Errors reach every rank, whoever computed them, and the host of a GPU without its being waited for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from helpers.distributed import run_on_ranks
from longlive.diffusion.schedule import FlowSchedule
from longlive.objectives.error_recycling import ErrorRecycling, Step
from longlive.objectives.error_sharing import ChunkName, StepErrors
from longlive.objectives.teacher_forcing import TeacherForcingInputs, draw, make_inputs
from longlive.typing import Tensor

SHAPE = (2, 2, 3, 4, 5)
HOLDINGS = (
    [ChunkName(9, 0, 4), ChunkName(9, 1, 2), ChunkName(3, 0, 0)],
    [],
    [ChunkName(8, 2, 1), ChunkName(9, 0, 4)],
)
"""By rank. The second one holds nothing, as do the ranks of a contiguous split that have history only; sample 9 was
drawn twice."""


def error(name: ChunkName) -> Tensor:
    return torch.full(SHAPE, name.sample + name.chunk / 8).bfloat16()


def share() -> tuple[set[int], list[tuple[ChunkName, Tensor]]]:
    """Two batches of one step, the second without errors; sample 3 is not wanted."""
    errors = StepErrors()
    for names in (HOLDINGS[dist.get_rank()], []):
        errors.announce(names, most=4, device=torch.device("cpu"))
        held = {name: error(name) for name in errors.missing({8, 9}, [9, 8, 3])}
        errors.hold(held, torch.empty(0, *SHAPE, dtype=torch.bfloat16))
    arrived = [pair for arrival in errors.send({8, 9}) for pair in zip(arrival.names, arrival.wait(), strict=True)]
    return errors.samples, arrived


def test_every_rank_gets_every_wanted_error_once() -> None:
    """A rank that expects another number of errors than its peer sends hangs, or reads another chunk's."""
    for samples, arrived in run_on_ranks(share, 3):
        assert samples == {3, 8, 9}
        assert [name for name, _ in arrived] == [ChunkName(9, 0, 4), ChunkName(9, 1, 2), ChunkName(8, 2, 1)]
        assert all(torch.equal(found, error(name)) for name, found in arrived)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_recycles_what_a_cpu_does_and_its_forward_is_not_waited_for() -> None:
    """A wait for each chunk would cost more than the copies (known mistake 23)."""
    schedule, chunks = FlowSchedule(num_steps=100), list(range(3))
    recyclers = {
        device: ErrorRecycling(budget_mib=8, num_buckets=2, clean_probability=0, noise_probability=1)
        for device in ("cpu", "cuda")
    }

    def inputs_of(step: Step, device: str) -> TeacherForcingInputs:
        draws = draw(
            (16, 8, 8), 4, schedule, seed=0, step=step.step, sample_ids=step.sample_ids, history=chunks, targets=chunks
        )
        clean = torch.randn(2, 12, 16, 8, 8, generator=torch.Generator().manual_seed(step.step)).to(device)
        errors = recyclers[device].inject(step, clean, chunks, chunks, draws.grid_index)
        assert (errors.latents is None) == (step.step == 0), "there are none before the first step's"
        inputs = make_inputs(clean, clean, draws, schedule, 4, step.is_given(chunks), errors=errors)
        recyclers[device].announce(step, chunks, inputs, torch.ones(2, 12, dtype=torch.bool))
        return inputs

    first = Step(seed=0, step=0, sample_ids=(5, 2), num_chunks=3, chunk_frames=4, grid_size=100, given_frames=1)
    for number in range(4):
        step = replace(first, step=number)
        seen = {}
        for device, recycler in recyclers.items():
            inputs = inputs_of(step, device)
            seen[device] = inputs.latents.cpu()
            prediction = inputs.target + 0.5
            torch.cuda.set_sync_debug_mode("error")
            try:
                recycler.record(step, chunks, inputs, prediction)
                recycler.commit()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(seen["cuda"], seen["cpu"], atol=1e-2, rtol=1e-2)
    for recycler in recyclers.values():
        recycler.state_dict()
    ours, theirs = (recycler.buffer for recycler in recyclers.values())
    places = [(bucket, rank) for bucket in range(2) for rank in range(ours.size(bucket))]
    assert len(places) == len(theirs) == 4 * 6
    for kind in range(2):
        torch.testing.assert_close(ours.take(kind, places), theirs.take(kind, places), atol=1e-2, rtol=1e-2)
