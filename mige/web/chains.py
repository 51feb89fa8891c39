"""What leads from one tab to another: a result used again, the history, a result PNG, what a reload brings back."""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from mige.tasks import Task
from mige.web import forms
from mige.web.components import Tab, Token
from mige.web.events import QUIET, Events, Site
from mige.web.fields import read_images
from mige.web.instructions import RefusedError
from mige.web.messages import as_messages
from mige.web.provenance import read_settings

SOURCE_OF = {Task.SUBJECT: Task.EDIT, Task.EDIT: Task.EDIT, Task.SUBJECT_EDIT: Task.SUBJECT_EDIT}
"""The tab that a result becomes picture 1 of."""
SUBJECT_OF = {Task.SUBJECT: Task.SUBJECT, Task.EDIT: Task.SUBJECT_EDIT, Task.SUBJECT_EDIT: Task.SUBJECT_EDIT}
"""The tab that a result becomes a subject in."""


def connect_all(tabs: Mapping[Task, Tab], chooser: gr.Tabs, restore: gr.UploadButton, site: Site) -> None:
    """Tie the tabs to each other."""
    chains = Chains(tabs, site)
    for task, tab in tabs.items():
        named = [tab.results.token, tab.results.chosen]
        source, subject = tabs[SOURCE_OF[task]], tabs[SUBJECT_OF[task]]
        tab.results.as_source.click(
            chains.as_source(task), named, [chooser, source.pictures[0], source.settings[-1]], **QUIET
        )
        tab.results.as_subject.click(chains.as_subject(task), named + subject.slots, [chooser, *subject.slots], **QUIET)
        _keep_draft(tab, chains, site)
    fields = [part for tab in tabs.values() for part in tab.asked]
    results = [part for tab in tabs.values() for part in _shown(tab)]
    site.history.click(chains.again, site.visitor, [chooser, *fields, *results], **QUIET)
    restore.upload(chains.restore, restore, [chooser, *fields], **(QUIET | {"queue": True}))
    chooser.select(None, None, None, js="() => window.mige.keepTab()", api_visibility="private")
    site.page.load(
        chains.welcome, site.visitor, [site.visitor, site.history], js="() => [window.mige.kept('visitor')]", **QUIET
    ).then(None, site.visitor, None, js="(token) => { window.mige.keep('visitor', token); window.mige.showTab(); }",
           api_visibility="private")  # fmt: skip


def _keep_draft(tab: Tab, chains: "Chains", site: Site) -> None:
    """Keep what is written in this browser, and bring it back when the page is opened again."""
    key, draft = f"draft-{tab.job.api_name}", Token(visible=False)
    changes = [part.change for part in tab.asked]
    gr.on(changes, None, tab.asked, None, js=f"(...values) => window.mige.keepDraft('{key}', values)",
          api_visibility="private")  # fmt: skip
    site.page.load(chains.draft(tab), draft, tab.asked, js=f"() => [window.mige.kept('{key}')]", **QUIET).then(
        None, None, None, js=f"() => window.mige.draftIsBack('{key}')", api_visibility="private"
    )


def _shown(tab: Tab) -> list[gr.Component]:
    results = tab.results
    return [results.token, results.stage, results.gallery, *results.shown, results.download_all]


class Chains:
    """The events that concern several tabs."""

    def __init__(self, tabs: Mapping[Task, Tab], site: Site):
        self.tabs, self.site = tabs, site
        self.events = {task: Events(tab, site) for task, tab in tabs.items()}

    def as_source(self, task: Task):
        """The event that makes the image that is shown picture 1, without a mask."""

        def use(token, chosen):
            with as_messages():
                return [_chosen_tab(self.tabs[SOURCE_OF[task]]), self.events[task].path(token, chosen), []]

        return use

    def as_subject(self, task: Task):
        """The event that puts the image that is shown into the first free place for a subject."""
        target = self.tabs[SUBJECT_OF[task]]
        first = 0 if target.job.task is Task.SUBJECT else 1

        def use(token, chosen, *sent):
            with as_messages():
                path = self.events[task].path(token, chosen)
                there = read_images(sent, self.site.store)
                free = [place for place in range(first, len(there)) if there[place] is None]
                if not free:
                    raise RefusedError("There is no free place for a subject: take one away first.")
                return [_chosen_tab(target), *(path if at == free[0] else gr.skip() for at in range(len(there)))]

        return use

    def again(self, visitor: Any, event: gr.EventData) -> list[Any]:
        """A run of the history: its form, and its results while they are there."""
        with as_messages():
            token = event._data.get("token") if isinstance(event._data, dict) else None
            entry = self.site.histories.find(visitor, token)
            if entry is None:
                raise RefusedError("This run is not in your history, or no longer: reload the page.")
            tab = self.tabs[entry.request.task]
            values = forms.of_request(entry.request, self.site.store, len(tab.pictures), self._adapters)
            return [_chosen_tab(tab), *self._fields(tab, values), *self._results(tab, token)]

    def restore(self, sent: Any) -> list[Any]:
        """The form that a result PNG was made with."""
        with as_messages():
            [path] = read_images([sent], self.site.store)
            try:
                settings = read_settings(path) if path else {}
            except (ValueError, OSError) as error:
                raise RefusedError(
                    "This file holds no settings of MIGE: send a PNG that was downloaded here."
                ) from error
            tabs = {task: len(tab.pictures) for task, tab in self.tabs.items()}
            task, values = forms.of_settings(settings, tabs, self._adapters)
            return [_chosen_tab(self.tabs[task]), *self._fields(self.tabs[task], values)]

    def welcome(self, visitor: Any) -> list[Any]:
        """Who is there, and what was made before."""
        token = self.site.histories.welcome(visitor)
        return [token, self.events[Task.EDIT].listed(token)]

    def draft(self, tab: Tab):
        """The event that fills a form with what a browser kept of it."""

        def fill(kept):
            values = forms.of_draft(kept, len(tab.pictures), self.site.store, self._adapters)
            return [gr.skip() if value is forms.KEEP else value for value in values]

        return fill

    @property
    def _adapters(self):
        return self.site.service.adapters.offered

    def _fields(self, tab: Tab, values: Sequence[Any]) -> list[Any]:
        """The values for one tab, nothing for the others."""
        found = []
        for one in self.tabs.values():
            found += [gr.skip() if value is forms.KEEP else value for value in values] if one is tab else [
                gr.skip() for _ in one.asked
            ]  # fmt: skip
        return found

    def _results(self, tab: Tab, token: str) -> list[Any]:
        results, found = self.site.store.results(token), []
        for task, one in self.tabs.items():
            if one is not tab or results is None:
                found += [gr.skip() for _ in _shown(one)]
                continue
            gallery, *others = self.events[task].results(token)
            found += [token, "", gallery | {"value": list(results.images)}, *others]
        return found


def _chosen_tab(tab: Tab) -> dict[str, Any]:
    return gr.update(selected=tab.job.api_name)
