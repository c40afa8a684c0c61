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
