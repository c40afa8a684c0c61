"""The choice of precision."""

import pytest
import torch

from longlive.precision import auto
from longlive.precision.auto import PRECISIONS, choose_precision


def test_a_named_precision_is_taken_as_it_is():
    assert [choose_precision(name) for name in PRECISIONS] == ["32-true", "bf16-mixed"]


@pytest.mark.parametrize("name", ["bf16-true", "16-mixed", "64", "fast"])
def test_a_precision_that_does_not_train_here_is_refused_with_those_that_do(name):
    with pytest.raises(ValueError, match=f"precision='{name}' is not supported; use auto, 32-true or bf16-mixed"):
        choose_precision(name)


@pytest.mark.parametrize(("has_instructions", "chosen"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_is_bfloat16_only_where_the_cpu_multiplies_it(monkeypatch, has_instructions, chosen):
    """Emulated bfloat16 trains many times slower than float32, and nothing says so."""
    monkeypatch.setattr(auto.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(auto.torch.cpu, "_is_avx512_bf16_supported", lambda: has_instructions)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    assert choose_precision("auto") == chosen
