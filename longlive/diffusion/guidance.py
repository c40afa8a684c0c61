"""Classifier-free guidance: push a prediction away from what the model says without the prompt.

    v = v_uncond + scale (v_cond - v_uncond)

(Ho & Salimans 2022, in the form with scale 1 = no guidance, scale 0 = no prompt.) Velocity, noise and clean latents are
affine in one another at a fixed `x_t`, so combining any of them is the same.
"""

from longlive.typing import Latents


def guide(conditional: Latents, unconditional: Latents, scale: float) -> Latents:
    """The guided prediction; `scale` 1 returns the conditional one."""
    return unconditional + scale * (conditional - unconditional)
