"""Classifier-free guidance."""

import torch

from longlive.diffusion.guidance import guide


def test_scales_zero_one_and_three() -> None:
    conditional, unconditional = torch.full((1, 1, 1, 1, 1), 5.0), torch.full((1, 1, 1, 1, 1), 2.0)
    assert guide(conditional, unconditional, 0.0).item() == 2
    assert guide(conditional, unconditional, 1.0).item() == 5
    assert guide(conditional, unconditional, 3.0).item() == 11
