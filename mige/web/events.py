"""What happens in a tab, from typing to the result.

Run: `begin` (checks, outside the queue) -> `make` (the queue's one place; its steps stream to the page). An event takes
the fields of the tab and nothing else; results are named by a token, and their files come from the store.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from mige.tasks import Task
from mige.web import theme
from mige.web.components import Job, Tab
from mige.web.examples import Example
from mige.web.fields import read_images, read_request, read_text, show
from mige.web.file_store import FileStore, Results
from mige.web.history import Entry, Histories
from mige.web.instructions import RefusedError
from mige.web.layout import values_of
from mige.web.messages import as_messages
from mige.web.remarks import remarks
from mige.web.request import Step
from mige.web.saving import save_results
from mige.web.service import GenerationService

MODEL = "model"  # the queue of those who wait for it
SCROLL = "() => document.querySelector('[role=tabpanel]:not([style*=none]) .mige-output')?.scrollIntoView(OPTIONS)"
SCROLL = SCROLL.replace("OPTIONS", "{behavior: 'smooth', block: 'nearest'}")
NEW_SEED = "(random, seed) => random ? window.mige.seed() : seed"
QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Site:
    """What the events of all tabs share."""

    service: GenerationService
    store: FileStore
    histories: Histories
    page: gr.Blocks
    visitor: gr.Textbox  # never visible: who is there
    history: gr.HTML  # what the visitor made


def connect(tab: Tab, site: Site, examples: list[Example]) -> None:
    """Tie the components of a tab to the service."""
    events, results = Events(tab, site), tab.results
    asked, buttons = [tab.instruction, *tab.pictures], [tab.run, tab.stop, results.timer]
    gr.on(
        [tab.instruction.change, *(picture.change for picture in tab.pictures)],
        lambda *values: events.read_aloud(values),
        asked, tab.reads, trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    first, mask = tab.pictures[0], tab.settings[-1]
    gr.on([first.upload, first.clear], None, None, mask, js="() => [[]]", api_visibility="private")  # another image
    tab.examples.click(lambda index: _example(examples, len(asked), index), tab.examples, asked, **QUIET)
    starts = [tab.run.click, tab.instruction.submit]
    gr.on(starts, None, None, None, js=SCROLL, api_visibility="private")
    seeded = gr.on(starts, None, [tab.random, tab.settings[0]], tab.settings[0], js=NEW_SEED, api_visibility="private")
    begun = seeded.then(
        lambda *values: events.begin(values), tab.asked, [*buttons, results.stage], concurrency_limit=None,
        **(QUIET | {"queue": True}),  # only of queued events does the page show errors
    )  # fmt: skip
    made = begun.success(
        _endpoint(tab.job, events.make), [*tab.asked, site.visitor], [results.gallery, results.token, results.stage],
        show_progress="hidden", api_name=tab.job.api_name, concurrency_limit=1, concurrency_id=MODEL,
    )  # fmt: skip
    shown = [results.gallery, *results.shown, results.download_all]
    made.success(
        lambda *named: events.show(*named), [results.token, site.visitor], [*buttons, *shown, site.history], **QUIET
    )
    made.failure(lambda token: events.ended(token), results.token, [*buttons, results.stage], **QUIET)
    tab.stop.click(lambda token: events.ended(token), results.token, [*buttons, results.stage], cancels=[made], **QUIET)
    results.gallery.select(events.pick, results.token, [results.gallery, *results.shown], **QUIET)
    results.timer.tick(events.wait, None, results.stage, **QUIET)


@dataclass(frozen=True)
class Events:
    """The events of one tab."""

    tab: Tab
    site: Site

    def read_aloud(self, values: Sequence[Any]) -> str:
        """What the model is given, or why it can't be read yet; nothing while nothing is written."""
        task = self.tab.job.task
        try:
            text, paths = read_text(values[0]), read_images(values[1:], self.site.store)
            said = remarks(paths)
            if not text.strip():
                return theme.noted(said)
            reading, full, odd = self.site.service.explain(task, text, [path is not None for path in paths])
        except RefusedError as refusal:
            return theme.wrong(str(refusal))
        named = {number: paths[number - 1] for number in reading.numbers}
        return theme.instruction(task, full, reading.numbers, named, [*said, *odd])

    def begin(self, values: Sequence[Any]) -> list[Any]:
        """Refuse at once what cannot run; else clear the stage. An earlier result stays until there is a new one."""
        with as_messages():
            self.site.store.require_room()
            self.site.service.check(self._request(values))
        return [gr.update(visible=False), gr.update(visible=True), gr.Timer(active=True), theme.WAITING]

    def wait(self, request: gr.Request) -> Any:
        """The place in the queue of whoever asks, and the seconds until it is reached, as far as they can be told."""
        queue = self.site.page._queue.event_queue_per_concurrency_id.get(MODEL)
        sessions = [] if queue is None else [event.session_hash for event in list(queue.queue)]
        if request.session_hash not in sessions:
            return gr.skip()
        place, pace = sessions.index(request.session_hash), self.site.service.pace
        left, typical = pace.left(), pace.typical
        seconds = None if left is None or (place and typical is None) else left + place * (typical or 0.0)
        return theme.waiting(place + 1, seconds)

    def ended(self, token: Any) -> list[Any]:
        """The buttons and the stage after an error, or when stopped."""
        kept = self.site.store.results(token) is not None
        return [*_ready(), theme.NOTHING_NEW if kept else theme.NOTHING_MADE]

    def show(self, token: Any, visitor: Any) -> list[Any]:
        """A result: beside its input where there is one, and as a grid where there are several."""
        with as_messages():
            return [*_ready(), *self.results(token), self.listed(visitor)]

    def results(self, token: Any) -> list[Any]:
        """What shows the results of a token: gallery, its first image, all of them to download."""
        results = self._results(token)
        gallery = gr.update(visible=results.before is None or len(results.images) > 1, selected_index=None)
        return [gallery, *self._chosen(results, 0), gr.update(value=results.archive, visible=bool(results.archive))]

    def listed(self, visitor: Any) -> str:
        """The history of a visitor."""
        found = [(entry, self.site.store.results(entry.token)) for entry in self.site.histories.entries(visitor)]
        return theme.history(found)

    def pick(self, token: Any, event: gr.EventData) -> list[Any]:
        """The image of the grid that was clicked: to compare, to download and to go on with."""
        with as_messages():
            results = self._results(token)
            index = event._data.get("index") if isinstance(event._data, dict) else None
            return [gr.skip(), *self._chosen(results, read_index("result", index, len(results.images)))]

    def path(self, token: Any, chosen: Any) -> str:
        """The file of the image that is shown."""
        results = self._results(token)
        return results.images[read_index("result", chosen, len(results.images))][0]

    def make(self, values: Sequence[Any], visitor: Any = None) -> Iterator[tuple[Any, Any, str]]:
        """Run a request; yields gallery, token and stage after every step and at the end."""
        with as_messages():
            self.site.store.require_room()
            started, previews, request = time.perf_counter(), [], self._request(values)
            for event in self.site.service.run(request):
                if isinstance(event, Step):
                    if event.previews:
                        previews = [theme.preview(image) for image in event.previews]
                    yield gr.skip(), gr.skip(), theme.progress(event, time.perf_counter() - started, previews)
                else:
                    results = save_results(event, self.tab.job.api_name, self.site.store)
                    token = self.site.store.add_results(results)
                    self.site.histories.add(visitor, Entry(token, request))
                    withheld = len(request.seeds) - len(event.pictures)
                    done = theme.done(len(event.pictures), event.seconds, withheld, bool(request.mask))
                    yield list(results.images), token, done

    def _request(self, values: Sequence[Any]):
        return read_request(self.tab.job.task, values, self.site.store, self.site.service.adapters.offered)

    def _results(self, token: Any) -> Results:
        results = self.site.store.results(token)
        if results is None:
            raise RefusedError("These results are not on the server, or no longer: run the request again.")
        return results

    def _chosen(self, results: Results, index: int) -> list[Any]:
        path, caption = results.images[index]
        compare = "" if results.before is None else theme.compare(results.before, path, caption)
        return [
            index,
            gr.update(value=compare, visible=results.before is not None),
            gr.update(value=path, visible=True, label=f"Download PNG of {caption}"),
            gr.update(visible=True),
            gr.update(visible=self.site.service.capacity > 1),
        ]


def _ready() -> tuple[Any, Any, Any]:
    """The buttons when nothing runs, and nobody waits."""
    return gr.update(visible=True), gr.update(visible=False), gr.Timer(active=False)


def _example(examples: list[Example], num_inputs: int, index: Any) -> list[str | None]:
    with as_messages():
        return values_of(examples[read_index("example", index, len(examples))], num_inputs)


def read_index(name: str, value: Any, count: int) -> int:
    """A whole number from 0 below `count`; raises RefusedError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise RefusedError(f"The number of the {name} is {show(value)}: expected a whole number from 0 to {count - 1}.")
    return value


def _endpoint(job: Job, make: Callable[[Sequence[Any], Any], Iterator[list[Any]]]) -> Callable[..., Iterator]:
    """The function behind the API's endpoint of a tab; the names of its parameters are the API's.

    What the page alone has follows them: the mask, the adapters' scales and the visitor, each None for a client.
    """
    if job.task is Task.EDIT:

        def edit(
            instruction, picture_1, seed, pictures, steps, guidance, source_guidance, width, height, negative, *own
        ):  # fmt: skip
            """Edit picture 1 as the instruction says; a list of PNG files, one a seed."""
            settings = seed, pictures, steps, guidance, source_guidance, width, height, negative
            yield from make((instruction, picture_1, *settings, *own[:-1]), own[-1])

        return edit

    def with_subjects(
        instruction,
        picture_1,
        picture_2=None,
        picture_3=None,
        picture_4=None,
        seed=None,
        pictures=None,
        steps=None,
        guidance=None,
        source_guidance=None,
        width=None,
        height=None,
        negative=None,
        *own,
    ):  # fmt: skip - what a client leaves out has the page's value, never None
        """Make what the instruction says, which names the pictures by number; a list of PNG files, one a seed."""
        named = instruction, picture_1, picture_2, picture_3, picture_4
        settings = seed, pictures, steps, guidance, source_guidance, width, height, negative
        yield from make((*named, *settings, *own[:-1]), own[-1])

    return with_subjects
