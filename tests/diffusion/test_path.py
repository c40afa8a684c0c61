"""The path between data and noise, and its inverses."""

import torch

from longlive.diffusion.path import add_noise, noise_from_velocity, velocity_target, x0_from_velocity


def test_ends_of_the_path_are_data_and_noise_frame_by_frame() -> None:
    """Catches a sigma that is broadcast along the wrong dim: each frame has its own."""
    x0, eps = torch.full((1, 3, 2, 2, 2), 2.0), torch.full((1, 3, 2, 2, 2), -4.0)
    x_t = add_noise(x0, eps, torch.tensor([[0.0, 1.0, 0.25]]))
    assert (x_t[0, 0] == 2).all()
    assert (x_t[0, 1] == -4).all()
    assert (x_t[0, 2] == 0.5).all()


def test_velocity_is_the_derivative_along_sigma() -> None:
    x0, eps = torch.randn(2, 2, 3, 4, 5, 6).double()
    sigma = torch.rand(2, 3).double().requires_grad_()
    total = (add_noise(x0, eps, sigma) * x0).sum()
    (derivative,) = torch.autograd.grad(total, sigma)
    torch.testing.assert_close(derivative, (velocity_target(x0, eps) * x0).sum((2, 3, 4)))


def test_data_and_noise_come_back_from_the_velocity() -> None:
    x0, eps = torch.randn(2, 2, 3, 4, 5, 6).double()
    sigma = torch.rand(2, 3).double()
    x_t, velocity = add_noise(x0, eps, sigma), velocity_target(x0, eps)
    torch.testing.assert_close(x0_from_velocity(x_t, velocity, sigma), x0)
    torch.testing.assert_close(noise_from_velocity(x_t, velocity, sigma), eps)
