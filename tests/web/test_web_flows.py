"""What a visitor does beside running: results used again, history, masks, pasting, reloading; the page in a browser."""

import base64
import os
from pathlib import Path

import numpy as np
import pytest
from playwright import sync_api as playwright
from test_web_browser import (
    CHROMIUM,
    EDIT,
    SUBJECT,
    SUBJECT_EDIT,
    WAIT,
    address,
    browser,
    choose,
    counted,
    keep_seed,
    message,
    opened,
    pictures,
    run,
    service,
    upload,
    write,
)

from mige.tasks import Task
from mige.utils.images import open_image
from mige.web import page
from mige.web.provenance import read_settings
from mige.web.service import GenerationService

__all__ = ["address", "browser", "opened", "pictures", "service"]  # fixtures
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: apt-get install chromium"),
]
FILES = """([name, ...files]) => {
  const moved = new DataTransfer();
  for (const [title, data] of files) {
    const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
    moved.items.add(new File([bytes], title, { type: "image/png" }));
  }
  const how = { bubbles: true, cancelable: true };
  if (name === "paste")
    document.activeElement.dispatchEvent(new ClipboardEvent("paste", { ...how, clipboardData: moved }));
  else [...document.querySelectorAll(name)].find((one) => one.checkVisibility())
    .dispatchEvent(new DragEvent("drop", { ...how, dataTransfer: moved }));
}"""  # as a browser tells of files that are pasted, or dropped on what a selector names


def files(*paths) -> list[list[str]]:
    return [[Path(path).name, base64.b64encode(Path(path).read_bytes()).decode()] for path in paths]


def current(window):
    return window.locator("[role=tabpanel]:visible")


def filled(tab):
    return tab.locator(".mige-slot img")


def made(tab, *paths, text: str = "erase the thing at the top", **settings: int) -> None:
    upload(tab, *paths)
    write(tab, text)
    for label, value in ({"Steps": 2} | settings).items():
        choose(tab, label, value)
    keep_seed(tab)
    run(tab)
    tab.locator(".mige-stage.done").wait_for(timeout=WAIT)
    playwright.expect(tab.get_by_text("Download PNG of seed 0")).to_be_visible()


def saved(window, tab, path: Path, name: str = "Download PNG of") -> Path:
    with window.expect_download() as download:
        tab.get_by_text(name).click()
    download.value.save_as(path)
    return path


def test_an_edit_is_gone_on_with_and_comes_back_from_the_history(opened, pictures, tmp_path):
    window, tab = opened(tab=EDIT)
    made(tab, *pictures[Task.EDIT])
    first = saved(window, tab, tmp_path / "first.png")
    tab.get_by_role("button", name="Use as picture 1").click()
    shown = tab.locator(".mige-pair .after").evaluate("one => one.src")
    playwright.expect(filled(tab)).to_have_attribute("src", shown)
    run(tab)
    playwright.expect(window.locator(".mige-entry")).to_have_count(2, timeout=WAIT)
    assert (np.asarray(open_image(saved(window, tab, tmp_path / "second.png"))) != np.asarray(open_image(first))).any()
    tab.get_by_role("button", name="Use as subject").click()
    playwright.expect(window.get_by_role("tab", name=SUBJECT_EDIT, exact=True)).to_have_attribute(
        "aria-selected", "true"
    )
    playwright.expect(filled(current(window))).to_have_count(1)
    assert current(window).locator(".mige-slot").nth(1).locator("img").count() == 1
    window.locator(".mige-entry").last.click()  # the first run, on its own tab
    playwright.expect(window.get_by_role("tab", name=EDIT, exact=True)).to_have_attribute("aria-selected", "true")
    playwright.expect(tab.locator(".mige-pair .after")).to_be_visible()
    again = saved(window, tab, tmp_path / "again.png")
    assert again.read_bytes() == first.read_bytes()


def test_what_was_swept_stays_in_the_history_as_expired(browser, lively, pictures):
    from mige.inference.pipeline import MIGEPipeline

    own = GenerationService(MIGEPipeline.from_pretrained(lively), "lively")
    with page.serving(own) as address:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        window = browser.new_page()
        window.goto(address)
        window.get_by_role("tab", name=EDIT, exact=True).click()
        made(current(window), *pictures[Task.EDIT])
        other = browser.new_context().new_page()
        other.goto(address)
        playwright.expect(other.locator(".mige-none")).to_be_visible()  # nobody sees what another made
        for entry in folder.iterdir():
            os.utime(entry, (0, 0))
        page.FileStore.sweep(_store_of(folder), 1.0)
        window.reload()
        playwright.expect(window.locator(".mige-entry .expired")).to_have_text("expired")
        write(current(window), "something else")
        window.locator(".mige-entry").click()
        playwright.expect(current(window).get_by_label("Instruction")).to_have_value("erase the thing at the top")
        playwright.expect(filled(current(window))).to_have_count(0)
        window.close()
        other.close()


def _store_of(folder: Path):
    import gc

    [store] = [one for one in gc.get_objects() if isinstance(one, page.FileStore) and one.folder == folder]
    return store


def test_a_reload_brings_back_what_was_written_and_made(opened, pictures):
    window, tab = opened(tab=EDIT)
    made(tab, *pictures[Task.EDIT], Pictures=2)
    write(tab, "erase the thing on the left")
    window.wait_for_timeout(500)
    window.reload()
    playwright.expect(window.get_by_role("tab", name=EDIT, exact=True)).to_have_attribute("aria-selected", "true")
    tab = current(window)
    playwright.expect(tab.get_by_label("Instruction")).to_have_value("erase the thing on the left")
    playwright.expect(filled(tab)).to_have_count(1)
    playwright.expect(tab.get_by_label("number input for Pictures")).to_have_value("2")
    playwright.expect(window.locator(".mige-entry")).to_have_count(1)
    run(tab)
    playwright.expect(window.locator(".mige-entry")).to_have_count(2, timeout=WAIT)


def test_a_reload_ends_the_work(opened, pictures, service):
    window, tab = opened(tab=EDIT)
    upload(tab, *pictures[Task.EDIT])
    write(tab, "erase the thing at the top")
    choose(tab, "Steps", 100)
    with counted(service) as calls:
        run(tab)
        playwright.expect(tab.locator(".mige-stage")).to_contain_text("Step", timeout=WAIT)
        window.reload()
        service._worker.submit(int).result()
    assert len(calls) < 90


def test_outside_a_painted_mask_nothing_changes(opened, pictures, tmp_path):
    window, tab = opened(tab=EDIT)
    upload(tab, *pictures[Task.EDIT])
    tab.get_by_text("Change only a part of picture 1").click()
    canvas = tab.locator(".mige-mask canvas")
    box = canvas.bounding_box()
    window.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.2 * box["height"])
    window.mouse.down()
    window.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.3 * box["height"], steps=4)
    window.mouse.up()
    canvas.focus()
    for key in ("ArrowDown", "Space", "Space", "Backspace"):  # one dot below the centre, by keyboard
        window.keyboard.press(key)
    playwright.expect(tab.locator(".mige-mask output")).to_have_text("Only what is painted may change.")
    write(tab, "erase the thing at the top")
    choose(tab, "Steps", 2)
    run(tab)
    playwright.expect(tab.locator(".mige-stage.done")).to_contain_text("inside the mask alone", timeout=WAIT)
    result = saved(window, tab, tmp_path / "result.png")
    mask = read_settings(result)["mask"]
    assert len(mask) == 2 and mask[0][1:3] == pytest.approx([0.6, 0.2], abs=0.01)
    assert mask[1][1:] == pytest.approx([0.5, 0.52], abs=0.001)
    before, after = (np.asarray(open_image(path)).astype(int) for path in (pictures[Task.EDIT][0], result))
    changed = (before != after).any(-1)
    rows, columns = changed.nonzero()
    assert changed.any() and rows.max() < 0.65 * 128 and columns.max() < 0.9 * 128 and columns.min() > 0.4 * 128
    tab.get_by_label("Remove Picture 1").click()  # with its picture the mask goes
    playwright.expect(tab.locator(".mige-mask-none")).to_be_visible()
    upload(tab, *pictures[Task.EDIT])
    playwright.expect(tab.locator(".mige-mask output")).to_have_text("")


def test_several_files_are_pasted_and_dropped_and_what_finds_no_place_is_said(opened, pictures):
    window, tab = opened(tab=SUBJECT)
    one, two = pictures[Task.SUBJECT]
    window.evaluate(FILES, ["[role=tabpanel]:not([style*=none]) .mige-output", *files(one, two)])
    playwright.expect(filled(tab)).to_have_count(2)
    places = tab.locator(".mige-slot").count()
    tab.get_by_label("Instruction").focus()
    window.evaluate(FILES, ["paste", *files(*[one] * (places - 1))])
    playwright.expect(filled(tab)).to_have_count(places)
    playwright.expect(window.locator(".mige-said")).to_contain_text(f"1 of {places - 1} files found no free place")


def test_a_result_png_gives_its_settings_back_and_no_other_file_does(opened, pictures, tmp_path):
    window, tab = opened(tab=EDIT)
    made(tab, *pictures[Task.EDIT], Steps=3)
    result = saved(window, tab, tmp_path / "result.png")
    window.get_by_role("tab", name=SUBJECT, exact=True).click()
    write(current(window), "something else")
    window.evaluate(FILES, [".mige-restore", *files(result)])
    playwright.expect(window.get_by_role("tab", name=EDIT, exact=True)).to_have_attribute("aria-selected", "true")
    playwright.expect(tab.get_by_label("Instruction")).to_have_value("erase the thing at the top")
    playwright.expect(tab.get_by_label("number input for Steps")).to_have_value("3")
    window.evaluate(FILES, [".mige-restore", *files(pictures[Task.EDIT][0])])
    playwright.expect(message(window)).to_contain_text("This file holds no settings of MIGE")


def test_keys_run_stop_and_compare(opened, pictures, service):
    window, tab = opened(tab=EDIT)
    upload(tab, *pictures[Task.EDIT])
    write(tab, "erase the thing at the top")
    choose(tab, "Steps", 100)
    with counted(service) as calls:
        tab.get_by_label("Instruction").press("Control+Enter")
        playwright.expect(tab.get_by_role("progressbar", name="Steps")).to_be_visible(timeout=WAIT)
        window.keyboard.press("Escape")
        playwright.expect(tab.locator(".mige-stage")).to_contain_text("Nothing was made")
        service._worker.submit(int).result()
    assert len(calls) < 90
    choose(tab, "Steps", 2)
    tab.get_by_label("Instruction").press("Control+Enter")
    tab.locator(".mige-stage.done").wait_for(timeout=WAIT)
    slider = tab.get_by_role("slider", name="How much of the input is shown")
    slider.focus()
    before = tab.locator(".mige-edge").bounding_box()["x"]
    for _ in range(20):
        slider.press("ArrowRight")
    assert tab.locator(".mige-edge").bounding_box()["x"] > before + 20


def test_every_run_has_a_new_seed_until_it_is_kept(opened, pictures):
    window, tab = opened(tab=EDIT)
    upload(tab, *pictures[Task.EDIT])
    write(tab, "erase the thing at the top")
    choose(tab, "Steps", 1)
    seeds = []
    for number in range(1, 4):
        run(tab)
        playwright.expect(window.locator(".mige-entry")).to_have_count(number, timeout=WAIT)
        seed = tab.get_by_label("Seed", exact=True).input_value()
        playwright.expect(tab.get_by_text(f"Download PNG of seed {seed}")).to_be_visible(timeout=WAIT)
        seeds.append(seed)
        if len(seeds) == 2:
            keep_seed(tab)
    assert seeds[0] != seeds[1] == seeds[2]


def test_a_shape_sets_both_sides(opened, pictures):
    _, tab = opened(tab=EDIT)
    upload(tab, *pictures[Task.EDIT])
    tab.get_by_text("Size, steps, guidance").click()
    tab.get_by_role("radio", name="3:2").check()
    width, height = (tab.get_by_label(f"number input for {side}") for side in ("Width", "Height"))
    playwright.expect(width).not_to_have_value("0")
    assert int(width.input_value()) / int(height.input_value()) == pytest.approx(1.5, rel=0.1)
    tab.get_by_role("radio", name="As picture 1").check()
    playwright.expect(width).to_have_value("0")


def test_a_refusal_stays_until_it_is_closed_and_names_the_place_it_is_about(opened, pictures):
    window, tab = opened(tab=EDIT)
    upload(tab, *pictures[Task.EDIT])
    run(tab)
    playwright.expect(message(window)).to_contain_text("The instruction is empty")
    window.wait_for_timeout(11_000)  # Gradio's own go after ten seconds
    playwright.expect(message(window)).to_contain_text("The instruction is empty")


NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, canvas, select, [role=slider], img")]
  .filter((one) => one.checkVisibility({visibilityProperty: true}) && !(one.getAttribute("aria-label") || one.title
    || one.alt || one.textContent.trim() || one.labels?.length || one.closest("td, .mige-entry, .mige-mask")))
  .map((one) => one.outerHTML.slice(0, 160))"""


def test_every_control_has_a_name_and_states_are_told(opened, pictures):
    window, tab = opened(tab=EDIT)
    made(tab, *pictures[Task.EDIT], Pictures=2)
    window.wait_for_timeout(500)
    assert window.evaluate(NAMELESS) == []
    assert tab.locator(".block.mige-result").get_attribute("aria-live") == "polite"
    window.get_by_role("tab", name=SUBJECT_EDIT, exact=True).click()
    names = (
        current(window)
        .locator(".mige-slot [aria-label^='Upload Picture']")
        .evaluate_all("all => all.map((one) => one.getAttribute('aria-label'))")
    )
    places = current(window).locator(".mige-slot").count()
    assert set(names) == {f"Upload Picture {number}" for number in range(1, places + 1)}


def test_a_server_that_is_gone_is_said(browser, lively):
    from mige.inference.pipeline import MIGEPipeline

    own = GenerationService(MIGEPipeline.from_pretrained(lively), "lively")
    window = browser.new_page()
    with page.serving(own) as address:
        window.goto(address)
        window.wait_for_timeout(6000)  # one look while it is there
        assert window.locator(".mige-lost").count() == 0
    playwright.expect(window.locator(".mige-lost")).to_contain_text("The server does not answer")
    window.close()
