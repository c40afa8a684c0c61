"""`precision=nvfp4`: the blocks' linear layers train, or roll out, in NVFP4 (`nvfp4.recipe`), by the best backend there
is.

Random bits of stochastic rounding come from a clock that all layers share. This plugin keeps it: the seed is the run's,
the step is the Trainer's when a backward begins (nothing is drawn earlier), and the rank's place among the others is
read when Lightning connects the plugin. A resumed run and one that was never interrupted draw the same.

The error of NVFP4 in a loss does not shrink with the loss. So the forward products of the last steps are in bfloat16
(`keep_last_steps_bf16`), as in arXiv 2509.25149: the network settles on what it will be rolled out in. Backward's stay
in NVFP4, and with them what is kept in between: these steps take no more memory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from longlive.parallel.mesh import DATA
from longlive.parallel.strategy import ShardedStrategy
from longlive.precision.nvfp4.backends.base import Backend
from longlive.precision.nvfp4.backends.choose import BACKENDS, choose_backend
from longlive.precision.nvfp4.linear import MULTIPLE, NVFP4Linear
from longlive.precision.nvfp4.recipe import NVFP4Recipe, StepClock, largest_over
from longlive.precision.plugin import LinearPrecision
from longlive.precision.selection import BLOCK_LINEARS, Layer
from longlive.typing import Int, Tensor

log = logging.getLogger(__name__)


class NVFP4Precision(LinearPrecision):
    """`precision=nvfp4`.

    Args:
        recipe: which operand is quantised how; None: the defaults.
        backend: `emulated`, `transformer_engine`, `torchao`, or `auto`, the best that runs here and computes the
            recipe.
        layers, keep_last_blocks_bf16: see `LayerSelection`.
        keep_last_steps_bf16: share of the Trainer's `max_steps`, the last ones, whose forward products are in bfloat16.
            Such a run is for rollouts in bfloat16. Of a network's own plugin alone: a role's has no steps.
        seed: of the random bits; the run's.

    Raises:
        ValueError: for an unknown backend, or one that is asked for and cannot run here; for a share outside [0, 1).
    """

    precision = "nvfp4"
    linear_class = NVFP4Linear

    def __init__(
        self,
        *,
        recipe: NVFP4Recipe | None = None,
        backend: str = "auto",
        layers: Sequence[str] = BLOCK_LINEARS,
        keep_last_blocks_bf16: float = 0.0,
        keep_last_steps_bf16: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(multiple=MULTIPLE, layers=layers, keep_last_blocks_bf16=keep_last_blocks_bf16)
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"backend={backend!r} is unknown; use auto, {', '.join(BACKENDS)}")
        if not 0 <= keep_last_steps_bf16 < 1:
            raise ValueError(
                f"keep_last_steps_bf16={keep_last_steps_bf16} must be at least 0 and below 1: a share of the steps"
            )
        self.keep_last_steps_bf16 = keep_last_steps_bf16
        self.recipe = recipe or NVFP4Recipe()
        self.asked_for = backend
        if backend != "auto":
            self._choose(trains=False)  # refused now, before data and networks, if it cannot run at all
        self.backend: Backend | None = None
        """Chosen when there are layers, for they say whether weights learn."""
        self.clock = StepClock(seed)
        self._trainer: Trainer | None = None
        self._means_are_checked = False

    @property
    def backend_name(self) -> str:
        return self.asked_for if self.backend is None else self.backend.name

    @property
    def settings(self) -> tuple[Any, ...]:
        return (self.recipe, self.asked_for, self.selection, self.keep_last_steps_bf16, self.clock.seed)

    def replace(self, module: nn.Module, layers: Sequence[Layer]) -> None:
        backend = self._backend_of([module.get_submodule(layer.name) for layer in layers])
        for layer in layers:
            parent, _, child = layer.name.rpartition(".")
            linear = module.get_submodule(layer.name)
            assert isinstance(linear, nn.Linear)
            name = layer.name.removesuffix(".base_layer")
            replaced = NVFP4Linear.from_linear(linear, self.recipe, backend, name, self.clock)
            setattr(module.get_submodule(parent), child, replaced)

    def adopt(self, layers: Sequence[nn.Module]) -> None:
        """Another plugin's layers follow this one's clock from now on, and compute its recipe."""
        backend = self._backend_of(layers)
        for layer in layers:
            assert isinstance(layer, NVFP4Linear)
            layer.clock, layer.recipe, layer.backend = self.clock, self.recipe, backend
            layer.backend_state.clear()

    def freeze(self, module: nn.Module) -> None:
        """Drop the master weights of frozen layers: 0.5625 bytes per weight stay."""
        for layer in module.modules():
            if isinstance(layer, NVFP4Linear) and self.recipe.weights is not None:
                layer.materialize()

    def connect(self, model: nn.Module, optimizers: list, lr_schedulers: list) -> tuple[nn.Module, list, list]:
        """Lightning has built everything: read which of the ranks this is.

        Raises:
            ValueError: for a share of steps whose number is unknown.
        """
        trainer = next(module for module in model.modules() if isinstance(module, LightningModule)).trainer
        if self.keep_last_steps_bf16 and trainer.max_steps < 1:
            raise ValueError(
                f"keep_last_steps_bf16={self.keep_last_steps_bf16} is a share of trainer.max_steps, which is "
                f"{trainer.max_steps}; set it to the number of steps, or the share to 0"
            )
        self._trainer = trainer
        if self.keep_last_steps_bf16:
            log.info(
                "precision nvfp4: from step %d on forward products in bfloat16",
                math.ceil(self.first_step_bf16(trainer)),
            )
        self.clock.stream, self.clock.reduce = trainer.global_rank, None
        if isinstance(trainer.strategy, ShardedStrategy):
            # Ranks of a sequence group share the tokens of their clips, and so a stream.
            self.clock.stream = trainer.strategy.device_mesh[DATA].get_local_rank()
            group = trainer.strategy.sequence.group
            self.clock.reduce = None if group is None else largest_over(group)
        return super().connect(model, optimizers, lr_schedulers)

    def first_step_bf16(self, trainer: Trainer) -> float:
        """Where the last steps begin."""
        return (1 - self.keep_last_steps_bf16) * trainer.max_steps

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        if self.keep_last_steps_bf16 and self._trainer is not None:
            self.clock.over = self._trainer.global_step >= self.first_step_bf16(self._trainer)
        with super().forward_context():
            yield

    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        self.begin_backward(module.global_step)
        return super().pre_backward(tensor, module)

    def begin_backward(self, step: int) -> None:
        self.clock.advance(step)

    def place_tokens(self, positions: Int[Tensor, "b l"]) -> None:
        if self.recipe.reduce_amax and self.clock.reduce is not None and not self._means_are_checked:
            self._check_means(positions)
            self._means_are_checked = True
        self.clock.place_tokens(positions.flatten())

    def _check_means(self, positions: Int[Tensor, "b l"]) -> None:
        """Ranks that share amax are to compute what one process does: say so, if their means are of other tokens."""
        tokens, piece = self.recipe.mean_tokens, piece_tokens(positions[0])
        if tokens is not None and self.recipe.activations is not None and piece % tokens:
            log.warning(
                "precision nvfp4: with reduce_amax=true ranks are to compute what one process does, but mean_tokens=%d "
                "does not divide the %d tokens of a piece that one rank holds, so their means are others; set "
                "precision.recipe.mean_tokens to %d or a divisor of it",
                tokens,
                piece,
                piece,
            )

    def _backend_of(self, layers: Sequence[nn.Module]) -> Backend:
        if self.backend is None:
            self.backend = self._choose(trains=any(p.requires_grad for layer in layers for p in layer.parameters()))
        return self.backend

    def _choose(self, trains: bool) -> Backend:
        try:
            return choose_backend(self.asked_for, self.recipe, trains=trains)
        except RuntimeError as error:  # a setting that this machine cannot have
            raise ValueError(str(error)) from error


def piece_tokens(positions: Int[Tensor, " l"]) -> int:
    """Tokens that are consecutive and begin at a multiple of their number, here and in the whole clip, on every rank
    that holds such pieces of it: as many share a mean, whoever computes it.

    Args:
        positions: of this rank's tokens among all of the clip's.
    """
    begins = torch.nonzero(positions.diff() != 1).flatten() + 1
    return math.gcd(len(positions), int(positions[0]), *begins.tolist(), *positions[begins].tolist())
