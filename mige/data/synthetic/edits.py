"""The world's nine edits by words: a scene, an instruction, and the scene that it asks for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from mige.data.synthetic.author import PLACES, SIDES, SIZES, Author, Case
from mige.data.synthetic.scenes import COLOURS, Placed, Scene, tint
from mige.tasks import PLACEHOLDER, Task

APART = 38  # from middle to middle of subjects side by side, in units
GROW, SHRINK = 1.45, 0.65


def _edit(kind: str, prompt: str, source: Scene, target: Scene, asked: Sequence[Placed]) -> Case:
    return Case(kind, Task.EDIT, prompt, target, (source,), 0, tuple(asked))


def _add(a: Author) -> Case:
    scene, places = a.scene(many=int(a.rng.integers(0, 4)))
    number, size = a.subject(named=True), a.size()
    place = a.pick([p for p in range(len(PLACES)) if p not in places])
    new, where = a.upright(number, place, size), a.pick(PLACES[place])
    prompt = a.pick(("add {} {} in{}", "put {} {} of{}", "place {} {} in{}", "insert {} {} into{}"))
    return _edit("add", prompt.format(a.new(number, size), where, PLACEHOLDER), scene, scene.with_(new), [new])


def beside(a: Author, plain: bool = True) -> tuple[Scene, str, tuple[float, float]]:
    """A scene with room on one side of its first subject; how that side is called, and its middle."""
    scene, places = a.scene(plain=plain)
    free = []
    for words, (dx, dy) in SIDES.items():
        column, row = places[0] % 3 + dx, places[0] // 3 + dy
        if 0 <= column < 3 and 0 <= row < 3 and row * 3 + column not in places:
            free.append((words, (dx, dy)))
    if not free:  # boxed in: start over with the subject alone
        scene = replace(scene, subjects=scene.subjects[:1])
        return _beside_alone(a, scene, places[0])
    words, (dx, dy) = a.pick(free)
    anchor = scene.subjects[0]
    return scene, f"{words} {a.old(anchor, places[0])}", (anchor.x + dx * APART, anchor.y + dy * APART)


def _beside_alone(a: Author, scene: Scene, place: int) -> tuple[Scene, str, tuple[float, float]]:
    anchor = scene.subjects[0]
    words, (dx, dy) = a.pick(
        [(w, (dx, dy)) for w, (dx, dy) in SIDES.items() if 0 <= place % 3 + dx < 3 and 0 <= place // 3 + dy < 3]
    )
    return scene, f"{words} {a.old(anchor, place)}", (anchor.x + dx * APART, anchor.y + dy * APART)


def _add_relative(a: Author) -> Case:
    scene, where, (x, y) = beside(a)
    number = a.subject(named=True)
    new = Placed(number, x, y, SIZES[""])
    prompt = a.pick(("add {} {} in{}", "put {} {} in{}", "place {} {} in{}"))
    words = prompt.format(a.new(number, ""), where, PLACEHOLDER)
    return _edit("add_relative", words, scene, scene.with_(new), [new])


def _remove(a: Author) -> Case:
    scene, places = a.scene(plain=True)
    gone = scene.subjects[0]
    prompt = a.pick(("remove {} from{}", "delete {} from{}", "erase {} in{}", "take {} out of{}"))
    words = prompt.format(a.old(gone, places[0]), PLACEHOLDER)
    return _edit("remove", words, scene, scene.without(gone), [gone])


def _replace(a: Author) -> Case:
    scene, places = a.scene(plain=True)
    old, number = scene.subjects[0], a.subject(named=True)
    new = Placed(number, old.x, old.y, old.size)
    prompt = a.pick(("replace {} in{} with {}", "turn {} in{} into {}", "swap {} in{} for {}", "change {} in{} to {}"))
    words = prompt.format(a.old(old, places[0]), PLACEHOLDER, a.new(number, ""))
    return _edit("replace", words, scene, scene.exchange(old, new), [new])


def _background(a: Author) -> Case:
    scene, _ = a.scene()
    kind = a.background(other_than=scene.background)
    where = a.world.phrases[kind]
    prompt = a.pick(("make{} happen {}", "change the background of{}: everything {}", "show what is in{} {}"))
    target = replace(scene, background=kind, variant=a.variant())
    return _edit("background", prompt.format(PLACEHOLDER, where), scene, target, ())


def _recolour(a: Author) -> Case:
    scene, places = a.scene(plain=True)
    old, colour = scene.subjects[0], a.pick(list(COLOURS))
    new = replace(old, colour=tint(colour))
    prompt = a.pick(("make {} in{} {}", "paint {} in{} {}", "change the colour of {} in{} to {}", "colour {} in{} {}"))
    words = prompt.format(a.old(old, places[0]), PLACEHOLDER, colour)
    return _edit("recolour", words, scene, scene.exchange(old, new), [new])


def _move(a: Author) -> Case:
    scene, places = a.scene(plain=True)
    old, place = scene.subjects[0], a.pick([p for p in range(len(PLACES)) if p not in places])
    x, y = a.middle(place)
    new, where = replace(old, x=x, y=y), a.pick(PLACES[place])
    prompt = a.pick(("move {} in{} so that it is {}", "shift {} in{}: it should be {}", "put {} in{} elsewhere, {}"))
    words = prompt.format(a.old(old, places[0]), PLACEHOLDER, where)
    return _edit("move", words, scene, scene.exchange(old, new), [new])


def _scale(a: Author) -> Case:
    larger = a.chance(0.5)
    scene, places = a.scene(plain=True, sizes=(28, 36) if larger else (42, 52))
    old = scene.subjects[0]
    new = replace(old, size=old.size * (GROW if larger else SHRINK))
    words = ("bigger", "larger") if larger else ("smaller", "tinier")
    prompt = a.pick(("make {} in{} {}", "let {} in{} be {}"))
    words = prompt.format(a.old(old, places[0]), PLACEHOLDER, a.pick(words))
    return _edit("scale", words, scene, scene.exchange(old, new), [new])


def _flip(a: Author) -> Case:
    scene, places = a.scene(plain=True, asymmetric=True)
    old = scene.subjects[0]
    new = replace(old, flip=not old.flip, angle=-old.angle)  # the mirror image of what is seen
    prompt = a.pick(("flip {} in{} horizontally", "mirror {} in{}", "turn {} in{} the other way round"))
    words = prompt.format(a.old(old, places[0]), PLACEHOLDER)
    return _edit("flip", words, scene, scene.exchange(old, new), [new])


EDITS: Mapping[str, Callable[[Author], Case]] = {
    "add": _add,
    "add_relative": _add_relative,
    "remove": _remove,
    "replace": _replace,
    "background": _background,
    "recolour": _recolour,
    "move": _move,
    "scale": _scale,
    "flip": _flip,
}
