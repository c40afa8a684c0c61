"""Muon and AdamW behind one optimizer: each equals itself alone, and schedules and checkpoints reach both."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon

from longlive.modules.optimizer import MuonAdamW


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
