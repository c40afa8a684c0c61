"""Rotary positions."""

from itertools import product

import torch

from longlive.models.wan.rope import pairs_per_direction, rotation


def test_a_head_is_shared_out_as_in_wan():
    assert pairs_per_direction(128) == (22, 21, 21)
    assert pairs_per_direction(32) == (6, 5, 5)


def test_pairs_turn_by_position_times_frequency():
    """The complex product of Wan's code, written out in complex128."""
    head_dim, positions = 16, torch.tensor([[0.0, 2.5], [3.0, 1000.0]])
    x = torch.randn(2, 12, 3, head_dim, generator=torch.Generator().manual_seed(0))
    angles = torch.zeros(2, 2, 2, 3, head_dim // 2, dtype=torch.float64)
    for batch, frame, row, column in product(range(2), range(2), range(2), range(3)):
        angles[batch, frame, row, column] = torch.tensor(
            [positions[batch, frame].item() * 10000.0 ** (-pair / 4) for pair in range(4)]
            + [row * 10000.0 ** (-pair / 2) for pair in range(2)]
            + [column * 10000.0 ** (-pair / 2) for pair in range(2)]
        )
    turns = torch.polar(torch.ones_like(angles), angles).flatten(1, 3)[:, :, None]
    expected = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turns).flatten(-2)
    torch.testing.assert_close(rotation(positions, 2, 3, head_dim).rotate(x), expected.float(), rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_the_rotation():
    turns = rotation(torch.tensor([[0, 7, 3]]), 1, 2, 8)
    x = torch.randn(1, 6, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(turns.rotate, (x,))


def test_scores_depend_on_distances_only():
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 32, generator=g).expand(1, 4, 1, 32) for _ in range(2))

    def scores(offset):
        turns = rotation(torch.arange(4)[None] + offset, 1, 1, 32)
        return torch.einsum("blne,bmne->blm", turns.rotate(q), turns.rotate(k))

    torch.testing.assert_close(scores(0.0), scores(100.5), rtol=1e-4, atol=1e-4)


def test_low_precision_tokens_are_turned_in_float32():
    """Catches tables or products in bfloat16, which lose positions beyond 256."""
    turns = rotation(torch.tensor([[1001]]), 1, 1, 32)
    x = torch.randn(1, 1, 1, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert turns.rotate(x).dtype == torch.bfloat16
    assert torch.equal(turns.rotate(x), turns.rotate(x.float()).bfloat16())


def test_a_run_of_tokens_has_its_own_turns():
    x = torch.randn(2, 12, 2, 16, generator=torch.Generator().manual_seed(0))
    turns = rotation(torch.tensor([[4, 5], [9, 2]]), 2, 3, 16)
    assert torch.equal(turns[3:9].rotate(x[:, 3:9]), turns.rotate(x)[:, 3:9])
