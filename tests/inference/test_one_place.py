"""Facts that stand in one place: the rule of markers, and the grid of sizes."""

import itertools
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer

from mige.data.parsing import make_record
from mige.inference.inputs import instruct
from mige.inference.pipeline import MIGEPipeline
from mige.inference.samples import Sample
from mige.inference.sizes import SizeGrid
from mige.tasks import Task, can_pair, is_rewritten


@pytest.fixture(scope="module")
def tokenizer(lively):
    return AutoTokenizer.from_pretrained(lively / "tokenizer")


@pytest.mark.parametrize("markers, references", list(itertools.product(range(4), range(1, 4))))
@pytest.mark.parametrize("has_source", [False, True])
def test_reading_and_running_take_the_same_markers(tokenizer, markers, references, has_source):
    """What reading records takes, running takes, and what it refuses, running refuses; so does the rule itself."""
    prompt = "make this photo like the image" + " <imageHERE> and" * markers
    paths = [f"{n}.png" for n in range(references)]
    row = {"multi_prompt": prompt, "entity_path": paths, "source_path": paths[:1] * has_source}
    record, _ = make_record(row, where="here", root=Path(), default_id="a")
    task = Task.SUBJECT if not has_source else Task.EDIT if references == 1 else Task.SUBJECT_EDIT
    images = tuple(Image.new("RGB", (8, 8)) for _ in paths)
    sample = Sample(task, prompt, images, images[0] if has_source else None)
    wanted = markers == references or (task is Task.EDIT and markers == 0)
    assert (record is not None) == wanted
    if wanted:  # the words of an edit without markers mention its image twice
        assert instruct(sample, tokenizer).num_images == (2 if markers == 0 else references)
    else:
        with pytest.raises(ValueError, match="write one for each reference"):
            instruct(sample, tokenizer)


def test_the_rule_of_markers():
    assert is_rewritten(Task.EDIT, "make it red") and not is_rewritten(Task.EDIT, "make <IMAGEHERE> red")
    assert not is_rewritten(Task.SUBJECT, "a cat")
    assert can_pair(Task.EDIT, "the photo like the image", 2, 1)
    assert not can_pair(Task.EDIT, "<imagehere><imagehere>", 2, 1)
    assert not can_pair(Task.EDIT, "the photo", 0, 1)  # cut off by the words before it
    assert not can_pair(Task.SUBJECT, "a", 1, 0) and not can_pair(Task.SUBJECT_EDIT, "a<imagehere>", 1, 2)


def test_a_folder_and_its_pipeline_have_one_grid(lively):
    pipe, grid = MIGEPipeline.from_pretrained(lively), SizeGrid.of_folder(lively)
    assert pipe.sizes == grid == SizeGrid(channels=4, cell=8, patch=2, native=128) and grid.step == 16
    assert grid.resolve(None, 64) == pipe.output_size(None, 64) == (128, 64)
    assert grid.latent_shape(96, 160) == pipe.latent_shape(96, 160) == (4, 12, 20)
    assert grid.reference_shape(Task.EDIT, 96, 160) == (4, 12, 20)
    assert (
        grid.reference_shape(Task.SUBJECT, 96, 160) == grid.reference_shape(Task.SUBJECT_EDIT, 96, 160) == (4, 16, 16)
    )
    for sides in ((100, 128), (128, 8), (0, 16), (-16, 16), (None, 15)):
        with pytest.raises(ValueError, match="height and width must be multiples of 16 px"):
            grid.resolve(*sides)
