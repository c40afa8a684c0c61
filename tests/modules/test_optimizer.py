"""Muon and AdamW behind one optimizer: each equals itself alone, and schedules and checkpoints reach both."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Muon

from helpers.distributed import run_on_ranks
from longlive.modules.optimizer import BatchedMuon, MuonAdamW


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(4, 6, generator=generator))
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        for parameter in self.blocks.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def loss(self, step: int) -> torch.Tensor:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step)) @ self.embedding
        for block in self.blocks:
            x = block(x).tanh()
        return x.square().mean()


def train(net: Net, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        net.loss(step).backward()
        for optimizer in optimizers:
            optimizer.step()


def make(net: Net) -> MuonAdamW:
    return MuonAdamW(net.named_parameters(), lr=0.02, adamw_lr=0.003, weight_decay=0.01)


def test_it_equals_the_two_optimizers_side_by_side():
    """A parameter in the wrong part, or in none, trains all the same, only worse."""
    net, reference = Net(), Net()
    matrices = [block.weight for block in reference.blocks]
    others = [reference.embedding, *(block.bias for block in reference.blocks)]
    muon = Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    train(net, [make(net)], range(5))
    train(reference, [muon, AdamW(others, lr=0.003, weight_decay=0.01)], range(5))
    for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


@pytest.mark.parametrize("batch_elements", [1, 10**9], ids=["one by one", "all together"])
def test_matrices_of_several_shapes_move_as_torchs_muon_moves_them(monkeypatch, batch_elements):
    """Tall and wide ones, in batches; bfloat16's rounding may differ, by one part in 256 of a step."""
    monkeypatch.setattr("longlive.modules.optimizer.BATCH_ELEMENTS", batch_elements)
    shapes = [(6, 6), (12, 6), (6, 12), (6, 6), (12, 6)]
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = BatchedMuon(ours, **settings), Muon(theirs, **settings)
    for _ in range(3):
        for pair in zip(ours, theirs, strict=True):
            gradient = torch.randn(pair[0].shape, generator=generator)
            for parameter in pair:
                parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, torchs in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, torchs, atol=3 * 0.1 * 0.2 * 12**0.5 / 256, rtol=0)


def test_a_learning_rate_schedule_scales_both_also_after_loading():
    """Groups that are copies would keep their first rate for ever."""
    net = Net()
    optimizer = make(net)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [0.01, 0.0015]


def test_a_loaded_optimizer_continues_bit_for_bit():
    net = Net()
    optimizer = make(net)
    train(net, [optimizer], range(3))
    other = copy.deepcopy(net)
    loaded = make(other)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, [optimizer], range(3, 6))
    train(other, [loaded], range(3, 6))
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_closure_is_evaluated_once_with_gradients():
    net = Net()
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        loss = net.loss(0)
        loss.backward()
        return loss

    before = net.loss(0).item()
    assert make(net).step(closure).item() == before
    assert calls == [True]


def test_a_network_without_blocks_is_told_to_use_adamw():
    with pytest.raises(ValueError, match=r"0 matrices inside `blocks` and 2 other parameters.*optimizer=adamw"):
        MuonAdamW(nn.Linear(3, 3).named_parameters(), lr=0.1, adamw_lr=0.1)


def test_its_state_dict_is_that_of_one_ordinary_optimizer():
    """Whoever saves shards by parameter name, or reads a state, finds every parameter in it, numbered through."""
    net = Net()
    optimizer = make(net)
    train(net, [optimizer], range(2))
    state = optimizer.state_dict()
    assert [group["params"] for group in state["param_groups"]] == [[0, 1], [2, 3, 4]]
    assert state["param_groups"][0]["param_names"] == ["blocks.0.weight", "blocks.1.weight"]
    assert {index: set(values) for index, values in state["state"].items()} == {
        index: {"momentum_buffer"} if index < 2 else {"step", "exp_avg", "exp_avg_sq"} for index in range(5)
    }


def _shard(net: Net) -> Net:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def _step_on_shards(steps: range) -> list[torch.Tensor]:
    """Steps with the gradients that one process has, so that only the optimizer's arithmetic can differ."""
    whole, sharded = Net(), _shard(Net())
    theirs, ours = make(whole), make(sharded)
    for step in steps:
        theirs.zero_grad()
        whole.loss(step).backward()
        for parameter, reference in zip(sharded.parameters(), whole.parameters(), strict=True):
            assert isinstance(parameter, DTensor)
            assert reference.grad is not None
            parameter.grad = distribute_tensor(reference.grad, parameter.device_mesh, parameter.placements)
        theirs.step()
        ours.step()
    momenta = [values["momentum_buffer"] for values in ours.state.values() if "momentum_buffer" in values]
    assert all(isinstance(momentum, DTensor) for momentum in momenta)
    return [p.full_tensor().detach() for p in sharded.parameters() if isinstance(p, DTensor)]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_on_shards_it_does_what_it_does_on_whole_matrices(num_ranks):
    """Orthogonalised shard by shard, or from partial products in bfloat16, the steps go elsewhere; six rows on four
    ranks leave one of them none."""
    net = Net()
    train(net, [make(net)], range(4))
    for weights in run_on_ranks(_step_on_shards, num_ranks, range(4)):
        for ours, theirs in zip(weights, net.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def _by_name() -> list[bool]:
    sharded = _shard(Net())
    optimizer = make(sharded)
    for step in range(3):
        optimizer.zero_grad()
        _backward(sharded, step)
        optimizer.step()
    state = get_optimizer_state_dict(sharded, optimizer)
    assert state["state"].keys() == dict(sharded.named_parameters()).keys()
    other = make(sharded)
    set_optimizer_state_dict(sharded, other, state)
    assert other.parts[0].state is other.state
    return [
        torch.equal(_whole(other.state[parameter][key]), _whole(value))
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    ]


def _backward(net: Net, step: int) -> None:
    for index, parameter in enumerate(net.parameters()):
        gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * step + index))
        assert isinstance(parameter, DTensor)
        parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def test_torch_reads_and_sets_its_state_by_parameter_name():
    for equal in run_on_ranks(_by_name, 2):
        assert len(equal) == 2 + 3 * 3
        assert all(equal)
