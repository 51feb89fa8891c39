"""The second world: four hands' drawings, two kinds of unseen, several shapes; and the first stays as it was."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from mige.cli import make_world
from mige.data.parsing import read_records
from mige.data.randomness import Dropout
from mige.data.synthetic import styles, tasks
from mige.data.synthetic.backgrounds import VARIANT
from mige.data.synthetic.scenes import Placed, Scene, Scenes, draw
from mige.data.synthetic.stream import WorldDataset, collate_world
from mige.data.synthetic.world import FIRST, SECOND, SQUARE, frame
from mige.utils import images

FOLDER = Path(styles.__file__).parent / "drawings"
SPLIT = SECOND.splits()
SEEN = SPLIT["seen"]
MIDDLE = np.full(VARIANT, 0.5, dtype=np.float32)


def case(kind: str, seed: int, subjects=SEEN, shape=SECOND.shapes[0], augment=False) -> tasks.Case:
    rng = np.random.default_rng([seed, list(tasks.KINDS).index(kind)])
    return tasks.make(kind, rng, subjects, augment=augment, world=SECOND, frame=frame(*shape))


def image(*scenes: Scene, side=None) -> torch.Tensor:
    return draw(Scenes.stack(scenes), side=side, world=SECOND)


# ---- the drawings ----------------------------------------------------------------------------------------------------


def test_the_archives_hold_what_the_list_names_and_say_whose_it_is():
    names = [name for _, name in styles.subject_list()]
    assert len(names) == len(set(names)) == len({code for code, _ in styles.subject_list()}) == 726
    by_style = {style: [n for n, s in styles.drawings() if s == style] for style in styles.STYLES}
    assert {style: len(there) for style, there in by_style.items()} == {
        "fluent": 726,
        "noto": 698,
        "twemoji": 726,
        "openmoji": 723,
    }
    assert all(sum(name in set(there) for there in by_style.values()) >= 3 for name in names)
    archives = [FOLDER / f"{style}.zip" for style in styles.STYLES]
    assert sum(file.stat().st_size for file in archives) < 12e6
    licences = (FOLDER / "LICENCES.md").read_text(encoding="utf-8")
    assert all(f"`{file.name}`" in licences for file in archives)


def test_a_drawing_is_the_same_at_every_level():
    for number in (SEEN[0], SPLIT["unseen_names"][0], SPLIT["unseen_drawings"][-1]):
        small, middle, large = (styles.sample(level, torch.tensor([number]))[0] for level in range(3))
        assert [one.shape for one in (small, middle, large)] == [(4, 48, 48), (4, 96, 96), (4, 192, 192)]
        for one in (small, middle):
            expected = torch.nn.functional.adaptive_avg_pool2d(large, one.shape[1:])
            torch.testing.assert_close(one, expected, rtol=0, atol=2.1 / 255)
        assert (large[:3] <= large[3:] + 1 / 255).all()  # colours times alpha
        solid = large[3] > 0.5
        rows, columns = solid.any(1).nonzero(), solid.any(0).nonzero()
        spans = [int(there.max() - there.min()) + 1 for there in (rows, columns)]
        assert 160 <= max(spans) <= 178


def test_names_and_drawings_are_held_out():
    """All styles of 80 names; one style, never the first, of 160 others; nothing is in two splits."""
    by_split = {half: {styles.drawings()[n] for n in numbers} for half, numbers in SPLIT.items()}
    assert list(SPLIT) == ["seen", "unseen_names", "unseen_drawings"]
    assert sorted(n for numbers in SPLIT.values() for n in numbers) == list(range(len(styles.drawings())))
    names = {half: {name for name, _ in there} for half, there in by_split.items()}
    assert len(names["unseen_names"]) == 80 and not names["unseen_names"] & (names["seen"] | names["unseen_drawings"])
    assert len(by_split["unseen_drawings"]) == len(names["unseen_drawings"]) == 160
    assert names["unseen_drawings"] <= names["seen"]
    assert {style for _, style in by_split["unseen_drawings"]} == set(styles.STYLES[1:])
    assert {styles.drawings()[n] for n in SECOND.named()} == {(name, "fluent") for name in names["seen"]}


# ---- scenes ----------------------------------------------------------------------------------------------------------


def test_an_image_does_not_depend_on_its_neighbours():
    scenes = [case(kind, 0, augment=True).target for kind in list(tasks.KINDS)[::3]]
    together = image(*scenes)
    assert together.shape == (len(scenes), 3, 256, 256) and together.abs().max() <= 1
    for scene, drawn in zip(scenes, together, strict=True):
        torch.testing.assert_close(image(scene)[0], drawn, rtol=0, atol=1e-5)


def test_every_kind_of_background_is_its_own_and_fills_every_shape():
    variants = torch.from_numpy(np.random.default_rng(0).random((4, VARIANT), dtype=np.float32))
    drawn = [SECOND.draw(kind, variants, 48, 48) for kind in range(len(SECOND.phrases))]
    assert len(set(SECOND.phrases)) == len(drawn) == 28
    for kind, these in enumerate(drawn):
        assert these.min() >= 0 and these.max() <= 1
        assert (these[0] - these[1]).abs().mean() > 1e-3, SECOND.phrases[kind]
        others = [(these.mean(0) - other.mean(0)).abs().mean() for i, other in enumerate(drawn) if i != kind]
        assert min(others) > 0.01, SECOND.phrases[kind]
        for height, width in ((42, 54), (84, 48)):
            assert SECOND.draw(kind, variants[:1], height, width).shape == (1, 3, height, width)


@pytest.mark.parametrize("shape", SECOND.shapes)
def test_a_subject_stands_where_it_is_placed_whatever_the_shape(shape):
    height, width = shape
    wide, high = frame(height, width)
    assert min(wide, high) == 128 and height * width / 256 in (252, 256)
    empty = Scene(SECOND.white, MIDDLE)
    number = next(n for n in SEEN if styles.drawings()[n] == ("basketball", "twemoji"))
    after = image(empty.with_(Placed(number, 0.25 * wide, 0.7 * high, 40)), side=shape)[0]
    changed = after.amax(0) - after.amin(0) > 0.4  # the ball is orange, its shadow grey
    rows, columns = changed.nonzero().T
    unit = min(shape) / 128
    assert abs(rows.float().mean() - 0.7 * height) < 3 and abs(columns.float().mean() - 0.25 * width) < 3
    for along in (rows, columns):
        assert 40 * unit * 0.85 < along.max() - along.min() + 1 < 40 * unit * 0.95  # round in every shape


def test_shadows_darken_the_ground_at_the_foot_and_the_wall_behind():
    number = next(n for n in SEEN if styles.drawings()[n] == ("basketball", "twemoji"))
    for kind, reach in ((SECOND.grey, 0.25), (SECOND.phrases.index("on a striped background"), 0.12)):
        ground = Scene(kind, MIDDLE)
        before, after = image(ground, ground.with_(Placed(number, 64, 64, 50)))
        below = slice(128 + 50, 128 + 50 + int(100 * reach))
        assert (after <= before + 1e-6)[:, below].all()
        assert (before - after)[:, below, 118:158].max() > 0.1, SECOND.phrases[kind]
        assert torch.equal(before[:, :70], after[:, :70]) and torch.equal(before[:, 215:], after[:, 215:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_draws_what_a_cpu_draws():
    scenes = [case(kind, 1, augment=True).target for kind in tasks.KINDS]
    scenes += [Scene(kind, MIDDLE) for kind in range(len(SECOND.phrases))]
    there = draw(Scenes.stack(scenes), "cuda", world=SECOND).cpu()
    apart = (there - image(*scenes)).abs()
    assert apart.mean(dim=(1, 2, 3)).max() < 1e-3  # a few pixels lie on an edge that rounding decides
    assert (apart > 0.02).float().mean() < 1e-3


# ---- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_an_edit_changes_its_subjects_only_and_every_place_is_inside(kind):
    """But for the places of what is new, gone or changed, and shadows, target and source are equal."""
    for seed, shape in enumerate(SECOND.shapes[:3]):
        one = case(kind, seed, shape=shape, augment=seed == 1)
        wide, high = frame(*shape)
        for s in one.target.subjects:
            assert s.x - s.size / 4 >= 0 and s.x + s.size / 4 <= wide and 0 <= s.y - s.size / 4 <= high
        if one.source is None or kind == "background":
            continue
        source = one.references[one.source]
        before, after = image(source, one.target, side=shape)
        changed = [s for s in source.subjects if s not in one.target.subjects]
        changed += [s for s in one.target.subjects if s not in source.subjects]
        assert not torch.equal(before, after) and 1 <= len(changed) <= 2
        y, x = torch.meshgrid(*((torch.arange(n) + 0.5) * 128 / min(shape) for n in shape), indexing="ij")
        outside = torch.stack([(x - s.x).hypot(y - s.y) > 1.1 * s.size for s in changed]).all(0)
        torch.testing.assert_close(before[:, outside], after[:, outside], rtol=0, atol=1e-5)


def test_training_shows_seen_drawings_only_and_calls_only_seen_names():
    held_out, shown = {styles.names()[n] for n in SPLIT["unseen_names"]}, set()
    for seed in range(400):
        one = tasks.sample(np.random.default_rng(seed), SEEN, augment=True, world=SECOND)
        subjects = [s for scene in (one.target, *one.references) for s in scene.subjects]
        shown |= {s.sprite for s in subjects} | {s.other for s in subjects if s.other >= 0}
    assert shown <= set(SEEN)
    everything = sorted({name for _, name in styles.subject_list()}, key=len, reverse=True)
    for half in ("unseen_names", "unseen_drawings"):
        for seed in range(60):
            prompt = f" {case(list(tasks.KINDS)[seed % 16], seed, SPLIT[half]).prompt} "
            called = next((name for name in everything if f" {name} " in prompt), None)
            assert called not in held_out, prompt


def test_no_two_subjects_of_a_case_have_one_name():
    for seed in range(100):
        one = case(list(tasks.KINDS)[seed % 16], seed, augment=True)
        for scene in (one.target, *one.references):
            names = [styles.names()[s.sprite] for s in scene.subjects]
            assert len(names) == len(set(names))


def test_a_case_is_a_function_of_the_generator():
    for seed in range(8):
        one, again = (case(list(tasks.KINDS)[2 * seed], seed, augment=True) for _ in range(2))
        assert one.prompt == again.prompt
        assert torch.equal(image(one.target), image(again.target))


def test_the_first_world_is_what_it_was_before_there_was_a_second():
    """Instructions and scenes of 800 cases, to the last bit: what the shipped weights were trained on."""
    found = hashlib.sha256()
    for augmented in (False, True):
        for number in range(400):
            subjects = FIRST.splits()["unseen" if number % 2 else "seen"]
            one = tasks.sample(np.random.default_rng([5, number]), subjects, augment=augmented)
            scenes = Scenes.stack([one.target, *one.references])
            found.update(one.prompt.encode())
            for name in ("background", "variant", "sprite", "place", "colour", "other", "cut"):
                found.update(getattr(scenes, name).numpy().tobytes())
    assert frame(128, 128) == SQUARE
    assert found.hexdigest() == DIGEST


DIGEST = "0b77368979024ee0bca54daab1ad9b9dc1e358e48feffddc31f89175dc6ce76f"


# ---- the stream ------------------------------------------------------------------------------------------------------


def test_the_stream_has_a_shape_a_block_and_latents_to_fit(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model / "tokenizer")
    common = dict(seed=3, size=256, latent_shape=(4, 32, 32), vision_size=28, dropout=Dropout(), noise_levels=1)
    stream = WorldDataset(tasks.MIXTURE, tokenizer, world=SECOND, shapes=SECOND.shapes, block=2, **common)
    shapes = [stream.shape(index) for index in range(80)]
    assert shapes[::2] == shapes[1::2] and set(shapes) == set(SECOND.shapes)
    first = next(index for index in range(0, 80, 2) if shapes[index] == (192, 336))
    made = pickle.loads(pickle.dumps(collate_world([stream[first], stream[first + 1]])))  # as from a worker process
    assert len(pickle.dumps(made.world)) < 2000
    batch = made.to(torch.device("cpu"))
    assert batch.noise_BCHW.shape == (2, 4, 24, 42) and batch.pixels_PCHW.shape[1:] == (3, 192, 336)
    assert batch.vision_RCHW.shape[1:] == (3, 28, 28)
    one = stream.case(first)
    expected = image(one.target, *one.references, side=(192, 336))
    torch.testing.assert_close(batch.pixels_PCHW[: len(expected)], expected, rtol=0, atol=1e-5)
    other = next(index for index in range(0, 80, 2) if shapes[index] != (192, 336))
    with pytest.raises(ValueError, match=r"have one shape, got .*\(192, 336\)"):
        collate_world([stream[first], stream[other]])
    square = WorldDataset(tasks.MIXTURE, tokenizer, world=SECOND, **common)
    assert {square.shape(index) for index in range(80)} == {(256, 256)}


# ---- on disk ---------------------------------------------------------------------------------------------------------


def test_the_second_world_on_disk_is_what_the_stream_draws(tmp_path, capsys):
    given = ["--cases", "3", "--seed", "5", "--kinds", "flip", "add_by_reference", "--world", "second"]
    assert make_world.main([str(tmp_path / "world"), *given, "--unseen-drawings"]) == 0
    records = read_records([tmp_path / "world" / "records.jsonl"]).raise_if_errors()
    mixture = {kind: tasks.MIXTURE[kind] for kind in ("flip", "add_by_reference")}
    for number, record in enumerate(records):
        rng = np.random.default_rng([5, number])
        one = tasks.sample(rng, SPLIT["unseen_drawings"], mixture, world=SECOND)
        assert record.prompt == one.prompt
        drawn = image(one.target, *one.references)
        for path, expected in zip([record.target, *record.references], drawn, strict=True):
            assert (images.to_pixels(images.open_image(path)) - expected).abs().max() < 1.01 / 127.5
    with pytest.raises(SystemExit, match="2"):
        make_world.main([str(tmp_path / "other"), "--cases", "1", "--unseen-drawings"])
    assert "--unseen-drawings belongs to --world second" in capsys.readouterr().err
