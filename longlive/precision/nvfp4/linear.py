"""A linear layer whose GEMMs are NVFP4: the same Parameters, another forward.

`NVFP4Linear` takes the place of an `nn.Linear` and keeps its `weight` and `bias`, so that checkpoints, averages,
sharding and LoRA see no difference. What is computed is the recipe's (`recipe.py`, `gemms.py`), who computes it the
backend.

`materialize()` drops the master weight of a frozen layer: codes, scales and amax stay as `weight_packed`,
`weight_scale` and `weight_amax`, 0.5625 bytes per weight. They are in the state dict under these names, with the scale
rule in the state dict's metadata; a layer that is given such a state becomes a packed one.

Codes and scales are frozen Parameters of bytes, so that sharding, and whatever asks what of a module is frozen, treats
them as any other weight; amax, one number, is a buffer that every rank has. A layer may be packed on meta, before there
are numbers: `pack` brings them, of a sharded layer every rank its own rows. `masters` is how weights that are not
packed are loaded where layers are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, zeros

from longlive.parallel.materialise import local_part
from longlive.precision.nvfp4.backends.base import Backend
from longlive.precision.nvfp4.format import BLOCK, RULES, QuantisedTensor, quantise
from longlive.precision.nvfp4.gemms import ExactProduct, add_means, split_means
from longlive.precision.nvfp4.recipe import NVFP4Recipe, StepClock
from longlive.typing import Float, Tensor

MULTIPLE = 32
"""In and out features are multiples of this: FP4 GEMMs address whole groups of 16 bytes."""

RULE_KEY = "nvfp4_rule"
TILES_KEY = "nvfp4_tiles"
BY_ROWS = "_1x16"
"""In a layer's state-dict metadata, and behind the rule in `packing`."""


def packed_parts(weight: str) -> tuple[str, str, str]:
    """What a packed weight of this name is in a state dict: codes, scales, amax."""
    return f"{weight}_packed", f"{weight}_scale", f"{weight}_amax"


def reason_against(linear: nn.Module) -> str | None:
    """Why a layer cannot become an `NVFP4Linear`; None: it can."""
    if isinstance(linear, NVFP4Linear):
        return "is NVFP4 already"
    if type(linear) is not nn.Linear:
        return f"is {type(linear).__name__}, not nn.Linear"
    for name, size in (("in_features", linear.in_features), ("out_features", linear.out_features)):
        if size % MULTIPLE:
            return f"{name}={size} is no multiple of {MULTIPLE}"
    if isinstance(linear.weight, DTensor):
        return "is sharded already; convert before sharding"
    if linear.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"weight is {linear.weight.dtype}, not float32 or bfloat16"
    return None


class NVFP4Linear(nn.Linear):
    """`x W^T + b` by an NVFP4 recipe.

    Args:
        in_features, out_features: multiples of 32.
        recipe: what is quantised how.
        backend: who computes it.
        name: names the layer's random bits; one name in a network.
        clock: names them too; all layers of a run share it.

    Raises:
        ValueError: for sizes that do not fit.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_amax: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: NVFP4Recipe,
        backend: Backend,
        name: str = "linear",
        clock: StepClock | None = None,
    ) -> None:
        for what, size in (("in_features", in_features), ("out_features", out_features)):
            if size % MULTIPLE:
                raise ValueError(f"{what}={size} is no multiple of {MULTIPLE}; keep this layer in high precision")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe = recipe
        self.backend = backend
        self.name = name
        self.clock = clock or StepClock()
        self.rule: str | None = None
        """The scale rule of the packed weight; None: there is a master weight."""
        self.tiles = True
        """Whether the packed weight's scales are shared by 16 x 16 elements."""
        self.backend_state: dict[str, Any] = {}
        """What the backend keeps of this layer between calls."""

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        recipe: NVFP4Recipe,
        backend: Backend,
        name: str = "linear",
        clock: StepClock | None = None,
    ) -> NVFP4Linear:
        """The layer that takes `linear`'s place, with its very Parameters, on whatever device they are.

        Raises:
            ValueError: with the reason, for a layer that cannot (`reason_against`).
        """
        reason = reason_against(linear)
        if reason is not None:
            raise ValueError(f"{name} {reason}; keep it in high precision")
        has_bias = linear.bias is not None
        layer = cls(
            linear.in_features, linear.out_features, has_bias, "meta",
            recipe=recipe, backend=backend, name=name, clock=clock,
        )  # fmt: skip
        layer.weight = linear.weight
        layer.bias = linear.bias
        return layer.train(linear.training)

    @torch.compiler.disable
    def forward(self, input: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch out"]:
        """Not compiled with what surrounds it: compiled division is approximate, and the codes would be others."""
        if self.recipe.mean_tokens is None or self.recipe.activations is None:
            return self._quantised(input)
        return self._around_means(input, self.recipe.mean_tokens)

    def _around_means(self, input: Float[Tensor, "*batch features"], tokens: int) -> Float[Tensor, "*batch out"]:
        """Backends see what differs from the means. A weight that does not learn is its codes here too, packed or not:
        when it is packed must not show."""
        rows = torch.atleast_2d(input)
        tokens = max(min(tokens, rows.shape[-2]), 1)  # of fewer tokens one mean, without padding
        means, rest = split_means(rows, tokens)
        codes = self.codes
        if codes is None and not self.weight.requires_grad and self.recipe.weights is not None:
            codes = quantise(self.weight, self.recipe.weights, tiles=self.recipe.weight_tiles)
        exact = ExactProduct.apply(means, self.weight, codes)
        return add_means(self._quantised(rest), exact, tokens).view(*input.shape[:-1], self.out_features)

    def _quantised(self, input: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch out"]:
        output = self.backend.linear(self, input.reshape(-1, self.in_features))
        return output.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        packed = f", packed={self.rule}" if self.rule is not None else ""
        return f"{super().extra_repr()}, backend={self.backend.name}{packed}"

    @property
    def codes(self) -> QuantisedTensor | None:
        """The packed weight, if there is no master weight any more."""
        if self.rule is None:
            return None
        scales = self.weight_scale.view(torch.float8_e4m3fn)
        return QuantisedTensor(self.weight_packed, scales, self.weight_amax, self.rule, self.tiles)

    @property
    def packing(self) -> str | None:
        """Scale rule of the packed weight, and whether rows have their own scales: `mse`, `mse_1x16`."""
        return self.rule if self.rule is None or self.tiles else self.rule + BY_ROWS

    @property
    def is_packed(self) -> bool:
        """Whether there are codes in place of the master weight."""
        return self.rule is not None

    def materialize(self) -> None:
        """Replace a frozen master weight by its codes. Called again, it does nothing. On meta the codes have no memory
        either; `pack` fills them.

        Raises:
            ValueError: if the weight learns, is sharded, or stays in high precision by the recipe.
        """
        if self.rule is not None:
            return
        reason = None
        if self.recipe.weights is None:
            reason = "weights=null keeps it in high precision; name a scale rule"
        elif self.weight.requires_grad:
            reason = "it learns from its master copy; freeze it (requires_grad_(False)) first"
        elif isinstance(self.weight, DTensor):
            reason = "it is sharded; materialize before sharding"
        if reason is not None:
            raise ValueError(f"{self.name}: the weight cannot be packed: {reason}")
        assert self.recipe.weights is not None
        master = self.weight
        self._become_packed(self.recipe.weights)
        if not master.is_meta:
            self.pack(master)

    @torch.no_grad()
    def pack(self, master: Float[Tensor, "out features"]) -> None:
        """The codes of a packed layer become those of a weight.

        Args:
            master: whole, also where the layer is sharded.
        """
        assert self.rule is not None
        self.tiles = self.recipe.weight_tiles
        codes = quantise(master.to(self.weight_amax.device), self.rule, tiles=self.tiles)
        for kept, made in ((self.weight_packed, codes.packed), (self.weight_scale, codes.scales.view(torch.uint8))):
            part, where = local_part(kept)
            part.copy_(made[where])
        self.weight_amax.copy_(codes.amax)
        self.backend_state.clear()

    def _become_packed(self, rule: str) -> None:
        """With codes that have no numbers yet."""
        n, k, device = self.out_features, self.in_features, self.weight.device
        self.register_parameter("weight", None)
        for name, width in (("weight_packed", k // 2), ("weight_scale", k // BLOCK)):
            held = torch.empty(n, width, dtype=torch.uint8, device=device)
            self.register_parameter(name, nn.Parameter(held, requires_grad=False))
        self.register_buffer("weight_amax", torch.empty((), dtype=torch.float32, device=device))
        self.rule, self.tiles = rule, self.recipe.weight_tiles
        self.backend_state.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NVFP4Linear:
        """`.to(dtype)` is for numbers in high precision; codes, scales and amax move, and stay what they are."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = self._buffers[name]
            if tensor is not None and after is not None and after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
        self.backend_state.clear()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.rule is not None and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]] |= {RULE_KEY: self.rule, TILES_KEY: self.tiles}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Transformer Engine's layers save this; it holds nothing that this recipe needs.
        state_dict.pop(f"{prefix}_extra_state", None)
        if f"{prefix}weight_packed" in state_dict:
            # Without metadata (a plain dict) the recipe is all that says which rule it was.
            rule = local_metadata.get(RULE_KEY, self.rule or self.recipe.weights)
            tiles = local_metadata.get(TILES_KEY, self.recipe.weight_tiles if self.rule is None else self.tiles)
            if rule not in RULES:
                error_msgs.append(f"{prefix}weight_packed has the scale rule {rule!r}; known are {', '.join(RULES)}")
            elif self.rule is not None:
                self.rule = rule
            elif self.weight.requires_grad or isinstance(self.weight, DTensor):
                error_msgs.append(f"{prefix}weight_packed has no master weight to train; freeze the layer first")
            else:
                self._become_packed(rule)
            self.tiles = tiles
            # Files have the scales in their own dtype.
            state_dict[f"{prefix}weight_scale"] = state_dict[f"{prefix}weight_scale"].view(torch.uint8)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.backend_state.clear()


@contextmanager
def masters(layers: Sequence[NVFP4Linear]) -> Iterator[None]:
    """Inside, these packed layers have a master weight beside their codes, zero, for weights to be loaded into by the
    names that they have in a network that is not packed; afterwards their codes are those of what was loaded. It takes
    the memory of these weights in float32 for as long, of a sharded layer this rank's share."""
    for layer in layers:
        layer.weight = nn.Parameter(_zeros_beside(layer), requires_grad=False)
    try:
        yield
        for layer in layers:
            weight = layer.weight
            layer.pack(weight.full_tensor() if isinstance(weight, DTensor) else weight)
            layer.weight = None  # type: ignore[assignment]  # one after the other: memory falls as it goes
    finally:
        for layer in layers:
            layer.weight = None  # type: ignore[assignment]


def _zeros_beside(layer: NVFP4Linear) -> Tensor:
    """A weight laid out as the layer's codes are."""
    codes, shape = layer.weight_packed, (layer.out_features, layer.in_features)
    if isinstance(codes, DTensor):
        return zeros(*shape, dtype=torch.float32, device_mesh=codes.device_mesh, placements=codes.placements)
    return torch.zeros(shape, dtype=torch.float32, device=codes.device)
