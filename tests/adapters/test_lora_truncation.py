"""A smaller adapter is the nearest one of its rank, layer by layer, and what it lacks is what is said of it."""

import pytest
import torch

from helpers.adapters import adapted, base, fill_adapter
from longlive.adapters.lora import (
    LoRASettings,
    adapted_layers,
    adapter_names,
    adapter_parameters,
    add_adapter,
    base_parameters,
    matrices,
)
from longlive.adapters.lora_truncation import add_truncated, truncate
from longlive.models.wan.config import WanConfig
from longlive.models.wan.model import CausalWan
from longlive.typing import Tensor


def trained(rank: int = 4) -> CausalWan:
    network = base()
    add_adapter(network, "student", LoRASettings(rank=rank, alpha=2 * rank))
    fill_adapter(network, "student", 3)
    return network


def update(network: CausalWan, name: str, layer_name: str) -> Tensor:
    """The dense product of a layer, in float64."""
    layer = adapted_layers(network, name)[layer_name]
    down, up = matrices(layer, name)
    return (layer.scaling[name] * up.double() @ down.double()).detach()


def nearest(dense: Tensor, rank: int) -> Tensor:
    u, values, v = torch.linalg.svd(dense, full_matrices=False)
    return u[:, :rank] * values[:rank] @ v[:rank]


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_each_layer_has_the_nearest_update_of_that_rank(rank: int) -> None:
    network = trained()
    truncation = add_truncated(network, "student", rank, "small")
    lost = whole = worst = 0.0
    for name, layer in adapted_layers(network, "small").items():
        dense, ours = update(network, "student", name), update(network, "small", name)
        expected = nearest(dense, rank)
        assert (ours - expected).norm() <= 1e-6 * dense.norm()
        assert layer.scaling["small"] == 1
        down, up = matrices(layer, "small")
        assert (down.shape[0], up.shape[1]) == (rank, rank)
        torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))
        lost, whole = lost + float((dense - expected).square().sum()), whole + float(dense.square().sum())
        error = float((dense - expected).norm() / dense.norm())
        if error > worst:
            worst, worst_layer = error, name
    assert truncation.error == pytest.approx((lost / whole) ** 0.5, abs=1e-12)
    assert truncation.worst_error == pytest.approx(worst, abs=1e-12)
    assert (truncation.rank, truncation.trained_rank) == (rank, 4)
    if rank < 4:
        assert truncation.worst_layer == worst_layer
        assert 0.05 < truncation.error < truncation.worst_error < 1
    else:
        assert truncation.error == 0


def test_in_the_trained_rank_it_computes_what_the_trained_one_does() -> None:
    network = trained()
    add_truncated(network, "student", 4, "small")
    assert adapter_names(network) == ["small", "student"]
    torch.testing.assert_close(adapted("small", network), adapted("student", network), rtol=0, atol=1e-5)
    assert (adapted("small", network) - adapted(None, network)).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_are_those_of_float64_in_exact_numbers(dtype: torch.dtype) -> None:
    """Large and small singular values of one layer: squares of them, as of D^T D, would drown the small ones."""
    numbers = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 6, generator=numbers).double())[0] for n in (24, 40))
    exact = torch.tensor([1.0, 0.5, 1e-2, 1e-4, 1e-5, 1e-6]).double()
    up, down = (left * exact).to(dtype), right.T.contiguous().to(dtype)
    smaller_down, smaller_up, values = truncate(down, up, 3.0, 5)
    torch.testing.assert_close(values, 3 * exact, rtol=1e-3, atol=0)
    assert (smaller_down.dtype, smaller_up.dtype, values.dtype) == (dtype, dtype, torch.float64)
    expected = nearest(3 * up.double() @ down.double(), 5)
    torch.testing.assert_close(smaller_up.double() @ smaller_down.double(), expected, rtol=0, atol=1e-6)


def test_signs_of_singular_vectors_are_settled() -> None:
    """They are free to change together: with another sign of A and B the same update would be another file."""
    down, up = (torch.randn(size, generator=torch.Generator().manual_seed(n)) for n, size in ((1, (4, 9)), (2, (7, 4))))
    first = truncate(down, up, 1.0, 3)
    second = truncate(-down, -up, 1.0, 3)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)
    largest = first[1].abs().argmax(dim=0)
    assert (first[1][largest, range(3)] > 0).all()


def test_a_layer_may_have_fewer_outputs_than_the_rank() -> None:
    down, up = (torch.randn(size, generator=torch.Generator().manual_seed(n)) for n, size in ((1, (4, 9)), (2, (2, 4))))
    smaller_down, smaller_up, values = truncate(down, up, 1.0, 3)
    assert (smaller_down.shape, smaller_up.shape, len(values)) == ((3, 9), (2, 3), 2)
    torch.testing.assert_close(smaller_up @ smaller_down, up @ down)


def test_of_an_adapter_that_does_nothing_yet_nothing_is_lost() -> None:
    network = base()
    add_adapter(network, "student", LoRASettings(rank=4, alpha=8))
    truncation = add_truncated(network, "student", 2, "small")
    assert (truncation.error, truncation.worst_error) == (0, 0)
    assert torch.equal(adapted("small", network), adapted(None, network))


@pytest.mark.parametrize("rank", [0, 5])
def test_another_rank_than_a_lower_one_is_refused(rank: int) -> None:
    network = trained()
    with pytest.raises(ValueError, match=f"rank={rank} must be 1 to 4, the rank of the trained adapter: a higher one"):
        add_truncated(network, "student", rank, "small")
    assert adapter_names(network) == ["student"]


@pytest.mark.parametrize(("rank", "number", "share"), [(128, 322_437_120, "6.45%"), (96, 241_827_840, "4.84%")])
def test_of_the_5b_model_rank_96_is_below_a_twentieth(rank: int, number: int, share: str) -> None:
    with torch.device("meta"):
        network = CausalWan(WanConfig.ti2v_5b())
    add_adapter(network, "student", LoRASettings(rank=rank, alpha=rank))
    count = sum(parameter.numel() for _, parameter in adapter_parameters(network, "student"))
    whole = sum(parameter.numel() for parameter in base_parameters(network))
    assert (count, whole) == (number, 4_999_787_712)
    assert f"{count / whole:.2%}" == share
