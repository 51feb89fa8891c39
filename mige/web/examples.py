"""Examples for the page: prepared cases whose instruction is spelled with numbered pictures."""

from dataclasses import dataclass
from pathlib import Path

from mige.data.parsing import read_records
from mige.data.records import Record
from mige.data.synthetic.cases import BenchCase, make_cases
from mige.data.synthetic.scenes import Scenes, draw
from mige.tasks import Task, placeholders
from mige.utils import images
from mige.web.instructions import spell

KINDS = {
    Task.SUBJECT: ("one_reference", "two_references", "reference_and_name"),
    Task.EDIT: ("move", "remove", "recolour", "background"),
    Task.SUBJECT_EDIT: ("replace_by_reference", "add_by_reference", "add_by_reference_relative"),
}
"""Of the miniature world: one example each."""


@dataclass(frozen=True)
class Example:
    """An instruction and picture 1, 2, ..."""

    instruction: str
    pictures: tuple[Path, ...]


def of_the_world(task: Task, folder: Path) -> list[Example]:
    """Of each kind the mini-bench's case about unseen subjects with the shortest words; draws into `folder`."""
    chosen = []
    for kind in KINDS[task]:
        unseen = [one for one in make_cases(kinds=[kind]) if one.split == "unseen"]
        chosen.append(min(unseen, key=lambda one: len(_spelled(one))))
    return [_draw(one, folder) for one in chosen]


def of_records(task: Task, folder: Path) -> list[Example]:
    """The records of `folder`/TASK.json, as `read_records` reads them; raises BadRecordsError where it finds faults."""
    return [_from_record(record) for record in read_records([folder / f"{task}.json"]).raise_if_errors()]


def _spelled(one: BenchCase) -> str:
    return spell(one.case.prompt, _numbers(len(one.case.references), one.case.source))


def _draw(one: BenchCase, folder: Path) -> Example:
    numbers = _numbers(len(one.case.references), one.case.source)
    drawn = images.to_pil(draw(Scenes.stack(one.case.references)))
    paths = {number: folder / f"{one.id}-{number}.png" for number in numbers}
    for number, picture in zip(numbers, drawn, strict=True):
        images.save_image(picture, paths[number])
    return Example(_spelled(one), tuple(paths[number] for number in sorted(paths)))


def _from_record(record: Record) -> Example:
    source = None if record.source is None else record.references.index(record.source)
    numbers = _numbers(len(record.references), source)
    by_number = dict(zip(numbers, record.references, strict=True))
    named = numbers if placeholders(record.prompt) else []
    return Example(spell(record.prompt, named), tuple(by_number[number] for number in sorted(by_number)))


def _numbers(references: int, source: int | None) -> list[int]:
    """The number of each reference: the source is picture 1, the others follow in the order of the prompt."""
    order = sorted(range(references), key=lambda place: place != source)
    return [order.index(place) + 1 for place in range(references)]
