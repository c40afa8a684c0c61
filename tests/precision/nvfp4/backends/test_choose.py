"""Which backend runs, and what is said when the one that was asked for cannot."""

import logging

import pytest

from longlive.precision.nvfp4.backends import base, choose
from longlive.precision.nvfp4.backends.choose import BACKENDS, choose_backend
from longlive.precision.nvfp4.backends.emulated import EmulatedBackend
from longlive.precision.nvfp4.backends.torchao import TorchAOBackend
from longlive.precision.nvfp4.backends.transformer_engine import TransformerEngineBackend
from longlive.precision.nvfp4.recipe import NVFP4Recipe

STATIC = NVFP4Recipe(weights="static_6", activations="static_6")


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    choose._say.cache_clear()


@pytest.fixture
def without_cuda(monkeypatch):
    monkeypatch.setattr(base.torch.cuda, "is_available", lambda: False)


@pytest.fixture
def blackwell(monkeypatch):
    """A Blackwell GPU with Transformer Engine installed."""
    monkeypatch.setattr(base.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(base.torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    monkeypatch.setattr(base.torch.cuda, "get_device_name", lambda device=None: "B200")
    monkeypatch.setattr(choose.transformer_engine, "missing", lambda device=None: None)
    monkeypatch.setattr(TransformerEngineBackend, "__init__", lambda self, device=None: None)


@pytest.mark.usefixtures("without_cuda")
def test_without_cuda_a_named_transformer_engine_is_one_clear_error():
    with pytest.raises(RuntimeError) as error:
        choose_backend("transformer_engine")
    assert str(error.value).startswith("backend=transformer_engine cannot run here: there is no CUDA device; importing")
    assert str(error.value).endswith("backend=auto would run emulated instead")


@pytest.mark.usefixtures("without_cuda")
def test_auto_emulates_without_cuda_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert isinstance(choose_backend("auto"), EmulatedBackend)
    assert caplog.messages == [
        "NVFP4 backend: emulated (cpu has no FP4 GEMMs)",
        "NVFP4 is emulated on cpu: accuracy is real, speed and memory of GEMMs are not",
    ]


def test_a_name_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(
        ValueError, match="backend='te' does not exist; use auto, emulated, transformer_engine, torchao"
    ):
        choose_backend("te")


@pytest.mark.usefixtures("blackwell")
def test_auto_takes_transformer_engine_where_it_computes_the_recipe():
    assert isinstance(choose_backend("auto", STATIC), TransformerEngineBackend)
    assert isinstance(choose_backend("auto", STATIC, device="cpu"), EmulatedBackend)


@pytest.mark.usefixtures("blackwell")
def test_auto_passes_over_a_backend_that_would_compute_another_recipe_and_says_why(caplog):
    with caplog.at_level(logging.INFO):
        assert isinstance(choose_backend("auto", NVFP4Recipe()), EmulatedBackend)
    assert "not transformer_engine: it does not compute weights=mse, activations=mse" in caplog.messages[0]
    assert "not torchao: its weights do not learn" in caplog.messages[0]
    assert "emulated on B200 (compute capability 10.0)" in caplog.messages[1]


@pytest.mark.usefixtures("blackwell")
def test_auto_takes_torchao_for_rollouts_where_transformer_engine_is_missing(monkeypatch):
    monkeypatch.setattr(choose.transformer_engine, "missing", lambda device=None: "it is not installed")
    assert isinstance(choose_backend("auto", STATIC, trains=False), TorchAOBackend)
    assert isinstance(choose_backend("auto", STATIC, trains=True), EmulatedBackend)


@pytest.mark.usefixtures("blackwell")
def test_a_named_backend_that_would_compute_another_recipe_is_an_error():
    with pytest.raises(
        ValueError, match="backend=transformer_engine cannot do what is asked: it does not compute weigh"
    ):
        choose_backend("transformer_engine", NVFP4Recipe())
    with pytest.raises(ValueError, match="backend=torchao cannot do what is asked: its weights do not learn"):
        choose_backend("torchao", STATIC)


@pytest.mark.usefixtures("without_cuda")
def test_every_backend_goes_by_its_name():
    assert {backend.name for backend in (EmulatedBackend, TransformerEngineBackend, TorchAOBackend)} == set(BACKENDS)
    assert isinstance(choose_backend("emulated"), EmulatedBackend)
    assert isinstance(choose_backend("torchao", NVFP4Recipe(activations=None), trains=False), TorchAOBackend)
