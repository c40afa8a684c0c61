"""The shifted flow-matching schedule: which noise levels training draws, and which ones rollout steps through.

With `u` on the uniform grid `1, 1 - 1/N, ..., 1/N` and a shift `s`,

    sigma = s u / (1 + (s - 1) u),        timestep = 1000 sigma.

A shift above 1 spends more of the grid at high noise, where the layout of a video is decided; long token sequences need
more of it (Esser et al. 2024, section 5.3; Wan2.2 uses 5). The same map carries the training grid of N points and the
rollout grid of n steps, so a model never meets a noise level in rollout that lies outside those it was trained on.

The training loss is weighted by `w(t) = exp(-2 ((t - 500) / 1000)^2)`, minus its minimum over the grid, scaled so that
the grid's mean is 1: the two ends, nearly free of information, count little, and the mean loss keeps its scale
(LongLive-2.0's public training code). `uniform` weights are 1: where most of a token is redundant, as in the toy
world, the layout is decided near pure noise, and that end must be learned well.

Computed in float64, kept in float32.
"""

import torch

from longlive.typing import Float, Int, Tensor

TIMESTEP_SCALE = 1000.0
"""The network is told `1000 sigma`, whatever the number of grid points (Wan's convention)."""


class FlowSchedule:
    """Noise levels from pure noise (first) to nearly clean (last), on the CPU.

    Attributes:
        sigmas: share of noise at each grid point, float32 `[N]`, falling from 1.
        timesteps: `1000 sigma`, float32 `[N]`.
        loss_weights: `w(t)` of the module docstring, float32 `[N]`, mean 1.
    """

    def __init__(self, num_steps: int = 1000, shift: float = 5.0, weighting: str = "bell") -> None:
        """
        Args:
            num_steps: grid points N.
            shift: s; 1 leaves the grid uniform in sigma.
            weighting: `"bell"` or `"uniform"`, of the training loss.

        Raises:
            ValueError: if there is less than two grid points (one has no mean-1 weight), the shift is not positive or
                the weighting is unknown.
        """
        if num_steps < 2:
            raise ValueError(f"num_steps={num_steps}: a training grid needs at least 2 points; use e.g. 1000")
        if not shift > 0:
            raise ValueError(f"shift={shift} is not positive; use 1 for a uniform grid, 5 as Wan2.2 does")
        if weighting not in ("bell", "uniform"):
            raise ValueError(f"weighting={weighting!r} is unknown; use bell or uniform")
        self.num_steps = num_steps
        self.shift = shift
        sigmas = self._shifted(num_steps)
        weights = torch.exp(-2 * ((TIMESTEP_SCALE * sigmas - 500) / 1000) ** 2)
        weights = weights - weights.min() if weighting == "bell" else torch.ones_like(weights)
        self.sigmas: Float[Tensor, " grid"] = sigmas.float()
        self.timesteps: Float[Tensor, " grid"] = (TIMESTEP_SCALE * sigmas).float()
        self.loss_weights: Float[Tensor, " grid"] = (weights / weights.mean()).float()

    def _shifted(self, num_points: int) -> Float[Tensor, " grid"]:
        u = torch.arange(num_points, 0, -1, dtype=torch.float64) / num_points
        return self.shift * u / (1 + (self.shift - 1) * u)

    def sigma(self, index: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Sigma at grid indices, on the device of the indices."""
        return self.sigmas.to(index.device)[index]

    def timestep(self, index: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Timestep (0 to 1000) at grid indices, on the device of the indices."""
        return self.timesteps.to(index.device)[index]

    def loss_weight(self, index: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Loss weight at grid indices, on the device of the indices."""
        return self.loss_weights.to(index.device)[index]

    def rollout_sigmas(self, num_steps: int) -> Float[Tensor, " borders"]:
        """The `num_steps + 1` noise levels that a solver of n steps visits: the shifted grid of n points, then 0.

        Returns:
            float32 `[num_steps + 1]`: step i goes from entry i to entry i + 1; the first is 1, the last is 0.

        Raises:
            ValueError: if there is no step.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps}: a rollout needs at least one solver step per chunk")
        return torch.cat([self._shifted(num_steps), torch.zeros(1, dtype=torch.float64)]).float()
