"""What happens in a tab, from typing to the result.

Run: `begin` (checks, outside the queue) -> `make` (the queue's one place; its steps stream to the page). An event takes
the fields of the tab and nothing else; results are named by a token, and their files come from the store.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gradio as gr
import torch

from mige.tasks import Task
from mige.utils.images import save_image
from mige.web import theme
from mige.web.components import Job, Tab
from mige.web.examples import Example
from mige.web.fields import read_images, read_request, read_text, show
from mige.web.file_store import FileStore, Results, StoreFullError
from mige.web.instructions import RefusedError
from mige.web.layout import values_of
from mige.web.provenance import save_with_settings
from mige.web.service import GenerationService, Made, Step, Stopped

SCROLL = "() => document.querySelector('[role=tabpanel]:not([style*=none]) .mige-output')?.scrollIntoView(OPTIONS)"
SCROLL = SCROLL.replace("OPTIONS", "{behavior: 'smooth', block: 'nearest'}")


def connect(tab: Tab, service: GenerationService, store: FileStore, examples: list[Example]) -> None:
    """Tie the components of a tab to the service."""
    events = Events(tab, service, store)
    quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    asked, buttons = [tab.instruction, *tab.pictures], [tab.run, tab.stop]
    gr.on(
        [tab.instruction.change, *(picture.change for picture in tab.pictures)],
        lambda *values: events.read_aloud(values),
        asked, tab.reads, trigger_mode="always_last", **quiet,
    )  # fmt: skip
    tab.examples.click(lambda index: _example(examples, len(asked), index), tab.examples, asked, **quiet)
    starts = [tab.run.click, tab.instruction.submit]
    gr.on(starts, None, None, None, js=SCROLL, api_visibility="private")
    begun = gr.on(
        starts, lambda *values: events.begin(values), tab.asked, [*buttons, tab.stage], concurrency_limit=None,
        **(quiet | {"queue": True}),  # only of queued events does the page show errors
    )  # fmt: skip
    made = begun.success(
        _endpoint(tab.job, events.make), tab.asked, [tab.gallery, tab.token, tab.stage], show_progress_on=tab.stage,
        api_name=tab.job.api_name, concurrency_limit=1, concurrency_id="model",
    )  # fmt: skip
    made.success(lambda token: events.show(token), tab.token, [*buttons, tab.gallery, *tab.compared], **quiet)
    made.failure(lambda token: events.ended(token), tab.token, [*buttons, tab.stage], **quiet)
    tab.stop.click(lambda token: events.ended(token), tab.token, [*buttons, tab.stage], cancels=[made], **quiet)
    tab.gallery.select(events.pick, tab.token, [tab.gallery, *tab.compared], **quiet)


@dataclass(frozen=True)
class Events:
    """The events of one tab."""

    tab: Tab
    service: GenerationService
    store: FileStore

    def read_aloud(self, values: Sequence[Any]) -> str:
        """What the model is given, or why it can't be read yet; nothing while nothing is written."""
        task = self.tab.job.task
        try:
            text, paths = read_text(values[0]), read_images(values[1:], self.store)
            if not text.strip():
                return theme.NOTHING_READ
            reading, full, odd = self.service.explain(task, text, [path is not None for path in paths])
        except RefusedError as refusal:
            return theme.wrong(str(refusal))
        named = {number: paths[number - 1] for number in reading.numbers}
        return theme.instruction(task, full, reading.numbers, named, odd)

    def begin(self, values: Sequence[Any]) -> list[Any]:
        """Refuse at once what cannot run; else clear the stage. An earlier result stays until there is a new one."""
        with as_messages():
            self.store.require_room()
            self.service.check(read_request(self.tab.job.task, values, self.store))
        return [gr.update(visible=False), gr.update(visible=True), theme.WAITING]

    def ended(self, token: Any) -> list[Any]:
        """The buttons and the stage after an error, or when stopped."""
        kept = self.store.results(token) is not None
        return [*_ready(), theme.NOTHING_NEW if kept else theme.NOTHING_MADE]

    def show(self, token: Any) -> list[Any]:
        """A result: beside its input where there is one, and as a grid where there are several."""
        with as_messages():
            results = self._results(token)
            gallery = gr.update(visible=results.before is None or len(results.images) > 1, selected_index=None)
            return [*_ready(), gallery, *self._chosen(results, 0)]

    def pick(self, token: Any, event: gr.EventData) -> list[Any]:
        """The image of the grid that was clicked: to compare and to download."""
        with as_messages():
            results = self._results(token)
            index = event._data.get("index") if isinstance(event._data, dict) else None
            return [gr.skip(), *self._chosen(results, _index("result", index, len(results.images)))]

    def make(self, values: Sequence[Any]) -> Iterator[tuple[Any, Any, str]]:
        """Run a request; yields gallery, token and stage after every step and at the end."""
        with as_messages():
            self.store.require_room()
            started, previews = time.perf_counter(), []
            for event in self.service.run(read_request(self.tab.job.task, values, self.store)):
                if isinstance(event, Step):
                    if event.previews:
                        previews = [theme.preview(image) for image in event.previews]
                    yield gr.skip(), gr.skip(), theme.progress(event, time.perf_counter() - started, previews)
                else:
                    results = self._save(event)
                    token = self.store.add_results(results)
                    yield list(results.images), token, theme.done(len(event.pictures), event.seconds)

    def _results(self, token: Any) -> Results:
        results = self.store.results(token)
        if results is None:
            raise RefusedError("These results are not on the server, or no longer: run the request again.")
        return results

    def _chosen(self, results: Results, index: int) -> list[Any]:
        path, caption = results.images[index]
        download = gr.update(value=path, visible=True, label=f"Download PNG of {caption}")
        if self.tab.slider is None:
            return [download]
        return [download, gr.update(value=(results.before, path), visible=True)]

    def _save(self, made: Made) -> Results:
        """Results as PNG files with their settings, and the edited image as one, in a folder of their own."""
        folder = self.store.new_folder()
        saved, before = [], None
        for picture, settings in zip(made.pictures, made.settings, strict=True):
            path = folder / f"mige-{self.tab.job.api_name}-seed-{settings['seed']}.png"
            save_with_settings(picture, path, settings)
            saved.append((self.store.hand_out(path), f"seed {settings['seed']}"))
        if made.before is not None:
            save_image(made.before, folder / "before.png")
            before = self.store.hand_out(folder / "before.png")
        return Results(tuple(saved), before)


def _ready() -> tuple[Any, Any]:
    """The buttons when nothing runs."""
    return gr.update(visible=True), gr.update(visible=False)


def _example(examples: list[Example], num_inputs: int, index: Any) -> list[str | None]:
    with as_messages():
        return values_of(examples[_index("example", index, len(examples))], num_inputs)


def _index(name: str, value: Any, count: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise RefusedError(f"The number of the {name} is {show(value)}: expected a whole number from 0 to {count - 1}.")
    return value


def _endpoint(job: Job, make: Callable[[Sequence[Any]], Iterator[list[Any]]]) -> Callable[..., Iterator]:
    """The function behind the API's endpoint of a tab; the names of its parameters are the API's."""
    if job.task is Task.EDIT:

        def edit(instruction, picture_1, seed, pictures, steps, guidance, source_guidance, width, height):
            """Edit picture 1 as the instruction says; a list of PNG files, one a seed."""
            yield from make((instruction, picture_1, seed, pictures, steps, guidance, source_guidance, width, height))

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
    ):  # fmt: skip - what a client leaves out has the page's value, never None
        """Make what the instruction says, which names the pictures by number; a list of PNG files, one a seed."""
        named = instruction, picture_1, picture_2, picture_3, picture_4
        yield from make((*named, seed, pictures, steps, guidance, source_guidance, width, height))

    return with_subjects


@contextmanager
def as_messages() -> Iterator[None]:
    """Errors as what the page and the API show: a refusal in its own words, a fault of ours without its details."""
    try:
        yield
    except RefusedError as refusal:
        raise gr.Error(str(refusal), title="This cannot run", print_exception=False) from refusal
    except StoreFullError as error:
        message = "The server holds too many files: try again in an hour."
        raise gr.Error(message, title="This cannot run", print_exception=False) from error
    except torch.OutOfMemoryError as error:
        raise gr.Error(
            "The model ran out of memory: ask for fewer pictures at once, a smaller size, or name fewer pictures.",
            title="This cannot run",
        ) from error
    except Stopped as stopped:
        raise gr.Error("The server is closing.", title="Stopped", print_exception=False) from stopped
    except gr.Error:
        raise
    except Exception as error:
        raise gr.Error("Something went wrong at our end: the log of the server says what.") from error
