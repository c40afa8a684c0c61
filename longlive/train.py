"""`longlive train`: a composed config becomes objects, and the objects a run.

A run lives in one directory. Started again with the same command, it continues from its newest complete checkpoint
(`resume=auto`); `initialise_from` is something else: it takes the weights of another run and starts at step 0. Which
checkpoint that was is settled by the first start, and stays so: the run's config names it.

How a run ends is known afterwards. It finishes; or a signal stops it at the end of a step, with a checkpoint, and the
process exits with `EXIT_STOPPED`; or it fails, and the error leaves the process. `run.json` tells which
(`longlive doctor run`), and is the first thing that training writes.
"""

from __future__ import annotations

import logging
import re
import warnings
from contextlib import ExitStack
from pathlib import Path

from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from longlive.callbacks.ema import averaged_weights
from longlive.callbacks.initial_weights import InitialWeights
from longlive.callbacks.provenance import Provenance, origin
from longlive.callbacks.run_record import RunRecord
from longlive.callbacks.stop_on_signal import StopOnSignal
from longlive.config import instantiate, to_plain
from longlive.data.workers import DataWorkerError
from longlive.modules.base import LongLiveModule
from longlive.parallel.checkpoint import (
    AtomicCheckpointIO,
    check_same_shapes,
    existing,
    find_checkpoint,
    is_trainable_only,
    load_checkpoint,
    newest_checkpoint,
)
from longlive.parallel.checkpoint_directory import is_complete, read_tree, standing
from longlive.parallel.launcher import EXIT_STOPPED, exit_soon
from longlive.parallel.sources import lost, sources_of
from longlive.parallel.strategy import ShardedStrategy

log = logging.getLogger(__name__)


def train(config: DictConfig) -> Trainer:
    """Run `conf/train.yaml` as composed.

    Raises:
        ValueError: if a setting is wrong, before any work; the message names it.
        FileNotFoundError: if data or a checkpoint that a setting names is missing.
        SystemExit: with `EXIT_STOPPED`, if a signal ended the run before its last step; its checkpoint is complete.
    """
    _quieten()
    directory = Path(config.directory)
    checkpoint = _checkpoint_to_resume(config.resume, directory)
    start = _start(config.initialise_from, checkpoint)
    datamodule = instantiate(config.data)
    module: LongLiveModule = instantiate(config.module)
    module.run_config = to_plain(config) | {"initialise_from": start}
    trainer = make_trainer(config)
    # A checkpoint that leaves out frozen weights goes on over those that its run started from.
    if start is not None and (checkpoint is None or is_trainable_only(checkpoint)):
        initialise(trainer, module, Path(start))
    # Written once the run trains: a start that is refused leaves the records of an earlier one as they were.
    came_from = origin(Path.cwd())
    trainer.callbacks += [  # type: ignore[attr-defined]
        LambdaCallback(on_train_start=lambda *_: _save_config(module, directory)),
        Provenance(module.run_config, came_from),
        RunRecord(directory, came_from),
    ]
    log.info("continuing from %s", checkpoint) if checkpoint else log.info("a new run in %s", directory)
    _fit(trainer, module, datamodule, checkpoint)
    return trainer


def _fit(trainer: Trainer, module: LongLiveModule, datamodule: LightningDataModule, checkpoint: Path | None) -> None:
    """Train to the end, or until a signal stops the run: then exit."""
    with ExitStack() as stack:
        listeners = [callback for callback in _callbacks(trainer) if isinstance(callback, StopOnSignal)]
        for listener in listeners:
            stack.enter_context(listener.listening())
        try:
            trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
        except SIGTERMException as stopped:  # Lightning's, of a signal just before training: its exit code is success
            raise SystemExit(EXIT_STOPPED) from stopped
        except DataWorkerError:
            exit_soon()  # a worker that hangs in the kernel cannot be killed, and Python would wait for it
            raise
        if any(listener.stopped_by for listener in listeners):
            log.warning("stopped at step %d; the same command continues from there", trainer.global_step)
            raise SystemExit(EXIT_STOPPED)


def lightning_strategy(name: str) -> str:
    """One of Lightning's own strategies, which know no sequence groups."""
    return name


def make_trainer(config: DictConfig) -> Trainer:
    """The Trainer of a config, with its precision, strategy, callbacks and loggers."""
    callbacks = [instantiate(callback) for callback in config.callbacks.values() if callback is not None]
    loggers = [instantiate(logger) for logger in config.logger.values() if logger is not None]
    precision: Precision | str = instantiate(config.precision)
    is_plugin = isinstance(precision, Precision)
    trainer: Trainer = instantiate(
        config.trainer,
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO(), *([precision] if is_plugin else [])],
        precision=None if is_plugin else precision,
        strategy=config.strategy,
    )
    return trainer


def initialise(trainer: Trainer, module: LongLiveModule, checkpoint: Path) -> None:
    """Take the weights (the average, where there is one) of a checkpoint; step, optimizer and data position stay at 0.
    One that leaves out frozen weights is taken over those that it goes over. Under a sharded strategy there is no
    network yet: it takes them when the fit starts.

    Raises:
        ValueError: if the checkpoint is of another model, or over weights that are not there.
    """
    sources = sources_of(checkpoint)
    module.weights = sources.weights or module.weights
    if isinstance(trainer.strategy, ShardedStrategy):
        trainer.callbacks.insert(0, InitialWeights(*sources.checkpoints))  # type: ignore[attr-defined]
        return
    module.trainer = trainer  # the network's precision is the run's
    module.configure_model()
    for path in sources.checkpoints:
        stored = load_checkpoint(path)
        with module.room_for(stored):
            weights = module.weights_of(averaged_weights(stored), bool(stored.get("trainable_only")))
            check_same_shapes(module.state_dict(), weights)
            module.load_state_dict(weights)


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


@rank_zero_only
def _save_config(module: LongLiveModule, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(module.run_config), directory / "config.yaml")


def _quieten() -> None:
    """Leave out what libraries say of themselves; what they warn of a run stays."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        "`isinstance(treespec, LeafSpec)` is deprecated",  # Lightning's own use of torch
        "Total length of `list` across ranks is zero",  # a run without validation data
        "The `srun` command is available",  # SLURM's tools on a machine where no job runs
        "Checkpoint directory",  # a resumed run has one
    ):
        warnings.filterwarnings("ignore", message=".*" + re.escape(message))


def _start(given: str | None, checkpoint: Path | None) -> str | None:
    """The checkpoint whose weights a run starts from, or has started from.

    Args:
        given: `initialise_from`.
        checkpoint: that it continues from; None: it is new.
    """
    if checkpoint is None:
        return None if given is None else str(find_checkpoint(given).resolve())
    stored = read_tree(existing(checkpoint))
    start: str | None = (stored.get("config") or {}).get("initialise_from")
    if start is None or not stored.get("trainable_only"):
        return start
    try:
        return str(find_checkpoint(start).resolve())
    except FileNotFoundError as error:
        elsewhere = None if given is None else standing(Path(given))
        if elsewhere is not None and is_complete(elsewhere) and elsewhere.name == Path(start).name:
            return str(elsewhere.resolve())
        raise ValueError(
            f"{lost(checkpoint, start)}; if it has moved, give that checkpoint itself: "
            f"initialise_from=.../{Path(start).name}"
        ) from error


def _checkpoint_to_resume(resume: str | bool, directory: Path) -> Path | None:
    newest = newest_checkpoint(directory / "checkpoints")
    if resume == "auto":
        return newest
    found = None if resume == "never" else find_checkpoint(str(resume))
    if newest is not None and (found is None or not newest.samefile(found)):
        raise ValueError(
            f"resume={resume}, but {newest} exists: nothing already written is overwritten. "
            "Use another directory=..., or resume=auto"
        )
    return found
