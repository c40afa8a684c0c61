"""Files of tensors from others: what is read, what is refused, and that nothing in them is ever run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longlive.data.weight_files import TensorFiles, check_tensors, find_files, plain_names

TENSORS = {"a.weight": torch.arange(12.0).view(4, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


class Harmful:
    """A pickle that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def save(path: Path, tensors=TENSORS) -> Path:
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.pth"])
def test_both_kinds_hand_out_the_same(name, tmp_path):
    files = TensorFiles.open([save(tmp_path / name)])
    assert files.shapes == {"a.weight": (4, 3), "b": (2,)}
    assert files.dtypes == {"a.weight": "float32", "b": "bfloat16"}
    for name, stored in files:
        for where in ((), (slice(1, 2),), (slice(0, 0),)):
            assert torch.equal(stored[where], TENSORS[name][where])


def test_files_older_than_the_zip_format_are_read(tmp_path):
    torch.save(TENSORS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    files = dict(TensorFiles.open([tmp_path / "old.pth"]))
    assert torch.equal(files["a.weight"][()], TENSORS["a.weight"])


def test_a_mapped_file_takes_no_memory_until_it_is_read(tmp_path):
    """Catches a file read whole by every rank: 80 GB of host memory on a node of eight."""

    def anonymous_mib() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

    path = save(tmp_path / "large.pt", {"x": torch.zeros(64, 2**18)})
    before = anonymous_mib()
    ((_, stored),) = TensorFiles.open([path])
    part = stored[(slice(0, 8),)]
    assert anonymous_mib() - before < 32, "of 64 MiB, 8 are asked for"
    assert part.untyped_storage().nbytes() == 8 * 2**20


@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {"generator": TENSORS, "step": bad}], ids=["top", "in"])
def test_code_in_a_file_is_never_run(wrap, tmp_path):
    torch.save(wrap(Harmful(tmp_path / "harmed")), tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad\.pt is no file of tensors and plain containers.*could run code"):
        TensorFiles.open([tmp_path / "bad.pt"], ["generator"])
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"step": 3, "critic": TENSORS}, "holds step, critic; looked for generator, model, or tensors by name"),
        ({"model": {"x": torch.zeros(1), "_extra_state": [1]}}, "model holds more than tensors: _extra_state"),
        ([torch.zeros(1)], "holds a list, not tensors by name"),
        ({}, "holds nothing"),
        ({"model": {"model.x": torch.zeros(1), "model._orig_mod.x": torch.zeros(1)}}, "x is there twice"),
    ],
)
def test_what_a_file_holds_instead_is_said(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        TensorFiles.open([tmp_path / "x.pt"], ["generator", "model"])


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
@pytest.mark.parametrize("kept", [0, 40, 300])
def test_a_torn_file_is_named(name, kept, tmp_path):
    path = save(tmp_path / name)
    path.write_bytes(path.read_bytes()[:kept] if kept < path.stat().st_size - 20 else b"version https://git-lfs")
    with pytest.raises(ValueError, match=rf"{name}.*download it again"):
        TensorFiles.open([path])


def test_the_first_place_that_has_something_is_taken(tmp_path):
    (tmp_path / "part").mkdir()
    save(tmp_path / "part" / "x.safetensors")
    assert find_files(tmp_path, ["*.safetensors", "part/*.safetensors", "*.pt"], "x") == [
        tmp_path / "part" / "x.safetensors"
    ]
    save(tmp_path / "x.pt")
    assert find_files(tmp_path, ["*.pt", "part/*.safetensors"], "x") == [tmp_path / "x.pt"]
    assert find_files(tmp_path / "x.pt", [], "x") == [tmp_path / "x.pt"]


def test_several_files_without_an_index_are_refused(tmp_path):
    for name in ("a.pt", "b.pt"):
        save(tmp_path / name)
    with pytest.raises(ValueError, match=r"holds 2 files \*\.pt and 0 indices of them: a\.pt, b\.pt; give one of"):
        find_files(tmp_path, ["*.pt"], "x")
    with pytest.raises(ValueError, match=r"nowhere does not exist; give a folder or a file with weights"):
        find_files(tmp_path / "nowhere", ["*.pt"], "weights")
    (tmp_path / "x.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.safetensors\.index\.json is no index of safetensors"):
        find_files(tmp_path / "x.safetensors.index.json", [], "x")


def test_a_prefix_is_taken_off_only_if_all_have_it():
    assert plain_names(["model.a", "model.b.c"]) == {"model.a": "a", "model.b.c": "b.c"}
    assert plain_names(["model.a", "b"]) == {"model.a": "model.a", "b": "b"}
    assert plain_names(["a._fsdp_wrapped_module.b", "not_fsdp_wrapped_module.c"]) == {
        "a._fsdp_wrapped_module.b": "a.b",
        "not_fsdp_wrapped_module.c": "not_fsdp_wrapped_module.c",
    }


def test_differences_are_listed_both_ways():
    stored = {"same": (1,), "other": (2, 3), **{f"more{i}": (1,) for i in range(5)}}
    with pytest.raises(ValueError, match="does not fit") as raised:
        check_tensors(stored, {"same": [1], "other": [3, 2], "lost": [1]}, "the file", "Do something")
    assert str(raised.value) == (
        "the file does not fit the network. 1 missing: lost; 5 unexpected: more0, more1, more2, more3, ...; "
        "1 of another shape: other [2, 3] instead of [3, 2]. Do something"
    )
    check_tensors({"same": (1,)}, {"same": [1]}, "the file")
