"""What the roles of distillation hold: their bases and adapters, counted on the networks that a run builds, on meta."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast

from lightning.pytorch.plugins import Precision
from torch import Tensor, nn

from longlive.adapters.lora import adapted_layers, adapter_parameters, base_name
from longlive.doctor.plan_memory import FLOAT32, Adapter, Sharding, state_bytes, stepped_on_meta
from longlive.doctor.role_memory import base_bytes, base_on_meta
from longlive.models.wan.model import CausalWan
from longlive.modules.base import OptimizerFactory, on_meta
from longlive.modules.distillation import DistillationModule
from longlive.modules.roles import CRITIC, STUDENT, Base, shared_bases
from longlive.precision.plugin import LinearPrecision


@dataclass(frozen=True)
class HeldBase:
    """A frozen network that roles share, with their adapters.

    Attributes:
        roles: who they are.
        num_bytes: of the base, as it is kept.
        block, rest: bytes of a block and of everything else as a rank gathers them, adapters included.
    """

    roles: tuple[str, ...]
    num_bytes: int
    block: int
    rest: int


@dataclass(frozen=True)
class Roles:
    """All of them.

    Attributes:
        num_parameters: of the network of stage 1.
        bases: at least one.
        adapters: in one block, of the student and the critic.
        sizes: parameters of their adapters.
        optimizer_bytes: of the state of their optimizers.
    """

    num_parameters: int
    bases: tuple[HeldBase, ...]
    adapters: Mapping[str, Adapter]
    sizes: Mapping[str, int]
    optimizer_bytes: Mapping[str, int]

    def base_of(self, role: str) -> HeldBase:
        (base,) = (base for base in self.bases if role in base.roles)
        return base

    def memory(self, sharding: Sharding, has_average: bool) -> dict[str, int]:
        """Bytes per rank that are there all the time, by name."""
        shards = sharding.num_shards
        memory = {
            "frozen bases": -(-sum(base.num_bytes for base in self.bases) // shards),
            "adapters": -(-sum(self.sizes.values()) * FLOAT32 // shards),
            "optimizer state": -(-sum(self.optimizer_bytes.values()) // shards),
        }
        if has_average:
            memory["average (EMA)"] = -(-self.sizes[STUDENT] * FLOAT32 // shards)
        if sharding.gathers:
            memory["gathered parameters"] = max(base.rest + 2 * base.block for base in self.bases)
        return memory


def count_roles(module: DistillationModule, of_run: Precision | str, sharding: Sharding) -> Roles:
    """Build every base on meta, and count. Where all blocks are alike, one is built and counted for all.

    Args:
        module: whose settings count; it has no networks.
        of_run: the run's precision.
        sharding: says what parameters are gathered in.
    """
    makers: dict[str, OptimizerFactory] = {STUDENT: module.make_optimizer, CRITIC: module.make_critic_optimizer}
    model = module.model_config
    built = replace(model, num_layers=1) if _alike((of_run, *module.precisions.values())) else model
    bases, adapters, sizes, states = [], {}, {}, {}
    for base in shared_bases(module.precisions, of_run):
        network = base_on_meta(built, base, module.lora, of_run)
        bases.append(_held(base, network, sharding, model.num_layers))
        for role in set(base.roles) & makers.keys():
            # Those of one block: all are alike, and an optimizer's step on meta takes as long as any.
            learned = [named for named in adapter_parameters(network, role) if named[0].startswith("blocks.0.")]
            adapters[role] = _adapter(network, role)
            sizes[role] = model.num_layers * sum(parameter.numel() for _, parameter in learned)
            states[role] = model.num_layers * state_bytes(stepped_on_meta(makers[role], learned))
    return Roles(sum(p.numel() for p in on_meta(model).parameters()), tuple(bases), adapters, sizes, states)


def _alike(precisions: Iterable[Precision | str | None]) -> bool:
    """Whether all blocks are treated alike."""
    return not any(isinstance(each, LinearPrecision) and each.selection.keep_last_blocks_bf16 for each in precisions)


def _held(base: Base, network: CausalWan, sharding: Sharding, num_layers: int) -> HeldBase:
    tensors: dict[str, Tensor] = dict(network.named_parameters()) | dict(network.named_buffers())
    gathered = {name: _gathered_bytes(name, tensor, sharding) for name, tensor in tensors.items()}
    block = sum(size for name, size in gathered.items() if name.startswith("blocks.0."))
    held = sum(
        tensor.nbytes
        for name, tensor in tensors.items()
        if name.startswith("blocks.0.") and base_name(name) is not None
    )
    return HeldBase(
        roles=base.roles,
        num_bytes=base_bytes(network) + (num_layers - len(network.blocks)) * held,
        block=block,
        rest=sum(size for name, size in gathered.items() if not name.startswith("blocks.")),
    )


def _gathered_bytes(name: str, tensor: Tensor, sharding: Sharding) -> int:
    """The timestep's layers are gathered as they are kept, and so are codes."""
    if tensor.is_floating_point() and tensor.itemsize == FLOAT32 and not name.startswith("time_"):
        return tensor.numel() * sharding.gathered_itemsize
    return tensor.nbytes


def _adapter(network: CausalWan, role: str) -> Adapter:
    """Of the first block; all are alike."""
    layers = adapted_layers(network.blocks[0], role)

    def total(chosen: Callable[[str], bool], of: Callable[[nn.Linear, int], int]) -> int:
        return sum(
            of(cast(nn.Linear, layer.get_base_layer()), layer.r[role]) for name, layer in layers.items() if chosen(name)
        )

    def takes_text(name: str) -> bool:
        return name in ("cross_attn.k", "cross_attn.v")

    def takes_tokens(name: str) -> bool:
        return not takes_text(name)

    def enters(name: str) -> bool:
        return name in ("self_attn.q", "self_attn.k", "self_attn.v")

    def numbers(layer: nn.Linear, rank: int) -> int:
        return rank * (layer.in_features + layer.out_features)

    return Adapter(
        token_ranks=total(takes_tokens, lambda layer, rank: rank),
        text_ranks=total(takes_text, lambda layer, rank: rank),
        token_numbers=total(takes_tokens, numbers),
        text_numbers=total(takes_text, numbers),
        entering=total(enters, lambda layer, rank: rank * layer.in_features),
        text_entering=total(takes_text, lambda layer, rank: rank * layer.in_features),
    )
