"""`longlive <command>`: dispatch, and what a user sees when something is wrong.

Each command of the table below is a primary file in `conf/` and a function that takes the composed config; Hydra runs
it, so sweeps and launchers (`-m`, `hydra/launcher=...`) work for all of them. What one of our own checks raised (a
`ValueError`; a `FileNotFoundError` with words of ours) is shown as its message alone (`HYDRA_FULL_ERROR=1` shows where
it came from); every other exception keeps its traceback; both leave the process with a non-zero exit code. Nothing
heavy is imported before a command is known.
"""

import difflib
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longlive import __version__

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class _Command:
    """A command that runs with a config: the function `module.function`."""

    module: str
    function: str
    purpose: str
    flags: tuple[str, ...] = ()
    """`--name` stands for the override `name=true`."""

    directory_per_job: bool = False
    """A job of a sweep writes to a folder of its own in `directory`, named by its values."""


_COMMANDS = {
    "train": _Command(
        "longlive.train",
        "train",
        "train a model: longlive train experiment=toyworld trainer.max_steps=100",
        directory_per_job=True,
    ),
    "generate": _Command(
        "longlive.generate",
        "generate",
        "roll out videos: longlive generate checkpoint=... prompts=...",
        directory_per_job=True,
    ),
    "export": _Command(
        "longlive.export", "export", "one file of a run's weights: longlive export checkpoint=... format=... output=..."
    ),
    "shards": _Command(
        "longlive.make_shards",
        "make_shards",
        "write clips as WebDataset shards: longlive shards source=toyworld",
        ("strict",),
    ),
}
_DOCTOR = (
    "print versions, devices, and which precisions, kernels and codecs work here; "
    "longlive doctor plan num_gpus=...: what a training run takes; "
    "longlive doctor precision precision=...: which layers multiply in it; "
    "longlive doctor run DIRECTORY: what became of a run, and what to do next; "
    "longlive doctor weights <path>: what a download holds"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code.

    Raises:
        SystemExit: non-zero, if the command failed (Hydra reports the error and exits).
    """
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"longlive {__version__}")
        return 0
    if name == "doctor":
        return int(importlib.import_module("longlive.doctor").main(rest))
    if name not in _COMMANDS:
        near = difflib.get_close_matches(name, [*_COMMANDS, "doctor"], n=1)
        hint = f"did you mean {near[0]}?" if near else "longlive --help lists the commands"
        print(f"longlive: unknown command '{name}'; {hint}", file=sys.stderr)
        return 2
    try:
        _run(name, _COMMANDS[name], rest)
    except _CommandLineError as error:
        print(f"longlive {name}: {error}", file=sys.stderr)
        return 1
    return 0


class _Without(logging.Filter):
    """Leaves out the messages that begin so."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginning)


def _leave_out_torchao() -> None:
    """Leave out what is logged when torchao is imported, as it is for every run: peft and diffusers import it to know
    its tensors. It speaks of kernels that a run has not asked for; nvfp4 and fp8 say themselves what they lack."""
    for name, beginning in (
        ("torchao", "Failed to load"),  # its libraries for other GPUs, or without one
        ("torchao.kernel.intmm", "Warning: Detected no triton"),
        ("torch.utils._pytree", "%s is an Enum subclass"),  # of torch to torchao's authors
        ("diffusers.quantizers.torchao.torchao_quantizer", "Unable to import `torchao` Tensor objects"),
    ):
        logging.getLogger(name).addFilter(_Without(beginning))


_leave_out_torchao()  # here, because the processes that `longlive shards` spawns import this module, and run none of it


class _CommandLineError(Exception):
    """The command line names something that does not exist."""


def _run(name: str, command: _Command, arguments: list[str]) -> None:
    import hydra
    from hydra._internal.utils import get_args_parser
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import CompactHydraException
    from hydra.types import RunMode

    from longlive import config as configuration

    flags = {f"--{flag}": f"{flag}=true" for flag in command.flags}
    arguments = [flags.get(argument, argument) for argument in arguments]
    parsed = get_args_parser().parse_intermixed_args(arguments)
    if not (parsed.help or parsed.hydra_help or parsed.experimental_rerun or parsed.config_path):
        try:
            config = configuration.compose(parsed.config_name or name, parsed.overrides, parsed.config_dir)
            if not (parsed.cfg or parsed.info):
                configuration.check_complete(config)
        except ValueError as error:
            raise _CommandLineError(str(error)) from error

    command_line = sys.argv

    def task(config: "DictConfig") -> None:
        # Lightning's launcher starts its other ranks with this command line, so they must see it as it was given.
        sys.argv = command_line
        job = HydraConfig.get()
        if command.directory_per_job and job.mode is RunMode.MULTIRUN:
            if "shared_directory" in config:
                config.shared_directory = config.shared_directory  # no longer a reference to what changes now
            config.directory = job.runtime.output_dir
        function: Callable[[DictConfig], Any] = getattr(importlib.import_module(command.module), command.function)
        try:
            function(config)  # what it returns stays here: a launcher would send it back, with the whole network
        except (ValueError, FileNotFoundError) as error:
            if not _is_ours(error):
                raise
            raise CompactHydraException(f"longlive {name}: {error}") from error

    # Hydra reads options only before the first override, and names the run after the override that comes last.
    options = [argument for argument in arguments if argument not in parsed.overrides]
    named = [
        f"hydra.job.name={name}",
        # Jobs of a sweep are named by what is swept, in characters that need no quotes in checkpoint=runs/...
        "hydra.job.config.override_dirname.kv_sep=-",
        "hydra.job.config.override_dirname.item_sep=+",
        f"hydra.job.config.override_dirname.exclude_keys={['directory', *configuration.fixed_keys(parsed.overrides)]}",
    ]
    sys.argv = [command_line[0], *options, *named, *parsed.overrides]
    try:
        hydra.main(str(configuration.config_directory()), name, version_base="1.3")(task)()
    finally:
        sys.argv = command_line


def _is_ours(error: BaseException) -> bool:
    """Whether the error was raised in this package, not in a library or the system that it called."""
    if isinstance(error, OSError) and error.errno is not None:
        return False
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "longlive"


def _usage() -> str:
    from longlive import config as configuration

    rows = [(name, command.purpose) for name, command in _COMMANDS.items()] + [("doctor", _DOCTOR)]
    return "\n".join(
        [
            "usage: longlive <command> [key=value ...] [options]",
            "",
            *(f"  {name:<10}{purpose}" for name, purpose in rows),
            "",
            "key=value overrides a setting of the command's config; longlive <command> --cfg job prints the config,",
            "-m runs one job per value of key=a,b, --config-dir adds a folder of your own config files.",
            "A refused setting is reported in one message; HYDRA_FULL_ERROR=1 shows where it was refused.",
            "",
            f"configs: {configuration.config_directory()}",
            f"recipes: {configuration.recipe_directory()}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
