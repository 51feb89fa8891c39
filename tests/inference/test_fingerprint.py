"""A model's fingerprint: digests by hand, MIGE-mini's known values through the script, faults of each stage found."""

import copy
import hashlib
import json
import shutil

import pytest
import torch
from conftest import ROOT, run_here

from mige import config
from mige.inference import fingerprint
from mige.inference.pipeline import MIGEPipeline
from mige.models.build import build_parts

MINI = ROOT / "output" / "pretrained_models" / "mige-mini"
REFERENCES = ROOT / "tools" / "reference_values"


@pytest.fixture(scope="module")
def known() -> dict:
    return json.loads((REFERENCES / "mige-mini.json").read_text())


@pytest.fixture(scope="module")
def pipeline() -> MIGEPipeline:
    return MIGEPipeline.from_pretrained(MINI)


def test_the_digest_is_of_names_and_shapes():
    by_hand = hashlib.sha256(b"a.weight 2x3\nb.bias 4\n").hexdigest()[:16]
    assert fingerprint.digest_of_keys({"b.bias": (4,), "a.weight": (2, 3)}) == by_hand
    assert fingerprint.digest_of_keys({"b.bias": (4,), "a.weight": (3, 2)}) != by_hand


def test_a_summary_by_hand():
    found = fingerprint.summary(torch.arange(15.0).reshape(3, 5))
    assert found == {"shape": [3, 5], "mean": 7.0, "std": 4.47214, "values": [0, 2, 4, 6, 8, 10, 12, 14]}


def test_mige_minis_values_are_known(tmp_path):
    done = run_here("tools/verify_release.py", "model", MINI, "--output", tmp_path, "--device", "cpu")
    assert done.returncode == 0 and "MIGE-mini: 0 differences" in done.stdout, done.stdout + done.stderr
    found = json.loads((tmp_path / "model.json").read_text())
    assert found["compared with"] == "MIGE-mini" and found["versions"]["torch"]
    file = "diffusion_pytorch_model-00002-of-00004.safetensors"
    digest = hashlib.sha256((MINI / "transformer" / file).read_bytes()).hexdigest()
    assert found["parts"]["transformer"]["files"][file] == digest


def test_the_released_models_keys_are_those_of_its_file():
    """What can be known without the weights: keys and shapes, by the list of the official file and by our config."""
    known = json.loads((REFERENCES / "mige.json").read_text())
    rows = (ROOT / "tests" / "fixtures" / "official_keys.tsv").read_text().splitlines()[1:]
    official = {key: tuple(map(int, shape.split("x"))) for key, shape, *_ in (row.split("\t") for row in rows)}
    assert known["official file"] == {"tensors": 1451, "keys": fingerprint.digest_of_keys(official)}
    assert known["stages"] == {} and "not here yet" in known["note"]
    for name, part in build_parts(config.load(ROOT / "configs" / "mige_512.py").model, device="meta").items():
        shapes = {key: tuple(value.shape) for key, value in part.state_dict().items()}
        values = sum(torch.Size(shape).numel() for shape in shapes.values())
        assert known["parts"][name] == {
            "tensors": len(shapes),
            "values": values,
            "keys": fingerprint.digest_of_keys(shapes),
        }


@pytest.mark.parametrize(
    "part, key, stages",
    [
        ("text_encoder", "encoder.final_layer_norm.weight", ["encoder's context", "DiT's estimate"]),
        ("qformer", "layernorm.weight", ["encoder's context", "DiT's estimate"]),
        ("transformer", "proj_out.bias", ["DiT's estimate"]),
        ("vae", "decoder.conv_out.bias", ["VAE's decoding"]),
    ],
)
def test_a_weight_that_is_off_is_found_in_its_stage_and_what_follows(pipeline, known, part, key, stages):
    parameter = dict(getattr(pipeline, part).named_parameters())[key]
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(0.5 * kept.abs().mean() + 0.02)
        try:
            found = {"parts": known["parts"], "stages": fingerprint.stages_of(pipeline)}
        finally:
            parameter.copy_(kept)
    lines = fingerprint.differences(found, known, "float32")
    assert [line.split(":")[0] for line in lines] == stages


def test_differences_are_named(known):
    found = copy.deepcopy(known)
    assert fingerprint.differences(found, known, "float32") == []
    found["parts"]["vae"]["keys"] = "0" * 16
    found["parts"]["qformer"]["files"]["model.safetensors"] = "1" * 64
    found["stages"]["encoder's context"]["shape"] = [1]
    found["stages"]["VAE's decoding"]["values"][3] = float("nan")
    found["stages"]["DiT's estimate"]["mean"] += 0.01 * known["stages"]["DiT's estimate"]["std"]
    lines = fingerprint.differences(found, known, "float32")
    assert [line.split(" is")[0].split(" are")[0].split(", ")[0] for line in lines] == [
        "qformer/model.safetensors: SHA-256",
        "vae: keys",
        "encoder's context: shape [1]",
        "DiT's estimate: 1 of 10 numbers",
        "VAE's decoding: 1 of 10 numbers",
    ]
    assert not any("DiT's" in line for line in fingerprint.differences(found, known, "bfloat16"))


def test_a_model_that_nobody_knows(tmp_path, tiny_model):
    done = run_here("tools/verify_release.py", "model", tiny_model, "--output", tmp_path / "out", "--device", "cpu")
    assert done.returncode == 3 and "no known model has these keys" in done.stdout
    shutil.copytree(REFERENCES, tmp_path / "known")
    found = json.loads((tmp_path / "out" / "model.json").read_text())
    tiny = {"model": "tiny", "parts": found["parts"], "stages": {}}
    (tmp_path / "known" / "a.json").write_text(json.dumps(tiny))
    done = run_here("tools/verify_release.py", "model", tiny_model, "--output", tmp_path / "out", "--device", "cpu",
                    "--against", tmp_path / "known")  # fmt: skip
    assert done.returncode == 0 and "tiny: 0 differences" in done.stdout and "no values to compare with" in done.stdout
