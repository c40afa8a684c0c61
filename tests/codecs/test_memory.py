"""Counting the bytes of tensors alive: literal sizes, views, temporaries, and the meta device."""

import pytest
import torch

from longlive.codecs.memory import LiveBytes

KIB = torch.Size([256])  # float32


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_peak_counts_what_is_alive_at_once(device: str) -> None:
    with LiveBytes() as bytes_:
        first = torch.zeros(KIB, device=device)
        second = torch.zeros(KIB, device=device) + 1
        del first
        third = torch.zeros(KIB, device=device)
    assert (bytes_.peak, bytes_.live) == (3 * 1024, 2 * 1024)
    assert second.shape == third.shape


def test_views_and_operations_in_place_allocate_nothing() -> None:
    outside = torch.zeros(KIB)
    with LiveBytes() as bytes_:
        outside.view(2, 128).add_(1)
        inside = torch.zeros(KIB)
        view = inside[:10]
        del inside
        view.mul_(2)
        assert bytes_.live == 1024, "a view keeps its storage alive"
        del view
        assert bytes_.live == 0
    assert bytes_.peak == 1024


def test_temporaries_inside_a_module_are_counted() -> None:
    """A forward that is measured from its inputs and outputs alone would miss them."""
    module = torch.nn.Sequential(
        torch.nn.Linear(4, 1024, bias=False), torch.nn.ReLU(), torch.nn.Linear(1024, 4, bias=False)
    )
    module.requires_grad_(False)
    x = torch.zeros(64, 4)
    with LiveBytes() as bytes_:
        module(x)
    hidden = 64 * 1024 * 4
    assert 2 * hidden <= bytes_.peak <= 2 * hidden + 2 * 64 * 4 * 4
    assert bytes_.live == 0
