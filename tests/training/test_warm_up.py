"""Nothing is compiled after the warm-up, whatever lengths the prompts have and however many images there are."""

import json
import logging

import pytest
import torch
from conftest import ROOT
from test_trainer import build, metrics

from mige.inference.pipeline import MIGEPipeline
from mige.models.instruction import Instruction
from mige.training.warm_up import compiled_graphs

ALL = "train.compile=['transformer','text_encoder','image_encoder','qformer']"


@pytest.fixture
def graphs_alone(monkeypatch):
    """torch.compile without its slow half: graphs are captured and guarded as ever, and run as they are."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: compile_(self, backend="eager", **given))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def varied_records(folder, many: int):
    """Subjects of one to three images and prompts of 1 to 60 words."""
    images = sorted((ROOT / "example_data" / "images").glob("*.jpg"))[:3]
    rows = []
    for number in range(many):
        count, words = 1 + number % 3, " ".join(["cat"] * (1 + 7 * number % 60))
        rows.append({
            "id": str(number), "multi_prompt": "a" + "<imagehere>and" * count + " " + words,
            "entity_path": [str(path) for path in images[:count]], "image": str(images[0]),
        })  # fmt: skip
    (folder / "varied.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.sets=[{{'file': {str(folder / 'varied.jsonl')!r}, 'weight': 1.0, 'task': 'subject'}}]"


@pytest.mark.slow
def test_nothing_is_compiled_after_the_warm_up(tiny_model, tmp_path, graphs_alone, caplog):
    """50 batches of two samples; the warm-up takes a batch a width and leaves no trace: losses are as uncompiled."""
    caplog.set_level(logging.INFO, "mige")
    steps = ("train.steps=50", "train.checkpoint_every=50", "train.ema=None", varied_records(tmp_path, 37))
    assert build(tiny_model, tmp_path / "compiled", *steps, ALL).run() == 0
    warm = [line.split(":")[1].strip() for line in caplog.messages if "graphs compiled" in line]
    assert warm == ["width 128", "width 64", "width 64 without images"]
    lines = metrics(tmp_path / "compiled")
    assert len(lines) == 50 and {line["recompiles"] for line in lines} == {0}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 8  # and something was compiled
    assert build(tiny_model, tmp_path / "plain", *steps).run() == 0
    plain = metrics(tmp_path / "plain")
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in plain], rel=1e-3)
    assert "recompiles" not in plain[0]


def test_padding_to_a_width_changes_nothing(lively):
    """Masked positions are not read: contexts and gradients are those of the exact width."""
    model = MIGEPipeline.from_pretrained(lively).model.train()
    instructions, latents = [Instruction(((5, 6, 7), (8, 1)))] * 2, torch.randn(2, 4, 16, 16)
    inputs = (torch.randn(2, 4, 16, 16), torch.tensor([3.0, 700.0]), instructions, torch.randn(2, 3, 28, 28), latents)
    outputs, gradients = [], []
    for pad_to in (1, 64):
        model.encoder.pad_to = pad_to
        outputs.append(model(*inputs, torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))))
        model.zero_grad()
        outputs[-1].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert torch.allclose(*outputs, atol=1e-5) and gradients[0].keys() == gradients[1].keys()
    for name, exact in gradients[0].items():
        assert (exact - gradients[1][name]).norm() <= 1e-4 * exact.norm() + 1e-7, name


def test_parts_that_see_have_gradients_without_images(lively):
    """Zero ones, so that no process waits for another whose batch has images."""
    model = MIGEPipeline.from_pretrained(lively).model.train()
    model.freeze("full")
    empty = torch.zeros(0, 3, 28, 28), torch.zeros(0, 4, 16, 16)
    inputs = (torch.randn(1, 4, 16, 16), torch.tensor([3.0]), [Instruction(((5, 6, 1),))], *empty)
    model(*inputs, torch.zeros(1, 4, 16, 16)).square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None]
    assert not without and all(not p.grad.any() for name, p in trained.items() if "qformer" in name)
    assert trained["transformer.proj_out.weight"].grad.any()


def test_one_image_and_none_need_no_kernels_of_their_own(lively, graphs_alone):
    """Kernels for any number of images are for two and more: one is encoded twice, to the same tokens."""
    model = MIGEPipeline.from_pretrained(lively).model.train()
    model.compile_blocks(["qformer"])
    vision, patches = torch.randn(4, 3, 28, 28), torch.randn(4, 64, 64)
    four = model.encoder.encode_images(vision, patches)
    graphs = compiled_graphs()
    assert torch.allclose(model.encoder.encode_images(vision[:1], patches[:1]), four[:1], atol=1e-5)
    assert torch.allclose(model.encoder.encode_images(vision[:3], patches[:3]), four[:3], atol=1e-5)
    model.encoder([Instruction(((5, 1),))], vision[:0], patches[:0])
    assert compiled_graphs() == graphs > 0


@pytest.mark.parametrize(
    ("limit", "widths"), [(256, [128, 192, 256]), (160, [64, 128, 160]), (128, [64, 128]), (40, [40])]
)
def test_few_widths(lively, graphs_alone, limit, widths):
    """Of those that prompts can have."""
    model = MIGEPipeline.from_pretrained(lively).model
    model.encoder.fusion.register_to_config(max_tokens=limit)
    model.compile_blocks(["qformer"])
    assert model.encoder.widths == widths
    seen = {model.encoder._layout([Instruction(((5,) * many,))]).shape[2] for many in range(1, limit + 9)}
    assert sorted(seen) == widths
