"""Checkpoints of sharded runs: written by all ranks, complete or absent, read by any number of ranks.

Saving, every rank writes its own shards of everything that is sharded (weights, optimizer state, the average of the
weights), wherever it is in the checkpoint; rank 0 writes the rest, the marker, and gives the directory its name
(`checkpoint_directory.py`). Loading, every rank reads what belongs to its shards as they are *now*: of a directory that
other ranks, another split or another strategy wrote, or of the file of a run of one process. No rank ever holds the
whole model.

A tensor of a checkpoint is laid out like the parameter that its path names, if it has its shape: optimizer state and
averages need not be told apart.

What fails on one rank is raised on all of them, so none waits for another. Talk about checkpoints has a process group
of its own, over gloo, so a save in the background does not mix with training's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor, zeros
from torch.optim import Optimizer

from longlive.parallel import checkpoint_directory
from longlive.parallel.checkpoint import check_same_shapes, existing, with_frozen
from longlive.parallel.checkpoint_directory import (
    ShardReader,
    ShardWriter,
    TreePath,
    map_tensors,
    name_of,
    partial_of,
    read_tree,
    split,
)
from longlive.parallel.full_disk import full_disk, is_full
from longlive.parallel.materialise import local_part
from longlive.typing import Tensor

Result = TypeVar("Result")
ChooseWeights = Callable[[Mapping[str, Any]], Mapping[str, Tensor]]


class ShardedCheckpoints:
    """How a sharded strategy saves and loads.

    Args:
        trainable_only: leave out parameters that are not trained. Who loads such a checkpoint has them already, from
            where its run has had them (`sources.py`).
        asynchronous: copy this rank's part to host memory and write it while training goes on. At most one write is
            under way: the next save, a load and `wait` wait for it, and raise what it raised.
    """

    def __init__(self, trainable_only: bool = False, asynchronous: bool = False) -> None:
        self.trainable_only = trainable_only
        self.asynchronous = asynchronous
        self._ranks: _Ranks | None = None
        self._background: ThreadPoolExecutor | None = None
        self._under_way: list[Future[None]] = []

    def save(self, strategy: ModelParallelStrategy, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Write a checkpoint. Every rank must call it.

        Raises:
            RuntimeError: on every rank, if one of them could not write; what was there before is still there.
            OSError: of these, if a disk is full; says how full.
        """
        self.wait()
        ranks = self._connect()
        path = ranks.of_first(Path(path))
        if self.trainable_only:
            frozen = {name for name, value in _module(strategy).named_parameters() if not value.requires_grad}
            weights = {name: value for name, value in checkpoint["state_dict"].items() if name not in frozen}
            checkpoint = checkpoint | {"state_dict": weights, "trainable_only": True}
        tree, shards = split(checkpoint)
        if not self.asynchronous:
            _write(ranks, tree, shards, path)
            return
        tree = map_tensors(_staged, tree) if ranks.rank == 0 else None
        shards = map_tensors(_staged, shards)
        if self._background is None:
            self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way.append(self._background.submit(_write, ranks, tree, shards, path))

    def remove(self, path: str | Path) -> None:
        """Remove a checkpoint, called by rank 0; not before the one being written, which may replace it, is there."""
        if not self._under_way:
            checkpoint_directory.remove(Path(path))
            return
        assert self._background is not None
        self._under_way.append(self._background.submit(_remove_after, self._under_way[0], Path(path)))

    def wait(self) -> None:
        """Until nothing is under way.

        Raises:
            RuntimeError: if the write that was under way failed.
        """
        under_way, self._under_way = self._under_way, []
        for work in under_way:
            work.result()

    def load(self, strategy: ModelParallelStrategy, path: str | Path) -> dict[str, Any]:
        """Fill the strategy's model and optimizers; every rank must call it.

        Returns:
            the rest of the checkpoint. What was sharded in it is sharded as the parameters are now.

        Raises:
            FileNotFoundError: if there is no complete checkpoint.
            ValueError: on every rank, before anything is overwritten: if it is torn or of another model or optimizer.
        """
        self.wait()
        ranks = self._connect()
        path = ranks.of_first(Path(path))
        found = ranks.together(lambda: _Loading(_module(strategy), strategy.optimizers, existing(path)))
        found.read(ranks)
        return found.finish()

    def load_weights(
        self, strategy: ModelParallelStrategy, path: str | Path, choose: ChooseWeights = lambda tree: tree["state_dict"]
    ) -> None:
        """Fill the strategy's model alone; every rank must call it.

        Args:
            choose: which of a checkpoint's tensors are the weights: gets the checkpoint, perhaps without data in it. Of
                what stays as it is, it returns the model's own tensors.

        Raises:
            FileNotFoundError, ValueError: as `load`.
        """
        self.wait()
        ranks = self._connect()
        path = ranks.of_first(Path(path))
        ranks.together(lambda: _Loading(_module(strategy), [], existing(path), choose)).read(ranks)

    def _connect(self) -> _Ranks:
        """The group is made at the first use, and again for another run in the same process."""
        world = dist.group.WORLD
        if self._ranks is None or self._ranks.world is not world:
            self._ranks = _Ranks(world, dist.new_group(backend="gloo"))
        return self._ranks


@dataclass(frozen=True)
class _Ranks:
    """All ranks, and how they agree."""

    world: Any
    group: Any

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def of_first(self, value: Result) -> Result:
        """Rank 0's value."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def together(self, action: Callable[[], Result]) -> Result:
        """Call it on every rank; what it raises on one of them is raised on all."""
        result, error = None, None
        try:
            result = action()
        except Exception as raised:
            error = raised
        # The kinds that the callers promise travel as they are; others need not survive pickling.
        portable = error if isinstance(error, ValueError | OSError | None) else RuntimeError(repr(error))
        errors: list[Exception | None] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(errors, portable, group=self.group)
        if error is not None:
            raise error
        for other in errors:
            if other is not None:
                raise other
        return result  # type: ignore[return-value]

    def first(self, action: Callable[[], None]) -> None:
        """Call it on rank 0; what it raises is raised on all."""
        self.together(lambda: action() if self.rank == 0 else None)


def _module(strategy: ModelParallelStrategy) -> nn.Module:
    assert isinstance(strategy.model, nn.Module)
    return strategy.model


def _write(ranks: _Ranks, tree: Any, shards: dict[str, Tensor], path: Path) -> None:
    temporary = partial_of(path)
    try:
        ranks.first(lambda: _begin(path))
        dcp.save(shards, storage_writer=ShardWriter(temporary), process_group=ranks.group)
        ranks.first(lambda: checkpoint_directory.finish(tree, temporary, path))
    except BaseException as error:
        if ranks.rank == 0:
            checkpoint_directory.clean(path)
        failures = error.failures.values() if isinstance(error, dcp.CheckpointException) else [(error, None)]
        if any(is_full(cause) for cause, _ in failures):
            raise full_disk(path, [tree, shards]) from error
        if isinstance(error, dcp.CheckpointException):  # torch makes it a BaseException
            rank, (cause, _) = next(iter(error.failures.items()))
            raise RuntimeError(f"{path} was not written: rank {rank}: {cause!r}") from error
        raise


def _begin(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint_directory.clean(path)
    partial_of(path).mkdir()


def _remove_after(write: Future[None], path: Path) -> None:
    if write.exception() is None:
        checkpoint_directory.remove(path)


def _staged(path: TreePath, tensor: Tensor) -> Tensor:
    """A copy in host memory: training goes on to change the original. Placeholders have nothing to copy."""
    return tensor if tensor.is_meta else tensor.detach().to("cpu", copy=True)


class _Loading:
    """A checkpoint on its way into a model and its optimizers. Construction only looks, and raises if it cannot be.

    Args:
        module: its state dict has the checkpoint's names.
        optimizers: to be filled; none: their state is not read.
        path: a complete checkpoint, directory or file.
        choose: the weights alone are wanted, and this says which.
    """

    def __init__(
        self, module: nn.Module, optimizers: list[Optimizer], path: Path, choose: ChooseWeights | None = None
    ) -> None:
        self.reader = ShardReader(path) if path.is_dir() else None
        self.optimizers = optimizers
        tree = read_tree(path)
        # A module that was used keeps whole parameters for a while; its state dict never does.
        self.own = cast(dict[str, Tensor], get_model_state_dict(module))
        self.targets: dict[str, tuple[Tensor, list[Tensor]]] = {}
        if choose is not None:
            self.tree = {}
            self._aim_at_weights(tree, choose, module)
            return
        names = [_names(optimizer, module) for optimizer in optimizers]
        states = tree.pop("optimizer_states", None)
        if optimizers:
            if states is None or len(states) != len(optimizers):
                raise ValueError(
                    f"{path} holds the state of {len(states or [])} optimizers, and this run has {len(optimizers)}; "
                    "to start from its weights alone, use initialise_from"
                )
            tree["optimizer_states"] = [_by_name(state, groups) for state, groups in zip(states, names, strict=True)]
        self.names = names
        check_same_shapes(self.own, with_frozen(module, tree["state_dict"]))
        self.tree = map_tensors(self._aim, tree)
        self.tree["state_dict"] = with_frozen(module, self.tree["state_dict"])

    def _aim_at_weights(self, tree: dict[str, Any], choose: ChooseWeights, module: nn.Module) -> None:
        stored_under: dict[int, str] = {}

        def note(path: TreePath, tensor: Tensor) -> Tensor:
            stored_under[id(tensor)] = name_of(path)
            return tensor

        weights = choose(map_tensors(note, tree))
        check_same_shapes(self.own, with_frozen(module, weights))
        for name, tensor in weights.items():
            # What is chosen and not stored is the model's own, and stays.
            if id(tensor) in stored_under:
                self.targets.setdefault(stored_under[id(tensor)], (tensor, []))[1].append(self.own[name])

    def _aim(self, path: TreePath, stored: Tensor) -> Tensor:
        """Where a stored tensor will be."""
        if path[0] == "state_dict":
            target = self.own[str(path[-1])]
        else:
            like = next((self.own[str(part)] for part in reversed(path) if self._has_shape(part, stored)), None)
            if like is None and stored.is_meta:
                like = next(value for value in self.own.values() if isinstance(value, DTensor))
            if not isinstance(like, DTensor):
                return stored.clone()
            target = zeros(*stored.shape, dtype=stored.dtype, device_mesh=like.device_mesh, placements=like.placements)
        self.targets[name_of(path)] = (stored, [target])
        return target

    def _has_shape(self, name: str | int, stored: Tensor) -> bool:
        return isinstance(name, str) and name in self.own and self.own[name].shape == stored.shape

    @torch.no_grad()
    def read(self, ranks: _Ranks) -> None:
        """Fill what the construction made and found."""
        ranks.together(self._copy)
        sharded = {name: targets for name, (stored, targets) in self.targets.items() if stored.is_meta}
        # Of those that take the same tensor, the widest is read, and the others are laid out as it is.
        shards: dict[str, Any] = {name: max(targets, key=_itemsize).detach() for name, targets in sharded.items()}
        reader = self.reader
        if shards and reader is not None:
            reader.read(lambda: dcp.load(shards, storage_reader=reader, process_group=ranks.group))
        for name, targets in sharded.items():
            for target in targets:
                local_part(target)[0].copy_(local_part(shards[name])[0])

    def _copy(self) -> None:
        """This rank's part of what the checkpoint holds whole."""
        for stored, targets in self.targets.values():
            for target in targets if not stored.is_meta else ():
                part, where = local_part(target)
                part.copy_(stored[where])

    def finish(self) -> dict[str, Any]:
        """Hand their states to the optimizers; returns the rest."""
        for optimizer, state, names in zip(
            self.optimizers, self.tree.pop("optimizer_states", []), self.names, strict=True
        ):
            optimizer.load_state_dict(_numbered_as(state, names))
        return self.tree


def _itemsize(tensor: Tensor) -> int:
    return tensor.dtype.itemsize


def _names(optimizer: Optimizer, module: nn.Module) -> list[list[str]]:
    """The names of an optimizer's parameters, by group."""
    name = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[name[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _by_name(state: Mapping[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """A stored optimizer state, keyed by the parameters' names whatever it was keyed by.

    Raises:
        ValueError: if its groups are not those of `names`.
    """
    stored = state["param_groups"]
    if len(stored) != len(names) or any(len(g["params"]) != len(n) for g, n in zip(stored, names, strict=True)):
        raise ValueError(_other_optimizer([len(group["params"]) for group in stored], [len(n) for n in names]))
    found: dict[Any, str] = {}
    groups = []
    for group, ours in zip(stored, names, strict=True):
        theirs = group.get("param_names", ours) if isinstance(group["params"][0], int) else group["params"]
        if set(theirs) != set(ours):
            differing = sorted(set(theirs) ^ set(ours))[:5]
            raise ValueError(_other_optimizer(f"a group with {', '.join(differing)}", "one without, or the other way"))
        found |= dict(zip(group["params"], theirs, strict=True))
        groups.append(group | {"params": list(theirs)})
    return {"state": {found[key]: values for key, values in state["state"].items()}, "param_groups": groups}


def _other_optimizer(theirs: Any, ours: Any) -> str:
    return (
        f"the checkpoint is of another optimizer: its parameter groups have {theirs}, and here {ours}. Use the "
        "optimizer that it was trained with, or initialise_from, which starts from its weights alone"
    )


def _numbered_as(state: Mapping[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """A state keyed by names, as `Optimizer.load_state_dict` takes it for parameters of these names in this order."""
    number = {name: index for index, name in enumerate(name for group in names for name in group)}
    return {
        "state": {number[name]: values for name, values in state["state"].items()},
        "param_groups": [
            group | {"params": [number[name] for name in ours]}
            for group, ours in zip(state["param_groups"], names, strict=True)
        ],
    }
