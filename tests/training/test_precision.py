"""What `train.precision: auto` stands for: by the smallest card, written down, ruling on resume."""

import json
import re

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from conftest import ROOT
from safetensors.torch import load_file
from test_trainer import build

from mige import config
from mige.config import ConfigError
from mige.training import precision
from mige.training.precision import GIB, Sizes, choose, needed_bytes

STEPS = ("train.steps=2", "train.checkpoint_every=1")
FULL, FROZEN = 5_488_000_000, 986_000_000  # of the released model, trained and not


def card(monkeypatch, size: float) -> None:
    monkeypatch.setattr(precision, "card_memory", lambda state: int(size))


def settings(*more: str, file: str = "mige_512.py"):
    return config.load(ROOT / "configs" / file, more).train


@pytest.mark.parametrize(
    ("gib", "more", "chosen"),
    [
        (79.2, (), "bfloat16"),
        (139.8, (), "mixed"),
        (139.8, ("train.ema=0.999",), "bfloat16"),  # the average takes 20 GiB more
        (23.6, ("train.trainable=lora",), "bfloat16"),
        (79.2, ("train.optimizer=adamw_8bit",), "mixed"),  # has no other
        (None, (), "float32"),
    ],
)
def test_the_smallest_card_chooses(gib, more, chosen):
    sizes = Sizes(FULL, FROZEN)
    assert choose(settings(*more), sizes, gib and int(gib * GIB), "none") == chosen


def test_the_released_model_is_counted():
    """As docs/training.md has it, without building it."""
    whole = config.load(ROOT / "configs" / "mige_512.py")
    sizes = precision.count_parameters(whole)
    assert sizes.trained == pytest.approx(5.49e9, rel=0.002) and 0.9e9 < sizes.frozen < 1.1e9
    assert needed_bytes(whole.train, sizes, "bfloat16") == 8 * sizes.trained + 2 * sizes.frozen


def test_a_run_is_trained_as_chosen_and_resumed_so_on_a_larger_card(tiny_model, tmp_path, monkeypatch, capsys):
    run, trained = tmp_path / "run", 307_872
    card(monkeypatch, 12 * trained)  # too small for 18 bytes a parameter, large enough for 8
    compiled = "train.compile=[]"  # as on a CPU
    assert build(tiny_model, run, "train.steps=1", compiled).run() == 0
    said = re.search(r"precision bfloat16 \(for cards of 0 GiB; train.precision overrides\), one process on 1 x cpu",
                     capsys.readouterr().err)  # fmt: skip
    assert said and json.loads((run / "config.json").read_text())["train"]["precision"] == "bfloat16"
    saved = json.loads((run / "checkpoints" / "step-00000001" / "progress.json").read_text())["invariants"]
    assert (saved["param_dtype"], saved["mixed_precision"], saved["optimizer"]) == ("bfloat16", "no", "adamw_bf16")
    weights = load_file(run / "checkpoints/step-00000001/model/transformer/diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}

    card(monkeypatch, 80 * GIB)
    trainer = build(tiny_model, run, *STEPS, compiled)
    assert trainer.run() == 0 and trainer.config.train.precision == "bfloat16"
    assert "precision bfloat16 (as the checkpoint)" in capsys.readouterr().err
    other = tmp_path / "other"
    assert build(tiny_model, other, *STEPS, compiled).config.train.precision == "mixed"


def test_an_older_checkpoint_that_is_named_rules(tiny_model, tmp_path):
    build(tiny_model, tmp_path / "mixed", *STEPS, "train.precision=mixed").run()
    first = tmp_path / "mixed" / "checkpoints" / "step-00000001"
    AcceleratorState._reset_state(reset_partial_state=True)
    again = build(tiny_model, tmp_path / "other", *STEPS, resume=first)
    assert again.config.train.precision == "mixed" and again.run(first) == 0


def test_what_does_not_fit_is_an_error_that_names_the_override(tiny_model, tmp_path, monkeypatch):
    card(monkeypatch, 2_000_000)  # 8 bytes of 307,872 parameters are more
    with pytest.raises(ConfigError, match=r"'bfloat16' .* take 0.00.* GiB a card, and the .*lora or LAUNCH"):
        build(tiny_model, tmp_path / "run")
    card(monkeypatch, 4_000_000)
    with pytest.raises(ConfigError, match=r"'mixed' .* set train.precision=bfloat16 or train.trainable=lora or LAUNCH"):
        build(tiny_model, tmp_path / "run", "train.precision=mixed")
    assert not (tmp_path / "run").exists()


def test_blocks_are_compiled_on_cards_alone(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    tiny, state = config.load(ROOT / "configs" / "tiny.py"), PartialState(cpu=True)
    assert precision.resolve(tiny, None, state, "none")[0].train.compile == []
    card(monkeypatch, 80 * GIB)
    assert precision.resolve(tiny, None, state, "none")[0].train.compile == list(precision.BLOCKS)
