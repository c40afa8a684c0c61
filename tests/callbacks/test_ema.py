"""The average is the recurrence of its docstring, and always where it should be: beside the weights, or in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from helpers.distributed import run_on_ranks
from helpers.runs import assert_same, fake_batches, fit, tiny_module
from longlive.callbacks.ema import EMA, averaged_weights


class Weights(LightningModule):
    """Two trainable tensors and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.ones(2, 3))
        self.vector = torch.nn.Parameter(torch.zeros(4))
        self.frozen = torch.nn.Parameter(torch.ones(5), requires_grad=False)

    def move(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for parameter in (self.matrix, self.vector):
            parameter.data += torch.randn(parameter.shape, generator=generator)


def started(module: LightningModule, **settings: Any) -> EMA:
    ema = EMA(**settings)
    ema.on_fit_start(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), module)
    return ema


def values(module: LightningModule) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


class History(Callback):
    """Weights after every optimizer step, as float64."""

    def __init__(self) -> None:
        self.initial: dict[str, torch.Tensor] = {}
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.initial = {name: value.double() for name, value in values(pl_module).items()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append({name: value.double() for name, value in values(pl_module).items()})


def average_of(history: History, decay: float, start_step: int = 0) -> dict[str, torch.Tensor]:
    """The recurrence, in float64."""
    average, updates = history.initial, 0
    for step, weights in enumerate(history.steps, start=1):
        if step <= start_step:
            average = weights
            continue
        d = min(decay, (1 + updates) / (10 + updates))
        average = {name: d * average[name] + (1 - d) * weights[name] for name in weights}
        updates += 1
    return average


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-6, atol=1e-7)


def test_the_first_updates_are_the_growing_decay_of_the_docstring():
    module = Weights()
    ema = started(module, decay=0.15)
    module.matrix.data.fill_(11.0)
    ema.update(module, 1)  # d = 1/10
    torch.testing.assert_close(ema.average["matrix"], torch.full((2, 3), 0.1 * 1 + 0.9 * 11))
    ema.update(module, 2)  # d = min(0.15, 2/11)
    torch.testing.assert_close(ema.average["matrix"], torch.full((2, 3), 0.15 * 10 + 0.85 * 11))
    assert ema.num_updates == 2


@pytest.mark.parametrize(("decay", "start_step"), [(0.995, 0), (0.3, 0), (0.0, 0), (0.9, 3), (0.9, 99)])
def test_the_average_of_a_run_equals_the_recurrence_in_float64(decay, start_step):
    history, ema = History(), EMA(decay=decay, start_step=start_step)
    module = tiny_module()
    fit(module, fake_batches(8), [history, ema])
    assert_close(ema.average, average_of(history, decay, start_step))
    assert ema.num_updates == max(0, 8 - start_step)
    lags = any(not torch.equal(value, ema.average[name]) for name, value in values(module).items())
    assert lags == (decay > 0 and start_step < 8)


def test_accumulated_micro_batches_are_one_update():
    """An update per micro-batch folds the same weights in twice: the effective decay is squared."""
    history, ema = History(), EMA(decay=0.9)
    trainer = fit(tiny_module(), fake_batches(9), [history, ema], max_steps=3, accumulate_grad_batches=3)
    assert trainer.global_step == ema.num_updates == len(history.steps) == 3
    assert_close(ema.average, average_of(history, 0.9))


def test_frozen_weights_are_not_averaged_and_the_average_is_a_copy():
    module = Weights()
    ema = started(module)
    assert ema.average.keys() == {"matrix", "vector"}
    module.move(0)
    torch.testing.assert_close(ema.average["matrix"], torch.ones(2, 3))


def test_the_average_stands_in_for_the_weights_only_inside():
    module = Weights()
    ema = started(module, decay=0.5)
    module.move(1)
    ema.update(module, 1)
    weights, average = values(module), {name: value.clone() for name, value in ema.average.items()}
    with ema.averaged(module):
        assert_same({"matrix": values(module)["matrix"], "vector": values(module)["vector"]}, average)
        with ema.averaged(module):
            assert_same(values(module)["matrix"], average["matrix"])
        assert_same(values(module)["matrix"], average["matrix"])
    assert_same(values(module), weights)
    assert_same(ema.average, average)


def test_an_error_inside_puts_the_weights_back():
    """Otherwise training goes on from the average, and the average from the weights."""
    module = Weights()
    ema = started(module)
    module.move(1)
    weights = values(module)
    with pytest.raises(RuntimeError, match="sampling failed"), ema.averaged(module), ema.averaged(module):
        raise RuntimeError("sampling failed")
    assert_same(values(module), weights)
    with ema.averaged(module):
        assert not torch.equal(module.matrix, weights["matrix"])


def test_without_an_average_the_weights_stand_for_themselves():
    module = Weights()
    with EMA().averaged(module):
        assert_same(values(module), values(Weights()))


class WeightsSeen(Callback):
    """What the module holds while it is validated, and checkpoints saved then."""

    def __init__(self, path: Path | None = None, fail: bool = False) -> None:
        self.path, self.fail = path, fail
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.seen.append(values(pl_module))
        if self.path is not None:
            trainer.save_checkpoint(self.path)
        if self.fail:
            raise RuntimeError("validation failed")


def test_validation_sees_the_average_and_training_goes_on_with_the_weights():
    history, ema, seen = History(), EMA(decay=0.9), WeightsSeen()
    batches = fake_batches(6)
    validated = tiny_module()
    fit(validated, batches, [history, ema, seen], validation=batches[:1], val_check_interval=3)
    first_half = History()
    first_half.initial, first_half.steps = history.initial, history.steps[:3]
    assert_close(seen.seen[0], average_of(first_half, 0.9))
    assert_close(seen.seen[1], average_of(history, 0.9))
    undisturbed, alone = tiny_module(), EMA(decay=0.9)
    fit(undisturbed, batches, [alone])
    assert_same(values(validated), values(undisturbed))
    assert_same(ema.average, alone.average)


def test_a_checkpoint_saved_during_validation_holds_the_weights_as_weights(tmp_path):
    """Swapped, a resumed run would train the average and average the weights."""
    path = tmp_path / "inside.ckpt"
    module, ema = tiny_module(), EMA(decay=0.9)
    batches = fake_batches(4)
    fit(module, batches, [ema, WeightsSeen(path)], validation=batches[:1], val_check_interval=4)
    saved = torch.load(path, weights_only=True)
    assert_same(dict(saved["state_dict"]), values(module))
    assert_same(saved["callbacks"]["EMA"]["average"], ema.average)
    assert_same(averaged_weights(saved), ema.average)
    assert any(not torch.equal(value, saved["state_dict"][name]) for name, value in ema.average.items())


def test_a_validation_that_fails_leaves_the_weights_in_place():
    module, ema = tiny_module(), EMA(decay=0.9)
    batches = fake_batches(4)
    with pytest.raises(RuntimeError, match="validation failed"):
        fit(module, batches, [ema, WeightsSeen(fail=True)], validation=batches[:1], val_check_interval=4)
    undisturbed, alone = tiny_module(), EMA(decay=0.9)
    fit(undisturbed, batches, [alone])
    assert_same(values(module), values(undisturbed))
    assert_same(ema.average, alone.average)


def test_the_average_and_its_count_survive_resuming(tmp_path):
    """Starting over at n = 0, the average forgets nine tenths of itself at the first step."""
    batches = fake_batches(8)
    whole = EMA(decay=0.995)
    fit(tiny_module(), batches, [whole])
    trainer = fit(tiny_module(), batches[:4], [EMA(decay=0.995)])
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = EMA(decay=0.995)
    fit(tiny_module(), batches[4:], [resumed], checkpoint=tmp_path / "half.ckpt", max_steps=8)
    assert resumed.num_updates == whole.num_updates == 8
    assert_same(resumed.average, whole.average)


def test_averaged_weights_of_a_checkpoint_without_an_average_are_its_weights():
    weights = {"a": torch.ones(2), "b": torch.zeros(1)}
    assert_same(averaged_weights({"state_dict": weights}), weights)
    average = {"EMA": {"num_updates": 1, "average": {"a": torch.full((2,), 5.0)}}}
    found = averaged_weights({"state_dict": weights, "callbacks": {"RunCheckpoint": {}} | average})
    assert_same(found, {"a": torch.full((2,), 5.0), "b": torch.zeros(1)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.0}, "decay=1.0 must be at least 0 and below 1"),
        ({"decay": -0.1}, "decay=-0.1 must be at least 0"),
        ({"start_step": -1}, "start_step=-1 must be at least 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EMA(**settings)


class Layers(LightningModule):
    """Two layers of three rows, so that ranks hold one or two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    def train_once(self) -> None:
        """A step of gradient descent; gradients of the same batch are the same on all ranks."""
        self(torch.ones(2, 4)).square().sum().backward()
        for parameter in self.parameters():
            parameter.data.add_(parameter.grad, alpha=-0.01)
            parameter.grad = None


def _swapping(sharded: bool) -> list[torch.Tensor]:
    module, x = Layers(), torch.ones(2, 4)
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(module.layers[0], mesh=mesh)
        fully_shard(module.layers, mesh=mesh)
    ema = started(module, decay=0.5)
    outputs = []
    for step in (1, 2):
        module.train_once()
        ema.update(module, step)
        with torch.no_grad():
            outputs.append(module(x))  # FSDP2 keeps the root's parameters whole after this
            with ema.averaged(module):
                outputs.append(module(x))
            outputs.append(module(x))
    if sharded:
        assert all(isinstance(average, DTensor) for average in ema.average.values())
        copy = EMA()
        copy.load_state_dict(ema.state_dict())
        assert_same({name: _full(a) for name, a in copy.average.items()}, {n: _full(a) for n, a in ema.average.items()})
    return [*outputs, *(_full(average) for average in ema.average.values())]


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_on_shards_the_average_stands_in_for_the_weights_as_on_one_rank():
    """FSDP2 reads memory of its own, not the parameters: exchanging those, the average is never used. It also keeps
    whole copies after a forward pass: the average would stay in them, and training would go on from it."""
    expected = _swapping(False)
    assert not torch.equal(expected[0], expected[1])
    assert torch.equal(expected[0], expected[2])
    for found in run_on_ranks(_swapping, 2, True):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
