"""The page and its server: three tabs over a generation service, a guard before them, one private folder below.

Everything that is written lies in that folder; it goes when `serving` ends.
"""

import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr
import torch
from gradio import routes
from starlette.middleware import Middleware

from mige.tasks import Task
from mige.utils.errors import UserError
from mige.web import theme, traffic
from mige.web.api import Api, Endpoint
from mige.web.chains import connect_all
from mige.web.components import JOBS
from mige.web.events import Site, connect
from mige.web.examples import Example, of_records, of_the_world
from mige.web.file_store import FileStore
from mige.web.guard import Guard
from mige.web.history import Histories
from mige.web.layout import lay_out, lay_out_history
from mige.web.login import Login
from mige.web.origin import OwnNames
from mige.web.service import GenerationService

EXAMPLE_DATA = Path(__file__).parents[2] / "example_data"  # of the checkout this runs from, if any
KEPT_SECONDS = 2 * 3600.0  # uploads and results older than this are deleted
SWEEP_SECONDS = 300.0

_log = logging.getLogger(__name__)


class ShareError(UserError):
    """There is no public link."""


@contextmanager
def serving(
    service: GenerationService,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    public_hosts: Sequence[str] = (),
    users: Mapping[str, str] | None = None,
    share: bool = False,
    root_path: str = "",
    api_key: str | None = None,
) -> Iterator[str]:
    """Serve page and HTTP endpoint while the context lasts, and yield their address; closes the service in the end.

    Args:
        host: the address to listen at.
        public_hosts: names by which visitors reach the page, as "mige.example.org"; requests to others are refused.
        port: None for the first free one from 7860. Raises OSError if it is taken.
        users: passwords by name of who may enter; everybody, without any.
        share: through a public address of Gradio's, which is then yielded. Raises ValueError without users, and
            ShareError where there is no such address to be had.
        root_path: where a proxy serves the page, as "/mige"; it has to strip that from what it sends on.
        api_key: what a request to the endpoint has to bear.
    """
    if share and not users:
        raise ValueError("share makes the page public: name the users who may enter")
    with tempfile.TemporaryDirectory(prefix="mige-web-", ignore_cleanup_errors=True) as folder:
        store = FileStore(Path(folder))
        with _environment(GRADIO_TEMP_DIR=str(store.folder), GRADIO_ANALYTICS_ENABLED="False"), _sweeping(store), \
             _server_folder(store.folder / "gradio"):  # fmt: skip
            page, names, shared = build(service, store), OwnNames(host, public_hosts), traffic.Traffic()
            shared.queued = lambda: len(page._queue)
            api = Api(service, store, names, shared, api_key)
            login = Middleware(Login, users=users or {}, has_key=api_key is not None)
            guard = Middleware(Guard, store=store, page=lambda: page, names=names, traffic=shared)
            try:
                _, address, public = page.launch(
                    server_name=host,
                    server_port=port,
                    prevent_thread_lock=True,
                    quiet=True,
                    share=share,
                    root_path=root_path or None,
                    max_file_size=f"{traffic.UPLOAD_MB}mb",
                    footer_links=["api"],
                    run_history=False,
                    enable_monitoring=False,
                    ssr_mode=False,
                    mcp_server=False,
                    theme=theme.THEME,
                    css=theme.CSS,
                    head=theme.SCRIPT,
                    app_kwargs={"middleware": [login, Middleware(Endpoint, api=api), guard]},
                )
                if share:
                    names.add(_host_of(public))
                yield public or address
            finally:
                service.close()
                page.close()


def build(service: GenerationService, store: FileStore) -> gr.Blocks:
    """The page over a service; its files lie in `store`, whose folder is Gradio's temporary one."""
    model = service.pipeline
    machine = f"{str(model.transformer.dtype).removeprefix('torch.')} on {_device_name(model.device)}"
    with gr.Blocks(title="MIGE", analytics_enabled=False) as page:
        gr.HTML(theme.header(service.name, model.native_size, machine, service.is_miniature))
        tabs, examples = {}, {job.task: _examples(service, job.task, store) for job in JOBS}
        with gr.Tabs() as chooser:
            for job in JOBS:
                with gr.Tab(job.title, id=job.api_name):
                    tabs[job.task] = lay_out(service, job, examples[job.task])
        visitor, history, restore = lay_out_history()
        site = Site(service, store, Histories(), page, visitor, history)
        for task, tab in tabs.items():
            connect(tab, site, examples[task])
        connect_all(tabs, chooser, restore, site)
    return page.queue(max_size=traffic.MAX_WAITING, api_open=False)  # no direct call passes the queue by


def _host_of(public: str | None) -> str:
    """The name in a public address; raises ShareError where Gradio got none, and has printed why."""
    if public is None:
        raise ShareError("Gradio's servers gave no public link: see above, or leave --share out and use --public-host")
    return urlsplit(public).hostname or ""


def _examples(service: GenerationService, task: Task, store: FileStore) -> list[Example]:
    with tempfile.TemporaryDirectory() as drawn:
        if service.is_miniature:
            found = of_the_world(task, Path(drawn))
        else:
            found = of_records(task, EXAMPLE_DATA) if EXAMPLE_DATA.is_dir() else []
        return [
            Example(one.instruction, tuple(Path(store.add_example(path)) for path in one.pictures)) for one in found
        ]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


@contextmanager
def _environment(**changes: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ |= changes
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@contextmanager
def _server_folder(folder: Path) -> Iterator[None]:
    """Where Gradio's server makes a folder of its own, which else stays in the system's for temporary files."""
    before, routes.DEFAULT_TEMP_DIR = routes.DEFAULT_TEMP_DIR, str(folder)  # of the environment when it was imported
    try:
        yield
    finally:
        routes.DEFAULT_TEMP_DIR = before


@contextmanager
def _sweeping(store: FileStore) -> Iterator[None]:
    """Delete what is too old, every SWEEP_SECONDS, while the context lasts."""
    ended = threading.Event()

    def sweep() -> None:
        while not ended.wait(SWEEP_SECONDS):
            try:
                store.sweep(KEPT_SECONDS)
            except OSError:  # tried again next time
                _log.exception("old files could not be deleted")

    thread = threading.Thread(target=sweep, name="sweep", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
