"""Configs are composed here from a small tree written for the test; conf/ itself is tested with what it describes."""

import os
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from longlive import config as configuration
from longlive.config import check_complete, compose, config_directory, instantiate, to_plain

FILES = {
    "train.yaml": "defaults: [_self_, {model: tiny}, {experiment: null}]\n"
    "seed: 0\ntrainer: {max_steps: 10, precision: bf16}\ncheckpoint: ???\noutput: runs/${seed}\n",
    "model/tiny.yaml": "num_layers: 4\ndim: 128\n",
    "model/big.yaml": "num_layers: 8\ndim: 256\n",
    "experiment/good.yaml": "# @package _global_\ndefaults: [{override /model: big}]\ntrainer: {max_steps: 20}\n",
    "experiment/misspelt.yaml": "# @package _global_\ntrainr: {max_steps: 20}\n",
}


def write(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


@pytest.fixture(autouse=True)
def conf(tmp_path, monkeypatch) -> Path:
    directory = write(tmp_path / "conf", FILES)
    monkeypatch.setattr(configuration, "config_directory", lambda: directory)
    return directory


class Box:
    """Something to instantiate."""

    def __init__(
        self, size: int, content: object = None, weight: "float | int | None" = None, is_open: bool = False
    ) -> None:
        if size < 0:
            raise ValueError(f"size={size} is negative; use 0 or more")
        if size > 100:
            raise OSError("does not fit the disk")
        self.size = size
        self.content = content


def box(**settings: object) -> DictConfig:
    return OmegaConf.create({"box": {"_target_": f"{__name__}.Box", **settings}}).box


def test_the_checkout_has_its_configs_beside_the_package():
    assert config_directory() == Path(configuration.__file__).parent.parent / "conf"


def test_overrides_groups_and_experiments_compose():
    config = compose("train", ["experiment=good", "seed=3"])
    assert (config.model.num_layers, config.trainer.max_steps, config.seed, config.output) == (8, 20, 3, "runs/3")


def test_composing_leaves_no_global_state_and_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    compose("train")
    with pytest.raises(ValueError, match="unknown key"):
        compose("train", ["sed=1"])
    assert not GlobalHydra.instance().is_initialized()
    assert dict(os.environ) == before
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layer=3", r"unknown key 'model.num_layer': .* did you mean model.num_layers\?"),
        ("modle=big", r"unknown key 'modle': .* did you mean model\?"),
        ("num_layers=3", r"unknown key 'num_layers': .* did you mean model.num_layers\?"),
        ("model.width=3", r"unknown key 'model.width': .* use one of model.dim, model.num_layers"),
        ("+sed=1", r"unknown top-level key 'sed': .* did you mean seed\?"),
        ("experiment=misspelt", r"unknown top-level key 'trainr': .* did you mean trainer\?"),
        ("model=huge", r"(?s)Could not find 'model/huge'.*big.*tiny"),
        ("seed", "'seed' is no override: write key=value"),
    ],
)
def test_a_name_that_does_not_exist_is_refused_with_the_nearest_names(override, message):
    """A misspelt setting that trains with its default is found after the run, if ever."""
    with pytest.raises(ValueError, match=message):
        compose("train", [override])


def test_two_unknown_keys_are_refused_too():
    with pytest.raises(ValueError, match="unknown key"):
        compose("train", ["model.num_layer=3", "trainer.max_step=1"])


def test_a_primary_file_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="Cannot find primary config 'tran'"):
        compose("tran")


def test_of_a_sweep_the_first_value_is_composed():
    config = compose("train", ["model=big,tiny", "trainer.max_steps=range(5,8)", "seed=choice(4,6)"])
    assert (config.model.num_layers, config.trainer.max_steps, config.seed) == (8, 5, 4)


def test_a_users_own_folder_adds_experiments_and_groups(tmp_path):
    mine = write(
        tmp_path / "mine",
        {
            "experiment/mine.yaml": "# @package _global_\ndefaults: [{override /model: wide}]\n",
            "model/wide.yaml": "num_layers: 2\ndim: 512\n",
        },
    )
    assert compose("train", ["experiment=mine"], extra_directory=mine).model.dim == 512
    with pytest.raises(ValueError, match=r"did you mean model\.dim"):
        compose("train", ["experiment=mine", "model.dims=1"], extra_directory=mine)
    with pytest.raises(ValueError, match="nowhere' does not exist"):
        compose("train", extra_directory=tmp_path / "nowhere")


def test_objects_are_instantiated_inside_out_with_plain_containers():
    """OmegaConf containers inside checkpoints cannot be loaded without OmegaConf, nor by torch's safe loader."""
    made = instantiate(
        box(size=1, content={"inner": {"_target_": f"{__name__}.Box", "size": 2}, "list": [1, {"a": 2}]})
    )
    assert made.content["inner"].size == 2
    assert type(made.content) is dict
    assert type(made.content["list"]) is list
    assert type(made.content["list"][1]) is dict


def test_arguments_beside_the_config_reach_the_constructor():
    assert instantiate(box(size=1), content="given").content == "given"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": -1}, r"box: size=-1 is negative; use 0 or more"),
        (
            {"size": 1, "sise": 2},
            r"box: .*unexpected keyword argument 'sise'; what a file sets is left out by ~box.sise",
        ),
        ({"size": 1, "sise": 2, "tint": 3}, r"unexpected keyword arguments 'sise', 'tint'; .* by ~box.sise ~box.tint$"),
        ({"size": "two"}, r"^box.size='two' is no int$"),
        ({"size": 1.5}, r"^box.size=1.5 is no int$"),
        ({"size": None}, r"^box.size=None is no int$"),
        ({"size": [1]}, r"^box.size=\[1\] is no int$"),
        ({"size": 1, "weight": "x"}, r"^box.weight='x' is no float or int or None$"),
        ({"size": 1, "is_open": 1}, r"^box.is_open=1 is no bool$"),
        ({"_partial_": True, "size": "two"}, r"^box.size='two' is no int$"),
        (
            {"size": 1, "content": [{"_target_": f"{__name__}.Box", "size": "two"}]},
            r"^box.content\[0\].size='two' is no",
        ),
        ({"size": 1, "content": {"_target_": f"{__name__}.Box", "size": -2}}, r"box.content: size=-2 is negative"),
        ({"_target_": f"{__name__}.Bx"}, r"(?s)box: Error locating target .*Bx"),
        ({"_partial_": True, "sise": 2}, r"box: .*Box got an unexpected keyword argument 'sise'"),
        (
            {"size": 1, "content": {"_target_": f"{__name__}.Box", "_partial_": True, "sise": 2}},
            r"box.content: .*unexpected keyword argument 'sise'",
        ),
    ],
)
def test_a_setting_that_a_constructor_refuses_is_named_with_its_config_key(settings, message):
    with pytest.raises(ValueError, match=message):
        instantiate(box(**settings))


def test_a_value_of_the_type_is_taken_and_what_is_given_in_code_is_not_asked():
    """A whole number is a float too, and None stands where a type says so, or an old library's default."""
    for weight in (None, 2, 2.5):
        instantiate(box(size=1, weight=weight))
    assert instantiate(box(size="two"), size=2).size == 2
    assert instantiate(OmegaConf.create({"_target_": f"{__name__}.old_box", "size": None})) is None


def old_box(size: int = None):  # type: ignore[assignment]  # noqa: RUF013
    return size


def test_what_is_called_later_is_checked_by_name_and_made_later():
    factory = instantiate(box(_partial_=True, content="given"))
    assert (factory(size=2).size, factory(3).content) == (2, "given")


def test_a_constructors_other_errors_keep_their_type_and_gain_the_key():
    with pytest.raises(OSError, match="does not fit the disk") as error:
        instantiate(box(size=101))
    assert "while box was instantiated" in error.value.__notes__[0]
    assert any(entry.name == "__init__" for entry in error.traceback)


def test_a_config_without_a_target_describes_no_object():
    with pytest.raises(ValueError, match=r"model has no _target_, .*'dim', 'num_layers'"):
        instantiate(compose("train").model)


def test_settings_that_were_not_given_are_named_all_at_once():
    check_complete(compose("train", ["checkpoint=x.ckpt"]))
    with pytest.raises(ValueError, match=r"must be given: checkpoint=\.\.\., trainer\.max_steps=\.\.\."):
        check_complete(compose("train", ["trainer.max_steps=???"]))


def test_the_plain_config_is_resolved_and_complete():
    plain = to_plain(compose("train", ["checkpoint=x.ckpt", "seed=5"]))
    assert plain["output"] == "runs/5"
    assert type(plain["trainer"]) is dict
    with pytest.raises(MissingMandatoryValue, match="checkpoint"):
        to_plain(compose("train"))
