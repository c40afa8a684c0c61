"""Hydra's side of the library: where `conf/` lies, how a config is composed from it, and how it becomes objects.

A config is a primary file (`train.yaml`, ...) that names every top-level key, plus one file per group. Two rules make
every unused setting an error: an override must name a key that exists (Hydra's struct mode; the message here adds the
nearest names), and no file or `+key=value` may bring a top-level key that the primary file does not have. What is
nested deeper is checked where it is used, because every `_target_` refuses arguments that it does not take, and numbers
that are none.

Nothing here outlives a call: Hydra's global state is entered and left inside `compose`.
"""

import difflib
import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.utils import _locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException, InstantiationException, OverrideParseException
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationToMissingValueError, ValidationError

_PACKAGE = Path(__file__).resolve().parent

_SCALARS: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "float": (int, float),
    "bool": bool,
    "None": type(None),
    "NoneType": type(None),
    "Tensor": (),  # what torch's optimizers take beside a number
}
"""What may be written in a config for a parameter of a type, by the type's name."""


def config_directory() -> Path:
    """The folder of the primary config files, from any working directory."""
    return _installed("conf")


def recipe_directory() -> Path:
    """The folder of the recipes: runs worth repeating, with their commands and their numbers."""
    return _installed("recipes")


def compose(name: str, overrides: Sequence[str] = (), extra_directory: str | Path | None = None) -> DictConfig:
    """The config that `longlive <command> <overrides>` runs with.

    Args:
        name: primary file, without `.yaml`.
        overrides: Hydra overrides. Of a sweep (`a=1,2`) the first value is taken.
        extra_directory: a user's own config folder, searched after ours.

    Raises:
        ValueError: if an override or a file names a key, a group or an option that does not exist, or a launcher is
            told what it cannot take.
    """
    overrides = [_first_of_sweep(override) for override in overrides]
    config = _compose(name, overrides, extra_directory)
    groups = {path.name for directory in _directories(extra_directory) for path in directory.iterdir() if path.is_dir()}
    # Experiments are the files that may write at the top level, so the names are taken from a config without one.
    choices = [override for override in overrides if _key(override).split("/")[0] in groups - {"experiment"}]
    known = {str(key) for key in _compose(name, choices, extra_directory)} | groups
    for key in map(str, config):
        if key not in known:
            raise ValueError(f"unknown top-level key '{key}': {name}.yaml has none of that name{_nearest(key, known)}")
    _check_launcher(config.hydra.launcher)
    with open_dict(config):
        del config["hydra"]
    return config


def fixed_keys(overrides: Sequence[str]) -> list[str]:
    """The keys that have the same value in all jobs of a command line: those that are no sweep (`a=1,2`)."""
    return [_key(override) for override in overrides if _first_of_sweep(override) == override]


def check_complete(config: DictConfig) -> None:
    """Raise a `ValueError` that names every setting which must be given and was not (`???` in the files)."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"these settings must be given: {', '.join(f'{key}=...' for key in missing)}")


def instantiate(config: DictConfig, *args: object, **kwargs: object) -> Any:
    """The object that `config._target_` describes, nested objects first. Its arguments are plain containers.

    Raises:
        ValueError: if there is no `_target_`, if it cannot be found, or if its constructor does not take one of the
            arguments (also one that is called later, `_partial_`) or refuses a value, or a number is to be one and is
            none; the message names the config key. A constructor's other errors pass unchanged.
    """
    where = config._get_full_key(None) or "the config"
    if "_target_" not in config:
        raise ValueError(f"{where} has no _target_, so it describes no object; its keys are {sorted(map(str, config))}")
    check_arguments(config, given=kwargs)
    try:
        return hydra_instantiate(config, *args, _convert_="all", **kwargs)
    except InstantiationException as error:
        key = re.search(r"^full_key: (.+)$", str(error), re.MULTILINE)
        where = key[1] if key else where
        cause = error.__cause__
        if cause is None or not str(error).startswith("Error in call to target"):
            raise ValueError(f"{where}: {error}") from error
        if isinstance(cause, ValueError) or "unexpected keyword argument" in str(cause):
            raise ValueError(f"{where}: {cause}") from error
        cause.add_note(f"This was raised while {where} was instantiated.")
        raise cause from None


def check_arguments(config: object, given: Collection[str] = ()) -> None:
    """Refuse, in all of a tree, arguments that a target does not take, and values of another type.

    Python would notice the first when it is called, which may be after hours (`_partial_`), and the second when it
    computes, without the setting's name. `instantiate` calls it.

    Args:
        config: a node, or a scalar, in which there is nothing to refuse.
        given: names of the node that are not looked at.

    Raises:
        ValueError: names the setting's key.
    """
    if isinstance(config, ListConfig):
        for value in config:
            check_arguments(value)
    if not isinstance(config, DictConfig):
        return
    names = [str(name) for name in config if name not in given and not OmegaConf.is_missing(config, name)]
    if "_target_" in names:
        parameters = _parameters_of(config._target_)
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            _check_known(config, [name for name in names if name not in parameters and not name.startswith("_")])
        # `size: int = None`, as in older libraries, takes None.
        optional = {name for name, parameter in parameters.items() if parameter.default is None}
        check_types(
            config,
            {
                name: parameters[name].annotation
                for name in names
                if name in parameters and not (name in optional and config[name] is None)
            },
        )
    for name in names:
        check_arguments(config[name])


def check_types(settings: DictConfig, annotations: Mapping[str, Any]) -> None:
    """Refuse values of another type than a setting has, before something computes with them.

    Args:
        settings: values by name; what is missing, and objects to be made (`_target_`), are left alone.
        annotations: types by name, as written or as objects: of `int`, `float`, `bool` and None, one or several (`|`).
            Any other type takes all values.

    Raises:
        ValueError: names the setting, its value and its type.
    """
    for name, annotation in annotations.items():
        kinds = _type_names(annotation)
        if name not in settings or OmegaConf.is_missing(settings, name) or not set(kinds) <= _SCALARS.keys():
            continue
        value = settings[name]
        if not isinstance(value, DictConfig) and not any(isinstance(value, _SCALARS[kind]) for kind in kinds):
            allowed = " or ".join(kind.removesuffix("Type") for kind in kinds if kind != "Tensor")
            raise ValueError(f"{settings._get_full_key(name)}={value!r} is no {allowed}")


def to_plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain dicts, lists and scalars: what checkpoints and loggers hold.

    Raises:
        omegaconf.errors.MissingMandatoryValue: if a `???` was not given.
    """
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def _installed(name: str) -> Path:
    """A folder that lies inside the package in a wheel, and beside it in a checkout."""
    for directory in (_PACKAGE / name, _PACKAGE.parent / name):
        if directory.is_dir():
            return directory
    raise FileNotFoundError(f"no {name}/ inside {_PACKAGE} or beside it: the installation is incomplete; install again")


def _directories(extra_directory: str | Path | None) -> Iterator[Path]:
    yield config_directory()
    if extra_directory is not None:
        directory = Path(extra_directory).absolute()
        if not directory.is_dir():
            raise ValueError(f"config directory '{directory}' does not exist")
        yield directory


def _compose(name: str, overrides: list[str], extra_directory: str | Path | None) -> DictConfig:
    """With Hydra's own part."""
    # Hydra looks for the primary file in its first folder alone, for everything else in all of them.
    directories = sorted(
        _directories(extra_directory), key=lambda directory: not (directory / f"{name}.yaml").is_file()
    )
    first, *others = map(str, directories)
    search_path = [f"hydra.searchpath=[{','.join(f'file://{directory}' for directory in others)}]"] if others else []
    with initialize_config_dir(config_dir=first, version_base="1.3"):
        try:
            return hydra_compose(name, [*search_path, *overrides], return_hydra_config=True)
        except CompactHydraException as error:
            if "Could not find 'hydra/launcher/submitit" in str(error):
                raise ValueError("launcher=slurm needs an extra: pip install 'longlive[slurm]'") from error
            unknown = re.match(r"Could not override '([^'@]+)", str(error))
            if unknown is None:
                raise ValueError(str(error)) from error
    # Composed once more without it, to learn which names there are.
    key = unknown[1]
    config = _compose(name, [other for other in overrides if _key(other) != key], extra_directory)
    is_hydras = key.startswith("hydra.")
    known = {each for each in _dotted_keys(OmegaConf.to_container(config)) if each.startswith("hydra.") is is_hydras}
    raise ValueError(f"unknown key '{key}': {name}.yaml has none of that name{_nearest(key, known)}")


def _check_launcher(launcher: DictConfig) -> None:
    """What jobs ask a cluster for follows from settings (`trainer.devices`) that may be of another type."""
    for key in launcher:
        try:
            _ = launcher[key]
        except ValidationError as error:
            raise ValueError(f"hydra.launcher.{key!s}: {str(error).splitlines()[0]}") from error
        except InterpolationToMissingValueError:
            continue  # `check_complete` names what must be given


def _key(override: str) -> str:
    """`group` of `+group@package=option`: the override without its sign, package and value."""
    return re.split(r"[=@]", override, maxsplit=1)[0].lstrip("+~")


def _first_of_sweep(override: str) -> str:
    try:
        (parsed,) = OverridesParser.create().parse_overrides([override])
    except OverrideParseException as error:
        raise ValueError(f"'{override}' is no override: write key=value; {error}") from error
    if not parsed.is_sweep_override():
        return override
    return f"{parsed.get_key_element()}={next(parsed.sweep_string_iterator())}"


def _dotted_keys(tree: object, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield f"{prefix}{key}"
        yield from _dotted_keys(value, f"{prefix}{key}.")


def _type_names(annotation: object) -> list[str]:
    if isinstance(annotation, str):
        return [name.strip() for name in annotation.split("|")]
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return [getattr(part, "__name__", "") if get_origin(part) is None else "" for part in parts]


def _parameters_of(target: str) -> Mapping[str, inspect.Parameter]:
    """By name; a target that cannot be found, or does not tell, takes anything here: Hydra has words for the first."""
    try:
        return inspect.signature(_locate(target)).parameters
    except (ImportError, TypeError, ValueError):
        return {"settings": inspect.Parameter("settings", inspect.Parameter.VAR_KEYWORD)}


def _check_known(config: DictConfig, unknown: Sequence[str]) -> None:
    if not unknown:
        return
    where = config._get_full_key(None)
    an, s = ("an ", "") if len(unknown) == 1 else ("", "s")
    raise ValueError(
        f"{where}: {config._target_} got {an}unexpected keyword argument{s} {', '.join(map(repr, unknown))}; "
        f"what a file sets is left out by {' '.join(f'~{where}.{name}' for name in unknown)}"
    )


def _nearest(key: str, known: set[str]) -> str:
    """The names that a user may have meant: near the whole name, or with the same last part elsewhere in the tree."""
    last = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.8)
    near += sorted(other for other in known if other.rpartition(".")[2] == last and other not in near)[:3]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    parent = key.rpartition(".")[0]
    siblings = sorted(other for other in known if other.rpartition(".")[0] == parent)
    return f"; use one of {', '.join(siblings)}" if siblings else ""
