"""Tokens and samples are counted, not estimated, and the phases of a step add up to it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from helpers.runs import MemoryLogger, fake_batches, fit, tiny_module
from longlive.callbacks.throughput import PHASES, Throughput, num_tokens
from longlive.data.batch import VideoBatch
from longlive.modules.distillation import DistillationModule
from longlive.modules.teacher_forcing import TeacherForcingModule

TOKENS = 2 * (4 + 8) * 2 * 2
"""Of a fake batch: two copies of two clips of 8 frames of 2 x 2 patches."""


class Clock:
    """Stands in for the `time` that the callback reads: it moves only where the test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def pass_seconds(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("longlive.callbacks.throughput.time", clock)
    return clock


SECONDS = {"data": 7.0, "encode": 1.0, "forward": 2.0, "backward": 3.0, "optimizer": 5.0}


def timed_module(clock: Clock) -> TeacherForcingModule:
    """A module whose phases last `SECONDS`."""

    class Timed(TeacherForcingModule):
        def encode(self, batch: VideoBatch) -> torch.Tensor:
            clock.pass_seconds(SECONDS["encode"])
            return super().encode(batch)

        def predict(self, *arguments: Any) -> torch.Tensor:
            clock.pass_seconds(SECONDS["forward"])
            return super().predict(*arguments)

        def on_after_backward(self) -> None:
            clock.pass_seconds(SECONDS["backward"])

    class TimedOptimizer(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            clock.pass_seconds(SECONDS["optimizer"])
            return result

    plain = tiny_module()
    return Timed(
        model=plain.model_config,
        codec=plain.codec,
        text_encoder=plain.text_encoder,
        schedule=plain.schedule,
        chunk_frames=plain.chunk_frames,
        optimizer=lambda parameters: TimedOptimizer(parameters, lr=0.1),
    )


def timed_batches(clock: Clock, number: int) -> list[VideoBatch]:
    """Batches that are waited for."""

    class Timed(list[VideoBatch]):
        def __iter__(self) -> Iterator[VideoBatch]:
            for batch in super().__iter__():
                clock.pass_seconds(SECONDS["data"])
                yield batch

    return Timed(fake_batches(number))


def test_the_tokens_of_a_batch_are_those_of_all_copies():
    module = tiny_module()
    (latents,) = fake_batches(1)
    assert num_tokens(latents, module) == TOKENS
    fields = {name: getattr(latents, name) for name in ("prompts", "shot_index", "num_valid_frames", "sample_ids")}
    pixels = VideoBatch(raw_frames=torch.zeros(2, 29, 3, 32, 32, dtype=torch.uint8), **fields)
    assert num_tokens(pixels, module) == TOKENS
    (large,) = fake_batches(1, batch_size=3, num_frames=12, height=8, width=6)
    assert num_tokens(large, module) == 3 * (8 + 12) * 4 * 3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_batch_is_counted_once(accumulate):
    logger, throughput = MemoryLogger(), Throughput(every_n_steps=2)
    fit(
        tiny_module(),
        fake_batches(6 * accumulate),
        [throughput],
        logger,
        max_steps=6,
        accumulate_grad_batches=accumulate,
    )
    batches = {step: (step + 1) * accumulate for step in (1, 3, 5)}
    assert logger.of("progress/samples") == {step: 2 * number for step, number in batches.items()}
    assert logger.of("progress/tokens") == {step: TOKENS * number for step, number in batches.items()}
    names = {f"throughput/seconds_{phase}" for phase in PHASES} | {
        "throughput/tokens_per_second",
        "throughput/step_seconds",
        "progress/samples",
        "progress/tokens",
    }
    assert PHASES == ("data", "encode", "forward", "backward", "optimizer")
    assert [values.keys() for _, values in logger.logged] == [names] * 3


def test_tokens_per_second_are_those_of_the_interval():
    logger, throughput = MemoryLogger(), Throughput(every_n_steps=2)
    fit(tiny_module(), fake_batches(4), [throughput], logger)
    for step in (1, 3):
        rate, seconds = (logger.of(f"throughput/{name}")[step] for name in ("tokens_per_second", "step_seconds"))
        assert rate * seconds == pytest.approx(TOKENS)
    assert throughput.tokens_per_second == logger.of("throughput/tokens_per_second")[3]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every_n_steps", [1, 2])
def test_the_phases_are_where_the_time_goes_and_sum_to_the_step(clock, accumulate, every_n_steps):
    """Time in the wrong phase sends people to optimise the wrong thing. Under accumulation a step is all its batches,
    with one optimizer phase."""
    logger = MemoryLogger()
    fit(
        timed_module(clock),
        timed_batches(clock, 5 * accumulate),
        [Throughput(every_n_steps)],
        logger,
        max_steps=4,
        accumulate_grad_batches=accumulate,
    )
    expected = {name: seconds * (1 if name == "optimizer" else accumulate) for name, seconds in SECONDS.items()}
    steps = range(every_n_steps - 1, 4, every_n_steps)
    # Lightning looks one batch ahead: the first two are waited for together.
    for step in steps if every_n_steps > 1 else list(steps)[1:]:
        assert {phase: logger.of(f"throughput/seconds_{phase}")[step] for phase in PHASES} == expected
    assert logger.of("throughput/step_seconds")[3] == sum(expected.values())
    assert logger.of("throughput/tokens_per_second")[3] == accumulate * TOKENS / sum(expected.values())


def test_validation_is_in_no_phase_of_training(clock):
    """Validation runs the same phases of the same module."""
    logger = MemoryLogger()
    batches = timed_batches(clock, 5)
    fit(
        timed_module(clock),
        batches,
        [Throughput(1)],
        logger,
        validation=fake_batches(3),
        val_check_interval=1,
        max_steps=4,
    )
    for step in range(4):
        for phase in ("encode", "forward", "backward", "optimizer"):
            assert logger.of(f"throughput/seconds_{phase}")[step] == SECONDS[phase]


def test_the_counts_survive_resuming(tmp_path):
    batches = fake_batches(6)
    fit(tiny_module(), batches[:4], [Throughput(2)]).save_checkpoint(tmp_path / "4.ckpt")
    logger, throughput = MemoryLogger(), Throughput(2)
    fit(tiny_module(), batches[4:], [throughput], logger, checkpoint=tmp_path / "4.ckpt", max_steps=6)
    assert (throughput.num_samples, throughput.num_tokens) == (12, 6 * TOKENS)
    assert logger.of("progress/samples") == {5: 12}


def test_a_stage_of_other_steps_is_refused_by_name_before_a_network_is_built():
    """Tokens of teacher forcing would be a wrong number for it, and batches of prompts have none."""
    module = tiny_module(DistillationModule, critic_optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match=r"the steps of DistillationModule are others; use callbacks.throughput=null"):
        fit(module, fake_batches(1), [Throughput()])
    assert module.network is None
