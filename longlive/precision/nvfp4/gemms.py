"""The three GEMMs of a linear layer with quantised operands, as one step of autograd.

FPROP quantises X by rows. If W learns, X is quantised once more: transposed and transformed, for WGRAD, whose blocks
run along the tokens. Both copies come from X itself, never one from the other, and only the second is kept: 0.5625
bytes per element. Of W the codes are kept for DGRAD (0.5625 bytes per weight, for as long as the layer's activations),
not W: a parameter that a sharded strategy gathered is gone by then, and must not be held back. A frozen W has no WGRAD,
and nothing of X is kept.

dY likewise is quantised twice. Its random bits are drawn in backward, which runs once also where activations are
computed again.

At the end of training (`StepClock.over`) Y is computed in high precision; what is kept, and backward, stay as they are.

Autocast does not reach in here: operands are quantised from what they are given as, sums and bias are float32, and the
output has autocast's dtype, or else that of X.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from longlive.precision.nvfp4.format import BLOCK, QuantisedTensor, max_magnitude, quantise
from longlive.precision.nvfp4.hadamard import hadamard, rotation_matrix
from longlive.precision.nvfp4.recipe import PADDED_TO, NVFP4Recipe, StepClock
from longlive.typing import Float, Tensor

Operand = QuantisedTensor | Tensor
"""A matrix of a GEMM; a plain one is left in high precision by the recipe."""

MatMul = Callable[[Operand, Operand], Tensor]
"""`left [m k], right [n k] -> left right^T [m n]`, float32."""


@dataclass(frozen=True)
class LinearPlan:
    """What the GEMMs of one layer need to know besides their tensors."""

    recipe: NVFP4Recipe
    clock: StepClock
    name: str
    matmul: MatMul


def quantised_linear(
    x: Float[Tensor, "tokens features"],
    weight: Tensor | QuantisedTensor,
    bias: Float[Tensor, " out"] | None,
    plan: LinearPlan,
) -> Float[Tensor, "tokens out"]:
    """`x weight^T + bias`, with the recipe's gradients.

    Args:
        x: any number of tokens.
        weight: `[out features]`, the parameter; or codes, which do not learn.
        bias: stays in high precision.
    """
    codes, master = (weight, None) if isinstance(weight, QuantisedTensor) else (None, weight)
    if not torch.is_grad_enabled():
        # Inside, autograd tells what could learn, not whether anyone asks: X^T would be quantised for nothing.
        x = x.detach()
        master, bias = (None if tensor is None else tensor.detach() for tensor in (master, bias))
    return QuantisedLinear.apply(x, master, bias, codes, plan)


class QuantisedLinear(torch.autograd.Function):
    """See `quantised_linear`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, master: Tensor | None, bias: Tensor | None, codes: QuantisedTensor | None, plan: LinearPlan
    ) -> Tensor:
        recipe, (needs_dx, needs_dw, _, *_) = plan.recipe, ctx.needs_input_grad
        out_dtype = output_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            rows = pad_tokens(x)
            columns = along_tokens(rows, recipe, recipe.activations) if needs_dw else None
            amax_rows, amax_columns = shared_amax(plan, rows, columns)
            w: Operand
            if codes is not None:
                w = codes
            else:
                assert master is not None
                w = quantised(master, recipe.weights, tiles=recipe.weight_tiles)
            y = None
            if not plan.clock.over:
                y = plan.matmul(quantised(rows, recipe.activations, amax_rows), w)[: len(x)]
                if bias is not None:
                    y += bias
            kept_x = None if columns is None else quantised(columns, recipe.activations, amax_columns)
            keep(ctx, w if needs_dx else None, kept_x)
        ctx.plan = plan
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, master, bias)]
        return high_precision(x, weight_of(master, codes), bias) if y is None else y.to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        plan: LinearPlan = ctx.plan
        recipe, rule = plan.recipe, plan.recipe.gradients
        w, x = kept(ctx)
        dx_dtype, dw_dtype, db_dtype = ctx.dtypes
        dx = dw = db = None
        with torch.autocast(gradient.device.type, enabled=False):
            rows = pad_tokens(gradient)
            columns = None if x is None else along_tokens(rows, recipe, rule)
            amax_rows, amax_columns = shared_amax(plan, rows, columns)
            if w is not None:
                dy = quantised(rows, rule, amax_rows, random_bits(plan, "dgrad", rows))
                dx = plan.matmul(dy, transposed(w))[: len(gradient)].to(dx_dtype)
            if columns is not None and x is not None:
                bits = random_bits(plan, "wgrad", rows)
                dy = quantised(columns, rule, amax_columns, None if bits is None else bits.t())
                dw = plan.matmul(dy, x).to(dw_dtype)
            if ctx.needs_input_grad[2]:
                db = gradient.sum(0, dtype=torch.float32).to(db_dtype)
        return dx, dw, db, None, None


class ExactProduct(torch.autograd.Function):
    """`x weight^T` in autocast's dtype or else x's, for means. Kept for backward are x, and the parameter or the codes:
    a copy of the weight in that dtype would be one of the whole network at the end of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, master: Tensor | None, codes: QuantisedTensor | None) -> Tensor:
        dtype = output_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            kept_x = x.to(dtype)
            y = F.linear(kept_x, weight_of(master, codes).to(dtype))
        needs_dx, needs_dw, _ = ctx.needs_input_grad
        keep(ctx, (master if codes is None else codes) if needs_dx else None, kept_x if needs_dw else None)
        ctx.dtypes = x.dtype, None if master is None else master.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        w, x = kept(ctx)
        dx = dw = None
        with torch.autocast(gradient.device.type, enabled=False):
            if w is not None:
                weight = w.dequantise() if isinstance(w, QuantisedTensor) else w
                dx = (gradient @ weight.to(gradient.dtype)).to(ctx.dtypes[0])
            if x is not None:
                assert isinstance(x, Tensor)
                dw = (gradient.flatten(0, -2).t() @ x.flatten(0, -2)).to(ctx.dtypes[1])
        return dx, dw, None


def split_means(
    x: Float[Tensor, "*batch tokens d"], tokens: int
) -> tuple[Float[Tensor, "*batch groups d"], Float[Tensor, "*batch tokens d"]]:
    """The mean of every so many tokens, the last ones maybe fewer, and what differs from it. In x's dtype."""
    length = x.shape[-2]
    missing = -length % tokens
    num_groups = (length + missing) // tokens
    groups = (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(-2, (num_groups, tokens))
    counts = torch.full((num_groups, 1), float(tokens), device=x.device)
    counts[-1:] -= missing
    means = (groups.sum(-2, dtype=torch.float32) / counts).to(x.dtype)
    return means, (groups - means.unsqueeze(-2)).flatten(-3, -2)[..., :length, :]


def add_means(
    y: Float[Tensor, "*batch tokens d"], means: Float[Tensor, "*batch groups d"], tokens: int
) -> Float[Tensor, "*batch tokens d"]:
    """To every token what belongs to its group of so many; where these come out even, without writing it out first."""
    length = y.shape[-2]
    if length % tokens:
        return y + means.repeat_interleave(tokens, -2)[..., :length, :]
    return (y.unflatten(-2, (length // tokens, tokens)) + means.unsqueeze(-2)).flatten(-3, -2)


def weight_of(master: Tensor | None, codes: QuantisedTensor | None) -> Tensor:
    """The numbers of a weight, or what its codes say."""
    if codes is not None:
        return codes.dequantise()
    assert master is not None
    return master


def high_precision(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer in autocast's dtype or else in x's, as it would be without NVFP4."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def output_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer's output is: autocast's dtype where that is on, else the input's."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def pad_tokens(x: Float[Tensor, "tokens d"]) -> Float[Tensor, "rows d"]:
    """With zeros up to a multiple of 32 tokens."""
    return F.pad(x, (0, 0, 0, -len(x) % PADDED_TO)) if len(x) % PADDED_TO else x


def along_tokens(rows: Float[Tensor, "l d"], recipe: NVFP4Recipe, rule: str | None) -> Float[Tensor, "d l"]:
    """The transpose, transformed if the recipe says so: an operand of WGRAD. One that is left in high precision is
    transformed in high precision, and only because the other operand is."""
    columns = rows.t()
    if not recipe.hadamard or (recipe.activations is None and recipe.gradients is None):
        return columns
    if rule is not None:
        return hadamard(columns)
    groups = columns.float().unflatten(-1, (columns.shape[-1] // BLOCK, BLOCK))
    return (groups.double() @ rotation_matrix(groups.device, torch.float64)).flatten(-2).float()


def quantised(
    x: Tensor, rule: str | None, amax: Tensor | None = None, random_bits: Tensor | None = None, *, tiles: bool = False
) -> Operand:
    """`x` in NVFP4; without a rule, `x`."""
    return x if rule is None else quantise(x, rule, tiles=tiles, amax=amax, random_bits=random_bits)


def transposed(w: Operand) -> Operand:
    """Scales of tiles are scales of the transpose too; by others, weights are decoded."""
    if isinstance(w, QuantisedTensor) and w.tiles:
        return w.transpose()
    return (w.dequantise() if isinstance(w, QuantisedTensor) else w).t()


def shared_amax(plan: LinearPlan, rows: Tensor, columns: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """amax of both copies over all ranks that share a clip, in one reduction; None: each its own."""
    if not plan.recipe.reduce_amax or plan.clock.reduce is None:
        return None, None
    amax = torch.stack([max_magnitude(matrix) for matrix in (rows, columns) if matrix is not None])
    largest = plan.clock.reduce(amax)
    return largest[0], None if columns is None else largest[1]


def random_bits(plan: LinearPlan, operand: str, rows: Tensor) -> Tensor | None:
    """Of a gradient `[tokens d]`, for the recipes that need them."""
    if plan.recipe.gradients is None or not plan.recipe.stochastic_gradients:
        return None
    num_tokens, features = rows.shape
    return plan.clock.bits(plan.name, operand, num_tokens, features, rows.device)


def keep(ctx: Any, *operands: Operand | None) -> None:
    """For `kept` in backward. Tensors go through autograd, where checkpointing and offloading see them."""
    tensors: list[Tensor | None] = []
    kinds: list[tuple[str, bool] | None] = []
    for operand in operands:
        if isinstance(operand, QuantisedTensor):
            tensors += [operand.packed, operand.scales, operand.amax]
            kinds.append((operand.rule, operand.tiles))
        else:
            tensors.append(operand)
            kinds.append(None)
    ctx.save_for_backward(*tensors)
    ctx.kinds = kinds


def kept(ctx: Any) -> list[Operand | None]:
    tensors = iter(ctx.saved_tensors)
    return [
        next(tensors) if kind is None else QuantisedTensor(next(tensors), next(tensors), next(tensors), *kind)
        for kind in ctx.kinds
    ]
