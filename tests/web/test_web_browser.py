"""The page in a real browser: headless Chromium drives every tab, from upload to download.

The model is a tiny one, each step of which waits as if it were large: what a test looks at on the way stays to be seen.
"""

import shutil
import threading
import time
from pathlib import Path

import pytest
from playwright import sync_api as playwright
from test_web_service import BAD_FILES

from mige.inference.pipeline import MIGEPipeline
from mige.tasks import Task
from mige.utils.images import open_image
from mige.web import page, traffic
from mige.web.examples import of_the_world
from mige.web.provenance import read_settings
from mige.web.service import GenerationService

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: apt-get install chromium"),
]

playwright.expect.set_options(timeout=60_000)

SUBJECT, EDIT, SUBJECT_EDIT = TITLES = [job.title for job in page.JOBS]
WAIT = 240_000  # ms: for work of the model, on a busy machine


@pytest.fixture(scope="module")
def service(lively) -> GenerationService:
    return GenerationService(MIGEPipeline.from_pretrained(lively), "lively")


@pytest.fixture(scope="module")
def address(service):
    with page.serving(service) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        # Chromium's sandbox needs rights that containers seldom give; the only page it opens is ours.
        yield running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def opened(browser, address):
    """Opens a window on the page; in the end, nothing was asked of any other host and nothing failed in the browser."""
    context = browser.new_context(accept_downloads=True)
    context.set_default_timeout(WAIT)
    elsewhere, errors = [], []

    def note(request) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            elsewhere.append(request.url)

    def at(width: int = 1400, theme: str = "light", tab: str = SUBJECT):
        window = context.new_page()
        window.set_viewport_size({"width": width, "height": 900})
        window.on("request", note)
        window.on("pageerror", lambda error: errors.append(str(error)))
        window.goto(f"{address}?__theme={theme}")
        window.get_by_role("tab", name=tab, exact=True).click()
        return window, window.locator("[role=tabpanel]:visible")

    yield at
    context.close()
    assert elsewhere == [] and errors == []


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[Task, tuple[Path, ...]]:
    folder = tmp_path_factory.mktemp("pictures")
    return {task: of_the_world(task, folder)[1 if task is Task.SUBJECT else 0].pictures for task in Task}


def upload(tab, *paths) -> None:
    for number, path in enumerate(paths):
        tab.locator(".mige-slot").nth(number).locator("input[type=file]").set_input_files(path)
        tab.locator(".mige-slot").nth(number).locator("img").wait_for()


def write(tab, text: str) -> None:
    tab.get_by_label("Instruction").fill(text)


def choose(tab, label: str, value: int) -> None:
    number = tab.get_by_label(f"number input for {label}")
    if not number.is_visible():
        tab.get_by_text("Size, steps, guidance").click()
    for _ in range(10):  # a slider that has only just been drawn may go back to its first value
        number.fill(str(value))
        number.press("Tab")
        tab.page.wait_for_timeout(300)
        if number.input_value() == str(value):
            return
    raise AssertionError(f"{label} does not stay at {value}")


def keep_seed(tab) -> None:
    tab.get_by_label("New seed at every run").uncheck()


def run(tab) -> None:
    tab.get_by_role("button", name="Run", exact=True).click()


def message(window):
    return window.get_by_test_id("toast-body")


class counted:  # noqa: N801 - reads as a verb
    """The calls of the service's network while the context lasts. Each takes as long as those of a large one.

    Args:
        go_on: if given, the third call lasts until it is set.
    """

    def __init__(self, service: GenerationService, go_on: threading.Event | None = None):
        self.network, self.calls, self.go_on = service.pipeline.transformer, [], go_on

    def __enter__(self) -> list[int]:
        self.hook = self.network.register_forward_hook(self._note)
        return self.calls

    def __exit__(self, *_) -> None:
        if self.go_on is not None:
            self.go_on.set()
        self.hook.remove()

    def _note(self, *_) -> None:
        self.calls.append(1)
        if self.go_on is None:
            time.sleep(0.3)
        elif len(self.calls) == 3:
            self.go_on.wait()


CASES = [
    (SUBJECT, Task.SUBJECT, "a picture 2 at the top and a picture 1 on the left", ["2", "1"]),
    (EDIT, Task.EDIT, "erase the thing at the top", ["1"]),
    (SUBJECT_EDIT, Task.SUBJECT_EDIT, "in picture 1 add a picture 2 at the top", ["1", "2"]),
]


@pytest.mark.parametrize(("title", "task", "text", "numbers"), CASES, ids=list(Task))
def test_from_upload_to_download(opened, pictures, service, tmp_path, title, task, text, numbers):
    window, tab = opened(tab=title)
    upload(tab, *pictures[task])
    write(tab, text)
    chips = tab.locator(".mige-chip")
    playwright.expect(chips).to_have_text(numbers)
    assert tab.locator(".mige-chip img").evaluate_all("all => all.every(one => one.complete && one.naturalWidth > 0)")
    choose(tab, "Steps", 4)
    choose(tab, "Pictures", 2)
    keep_seed(tab)
    with counted(service, threading.Event()):
        run(tab)
        playwright.expect(tab.locator(".mige-previews img")).to_have_count(2, timeout=WAIT)
        playwright.expect(tab.locator(".mige-stage")).to_contain_text("of 4")
    tab.locator(".mige-stage.done").wait_for(timeout=WAIT)
    playwright.expect(tab.locator(".mige-gallery img")).to_have_count(2)
    playwright.expect(tab.locator(".mige-compare")).to_have_count(0 if task is Task.SUBJECT else 1)
    tab.locator(".mige-gallery button").nth(1).click()
    with window.expect_download() as download:
        tab.get_by_text("Download PNG of seed 1").click()
    download.value.save_as(tmp_path / "result.png")
    settings = read_settings(tmp_path / "result.png")
    assert (settings["instruction"], settings["seed"], settings["steps"]) == (text, 1, 4)
    assert open_image(tmp_path / "result.png").size == (128, 128)


def test_an_example_is_one_click_away(opened):
    _, tab = opened(tab=SUBJECT_EDIT)
    tab.locator("table tbody tr").first.click()
    playwright.expect(tab.locator(".mige-chip")).to_have_count(2)
    assert "picture 2" in tab.get_by_label("Instruction").input_value()


def test_stop_ends_the_work(opened, pictures, service):
    _, tab = opened(tab=EDIT)
    upload(tab, *pictures[Task.EDIT])
    write(tab, "erase the thing at the top")
    choose(tab, "Steps", 100)
    with counted(service) as calls:
        run(tab)
        playwright.expect(tab.locator(".mige-stage")).to_contain_text("Step", timeout=WAIT)
        tab.get_by_role("button", name="Stop", exact=True).click()
        playwright.expect(tab.locator(".mige-stage")).to_contain_text("Nothing was made")
        playwright.expect(tab.get_by_role("button", name="Run", exact=True)).to_be_visible()
        service._worker.submit(int).result()
    assert len(calls) < 90


def test_closing_the_window_ends_the_work(opened, pictures, service):
    window, tab = opened(tab=EDIT)
    upload(tab, *pictures[Task.EDIT])
    write(tab, "erase the thing at the top")
    choose(tab, "Steps", 100)
    with counted(service) as calls:
        run(tab)
        playwright.expect(tab.locator(".mige-stage")).to_contain_text("Step", timeout=WAIT)
        window.close()
        service._worker.submit(int).result()
    assert len(calls) < 90


def test_who_waits_sees_the_place(opened, pictures, service):
    tabs, hold = [], threading.Event()
    service._worker.submit(hold.wait)  # the first one takes until all are there
    try:
        for _ in range(3):
            _, tab = opened(tab=EDIT)
            upload(tab, *pictures[Task.EDIT])
            write(tab, "erase the thing at the top")
            choose(tab, "Steps", 2)
            run(tab)
            tabs.append(tab)
        playwright.expect(tabs[1].locator(".mige-stage")).to_contain_text("Your turn is next", timeout=WAIT)
        playwright.expect(tabs[2].locator(".mige-stage")).to_contain_text("Place 2 in the queue", timeout=WAIT)
        tabs[1].get_by_role("button", name="Stop", exact=True).click()
        playwright.expect(tabs[2].locator(".mige-stage")).to_contain_text("Your turn is next", timeout=WAIT)
    finally:
        hold.set()
    for tab in (tabs[0], tabs[2]):
        tab.locator(".mige-stage.done").wait_for(timeout=WAIT)


def test_a_mismatch_is_said_while_typing_and_when_run(opened, pictures):
    window, tab = opened(tab=SUBJECT)
    upload(tab, pictures[Task.SUBJECT][0])
    write(tab, "a picture 1 and a picture 3 on the left")
    playwright.expect(tab.locator(".mige-reads .wrong")).to_contain_text("names picture 3, but there is none")
    run(tab)
    playwright.expect(message(window)).to_contain_text("names picture 3, but there is none")
    playwright.expect(tab.get_by_role("button", name="Run", exact=True)).to_be_visible()


def test_a_bad_file_is_said_and_the_next_run_works(opened, pictures, tmp_path):
    window, tab = opened(tab=EDIT)
    (tmp_path / "bomb.png").write_bytes(BAD_FILES["bomb"][0]())
    tab.locator("input[type=file]").first.set_input_files(tmp_path / "bomb.png")
    write(tab, "erase the thing at the top")
    playwright.expect(tab.locator(".mige-chip")).to_have_count(1)
    playwright.expect(tab.locator(".mige-reads")).to_contain_text("Picture 1 is no image that can be read")
    run(tab)
    playwright.expect(message(window)).to_contain_text("Picture 1: ", timeout=WAIT)
    playwright.expect(tab.locator(".mige-stage")).to_contain_text("Nothing was made")
    playwright.expect(tab.get_by_role("button", name="Run", exact=True)).to_be_visible()
    tab.get_by_label("Remove Picture 1").click()
    upload(tab, *pictures[Task.EDIT])
    choose(tab, "Steps", 2)
    run(tab)
    tab.locator(".mige-stage.done").wait_for(timeout=WAIT)


def test_an_upload_over_the_limit_is_said(opened, tmp_path):
    window, tab = opened(tab=EDIT)
    (tmp_path / "large.png").write_bytes(bytes(traffic.UPLOAD_MB * 2**20 + 1))
    tab.locator("input[type=file]").first.set_input_files(tmp_path / "large.png")
    playwright.expect(message(window)).to_contain_text("size")


# The text of a page whose contrast is below WCAG 2.1's AA (1.4.3): 4.5, of large text 3. Images have no text of ours.
FAINT = """() => {
  const parse = c => { const [r, g, b, a = 1] = c.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = (top, below) => top.map((v, i) => i < 3 ? v * top[3] + below[i] * (1 - top[3]) : 1);
  const behind = one => { const layers = [];
    for (let e = one; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reduceRight((below, top) => over(top, below), [255, 255, 255, 1]); };
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((m, n) => n - m); return (x + .05) / (y + .05); };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join("");
    const says = [[text, null]].concat(e.placeholder && !e.value ? [[e.placeholder, "::placeholder"]] : []);
    const written = "input:not([type=range], [type=radio], [type=checkbox]), textarea";
    if (e.value && e.matches(written)) says.push([e.value, null]);
    for (const [words, pseudo] of says) {
      const style = getComputedStyle(e, pseudo), box = e.getBoundingClientRect();
      if (!words || !e.checkVisibility({visibilityProperty: true, opacityProperty: true}) || box.width < 2) continue;
      if (e.matches(":disabled, script, style") || parse(style.color).length < 3) continue;
      const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
      const below = behind(e), got = ratio(over(parse(style.color), below), below);
      if (got < (large ? 3 : 4.5)) found.push(`${words.slice(0, 40)}: ${got.toFixed(2)} ${style.color} on ${below}`);
    }
  }
  return found;
}"""


# Texts of which a side lies beyond what cuts them off: a column too narrow for a slider's largest number.
CUT = """() => [...document.querySelectorAll("[role=tabpanel] *")].filter(e => {
  if (!e.checkVisibility({visibilityProperty: true}) || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
    return false;
  const range = document.createRange(); range.selectNodeContents(e);
  const text = range.getBoundingClientRect();
  for (let p = e.parentElement; p; p = p.parentElement) {
    const box = p.getBoundingClientRect();
    if (getComputedStyle(p).overflowX !== "visible" && (text.right > box.right + 1 || text.left < box.left - 1))
      return true;
  }
}).map(e => e.textContent.slice(0, 40))"""


def test_on_a_phone_a_result_is_seen_whole_and_survives_a_stop(opened, pictures, service):
    window, tab = opened(390, tab=EDIT)
    upload(tab, *pictures[Task.EDIT])
    write(tab, "erase the thing at the top")
    choose(tab, "Pictures", 4)
    keep_seed(tab)
    choose(tab, "Steps", 100)
    with counted(service):  # long enough for the bar to be looked at
        run(tab)
        playwright.expect(tab.locator(".mige-bar")).to_be_in_viewport(timeout=WAIT)
        tab.get_by_role("button", name="Stop", exact=True).click()
    choose(tab, "Steps", 2)
    run(tab)
    tab.locator(".mige-stage.done").wait_for(timeout=WAIT)
    images = tab.locator(".mige-gallery .grid-wrap img")
    playwright.expect(images).to_have_count(4)
    window.set_viewport_size({"width": 390, "height": 400})  # lower than the grid: it is not cut, the page scrolls
    assert tab.locator(".mige-gallery .grid-wrap").evaluate("one => one.scrollHeight <= one.clientHeight")
    for side in ("Before", "After"):
        playwright.expect(tab.locator(".mige-compare").get_by_text(side, exact=True)).to_be_visible()
    edge, pair = tab.locator(".mige-edge").bounding_box(), tab.locator(".mige-pair").bounding_box()
    assert edge["x"] - pair["x"] < pair["width"] / 4  # the result has three quarters of the width
    shown = images.evaluate_all("all => all.map(one => one.src)")
    choose(tab, "Steps", 100)
    with counted(service):
        run(tab)
        playwright.expect(tab.locator(".mige-stage")).to_contain_text("of 100", timeout=WAIT)
        assert window.evaluate(FAINT) == []
        tab.get_by_role("button", name="Stop", exact=True).click()
        playwright.expect(tab.locator(".mige-stage")).to_contain_text("Below is the result from before")
    assert images.evaluate_all("all => all.map(one => one.src)") == shown
    playwright.expect(tab.get_by_text("Download PNG of seed 0")).to_be_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [2560, 1400, 390])
def test_nothing_is_wider_than_the_window_or_too_faint_to_read(opened, width, theme):
    window, _ = opened(width, theme)
    for title in TITLES:
        window.get_by_role("tab", name=title, exact=True).click()
        playwright.expect(window.locator("[role=tabpanel]:visible").get_by_text("Examples")).to_be_visible()
        assert window.evaluate("document.documentElement.scrollWidth") <= width
        write(window.locator("[role=tabpanel]:visible"), "a picture 9" if title == EDIT else "")
        window.wait_for_timeout(300)  # transitions of colours
        assert window.evaluate(FAINT) == []
    if width == 1400 and theme == "light":  # settings opened where two columns have least room
        window.set_viewport_size({"width": 800, "height": 900})
        window.locator("[role=tabpanel]:visible").get_by_text("Size, steps, guidance").click()
        window.wait_for_timeout(300)
        assert window.evaluate(CUT) == []
    assert window.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
