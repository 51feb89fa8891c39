"""docs/tutorial.md, line by line: its commands with the tiny model, few steps and folders of the test."""

import re

import numpy as np
import pytest
from conftest import ROOT, image_size, shell_environment
from PIL import Image, ImageOps
from processes import run_program
from safetensors.torch import load_file

PAGE = (ROOT / "docs" / "tutorial.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S)


def photographs(folder, many=20):
    """Pairs: noise of low frequency, and the same in grey."""
    random = np.random.default_rng(0)
    for name in ("before", "after"):
        (folder / name).mkdir(parents=True)
    for number in range(1, many + 1):
        small = Image.fromarray(random.integers(0, 256, (4, 6, 3), dtype=np.uint8))
        photo = small.resize((192, 128), Image.Resampling.BICUBIC)
        photo.save(folder / "before" / f"{number:02}.jpg")
        ImageOps.grayscale(photo).convert("RGB").save(folder / "after" / f"{number:02}.jpg")


def small(block, folder, model):
    """The lines of a block, with this test's folders, the recipe over the tiny model, and two steps for 200."""
    block = block.replace("configs/lora_512.py", str(folder / "lora_tiny.py")).replace("step-00000200", "step-00000002")
    block = block.replace("output/pretrained_models/mige", str(model))
    block = re.sub(r"\b(mydata|output)/", rf"{folder}/\1/", block)
    if "train_mige.sh" in block:
        block = block.rstrip() + " train.steps=2 train.batch_size=2 train.checkpoint_every=2 data.workers=0\n"
    return block


@pytest.mark.processes
def test_every_command_runs_as_written(lively, tmp_path):
    photographs(tmp_path / "mydata")
    recipe = (ROOT / "configs" / "lora_512.py").read_text()
    assert '"mige_512.py"' in recipe
    recipe = recipe.replace('"mige_512.py"', repr(str(ROOT / "configs" / "tiny.py")))
    (tmp_path / "lora_tiny.py").write_text(recipe.replace('"output/pretrained_models/mige"', repr(str(lively))))
    said = []
    for block in BLOCKS:
        done = run_program("sh", "-ec", small(block, tmp_path, lively), cwd=ROOT, env=shell_environment())
        assert done.returncode == 0, (block, done.stderr)
        said.append(done.stdout)
    assert len(BLOCKS) == 5 and "20" in said[1]
    assert len((tmp_path / "mydata" / "records.jsonl").read_text().splitlines()) == 20
    [adapter] = (tmp_path / "output").rglob("adapter_model.safetensors")
    assert any(value.any() for name, value in load_file(adapter).items() if "lora_B" in name)
    [image] = (tmp_path / "output" / "pencil" / "images").iterdir()
    assert image_size(image) == (144, 96)  # the source's 3:2
