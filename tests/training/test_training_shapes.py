"""Training on images of several shapes, one a micro-batch: the same samples however a step is split."""

import pytest
from processes import run_python
from test_trainer import ON_CPU, ROOT, build, command, metrics, torchrun

from mige import config
from mige.config import ConfigError
from mige.data.shapes import image_sizes
from mige.data.synthetic import stream
from mige.data.synthetic.world import SECOND
from mige.training.trainer import Trainer

GRIDS = "data.shapes=[[8, 8], [7, 9], [9, 7]]"
WORLD = (
    "data.sets=[]", "data.world_name=second", "data.size=128", "data.workers=0",
    "data.world={'one_reference': 1, 'recolour': 1, 'text_to_image': 1}",
)  # fmt: skip


@pytest.fixture
def batches(monkeypatch) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Ids and shape of the latents of every micro-batch that is trained on."""
    seen, loss = [], Trainer._loss

    def noted(self, batch):
        seen.append((batch.ids, tuple(batch.noise_BCHW.shape[2:])))
        assert batch.pixels_PCHW.shape[2:] == tuple(8 * side for side in seen[-1][1])
        return loss(self, batch)

    monkeypatch.setattr(Trainer, "_loss", noted)
    return seen


def by_id(batches) -> list[tuple[str, tuple[int, ...]]]:
    return [(one, shape) for ids, shape in batches for one in ids]


# ---- the drawn world -------------------------------------------------------------------------------------------------


def test_the_world_is_drawn_in_several_shapes_one_a_micro_batch(tiny_model, tmp_path, batches, monkeypatch):
    drawn, draw = [], stream.draw
    monkeypatch.setattr(
        stream, "draw", lambda scenes, device, shape, world: drawn.append(shape) or draw(scenes, device, shape, world)
    )
    steps = (*WORLD, GRIDS, "train.steps=8", "train.batch_size=2", "train.checkpoint_every=100")
    assert build(tiny_model, tmp_path / "a", *steps).run() == 0
    shapes = [shape for _, shape in batches]
    assert set(shapes) == {(16, 16), (14, 18), (18, 14)}
    assert drawn == [(8 * height, 8 * width) for height, width in shapes]  # once a micro-batch, at its shape
    assert len(metrics(tmp_path / "a")) == 8
    whole = by_id(batches)
    batches.clear()
    halves = ("train.batch_size=1", "train.gradient_accumulation_steps=2", "data.shape_block=2")
    assert build(tiny_model, tmp_path / "b", *steps, *halves).run() == 0
    assert by_id(batches) == whole and len(batches) == 16


@pytest.mark.processes
def test_two_processes_draw_what_one_draws(tiny_model, tmp_path, batches):
    """A block of two samples is a process's micro-batch; alone, two micro-batches of a step."""
    steps = (*WORLD, GRIDS, "train.steps=3", "train.batch_size=2", "train.checkpoint_every=100", "train.seed=4")
    alone = ("train.gradient_accumulation_steps=2", "data.shape_block=2")
    assert build(tiny_model, tmp_path / "one", *steps, *alone).run() == 0
    assert any(a[1] != b[1] for a, b in zip(batches[::2], batches[1::2], strict=True))  # two shapes in a step
    two = command(tiny_model, tmp_path / "two", *steps)
    done = run_python(*torchrun(2), *two, cwd=ROOT, env=ON_CPU)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_mini_2_trains_on_the_shapes_of_its_world():
    sizes = image_sizes(config.load(ROOT / "configs" / "mini2.py").data, 16)
    assert set(sizes) == set(SECOND.shapes) and {h * w // 256 for h, w in sizes} == {256, 252}


# ---- what does not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("data.shapes=[[8, 8], [7]]",), r"data.shapes\[1\] is \[7\], expected rows and columns of patches"),
        (("data.shapes=[[0, 8]]",), r"data.shapes\[0\] is \[0, 8\], expected rows and columns of patches"),
        (("data.shapes=[[8, 8], [8, 8]]",), r"data.shapes\[1\] is \[8, 8\], which is there already"),
        (("data.shapes=[[8, 8.5]]",), r"data.shapes\[0\]\[1\] is 8.5, expected a whole number"),
        (("data.shape_block=0",), "data.shape_block is 0, expected at least 1"),
        (
            ("data.shape_block=6", "train.batch_size=4"),
            "data.shape_block is 6, expected a multiple of train.batch_size, which is 4",
        ),
        (
            ("data.sets=[]", "data.world={'flip': 1}", GRIDS),
            "data.shapes is set, but the first world's images are square",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        config.load(ROOT / "configs" / "tiny.py", change)
