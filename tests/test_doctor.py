"""The doctor tells the truth about what works, and one broken thing never hides the others."""

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from longlive import doctor
from longlive.doctor import Check, Finding, UnavailableError, compute, packages, video

ROOT = Path(__file__).parents[1]


def findings() -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.report()}


@pytest.fixture
def no_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first torch.compile takes up to half a minute of C++ compiler."""
    monkeypatch.setattr(compute, "probe_compile", lambda device: "not tried in this test")


@pytest.mark.usefixtures("no_compile")
def test_json_lists_every_check_with_what_works_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == [check.name for check in doctor.checks()]
    assert all(row["detail"] and "\n" not in row["detail"] for row in rows.values())
    # What this project cannot do without.
    for name in ("torch", "lightning", "diffusers", "transformers", "fp32", "bf16", "SDPA math", "encode h264"):
        assert rows[name]["works"], rows[name]
    # The distribution's version: wheels of the package index leave the CUDA version to torch.__version__.
    assert rows["torch"]["detail"] == importlib.metadata.version("torch")
    assert rows["cuda"]["works"] == torch.cuda.is_available()


@pytest.mark.usefixtures("no_compile")
def test_the_tables_name_every_check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "PACKAGES", {"torch": "torch"})
    monkeypatch.setattr(video, "ENCODERS", {"h264": ("libx264",)})
    monkeypatch.setenv("COLUMNS", "300")
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    for check in doctor.checks():
        assert re.search(rf"^ +{re.escape(check.name)} +(yes|no) ", printed, flags=re.MULTILINE), check.name


@pytest.mark.usefixtures("no_compile")
def test_a_probe_that_raises_anything_is_reported_with_its_reason_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> str:
        raise OSError("libcuda.so.1:\n  cannot open")

    monkeypatch.setattr(compute, "probe_cpu", broken)
    found = findings()
    assert found["cpu"] == Finding("devices", "cpu", False, "OSError: libcuda.so.1: cannot open")
    assert found["fp32"].works


def test_a_reason_is_one_line_of_bounded_length() -> None:
    def broken() -> str:
        raise RuntimeError("long " * 1000)

    finding = Check("group", "name", broken).run()
    assert not finding.works
    assert len(finding.detail) == 300
    assert finding.detail.startswith("RuntimeError: long long")

    def silent() -> str:
        raise KeyboardInterruptLikeError

    assert Check("group", "name", silent).run().detail == "KeyboardInterruptLikeError"


class KeyboardInterruptLikeError(Exception):
    """An error without a message."""


def test_an_installed_package_that_cannot_be_imported_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """`import transformer_engine` without CUDA's libraries raises RuntimeError, and availability flags stay True."""

    def fail(name: str) -> ModuleType:
        raise RuntimeError("Could not find shared object file: libtransformer_engine.so")

    monkeypatch.setattr(packages.importlib, "import_module", fail)
    finding = Check("versions", "torch", lambda: packages.probe_package("torch", "torch")).run()
    assert not finding.works
    version = importlib.metadata.version("torch")
    assert f"{version} is installed, but import torch fails: RuntimeError: Could not find" in finding.detail


def test_a_package_that_is_absent_says_how_to_get_it() -> None:
    finding = Check("extras", "x", lambda: packages.probe_package("no-such-distribution", "x", "nvfp4")).run()
    assert finding == Finding("extras", "x", False, "not installed; pip install longlive[nvfp4]")


def test_every_dependency_of_the_project_is_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=!~;\[ ]", requirement)[0] for requirement in project["dependencies"]}
    assert names == set(packages.PACKAGES)
    for distribution, (_, extra) in packages.EXTRAS.items():
        assert any(requirement.startswith(distribution) for requirement in project["optional-dependencies"][extra])


def test_low_precisions_name_what_they_lack_without_a_cuda_device() -> None:
    cpu = torch.device("cpu")
    fp8 = Check("precisions", "fp8", lambda: compute.probe_fp8(cpu)).run()
    nvfp4 = Check("precisions", "nvfp4", lambda: compute.probe_nvfp4(cpu)).run()
    assert (fp8.works, nvfp4.works) == (False, False)
    assert "compute capability 8.9 and newer, and there is no CUDA device" in fp8.detail
    assert "compute capability 10.0 and newer, and there is no CUDA device" in nvfp4.detail


def test_a_device_below_the_needed_capability_is_told_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    finding = Check("precisions", "nvfp4", lambda: compute.probe_nvfp4(torch.device("cuda"))).run()
    assert "10.0 and newer; this one has 9.0" in finding.detail


def test_a_product_that_is_wrong_is_not_called_working(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GEMM that runs and returns something else is the failure that nobody sees."""
    monkeypatch.setattr(compute, "_normal", lambda shape, device: torch.full(shape, float("nan")))
    finding = Check("precisions", "bf16", lambda: compute.probe_matmul(torch.bfloat16, torch.device("cpu"))).run()
    assert finding == Finding("precisions", "bf16", False, "a product has a relative error of nan")


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9", "av1"])
def test_codecs_round_trip_here_without_noise_on_stderr(codec: str, capfd: pytest.CaptureFixture[str]) -> None:
    encode = Check("video codecs", "encode", lambda: video.probe_encode(codec)).run()
    decode = Check("video codecs", "decode", lambda: video.probe_decode(codec)).run()
    assert encode.works, encode.detail
    assert decode.works, decode.detail
    assert "3 frames" in decode.detail
    assert capfd.readouterr().err == ""


def test_an_encoder_that_is_not_there_is_named_and_its_decoder_not_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "ENCODERS", {"h264": ("no_such_encoder", "neither_this")})
    encode = Check("video codecs", "encode h264", lambda: video.probe_encode("h264")).run()
    decode = Check("video codecs", "decode h264", lambda: video.probe_decode("h264")).run()
    assert not encode.works
    assert "no_such_encoder" in encode.detail
    assert "neither_this" in encode.detail
    assert (decode.works, decode.detail) == (False, "not tried: nothing here could encode a file for it")


def test_frames_that_come_back_wrong_are_not_called_decoded() -> None:
    """A decoder that returns other frames silently is worse than none."""
    frames = video._test_frames()
    assert video._psnr(frames) == float("inf")
    with pytest.raises(UnavailableError, match="frames came back wrong, at"):
        video._psnr(np.roll(frames, 1, axis=0))
    with pytest.raises(UnavailableError, match="frames came back as"):
        video._psnr(frames[:2])


def test_torch_compile_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: object) -> None:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(compute.shutil, "which", lambda name: None)
    finding = Check("kernels", "torch.compile", lambda: compute.probe_compile(torch.device("cpu"))).run()
    assert not finding.works
    assert "needs a C++ compiler" in finding.detail
