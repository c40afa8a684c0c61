from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from longlive.data.shards import load_index
from longlive.make_shards import make_shards


def config(directory: Path, **changes: object) -> DictConfig:
    source = {"_target_": "longlive.data.toyworld.ToyWorldSource", "num_clips": 3, "num_raw_frames": 5}
    settings = {"stage": "write", "source": source, "directory": str(directory), "clips_per_shard": 2, "quality": 18}
    return OmegaConf.create(settings | {"strict": False} | changes)


def test_a_configured_source_becomes_shards_and_a_second_run_leaves_them_alone(tmp_path, capsys):
    make_shards(config(tmp_path))
    index = load_index(tmp_path)
    assert len(index.samples) == 3
    assert {sample.num_raw_frames for sample in index.samples} == {5}
    assert len({sample.shard for sample in index.samples}) == 2
    assert f"3 clips in {tmp_path}, 0 unreadable ones skipped" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    make_shards(config(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_setting_that_the_source_does_not_take_is_refused_before_any_work(tmp_path):
    asked = config(tmp_path / "shards")
    asked.source.num_clip = 4
    with pytest.raises(ValueError, match="unexpected keyword argument 'num_clip'"):
        make_shards(asked)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(("name", "value", "type_"), [("clips_per_shard", "many", "int"), ("strict", "no", "bool")])
def test_a_number_that_is_none_is_refused_by_name(tmp_path, name, value, type_):
    with pytest.raises(ValueError, match=f"^{name}='{value}' is no {type_}$"):
        make_shards(config(tmp_path / "shards", **{name: value}))
    assert not (tmp_path / "shards").exists()
