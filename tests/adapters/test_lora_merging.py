"""Merged into its base, an adapter is in the weights to their rounding, and nothing of it is left beside them."""

import pytest
import torch

from helpers.adapters import base, fill_adapter
from longlive.adapters.lora import LoRASettings, adapter_names, adapter_state, add_adapter
from longlive.adapters.lora_merging import merge_adapter
from longlive.models.wan.model import CausalWan


def adapted(dtype: torch.dtype) -> CausalWan:
    """Two adapters that do something; the second's layers are fewer."""
    network = base().to(dtype)
    add_adapter(network, "student", LoRASettings(rank=4, alpha=8))
    add_adapter(network, "critic", LoRASettings(rank=2, alpha=2, targets=["ffn.0"]))
    for seed, name in enumerate(("student", "critic")):
        fill_adapter(network, name, seed)
    return network


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float32, 20)])
def test_merged_weights_are_base_and_adapter_to_the_rounding_of_their_dtype(dtype: torch.dtype, bits: int) -> None:
    network, plain = adapted(dtype), dict(base().to(dtype).named_parameters())
    state = {name: value.double() for name, value in adapter_state(network, "student").items()}
    merge_adapter(network, "student")
    merged = dict(network.named_parameters())
    assert merged.keys() == plain.keys()
    changed = 0
    for name, weight in plain.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        assert merged[name].dtype == dtype
        if f"{key}.lora_A.weight" not in state or name.endswith("bias"):
            assert torch.equal(merged[name], weight)
            continue
        exact = weight.double() + 2 * state[f"{key}.lora_B.weight"] @ state[f"{key}.lora_A.weight"]
        # Half a unit in the last place, and float32's own rounding of sums that are larger than the result.
        assert ((merged[name].double() - exact).abs() <= exact.abs() * 2.0**-bits * 1.0001 + 1e-8).all()
        assert not torch.equal(merged[name], weight)
        changed += 1
    assert changed == 20
    assert adapter_names(network) == []


def test_without_an_adapter_the_base_stays_and_a_wrong_name_changes_nothing() -> None:
    network, plain = adapted(torch.float32), base().state_dict()
    with pytest.raises(ValueError, match="no adapter 'teacher'; there are critic, student"):
        merge_adapter(network, "teacher")
    assert adapter_names(network) == ["critic", "student"]
    merge_adapter(network, None)
    assert network.state_dict().keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in network.state_dict().items())
