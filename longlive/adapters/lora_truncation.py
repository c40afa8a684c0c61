"""A smaller adapter in place of the one that was trained: of each layer's update, the nearest one of a lower rank.

    D = alpha / rank B A          D_R = sum of the R largest s_i u_i v_i^T of D's singular value decomposition

No matrix of rank R is nearer to D, in the Frobenius norm (Eckart and Young 1936); what is lost are the other singular
values, |D - D_R|^2 = sum of s_i^2 over i > R. D itself is never made: with B = Q_B R_B and A^T = Q_A R_A it is
Q_B (alpha / rank R_B R_A^T) Q_A^T, and the matrix in the middle has no more rows than the rank.

Both factors get half of each singular value, B_R = U sqrt(s) and A_R = sqrt(s) V^T, and `alpha` is R: the product is
not scaled, which is also what programs take that read no alpha. Of each pair of singular vectors, which are free to
change their signs together, the one in B has its largest element positive: the same adapter gives the same file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from longlive.adapters.lora import PREFIX, adapted_layers, add_stored_adapter, matrices
from longlive.typing import Float, Tensor


@dataclass(frozen=True)
class Truncation:
    """What a smaller adapter lacks. Errors are relative, in the Frobenius norm, before the factors are rounded.

    Attributes:
        rank: that it has.
        trained_rank: that it had.
        error: of the updates of all layers together.
        worst_layer: with the largest error of its own.
        worst_error: that one.
    """

    rank: int
    trained_rank: int
    error: float
    worst_layer: str
    worst_error: float


def truncate(
    down: Float[Tensor, "r k"], up: Float[Tensor, "n r"], scale: float, rank: int
) -> tuple[Float[Tensor, "rank k"], Float[Tensor, "n rank"], Float[Tensor, " s"]]:
    """The nearest `B_R A_R` to `scale B A`.

    Args:
        down, up: A and B.
        scale: of their product.
        rank: at most theirs.

    Returns:
        A_R and B_R in the dtypes of A and B, and all singular values of the product, falling, in float64.
    """
    left, right_of_left = torch.linalg.qr(up.double())
    right, right_of_right = torch.linalg.qr(down.double().T)
    u, values, v = torch.linalg.svd(scale * right_of_left @ right_of_right.T, full_matrices=False)
    u, v, roots = left @ u[:, :rank], v[:rank] @ right.T, values[:rank].sqrt()
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))[0]
    signs = torch.where(largest < 0, -1.0, 1.0) * roots
    # A layer with fewer inputs or outputs than the rank has fewer singular values, too.
    smaller_down, smaller_up = down.new_zeros(rank, down.shape[1]), up.new_zeros(up.shape[0], rank)
    smaller_down[: len(roots)] = signs[:, None] * v
    smaller_up[:, : len(roots)] = signs * u
    return smaller_down, smaller_up, values


@torch.no_grad()
def add_truncated(network: nn.Module, name: str, rank: int, truncated: str) -> Truncation:
    """Add an adapter of a lower rank that is as near as can be to one that the network has.

    Args:
        network: whole.
        name: of the adapter, which stays.
        rank: of the new one, up to that of the old one.
        truncated: the new one's name.

    Raises:
        ValueError: if there is no such adapter, or the rank is none or above its own; the network is untouched then.
    """
    layers = adapted_layers(network, name)
    trained_rank = next(iter(layers.values())).r[name]
    if not 1 <= rank <= trained_rank:
        raise ValueError(
            f"rank={rank} must be 1 to {trained_rank}, the rank of the trained adapter: a higher one would add zeros; "
            "or null, for the adapter as it was trained"
        )
    state: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    whole: dict[str, float] = {}
    for layer_name, layer in layers.items():
        down, up, values = truncate(*matrices(layer, name), layer.scaling[name], rank)
        state[f"{PREFIX}{layer_name}.lora_A.weight"], state[f"{PREFIX}{layer_name}.lora_B.weight"] = down, up
        lost[layer_name], whole[layer_name] = (float(part.square().sum()) for part in (values[rank:], values))
    add_stored_adapter(network, truncated, state, rank, alpha=rank, source=f"{name!r} in rank {rank}")
    errors = {layer_name: _relative(lost[layer_name], whole[layer_name]) for layer_name in layers}
    worst = max(errors, key=lambda layer_name: errors[layer_name])
    return Truncation(rank, trained_rank, _relative(sum(lost.values()), sum(whole.values())), worst, errors[worst])


def _relative(lost: float, whole: float) -> float:
    """Of squares; nothing of nothing is lost."""
    return (lost / whole) ** 0.5 if whole else 0.0
