"""What a device can do."""

import copy

import pytest
import torch

from longlive.precision.nvfp4.backends import base
from longlive.precision.nvfp4.backends.base import describe_device, has_fp4_gemms
from longlive.precision.nvfp4.backends.emulated import EmulatedBackend


@pytest.mark.parametrize(("capability", "has"), [((8, 0), False), ((9, 0), False), ((10, 0), True), ((12, 0), True)])
def test_fp4_gemms_come_with_compute_capability_10(monkeypatch, capability, has):
    monkeypatch.setattr(base.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(base.torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(base.torch.cuda, "get_device_name", lambda device=None: "GPU")
    assert has_fp4_gemms() is has
    assert has_fp4_gemms(torch.device("cuda", 0)) is has
    assert not has_fp4_gemms("cpu")
    assert describe_device() == f"GPU (compute capability {capability[0]}.{capability[1]})"
    assert describe_device("cpu") == "cpu"


def test_without_cuda_there_are_none(monkeypatch):
    monkeypatch.setattr(base.torch.cuda, "is_available", lambda: False)
    assert not has_fp4_gemms("cuda")
    assert describe_device("cuda") == "cpu"


def test_copied_layers_share_their_backend():
    backend = EmulatedBackend()
    assert copy.deepcopy([backend])[0] is backend
