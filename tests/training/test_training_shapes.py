"""Training on images of several shapes, one a micro-batch: the same samples however a step is split."""

import json
import logging
import shutil
from collections import Counter

import pytest
import torch
from conftest import run_here
from processes import run_python
from test_pair_crop import draw
from test_trainer import ON_CPU, ROOT, build, command, metrics, torchrun, weights
from test_warm_up import graphs_alone  # noqa: F401 - a fixture

from mige import config
from mige.config import ConfigError
from mige.data.latent_store.store import StoreError
from mige.data.records import BadRecordsError
from mige.data.shapes import image_sizes
from mige.data.synthetic import stream
from mige.data.synthetic.world import SECOND
from mige.training.errors import TrainingError
from mige.training.trainer import Trainer
from mige.utils.images import center_crop, open_image, to_pixels

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


# ---- records ---------------------------------------------------------------------------------------------------------

# width and height of source and target: squares, 9:7 lying and standing, a source of another shape than its target
IMAGES = [((96, 96), (96, 96)), ((144, 112), (144, 112)), ((56, 72), (112, 144)), ((130, 96), (96, 130)),
          ((150, 60), (150, 110)), ((64, 64), (128, 128)), ((99, 128), (99, 128))]  # fmt: skip
SHAPE_OF = [(128, 128), (112, 144), (144, 112), (144, 112), (112, 144), (128, 128), (144, 112)]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Seven edits whose images are as red as far to the right, and as green as far down."""
    folder, rows = tmp_path_factory.mktemp("shapes"), []
    for number, (source, target) in enumerate(IMAGES):
        draw(folder / f"s{number}.png", *source)
        draw(folder / f"t{number}.png", *target)
        names = {"source_path": [f"s{number}.png"], "image": f"t{number}.png", "entity_path": [f"s{number}.png"]}
        rows.append({"id": f"r{number}", "multi_prompt": "make<imagehere>blue"} | names)
    (folder / "records.json").write_text(json.dumps(rows))
    return folder / "records.json"


def on(records, *more: str, weight=1.0) -> tuple[str, ...]:
    sets = [{"file": str(records), "weight": weight}]
    return (f"data.sets={sets!r}", GRIDS, "data.size=128", "train.checkpoint_every=100", *more)


def losses(run) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(run)]


def test_records_are_shown_in_their_shapes_source_and_target_alike(tiny_model, records, tmp_path, monkeypatch):
    """Of every pair both show, at every pixel, one place of the whole image; three laps, blocks of three."""
    seen, loss = [], Trainer._loss
    monkeypatch.setattr(Trainer, "_loss", lambda self, batch: (seen.append(batch), loss(self, batch))[1])
    assert build(tiny_model, tmp_path / "run", *on(records, "train.steps=7", "train.batch_size=3")).run() == 0
    assert {batch.pixels_PCHW.shape[2:] for batch in seen} == set(SHAPE_OF)
    for batch in seen:
        for place, name in enumerate(batch.ids):
            number = int(name[1:])
            target, source = batch.pixels_PCHW[2 * place : 2 * place + 2]
            shape = SHAPE_OF[number]
            assert target.shape == (3, *shape)
            own = center_crop(open_image(records.parent / f"t{number}.png"), *shape)
            assert torch.equal(target, to_pixels(own))
            inner = (slice(None), slice(4, -4), slice(4, -4))
            assert (source - target)[inner].abs().max() < 5 / 127.5, name
    assert Counter(name for batch in seen for name in batch.ids) == {f"r{number}": 3 for number in range(len(IMAGES))}


@pytest.mark.parametrize("source", ["records", "world"])
def test_a_resumed_run_equals_one_that_never_stopped(tiny_model, records, tmp_path, source):
    steps = on(records) if source == "records" else (*WORLD, GRIDS)
    steps = (*steps, "train.batch_size=2", "train.checkpoint_every=3")
    assert build(tiny_model, tmp_path / "whole", *steps, "train.steps=6").run() == 0
    for until in (3, 6):
        assert build(tiny_model, tmp_path / "parts", *steps, f"train.steps={until}").run() == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 6
    one, other = (weights(tmp_path / name / "checkpoints" / "step-00000006") for name in ("whole", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_micro_batches_may_change_within_the_block_on_resume(tiny_model, records, tmp_path, batches):
    steps = on(records, "train.checkpoint_every=2")
    run, whole = tmp_path / "run", ("train.batch_size=2", "train.gradient_accumulation_steps=2")
    assert build(tiny_model, tmp_path / "whole", *steps, *whole, "train.steps=4").run() == 0
    expected = by_id(batches)
    batches.clear()
    assert build(tiny_model, run, *steps, *whole, "train.steps=2").run() == 0
    split = ("train.batch_size=1", "train.gradient_accumulation_steps=4", "train.steps=4")
    with pytest.raises(TrainingError, match=r"shape_block: 2 there, 1 now\. Set these back"):
        build(tiny_model, run, *steps, *split).run()
    assert build(tiny_model, run, *steps, *split, "data.shape_block=2").run() == 0
    assert by_id(batches) == expected
    for one, other in zip(losses(run), losses(tmp_path / "whole"), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.processes
def test_two_processes_train_on_what_one_does(tiny_model, records, tmp_path):
    steps = on(records, "train.steps=3", "train.batch_size=2")
    assert build(tiny_model, tmp_path / "one", *steps, "train.gradient_accumulation_steps=2").run() == 0
    done = run_python(*torchrun(2), *command(tiny_model, tmp_path / "two", *steps), cwd=ROOT, env=ON_CPU)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, other in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_other_shapes_and_other_images_are_not_resumed(tiny_model, records, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(records.parent, folder)
    steps = on(folder / "records.json", "train.steps=1")
    assert build(tiny_model, tmp_path / "run", *steps).run() == 0
    with pytest.raises(TrainingError, match=r"shapes: \[\[8, 8\], \[7, 9\], \[9, 7\]\] there, None now"):
        build(tiny_model, tmp_path / "run", *steps, "data.shapes=[]").run()
    draw(folder / "t0.png", 144, 112)  # another shape: other samples would follow
    with pytest.raises(TrainingError, match=r"set_0: .*'shapes': '\w+'} there, .*'shapes': '\w+'} now"):
        build(tiny_model, tmp_path / "run", *steps, "train.steps=2").run()


def test_a_run_of_before_there_were_shapes_is_resumed(tiny_model, records, tmp_path):
    steps = ("train.checkpoint_every=1",)
    assert build(tiny_model, tmp_path / "run", *steps, "train.steps=1").run() == 0
    [progress] = (tmp_path / "run" / "checkpoints").glob("*/progress.json")
    saved = json.loads(progress.read_text())
    for name in ("shapes", "shape_block"):
        assert saved["invariants"].pop(name) is None
    progress.write_text(json.dumps(saved))
    assert build(tiny_model, tmp_path / "run", *steps, "train.steps=2").run() == 0


@pytest.mark.parametrize("check", [True, False])
def test_a_target_that_is_no_image_is_named_before_the_first_step(
    tiny_model, records, tmp_path, check, caplog, monkeypatch
):
    """And without it the others have their shapes, however many are checked at a time."""
    monkeypatch.setattr("mige.training.data._CHUNK", 2)
    folder = tmp_path / "data"
    shutil.copytree(records.parent, folder)
    (folder / "t3.png").write_bytes(b"nothing")
    steps = on(folder / "records.json", f"data.check_images={check}")
    with pytest.raises(BadRecordsError, match=r"records.json, record 4 \(id r3\): .*t3.png: "):
        build(tiny_model, tmp_path / "run", *steps)
    trainer = build(tiny_model, tmp_path / "run", *steps, "data.skip_bad=True")
    assert len(trainer.dataset) == 6 and "record 4 (id r3)" in caplog.text
    shown = {(trainer.dataset.record(index).id, trainer.dataset.shape(index)) for index in range(60)}
    assert shown == {(f"r{number}", SHAPE_OF[number]) for number in (0, 1, 2, 4, 5, 6)}


# ---- the store -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes_config(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "shapes.py"
    file.write_text(f"_base_ = {str(ROOT / 'configs' / 'tiny.py')!r}\ndata = dict({GRIDS.removeprefix('data.')})\n")
    return file


def extract(model, records, store, *options):
    options = ("--output", store, "--workers", 0, "--device", "cpu", *options)
    return run_here("tools/extract_features.py", "--records", records, "--model", model, *options)


def test_training_from_the_stores_of_all_shapes_is_training_from_images(lively, records, shapes_config, tmp_path):
    """One shape a store; batches are as large as those of extraction here, so only the last bits may differ."""
    done = extract(lively, records, tmp_path / "store", "--config", shapes_config)
    assert done.returncode == 0, done.stderr
    for size, many in (("128x128", 4), ("112x144", 4), ("144x112", 6)):
        assert f"{tmp_path / 'store' / size}: {many} of {many} images, {many} in all" in done.stdout
    steps, store = on(records, "train.steps=4", "train.batch_size=2"), f"data.features={str(tmp_path / 'store')!r}"
    assert build(lively, tmp_path / "images", *steps).run() == 0
    assert build(lively, tmp_path / "stored", *steps, store).run() == 0
    for one, other in zip(losses(tmp_path / "images"), losses(tmp_path / "stored"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_store_of_other_shapes_is_refused(lively, records, shapes_config, tmp_path):
    assert extract(lively, records, tmp_path / "square").returncode == 0
    store = f"data.features={str(tmp_path / 'square')!r}"
    with pytest.raises(StoreError, match=r"square/128x128: no such folder; of 3 shapes .*extract_features.py --config"):
        build(lively, tmp_path / "run", *on(records), store)
    assert extract(lively, records, tmp_path / "store", "--config", shapes_config).returncode == 0
    (tmp_path / "store" / "112x144").rename(tmp_path / "store" / "lying")
    (tmp_path / "store" / "144x112").rename(tmp_path / "store" / "112x144")
    store = f"data.features={str(tmp_path / 'store')!r}"
    message = "112x144: made with other settings: height 144 there, 112 expected; width 112 there, 144 expected"
    with pytest.raises(StoreError, match=message):
        build(lively, tmp_path / "run", *on(records, "data.shapes=[[8, 8], [7, 9]]"), store)


def test_an_image_that_has_another_shape_now_is_missed_in_its_store(lively, records, shapes_config, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(records.parent, folder)
    assert extract(lively, folder / "records.json", tmp_path / "store", "--config", shapes_config).returncode == 0
    draw(folder / "t0.png", 144, 112)
    steps = on(folder / "records.json", "train.steps=1", f"data.features={str(tmp_path / 'store')!r}")
    with pytest.raises(TrainingError, match=r"2 of 6 images not in it, the first .*t0\.png of .*record 1 \(id r0\)"):
        build(lively, tmp_path / "run", *steps)
    trainer = build(lively, tmp_path / "run", *steps, "data.skip_bad=True")
    assert {trainer.dataset.record(index).id for index in range(60)} == {f"r{number}" for number in range(1, 7)}
    assert {trainer.dataset[index].moments.mean.shape[2:] for index in range(12)} == {(16, 16), (14, 18), (18, 14)}


def test_records_without_a_known_shape_are_listed(lively, records, shapes_config, tmp_path):
    rows = json.loads(records.read_text())
    del rows[2]["image"]
    rows[5]["image"] = "records.json"
    (records.parent / "odd.json").write_text(json.dumps(rows))
    done = extract(lively, records.parent / "odd.json", tmp_path / "store", "--config", shapes_config)
    assert done.returncode == 3
    listed = [json.loads(line)["where"] for line in (tmp_path / "store" / "failures.jsonl").read_text().splitlines()]
    assert [place.split(", ")[1] for place in listed] == ["record 3 (id r2)", "record 6 (id r5)"]
    done = extract(lively, records, tmp_path / "store", "--config", shapes_config, "--size", 128)
    assert done.returncode == 2 and "--size and --config both say how large images are" in done.stderr


# ---- compiled blocks -------------------------------------------------------------------------------------------------


def varied(folder) -> tuple[str, ...]:
    """Subjects of one to three images and prompts of 1 to 60 words, targets of all shapes."""
    rows = []
    for number in range(37):
        count, words = 1 + number % 3, " ".join(["cat"] * (1 + 7 * number % 60))
        references = [f"s{(number + place) % 7}.png" for place in range(count)]
        rows.append({
            "id": str(number), "multi_prompt": "a" + "<imagehere>and" * count + " " + words,
            "entity_path": references, "image": f"t{number % 7}.png",
        })  # fmt: skip
    (folder / "varied.json").write_text(json.dumps(rows))
    return on(folder / "varied.json")


@pytest.mark.slow
@pytest.mark.usefixtures("graphs_alone")
@pytest.mark.parametrize("source", ["records", "world"])
def test_nothing_is_compiled_after_the_warm_up_in_any_shape(tiny_model, records, tmp_path, caplog, batches, source):
    """30 steps of two samples, of the world with and without images; a batch a width and number of tokens warms up."""
    caplog.set_level(logging.INFO, "mige")
    shutil.copytree(records.parent, tmp_path / "data")
    settings = varied(tmp_path / "data") if source == "records" else (*WORLD, GRIDS, "train.checkpoint_every=100")
    parts = "train.compile=['transformer','text_encoder','image_encoder','qformer','vae']"
    many = ("train.steps=30", "train.ema=None", parts)
    assert build(tiny_model, tmp_path / "run", *settings, *many).run() == 0
    square, wide, tall = "128 x 128 px", "112 x 144 px", "144 x 112 px"
    warm = [line.split(": ")[1] for line in caplog.messages if "graphs compiled" in line]
    whole = ["width 128", "width 64", "width 64 without images"]
    assert warm == [f"{size}, {what}" for size in (square, wide) for what in whole] + [f"{tall}, width 128"]
    assert {shape for _, shape in batches[7:]} == {(16, 16), (14, 18), (18, 14)}
    lines = metrics(tmp_path / "run")
    assert len(lines) == 30 and {line["recompiles"] for line in lines} == {0}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 12  # and something was compiled


# ---- what does not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("data.shapes=[[8, 8], [7]]",), r"data.shapes\[1\] is \[7\], expected rows and columns of patches"),
        (("data.shapes=[[0, 8]]",), r"data.shapes\[0\] is \[0, 8\], expected rows and columns of patches"),
        (("data.shapes=[[8, 8], [8, 8]]",), r"data.shapes\[1\] is \[8, 8\], which is there already"),
        ((f"data.shapes={[[1, columns] for columns in range(1, 129)]}",), "has 128 shapes, expected at most 127"),
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
