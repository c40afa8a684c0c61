"""The straight path between data and noise, and its velocity: flow matching's one equation, solved for each of its
unknowns.

    x_t = (1 - sigma) x_0 + sigma eps,    v = dx_t / dsigma = eps - x_0
    x_0 = x_t - sigma v,                  eps = x_t + (1 - sigma) v

(Lipman et al. 2022; Liu et al. 2022, rectified flow.) `sigma` is given per frame, because the chunks of a clip, and the
frames of an image-to-video clip, have noise levels of their own.
"""

from longlive.typing import Float, Latents, PerFrame, Tensor


def per_frame(values: PerFrame) -> Float[Tensor, "b f 1 1 1"]:
    """Per-frame numbers, shaped so that they multiply latents."""
    return values[:, :, None, None, None]


def add_noise(x0: Latents, eps: Latents, sigma: PerFrame) -> Latents:
    """`x_t`: the latents at noise level sigma."""
    sigma = per_frame(sigma)
    return (1 - sigma) * x0 + sigma * eps


def velocity_target(x0: Latents, eps: Latents) -> Latents:
    """`v`: what the network learns to predict."""
    return eps - x0


def x0_from_velocity(x_t: Latents, velocity: Latents, sigma: PerFrame) -> Latents:
    """The clean latents that a velocity at `x_t` points to."""
    return x_t - per_frame(sigma) * velocity


def noise_from_velocity(x_t: Latents, velocity: Latents, sigma: PerFrame) -> Latents:
    """The noise that a velocity at `x_t` comes from."""
    return x_t + (1 - per_frame(sigma)) * velocity
