"""The roles of distillation, and the frozen networks under them, in the precision of each.

*Teacher*, *student* and *critic* start as one network, that of stage 1. The teacher is it; the student and the critic
are it with an adapter each (`adapters.lora`), and the adapters are all that learns. So roles of one precision are views
of one *base*, which is in memory once. A role of another precision has a base of its own, made of the same weights:

    role_precision                                  bases
    null                                            network (all three)
    {student: nvfp4}                                network (student), teacher_base (teacher, critic)
    {student: nvfp4, teacher: nvfp4}                network (student, teacher), critic_base (critic)
    {student: nvfp4, teacher: nvfp4, critic: nvfp4} network (all three)

The student's base is always `network`, which is what is averaged, rolled out and exported. A base holds no more than
its products read (`precision.frozen`): in NVFP4 codes alone, in bfloat16 no float32.

**Weights.** A base is a function of the weights of stage 1 and its precision. Those from a file (`weights`) and those
from a run (`initialise_from`) arrive as they are stored, and every base makes of them what it holds. A checkpoint has
every base as it is held, so a base that roles share is there once, codes are codes, and a resumed run has the very same
numbers. What was trained in one set of bases continues in another by `initialise_from`: `spread` finds its weights,
and no base keeps initial ones beside them.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from longlive.adapters.adapted import AdaptedNetwork
from longlive.adapters.lora import LoRASettings, base_name
from longlive.modules.base import LongLiveModule
from longlive.precision.auto import choose_precision
from longlive.precision.nvfp4.format import QuantisedTensor
from longlive.precision.nvfp4.linear import BY_ROWS, NVFP4Linear, masters, packed_parts
from longlive.precision.nvfp4.plugin import NVFP4Precision
from longlive.precision.plugin import LinearPrecision
from longlive.typing import Tensor

RoleName = Literal["student", "critic"]
STUDENT: RoleName = "student"
CRITIC: RoleName = "critic"
"""Those that learn, and the names of their adapters."""
TEACHER = "teacher"
ROLES = (STUDENT, TEACHER, CRITIC)

PLACES = ("network", f"{TEACHER}_base", f"{CRITIC}_base")
"""Where a module keeps its bases: the student's, and those of roles that do not share it."""

ALIASES = {"bf16": "bf16-mixed", "fp32": "32-true"}
PLAIN = "weights"
"""In a checkpoint: of a base that is not packed."""


@dataclass(frozen=True)
class Base:
    """A frozen network that roles share.

    Attributes:
        place: the module's attribute, one of `PLACES`.
        roles: at least one.
        precision: its own; None: the run's.
    """

    place: str
    roles: tuple[str, ...]
    precision: Precision | str | None

    def adapters(self, lora: Mapping[RoleName, LoRASettings]) -> dict[str, LoRASettings]:
        """Those of its roles."""
        return {role: settings for role, settings in lora.items() if role in self.roles}


def read_precisions(settings: Mapping[str, Precision | str | None] | None, seed: int) -> dict[str, Any]:
    """The precision of every role; None: the run's.

    Args:
        settings: by role, for those that have their own: a plugin, or a name as in `precision=`. A name of a plugin
            stands for its default settings.
        seed: of the plugins that are made.

    Raises:
        ValueError: for a role or a precision that does not exist.
    """
    settings = dict(settings or {})
    unknown = sorted(settings.keys() - set(ROLES))
    if unknown:
        raise ValueError(f"role_precision names {', '.join(unknown)}; the roles are {', '.join(ROLES)}")
    return {role: _precision(role, settings.get(role), seed) for role in ROLES}


def _precision(role: str, setting: Precision | str | None, seed: int) -> Precision | str | None:
    if setting is None or isinstance(setting, LinearPrecision):
        return setting
    if setting == NVFP4Precision.precision:
        return NVFP4Precision(seed=seed)
    if setting == "fp8":
        from longlive.precision.fp8 import FP8Precision  # torchao takes seconds to import

        return FP8Precision()
    try:
        return choose_precision(ALIASES.get(str(setting), str(setting)))
    except ValueError:
        raise ValueError(
            f"role_precision.{role}={setting!r} is not supported; use nvfp4, fp8, bf16-mixed (bf16), 32-true (fp32), "
            "or null for the run's"
        ) from None


def shared_bases(precisions: Mapping[str, Precision | str | None], of_run: Precision | str | None) -> tuple[Base, ...]:
    """Which roles share a base: those whose precisions compute the same.

    Args:
        precisions: of every role; None: the run's.
        of_run: that of the run, if it is known.
    """
    groups: list[tuple[Precision | str | None, list[str]]] = []
    for role in ROLES:
        own = precisions[role]
        if own is not None and _same(own, of_run):
            own = None
        group = next((group for group in groups if _same(group[0], own)), None)
        if group is None:
            groups.append((own, [role]))
        else:
            group[1].append(role)
    return tuple(Base(PLACES[ROLES.index(roles[0])], tuple(roles), own) for own, roles in groups)


def _same(one: Precision | str | None, other: Precision | str | None) -> bool:
    if isinstance(one, LinearPrecision) and isinstance(other, LinearPrecision):
        return type(one) is type(other) and one.settings == other.settings
    return one == other


class RolesModule(LongLiveModule):
    """What distillation trains: the roles, over their bases.

    Args:
        lora: the adapter of every role that learns.
        role_precision: see `read_precisions`; None: the run's, for all.
        **base: see `LongLiveModule`.

    Attributes:
        student, teacher, critic: the roles, once there are networks.
        bases: what is under them.

    Raises:
        ValueError: as `LongLiveModule` and `read_precisions`.
    """

    student: AdaptedNetwork
    teacher: AdaptedNetwork
    critic: AdaptedNetwork

    def __init__(
        self,
        *,
        lora: Mapping[RoleName, LoRASettings],
        role_precision: Mapping[str, Precision | str | None] | None = None,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.lora = dict(lora)
        self.precisions = read_precisions(role_precision, self.seed)
        self.bases: tuple[Base, ...] = ()

    def configure_model(self) -> None:
        """Build the bases, each as a network is built, and the roles, which are views of them."""
        if self.network is not None:
            return
        self.check_sequence()
        self.bases = shared_bases(self.precisions, self.precision_of_run)
        for base in self.bases:
            adapters = base.adapters(self.lora)
            network = self.build(base.precision, adapters)
            if STUDENT in base.roles:
                self.hold(network, STUDENT, base.precision)
            else:
                self.add_module(base.place, network)
            for role in base.roles:
                setattr(self, role, AdaptedNetwork(network, role if role in adapters else None, base.precision))

    def networks_of_run(self) -> Sequence[nn.Module]:
        if not self.bases:  # a finished network from elsewhere
            return super().networks_of_run()
        return [self.get_submodule(base.place) for base in self.bases if base.precision is None]

    def adapter_parameters_of(self, role: RoleName) -> list[tuple[str, nn.Parameter]]:
        """What of a role learns, under the names that `named_parameters` has for it."""
        (place,) = (base.place for base in self.bases if role in base.roles)
        adapted = self.student if role == STUDENT else self.critic
        return [(f"{place}.{name}", parameter) for name, parameter in adapted.named_adapter_parameters()]

    def averaged_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The student's: its average is what is generated from and exported."""
        yield from self.adapter_parameters_of(STUDENT)

    def own_plugins(self) -> list[LinearPrecision]:
        """Those of roles. Lightning knows the run's alone, and calls it."""
        return [base.precision for base in self.bases if isinstance(base.precision, LinearPrecision)]

    def linear_precisions(self) -> list[LinearPrecision]:
        return [*super().linear_precisions(), *self.own_plugins()]

    def setup(self, stage: str) -> None:
        """Ranks with copies of the module wait for no gradient of the adapter that a role's backward leaves alone."""
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy):
            strategy._ddp_kwargs.setdefault("find_unused_parameters", True)

    def on_fit_start(self) -> None:
        for plugin in self.own_plugins():
            plugin.connect(self, [], [])

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        for plugin in self.own_plugins():
            plugin.begin_backward(self.global_step)
        super().manual_backward(loss, *args, **kwargs)

    def weights_of(self, stored: Mapping[str, Tensor], is_part: bool = False) -> dict[str, Tensor]:
        """Also those of a run without adapters, or with other bases.

        Raises:
            ValueError: if a base would keep initial weights; see `spread`.
        """
        return spread(self.state_dict(), super().weights_of(stored, is_part))

    def room_for(self, checkpoint: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Packed layers take the codes that the run has of them; the others their weights.

        Raises:
            ValueError: for codes of another scale rule.
        """
        if checkpoint.get("trainable_only"):  # it has none of either: bases stay as they are
            return nullcontext()
        rules, found = checkpoint.get("bases", {}), _by_key(checkpoint["state_dict"])
        without_codes = []
        for place, name, layer in self._packed_layers():
            codes, _, _ = packed_parts(str(base_name(f"{name}.weight")))
            source = _source(place, found.get(codes, {}))
            if source is None:
                without_codes.append(layer)
            elif rules.get(source) != layer.packing:
                raise ValueError(
                    f"the checkpoint's {source} is packed with the rule {rules.get(source)}, and here with "
                    f"{layer.packing}; start from the weights that it started from, or from an export of it"
                )
        return masters(without_codes)

    def _packed_layers(self) -> Iterator[tuple[str, str, NVFP4Linear]]:
        """Place, name in the base, and layer."""
        for base in self.bases:
            for name, layer in self.get_submodule(base.place).named_modules():
                if isinstance(layer, NVFP4Linear) and layer.is_packed:
                    yield base.place, name, layer

    def held_as(self) -> dict[str, str]:
        """What every base has for weights, by its place: `weights`, or how codes are scaled."""
        packed = {place: str(layer.packing) for place, _, layer in self._packed_layers()}
        return {base.place: PLAIN for base in self.bases} | packed

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["bases"] = self.held_as()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        theirs, ours = checkpoint.get("bases", self.held_as()), self.held_as()
        if theirs != ours:
            raise ValueError(
                f"the checkpoint's bases are {theirs}, and this run's {ours}; resume with the precision and the "
                "module.role_precision of the run, or start a new one from its weights: initialise_from"
            )
        super().on_load_checkpoint(checkpoint)


def spread(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A run's weights under the names that a module has for them, which may hold them in other bases, in adapters'
    wrapping or without.

    Args:
        own: the module's state dict.
        stored: that of the run.

    Returns:
        what the module is to load. Adapters that are not stored are its own, and codes beside their weight, which they
        are made of; what it has no name for is under the stored name.

    Raises:
        ValueError: for weights of a base that are not stored: what the module has for them is no run's.
    """
    found, chosen = _by_key(stored), {}
    missing = []
    for name, value in own.items():
        place, key = _place_and_key(name)
        source = _source(place, found.get(key, {}))
        chosen[name] = value if source is None else found[key][source]
        weight = _weight_of(name)
        if source is None and base_name(name) is not None and (weight == name or weight not in own):
            missing.append(name)
    if missing:
        has_codes = packed_parts(_place_and_key(missing[0])[1])[0] in found
        raise ValueError(
            f"the checkpoint has no weights for {missing[0]}{', only NVFP4 codes' if has_codes else ''}"
            f"{f', and for {len(missing) - 1} more' if len(missing) > 1 else ''}: they would stay random. Use the "
            "model and precisions that it was trained with; or start from the run that it started from, or by "
            "module.weights from an export of it (longlive export format=fp32)"
        )
    known = {_weight_of(_place_and_key(name)[1]) for name in own}
    return chosen | {name: x for name, x in stored.items() if _weight_of(_place_and_key(name)[1]) not in known}


def with_weights(stored: Mapping[str, Tensor], held_as: Mapping[str, str]) -> dict[str, Tensor]:
    """A run's weights without codes. Where one of its bases has a weight as such, that is taken; else it is what the
    codes say.

    Args:
        stored: whole tensors.
        held_as: of the run's bases, as in its checkpoint.
    """
    plain = {name: tensor for name, tensor in stored.items() if not name.endswith(packed_parts(".weight"))}
    by_key = {_place_and_key(name)[1]: tensor for name, tensor in plain.items()}
    for name in stored:
        weight = name.removesuffix("_packed")
        if not name.endswith(packed_parts(".weight")[0]):
            continue
        place, key = _place_and_key(weight)
        packed, scales, amax = (stored[part] for part in packed_parts(weight))
        rule = held_as[place].removesuffix(BY_ROWS)
        codes = QuantisedTensor(packed, scales.view(torch.float8_e4m3fn), amax, rule)
        plain[weight] = by_key[key] if key in by_key else codes.dequantise()
    return plain


def _place_and_key(name: str) -> tuple[str, str]:
    """Which base a weight is of, and what it is called in any of them."""
    place, _, rest = name.partition(".")
    return place, base_name(rest) or rest


def _by_key(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Weights by key and place."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        place, key = _place_and_key(name)
        found.setdefault(key, {})[place] = tensor
    return found


def _source(place: str, places: Container[str]) -> str | None:
    """Whose weight a base takes: its own, if it is there, else the first in the order of the roles."""
    return next((each for each in (place, *PLACES) if each in places), None)


def _weight_of(name: str) -> str:
    """What the weight is called of which this is a part of the codes; of all else, the name."""
    for part in packed_parts(".weight"):
        if name.endswith(part):
            return f"{name.removesuffix(part)}.weight"
    return name
