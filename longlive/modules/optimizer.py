"""Muon for the matrices of the transformer blocks, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024; torch.optim.Muon) replaces a matrix's momentum by the nearest orthogonal matrix, so that
every direction moves by the same amount; it is defined for matrices only. With `match_rms_adamw` (Moonshot AI, arXiv
2502.16982) its step has the size of AdamW's; it bears a larger learning rate all the same. A small network from
scratch gets there in a fraction of the steps; tuning a pretrained one is AdamW's business.

The nearest orthogonal matrix is a property of the whole matrix. Where matrices are shards, the momentum stays a shard,
and matrices are gathered, one at a time, stepped whole on every rank alike, and dropped: the same numbers as on one
rank. (Left to DTensor, torch's Muon sums partial products in bfloat16 and ends up elsewhere.) Whole matrices of one
shape are orthogonalised in one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Muon, Optimizer

from longlive.typing import Float, Tensor

BATCH_ELEMENTS = 2**24
"""Elements that are orthogonalised together: enough to keep a device busy, little beside the optimizer's state."""


class BatchedMuon(Muon):
    """torch's Muon with all matrices of one shape orthogonalised together, also for parameters that are shards
    (DTensors): the same update in a fraction of the calls. Parameters are all shards or all whole; where they are
    shards, every rank must call `step`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            directions = [self._direction(parameter, group) for parameter in parameters]
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            for shape in dict.fromkeys(parameter.shape for parameter in parameters):
                same = [index for index, parameter in enumerate(parameters) if parameter.shape == shape]
                together = 1 if isinstance(directions[same[0]], DTensor) else max(1, BATCH_ELEMENTS // shape.numel())
                batches = [same[i : i + together] for i in range(0, len(same), together)]
                step_size = group["lr"] * 0.2 * math.sqrt(max(shape))
                for batch in batches:
                    whole = torch.stack([_whole(directions[index]) for index in batch])
                    updates = orthogonalised(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
                    for index, update in zip(batch, updates, strict=True):
                        parameter = parameters[index]
                        parameter.add_(_as_shard(update.to(parameter.dtype), parameter), alpha=-step_size)
        return loss

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The momentum after this gradient; with Nesterov's look ahead."""
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum


def orthogonalised(
    matrices: Float[Tensor, "n rows columns"], coefficients: Sequence[float], num_steps: int, eps: float
) -> Float[Tensor, "n rows columns"]:
    """Matrices with the singular vectors of the given ones and singular values near 1, in bfloat16.

    `X <- a X + (b X X^T + c (X X^T)^2) X`, from `X / |X|`, on the smaller side (Newton-Schulz, Jordan et al. 2024).
    """
    a, b, c = coefficients
    x = matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _as_shard(whole: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of what every rank holds, if the parameter is a shard."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


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
            BatchedMuon(
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
