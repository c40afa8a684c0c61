"""Solvers of the sampling ODE `dx/dsigma = v`, stepped from noise (sigma 1) to latents (sigma 0) on the rollout grid.

*Euler* follows the velocity straight to the next noise level. *UniPC* (Zhao et al. 2023; order 2, `bh2`, as diffusers
runs it for Wan) predicts with the previous velocity too and corrects each step when the next velocity is known, at the
same number of network calls: the choice for few steps.

UniPC is diffusers' `UniPCMultistepScheduler`. What this file adds is that every chunk starts a fresh multistep history,
that its grid is ours (diffusers' own `linspace` ends at `1/1000` of the training grid and so depends on two numbers of
steps), that timesteps stay fractional (diffusers rounds them to integers), and that the mathematics runs in the
latents' dtype, float32, whatever the dtype in which the network answers. diffusers lowers the first sigma by 1e-6 to
keep a logarithm finite.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
from diffusers import UniPCMultistepScheduler

from longlive.diffusion.schedule import TIMESTEP_SCALE, FlowSchedule
from longlive.typing import Latents


class Solver(ABC):
    """One walk from noise to latents; iterating starts it afresh.

        for timestep, sigma in solver:
            x = solver.step(velocity(x, timestep), x)

    Gradients flow through `step`.

    Attributes:
        sigmas: the `num_steps + 1` noise levels visited, falling from 1 to 0.
    """

    def __init__(self, num_steps: int, schedule: FlowSchedule) -> None:
        self.sigmas: tuple[float, ...] = tuple(schedule.rollout_sigmas(num_steps).tolist())
        self.num_steps = num_steps
        self._index = 0

    def __iter__(self) -> Iterator[tuple[float, float]]:
        """Yields `(timestep, sigma)` before each step. A new iteration forgets the last one's history."""
        self._restart()
        for index, sigma in enumerate(self.sigmas[:-1]):
            self._index = index
            yield TIMESTEP_SCALE * sigma, sigma

    @abstractmethod
    def step(self, velocity: Latents, x: Latents) -> Latents:
        """The latents at the next noise level, in the dtype of `x`."""

    @abstractmethod
    def _restart(self) -> None:
        """Forget the history of earlier steps."""


class EulerSolver(Solver):
    """`x + (sigma_next - sigma) v`."""

    def step(self, velocity: Latents, x: Latents) -> Latents:
        return x + (self.sigmas[self._index + 1] - self.sigmas[self._index]) * velocity.to(x.dtype)

    def _restart(self) -> None:
        """Every step stands for itself."""


class UniPCSolver(Solver):
    """Predictor-corrector of order 2 (first order at the first and the last step)."""

    def __init__(self, num_steps: int, schedule: FlowSchedule) -> None:
        super().__init__(num_steps, schedule)
        # diffusers' decorated classes have no types.
        self._scheduler: Any = cast(Any, UniPCMultistepScheduler)(
            solver_order=2,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=schedule.shift,
            final_sigmas_type="zero",
        )
        # diffusers applies the shift itself, so it is given the unshifted grid.
        self._unshifted = np.arange(num_steps, 0, -1, dtype=np.float64) / num_steps

    def _restart(self) -> None:
        self._scheduler.set_timesteps(sigmas=self._unshifted.copy())
        # Steps are counted, not looked up: two integer-rounded timesteps of a fine grid may be equal.
        self._scheduler.set_begin_index(0)

    def step(self, velocity: Latents, x: Latents) -> Latents:
        timestep = self._scheduler.timesteps[self._index]
        stepped: Latents = self._scheduler.step(velocity.to(x.dtype), timestep, x, return_dict=False)[0]
        return stepped


SOLVERS: dict[str, Callable[[int, FlowSchedule], Solver]] = {"unipc": UniPCSolver, "euler": EulerSolver}


def make_solver(name: str, num_steps: int, schedule: FlowSchedule) -> Solver:
    """The solver with a name.

    Raises:
        ValueError: for an unknown name, or no step.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver={name!r} is unknown; use one of {', '.join(SOLVERS)}")
    return SOLVERS[name](num_steps, schedule)
