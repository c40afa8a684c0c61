"""Muon for the matrices of the transformer blocks, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024; torch.optim.Muon) replaces a matrix's momentum by the nearest orthogonal matrix, so that
every direction moves by the same amount; it is defined for matrices only. With `match_rms_adamw` (Moonshot AI, arXiv
2502.16982) its step has the size of AdamW's; it bears a larger learning rate all the same. A small network from
scratch gets there in a fraction of the steps; tuning a pretrained one is AdamW's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """Two optimizers behind one `step`, one `state_dict` and one list of parameter groups (Muon's first).

    Args:
        named_parameters: as of `nn.Module.named_parameters`. Two-dimensional ones inside `blocks` go to Muon.
        lr: Muon's learning rate.
        adamw_lr: AdamW's. A learning-rate schedule scales both.
        momentum: Muon's.
        betas: AdamW's.
        weight_decay: of both, decoupled.

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
            Muon(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            AdamW(others, lr=adamw_lr, betas=(betas[0], betas[1]), weight_decay=weight_decay),
        )
        super().__init__([*matrices, *others], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """The groups here are the parts' own, so that a learning-rate schedule reaches them."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

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

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share()
