"""Muon for the matrices of the transformer blocks, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024; torch.optim.Muon) replaces a matrix's momentum by the nearest orthogonal matrix, so that
every direction moves by the same amount; it is defined for matrices only. With `match_rms_adamw` (Moonshot AI, arXiv
2502.16982) its step has the size of AdamW's; it bears a larger learning rate all the same. A small network from
scratch gets there in a fraction of the steps; tuning a pretrained one is AdamW's business.

The nearest orthogonal matrix is a property of the whole matrix. Where matrices are shards, the momentum stays a shard,
and matrices are gathered, one at a time, stepped whole on every rank alike, and dropped: the same numbers as on one
rank. (Left to DTensor, torch's Muon sums partial products in bfloat16 and ends up elsewhere.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Muon, Optimizer


class ShardedMuon(Muon):
    """torch's Muon, also for parameters that are shards (DTensors). Every rank must call `step`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters are all shards or all whole."""
        if not any(isinstance(parameter, DTensor) for group in self.param_groups for parameter in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_of_shards(parameter, group)
        return loss

    def _step_of_shards(self, parameter: DTensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert isinstance(gradient, DTensor)
        momentum = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(gradient))
        momentum.lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        assert isinstance(direction, DTensor)
        # The momentum is in the direction already; the rest is one step of torch's Muon without any.
        whole = nn.Parameter(parameter.full_tensor())
        whole.grad = direction.full_tensor()
        same = ("lr", "weight_decay", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
        Muon([whole], momentum=0.0, nesterov=False, **{name: group[name] for name in same}).step()
        parameter.copy_(
            distribute_tensor(whole.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None)
        )


class MuonAdamW(Optimizer):
    """Two optimizers behind one `step`, one `state` and one list of parameter groups (Muon's first).

    To everybody else it is one ordinary optimizer: its state dict has torch's form, so it can be saved in shards and
    loaded by parameter name.

    Args:
        named_parameters: as of `nn.Module.named_parameters`. Two-dimensional ones inside `blocks` go to Muon.
        lr: Muon's learning rate.
        adamw_lr: AdamW's. A learning-rate schedule scales both.
        momentum: Muon's.
        betas: AdamW's.
        weight_decay: of both, decoupled.
        ns_steps: Newton-Schulz iterations of Muon.

    Raises:
        ValueError: if there is no matrix inside `blocks`, or nothing else.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        adamw_lr: float,
        momentum: float = 0.95,
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        ns_steps: int = 5,
    ) -> None:
        matrices: list[tuple[str, nn.Parameter]] = []
        others: list[tuple[str, nn.Parameter]] = []
        for name, parameter in named_parameters:
            (matrices if parameter.ndim == 2 and "blocks" in name.split(".") else others).append((name, parameter))
        if not matrices or not others:
            raise ValueError(
                f"MuonAdamW got {len(matrices)} matrices inside `blocks` and {len(others)} other parameters; "
                "it needs both. Use optimizer=adamw"
            )
        self.parts: tuple[Optimizer, ...] = (
            ShardedMuon(
                matrices,
                lr=lr,
                momentum=momentum,
                weight_decay=weight_decay,
                ns_steps=ns_steps,
                adjust_lr_fn="match_rms_adamw",
            ),
            AdamW(others, lr=adamw_lr, betas=(betas[0], betas[1]), weight_decay=weight_decay),
        )
        super().__init__([{"params": matrices}, {"params": others}], {"lr": lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self._share()

    def _share(self) -> None:
        """Groups and state of the parts are the ones here: schedules and whoever loads a state reach them."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups = [group]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; a closure is evaluated once, with gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
