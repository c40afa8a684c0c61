"""`longlive doctor precision`: what is wrapped, by whom, and why the rest is not."""

from __future__ import annotations

import json

import pytest

from longlive import doctor
from longlive.doctor.precision import make_report

WIDE = ("precision=nvfp4", "precision.backend=emulated")


def test_the_5b_model_has_300_wrapped_layers_and_no_weights_are_built():
    report = make_report(["model=ti2v_5b", *WIDE])
    wrapped = [layer for layer in report.layers if layer.reason is None]
    assert (report.precision, report.backend, len(wrapped), len(report.layers)) == ("nvfp4", "emulated", 300, 307)
    # 30 blocks of 8 dim^2 + 2 dim ffn_dim; beside them the embeddings, the timestep's layers and the head.
    blocks = 30 * (8 * 3072**2 + 2 * 3072 * 14336)
    others = 3072 * (192 + 4096 + 3072 + 256 + 3072 + 6 * 3072 + 192)
    assert report.share == pytest.approx(blocks / (blocks + others))


def test_the_command_prints_a_row_per_layer_and_the_reasons(capsys):
    more = ["model.ffn_dim=520", "precision.keep_last_blocks_bf16=0.25"]
    assert doctor.main(["precision", *WIDE, *more]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "blocks.0-2.self_attn.q 3 128 128 yes" in lines
    assert "head.head 1 128 64 no not among `layers`" in lines
    assert any(line.startswith("blocks.0-2.ffn.0 3 128 520 no out_features=520") for line in lines)
    assert any(line.startswith("blocks.3.self_attn.q 1 128 128 no in the last blocks") for line in lines)
    assert lines[-1].startswith("precision=nvfp4: 24 of 47 layers, ")
    assert lines[-1].endswith("multiply in nvfp4, by the backend emulated.")


def test_json_holds_every_layer(capsys):
    assert doctor.main(["precision", "precision=bf16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["precision"], found["backend"], found["share_of_weights"]) == ("bf16-mixed", None, 0)
    assert {layer["reason"] for layer in found["layers"]} == {"precision=bf16-mixed wraps none"}
    assert len(found["layers"]) == 47


def test_what_train_would_refuse_is_refused_in_one_line(capsys):
    assert doctor.main(["precision", "precision=nvfp4", "precision.layers=[blocks.*.mlp]"]) == 1
    assert "no layer is named 'blocks.*.mlp'" in capsys.readouterr().err


def test_the_plan_counts_low_precision_as_bfloat16(capsys):
    peaks = {}
    for precision in ("bf16", "fp8", "nvfp4"):
        assert doctor.main(["plan", "num_gpus=1", "data.train=.", f"precision={precision}", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        peaks[plan["precision"]] = plan["peak_bytes"]
    assert set(peaks) == {"bf16-mixed", "fp8", "nvfp4"}
    assert len(set(peaks.values())) == 1


ROLES = ("model=ti2v_5b", "module=distillation", "data=toyworld_prompts", "precision=bf16")


EACH = ["student", "teacher", "critic"]


@pytest.mark.parametrize(
    ("packed", "shares", "most"),
    [
        (("student",), [["student"], ["teacher", "critic"]], 0.53),
        (("student", "teacher", "critic"), [["student", "teacher", "critic"]], 0.19),
    ],
    ids=str,
)
def test_the_roles_of_the_5b_model_hold_a_fraction_of_a_copy_each(packed, shares, most):
    """Three copies in bfloat16 are what there was to save; all in NVFP4 even without sharing hold below 0.45 of it."""
    names = [f"+module.role_precision.{role}=nvfp4" for role in packed]
    memory = make_report([*ROLES, *names]).roles
    assert [list(base.roles) for base, _ in memory.bases] == shares
    assert memory.copies == 3 * 2 * 4_999_787_712
    assert most - 0.01 < memory.total / memory.copies <= most
    # A rank of 128 beside 8 dim^2 and 2 dim ffn_dim, in 30 blocks, float32.
    assert memory.adapters == dict.fromkeys(("student", "critic"), 30 * 128 * (8 * 2 * 3072 + 2 * (3072 + 14336)) * 4)
    if len(packed) == 3:
        assert memory.unshared <= 0.45 * memory.copies
        linears = 30 * (8 * 3072**2 + 2 * 3072 * 14336)
        ((_, held),) = memory.bases
        assert 0.5625 * linears < held < 0.5625 * linears + 4 * (4_999_787_712 - linears)


def test_roles_with_packed_weights_alone_share_them_and_hold_less_than_half():
    """As an option for each role; none of them trains what is packed, and none rounds what it multiplies by."""
    memory = make_report([*ROLES, *(f"+precision@module.role_precision.{role}=nvfp4_weights" for role in EACH)]).roles
    ((base, _),) = memory.bases
    assert list(base.roles) == EACH
    recipe = base.precision.recipe
    assert (recipe.weights, recipe.weight_tiles, recipe.activations, recipe.gradients) == ("mse", False, None, None)
    assert 0.34 < memory.total / memory.copies <= 0.345


def test_the_command_prints_who_shares_what(capsys):
    more = ["module=distillation", "data=toyworld_prompts", "+module.role_precision.student=nvfp4", "precision=bf16"]
    assert doctor.main(["precision", *more]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "student base, nvfp4 0.00" in lines
    assert "teacher, critic base, bf16-mixed 0.00" in lines
    assert lines[-1].startswith("Together 0.0")
    assert lines[-1].endswith("of a bfloat16 copy of the network per role.")
    assert doctor.main(["precision", *more, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["roles"]
    assert [base["roles"] for base in found["bases"]] == [["student"], ["teacher", "critic"]]
    assert found["bytes"] == sum(base["bytes"] for base in found["bases"]) + sum(found["adapters"].values())
