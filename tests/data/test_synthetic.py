"""The miniature world: one right answer to every instruction, the same for the same seed."""

import subprocess
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_here
from transformers import AutoTokenizer

from mige.data.parsing import read_records
from mige.data.randomness import Dropout
from mige.data.synthetic import author, backgrounds, sprites, tasks
from mige.data.synthetic.scenes import SIDE, SWAPS, Placed, Scene, Scenes, draw
from mige.data.synthetic.stream import WorldBatch, WorldDataset, collate_world
from mige.tasks import PLACEHOLDER, Task
from mige.utils import images

ROOT = Path(__file__).parents[2]
SEEN, UNSEEN = sprites.split()
VARIANT = np.full(backgrounds.VARIANT, 0.5, dtype=np.float32)


def case(kind: str, seed: int, subjects=SEEN) -> tasks.Case:
    return tasks.make(kind, np.random.default_rng([seed, list(tasks.KINDS).index(kind)]), subjects)


def render(*scenes: Scene, side: int = SIDE) -> torch.Tensor:
    return draw(Scenes.stack(scenes), side=side)


def numbers(of: tasks.Case) -> set[int]:
    """Every subject the case shows."""
    shown = [s for scene in (of.target, *of.references) for s in scene.subjects]
    return {s.sprite for s in shown} | {s.other for s in shown if s.other >= 0}


# ---- drawing ---------------------------------------------------------------------------------------------------------


def test_an_image_does_not_depend_on_its_neighbours():
    scenes = [case(kind, 0).target for kind in tasks.KINDS]
    together = render(*scenes)
    assert together.shape == (len(scenes), 3, SIDE, SIDE) and together.abs().max() <= 1
    for scene, drawn in zip(scenes, together, strict=True):
        torch.testing.assert_close(render(scene)[0], drawn, rtol=0, atol=1e-5)


def test_every_kind_of_background_is_its_own_and_has_variants():
    flat = [backgrounds.draw(kind, torch.rand(8, backgrounds.VARIANT), 32) for kind in range(backgrounds.KINDS)]
    assert len(backgrounds.PHRASES) == len(set(backgrounds.PHRASES)) == backgrounds.KINDS == 24
    for kind, drawn in enumerate(flat):
        assert drawn.min() >= 0 and drawn.max() <= 1
        assert (drawn[0] - drawn[1]).abs().mean() > 1e-3, backgrounds.PHRASES[kind]
        others = [(drawn.mean(0) - other.mean(0)).abs().mean() for i, other in enumerate(flat) if i != kind]
        assert min(others) > 0.01, backgrounds.PHRASES[kind]


def test_a_subject_stands_where_it_is_placed():
    empty = render(Scene(22, VARIANT))
    for x, y in ((30, 40), (100, 90)):
        changed = (render(Scene(22, VARIANT, (Placed(SEEN[0], x, y, 40),))) - empty).abs().amax(1)[0] > 0.02
        rows, columns = changed.nonzero().T
        assert abs(rows.float().mean() - y) < 6 and abs(columns.float().mean() - x) < 6
        assert y - 20.5 <= rows.min() and rows.max() <= y + 20.5
        assert x - 20.5 <= columns.min() and columns.max() <= x + 20.5


def test_mirrored_and_recoloured_subjects():
    asymmetric = next(n for n in SEEN if sprites.is_asymmetric()[n])
    plain, mirrored, swapped = (
        render(Scene(22, VARIANT, (Placed(asymmetric, 64, 64, 70, **how),)))
        for how in ({}, {"flip": True}, {"colour": SWAPS[3]})
    )
    assert (plain - mirrored).abs().mean() > 0.02
    torch.testing.assert_close(plain.flip(3), mirrored, rtol=0, atol=0.05)
    ground = render(Scene(22, VARIANT))
    inside = (plain - ground).abs().amax(1, keepdim=True) > 0.1
    expected = torch.einsum("oc,nchw->nohw", torch.from_numpy(SWAPS[3]), (plain + 1) / 2) * 2 - 1
    solid = inside.expand(-1, 3, -1, -1)
    assert (swapped - expected)[solid].abs().mean() < 0.05 < (plain - swapped).abs()[solid].max()


def test_later_subjects_stand_in_front():
    a, b = (Placed(number, 64, 64, 60) for number in SEEN[:2])
    ground = Scene(22, VARIANT)
    front = render(ground.with_(a, b), ground.with_(b, a), ground.with_(b))
    solid = sprites.sheets(torch.device("cpu"))[1][SEEN[1], 3].mean() > 0.1
    assert solid and (front[0] - front[1]).abs().max() > 0.1
    assert (front[0] - front[2]).abs().mean() < (front[1] - front[2]).abs().mean()


# ---- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_a_case_is_a_sound_question(kind):
    for seed in range(30):
        one, again = case(kind, seed), case(kind, seed)
        assert one.kind == kind and one.prompt == again.prompt
        assert torch.equal(render(one.target, *one.references), render(again.target, *again.references))
        assert one.prompt.count(PLACEHOLDER) == len(one.references)
        task = {0: Task.SUBJECT} if one.source is None else {1: Task.EDIT, 2: Task.SUBJECT_EDIT}
        assert one.task is (Task.SUBJECT if one.source is None else task[len(one.references)])
        for s in one.target.subjects:
            assert s.x - s.size / 4 >= 0 and s.x + s.size / 4 <= SIDE and s.y - s.size / 4 >= 0
    assert len({case(kind, seed).prompt for seed in range(30)}) > 5


@pytest.mark.parametrize("kind", [kind for kind in tasks.KINDS if case(kind, 0).source is not None])
def test_an_edit_changes_its_subjects_only(kind):
    """Outside the places of what is new, gone or changed, target and source are equal to the last bit."""
    for seed in range(10):
        one = case(kind, seed)
        source = one.references[one.source]
        before, after = render(source, one.target)
        assert not torch.equal(before, after)
        if kind == "background":
            assert source.background != one.target.background
            assert {s.sprite for s in source.subjects} == {s.sprite for s in one.target.subjects}
            continue
        assert source.background == one.target.background
        changed = [s for s in source.subjects if s not in one.target.subjects]
        changed += [s for s in one.target.subjects if s not in source.subjects]
        assert 1 <= len(changed) <= 2
        y, x = torch.meshgrid(*[torch.arange(float(SIDE))] * 2, indexing="ij")
        outside = torch.stack([(x - s.x).hypot(y - s.y) > 0.75 * s.size for s in changed]).all(0)
        assert torch.equal(before[:, outside], after[:, outside])


@pytest.mark.parametrize("kind", [kind for kind in tasks.KINDS if "reference" in kind])
def test_what_a_reference_shows_is_in_the_answer(kind):
    for seed in range(10):
        one = case(kind, seed, UNSEEN)
        shown = [{s.sprite for s in r.subjects} for i, r in enumerate(one.references) if i != one.source]
        asked = {s.sprite for s in one.asked}
        assert asked and asked <= {s.sprite for s in one.target.subjects}
        assert all(len(subjects & asked) == 1 for subjects in shown)


@pytest.mark.parametrize("kind", ["one_reference", "two_references", "add_by_reference", "replace_by_reference"])
def test_training_augments_subjects_that_stand_alike_in_reference_and_answer(kind):
    made = [tasks.make(kind, np.random.default_rng(seed), SEEN, augment=True) for seed in range(200)]
    plain = [tasks.make(kind, np.random.default_rng(seed), SEEN) for seed in range(200)]
    asked = [s for one in made for s in one.asked]
    for one in made:
        shown = [s for i, r in enumerate(one.references) if i != one.source for s in r.subjects]
        for a, b in zip(shown, one.asked, strict=True):
            assert (a.sprite, a.other, a.cut, a.angle, a.flip) == (b.sprite, b.other, b.cut, b.angle, b.flip)
            assert np.array_equal(a.colour, b.colour) and a.sprite != a.other
    joined = sum(s.other >= 0 for s in asked) / len(asked)
    turned = sum(abs(s.angle) > 12 for s in asked) / len(asked)
    assert joined == pytest.approx(author.AUGMENTED * 2 / 3, abs=0.1)
    assert turned == pytest.approx(author.AUGMENTED * 3 / 4, abs=0.1)
    for one in plain:  # the benchmark's way
        assert all(s.other < 0 and abs(s.angle) <= 12 for s in one.asked)


@pytest.mark.parametrize("kind", ["move", "scale", "flip", "recolour", "replace", "remove", "add_relative"])
def test_training_augments_what_is_edited_and_calls_it_by_its_place(kind):
    made = [tasks.make(kind, np.random.default_rng(seed), SEEN, augment=True) for seed in range(200)]
    standing = [s for one in made for s in one.references[0].subjects]
    assert sum(s.other >= 0 for s in standing) / len(standing) == pytest.approx(author.AUGMENTED_THERE * 2 / 3, abs=0.1)
    for one in made:
        first = one.references[0].subjects[0]
        if first.other >= 0 or abs(first.angle) > 45:
            assert "object" in one.prompt or "thing" in one.prompt, one.prompt
    plain = [tasks.make(kind, np.random.default_rng(seed), SEEN) for seed in range(50)]  # the benchmark's way
    assert all(s.other < 0 and abs(s.angle) <= 12 for one in plain for s in one.references[0].subjects)


def test_unseen_subjects_stay_unseen():
    assert len(UNSEEN) == 90 and not set(SEEN) & set(UNSEEN)
    assert set(SEEN) | set(UNSEEN) == set(range(len(sprites.names())))
    held_out, shown = {sprites.names()[n] for n in UNSEEN}, set()
    for seed in range(1500):
        one = tasks.sample(np.random.default_rng(seed), SEEN, augment=seed % 2 == 0)
        shown |= numbers(one)
    assert shown <= set(SEEN) and len(shown) > 0.9 * len(SEEN)
    for kind in tasks.KINDS:
        for seed in range(20):
            prompt = f" {case(kind, seed, UNSEEN).prompt} "
            names = [name for name in sprites.names() if f" {name} " in prompt]
            assert not names or max(names, key=len) not in held_out, prompt  # no word that training did not teach


def test_two_drawings_are_joined_along_the_line():
    def alone(number: int, size: float, **how) -> torch.Tensor:
        return render(Scene(22, VARIANT, (Placed(number, 64, 64, size, **how),)))[0]

    first, second = SEEN[:2]
    for size in (48, 100):  # of the small sheet and of the large one
        a, b = alone(first, size), alone(second, size)
        right = alone(first, size, other=second)  # everything right of the middle is the second's
        assert torch.equal(right[:, :, :62], a[:, :, :62]) and torch.equal(right[:, :, 66:], b[:, :, 66:])
        below = alone(first, size, other=second, cut=(90.0, 0.0))
        assert torch.equal(below[:, :62], a[:, :62]) and torch.equal(below[:, 66:], b[:, 66:])
        assert torch.equal(alone(first, size, other=second, cut=(30.0, 2.0)), a)  # a line that misses the drawing
        assert torch.equal(alone(first, size, other=second, cut=(30.0, -2.0)), b)
        mirrored = alone(first, size, other=second, flip=True)
        assert torch.allclose(mirrored.flip(2)[:, :, 66:], b[:, :, 66:], atol=1e-4)  # the line turns with the subject
    beside = Placed(SEEN[2], 20, 64, 30)  # a subject without a second drawing in the same slot of another image
    both = render(Scene(22, VARIANT, (Placed(first, 64, 64, 48, other=second),)), Scene(22, VARIANT, (beside,)))
    assert torch.equal(both[1], render(Scene(22, VARIANT, (beside,)))[0])


# ---- on disk ---------------------------------------------------------------------------------------------------------


def make_world(*arguments: str) -> subprocess.CompletedProcess:
    return run_here("tools/make_world.py", *arguments)


@pytest.mark.parametrize("unseen", [False, True])
def test_cases_on_disk_are_records_with_the_drawn_images(tmp_path, unseen):
    done = make_world(str(tmp_path / "world"), "--cases", "70", "--seed", "5", *["--unseen"] * unseen)
    assert done.returncode == 0, done.stderr
    records = read_records([tmp_path / "world" / "records.jsonl"]).raise_if_errors()
    assert len(records) == 70 and len(list((tmp_path / "world" / "images").iterdir())) == 70 + sum(
        len(record.references) for record in records
    )
    mixture = {kind: weight for kind, weight in tasks.MIXTURE.items() if kind != "text_to_image"}
    for number, record in enumerate(records):
        rng, subjects = np.random.default_rng([5, number]), UNSEEN if unseen else SEEN
        one = tasks.sample(rng, subjects, mixture, augment=not unseen)  # as training does
        assert record.task is one.task and record.prompt == one.prompt and record.id.startswith(one.kind)
        source = None if record.source is None else record.references.index(record.source)
        assert source == one.source
        paths = [record.target, *record.references]
        drawn = render(one.target, *one.references)
        for path, expected in zip(paths, drawn, strict=True):
            assert (images.to_pixels(images.open_image(path)) - expected).abs().max() < 1.01 / 127.5


def test_a_larger_world_begins_with_the_smaller_one(tmp_path):
    for name, cases in (("small", "3"), ("large", "66")):
        assert make_world(str(tmp_path / name), "--cases", cases).returncode == 0
    small, large = ((tmp_path / name / "records.jsonl").read_text().splitlines() for name in ("small", "large"))
    assert len(large) == 66 and large[:3] == small


def test_a_folder_that_is_there_stays_as_it_is(tmp_path):
    done = make_world(str(tmp_path), "--cases", "1")
    assert done.returncode == 1 and "exists; name another folder or remove it" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert "--cases is 0" in make_world(str(tmp_path / "a"), "--cases", "0").stderr


# ---- the stream ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream(tiny_model) -> WorldDataset:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model / "tokenizer")
    sizes = dict(size=64, latent_shape=(4, 8, 8), vision_size=28)
    return WorldDataset(tasks.MIXTURE, tokenizer, seed=3, dropout=Dropout(), noise_levels=2, **sizes)


def test_the_stream_is_a_function_of_seed_and_counter(stream):
    def batch() -> WorldBatch:
        return collate_world([stream[index] for index in range(20, 28)])

    one, two = (batch().to(torch.device("cpu")) for _ in range(2))
    for name in ("pixels_PCHW", "vision_RCHW", "noise_BCHW", "time_B", "posterior_PCHW"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert one.ids == two.ids and one.instructions == two.instructions
    assert one.noise_BCHW.shape == (2 * 8, 4, 8, 8) and one.time_B.shape == (16,)
    total = 8 + sum(instruction.num_images for instruction in one.instructions)
    assert one.pixels_PCHW.shape == (total, 3, 64, 64)
    assert one.vision_RCHW.shape == (total - 8, 3, 28, 28)
    assert sorted([*one.target_B.tolist(), *one.reference_R.tolist()]) == list(range(total))


def test_the_stream_augments_subjects(stream):
    scenes = [scene for index in range(60) for scene in stream[index][1]]
    assert any(s.other >= 0 for scene in scenes for s in scene.subjects)


def test_a_mixture_is_kept(stream):
    ids = [stream[index][0].id.rsplit("-", 1)[0] for index in islice(range(10**6), 1500)]
    whole = sum(tasks.MIXTURE.values())
    for kind, weight in tasks.MIXTURE.items():
        expected = 1500 * weight / whole
        assert abs(ids.count(kind) - expected) < 5 * expected**0.5, kind


def test_an_unknown_kind_is_refused(stream):
    with pytest.raises(ValueError, match=r"knows no task.* juggle; known are text_to_image, "):
        WorldDataset(
            {"juggle": 1},
            stream.tokenizer,
            seed=0,
            size=64,
            latent_shape=(4, 8, 8),
            vision_size=28,
            dropout=Dropout(),
            noise_levels=1,
        )
