"""Solvers against a velocity field whose flow is known.

Data from N(mean, std^2) give the velocity of `velocity` below and the flow map `eps -> mean + std eps`.
"""

import pytest
import torch

from longlive.diffusion.schedule import FlowSchedule
from longlive.diffusion.solver import SOLVERS, Solver, UniPCSolver, make_solver
from longlive.typing import Tensor

MEAN, STD = 0.7, 0.3


def velocity(x: Tensor, sigma: float) -> Tensor:
    """`E[eps - x_0 | x]`."""
    score = (x - (1 - sigma) * MEAN) / ((1 - sigma) ** 2 * STD**2 + sigma**2)
    return sigma * score - (MEAN + (1 - sigma) * STD**2 * score)


def solve(solver: Solver, noise: Tensor) -> Tensor:
    x = noise
    for timestep, sigma in solver:
        assert timestep == pytest.approx(1000 * sigma)
        x = solver.step(velocity(x, sigma), x)
    return x


def error(name: str, num_steps: int) -> float:
    noise = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    solution = solve(make_solver(name, num_steps, FlowSchedule(shift=5.0)), noise)
    return (solution - (MEAN + STD * noise)).abs().max().item()


def test_both_solvers_converge_to_the_exact_flow_and_unipc_faster() -> None:
    """Catches UniPC with the wrong prediction type, sigmas or order: it would end elsewhere or converge like Euler."""
    assert error("euler", 1000) < 1e-2
    assert error("unipc", 1000) < 1e-3
    assert error("unipc", 100) < error("euler", 100) / 8
    assert error("unipc", 100) < error("unipc", 50) / 2.5, "second order: half the step, a quarter of the error"


def test_unipc_ends_where_a_fine_euler_solution_ends() -> None:
    noise = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    fine = solve(make_solver("euler", 4000, FlowSchedule()), noise)
    torch.testing.assert_close(solve(make_solver("unipc", 200, FlowSchedule()), noise), fine, atol=5e-3, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_diffusers_steps_through_our_sigmas(num_steps: int, shift: float) -> None:
    """Catches a shift applied twice or not at all, and diffusers' own grid."""
    solver = UniPCSolver(num_steps, FlowSchedule(shift=shift))
    next(iter(solver))
    torch.testing.assert_close(solver._scheduler.sigmas, torch.tensor(solver.sigmas), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_one_step_jumps_to_the_predicted_data(name: str) -> None:
    x, v = torch.randn(2, 1, 2, 3, 4, 5)
    solver = make_solver(name, 1, FlowSchedule())
    for _ in solver:
        x_end = solver.step(v, x)
    torch.testing.assert_close(x_end, x - v, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_second_walk_does_not_remember_the_first(name: str) -> None:
    """Catches a multistep history carried from one chunk into the next."""
    solver = make_solver(name, 5, FlowSchedule())
    first, second = torch.randn(2, 1, 2, 3, 4, 5)
    alone = solve(make_solver(name, 5, FlowSchedule()), second)
    solve(solver, first)
    assert torch.equal(solve(solver, second), alone)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_walk_that_was_broken_off_leaves_nothing_behind(name: str) -> None:
    solver = make_solver(name, 5, FlowSchedule())
    noise = torch.randn(1, 2, 3, 4, 5)
    for _, sigma in solver:
        solver.step(velocity(noise, sigma), noise)
        if sigma < 0.99:
            break
    assert torch.equal(solve(solver, noise), solve(make_solver(name, 5, FlowSchedule()), noise))


@pytest.mark.parametrize("name", SOLVERS)
def test_bfloat16_velocities_leave_float32_latents(name: str) -> None:
    solver = make_solver(name, 3, FlowSchedule())
    x = torch.randn(1, 2, 3, 4, 5)
    for _, sigma in solver:
        x = solver.step(velocity(x, sigma).bfloat16(), x)
    assert x.dtype == torch.float32


@pytest.mark.parametrize("name", SOLVERS)
def test_gradients_pass_through_the_steps(name: str) -> None:
    x0 = torch.randn(1, 2, 3, 4, 5).requires_grad_()
    end = solve(make_solver(name, 4, FlowSchedule()), x0)
    (gradient,) = torch.autograd.grad(end.sum(), x0)
    assert gradient.abs().min() > 1e-4


def test_unknown_solvers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'heun'.*unipc, euler"):
        make_solver("heun", 4, FlowSchedule())
