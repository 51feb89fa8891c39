"""The report: every case is drawn, images keep their shape, and the page stands on its own."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from conftest import image_size
from PIL import Image, ImageFont

from mige.reports import sheet as report
from mige.reports import thumbnails
from mige.reports.cases import Case
from mige.reports.page import html_page
from mige.reports.sheet import contact_sheet

RED, GREEN, BLUE = (220, 30, 30), (30, 180, 30), (30, 30, 220)


def image(colour=RED, size=(64, 64)):
    return Image.new("RGB", size, colour)


def case(instruction="A photo of <imagehere>.", inputs=None, output=None, **changes):
    inputs = (("image 1", image()),) if inputs is None else inputs
    fields = {"title": "record 1", "task": "subject", "detail": "seed 0, 50 steps"} | changes
    return Case(instruction=instruction, inputs=inputs, output=output or image(BLUE), **fields)


def box_of(sheet, colour):
    """(left, top, width, height) of the pixels of one colour."""
    ys, xs = np.nonzero((np.asarray(sheet) == colour).all(-1))
    return xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1


class Page(HTMLParser):
    """What a browser would make of a page: its tags with attributes, and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag, **attrs):
        return [found for name, found in self.tags if name == tag and attrs.items() <= found.items()]

    def links(self):
        return [found[name] for _, found in self.tags for name in ("href", "src") if name in found]


def test_sheet_shows_images_undistorted_and_in_columns(tmp_path):
    cases = [
        case(inputs=(("source", image(RED, (200, 100))),), output=image(BLUE, (30, 60))),
        case(inputs=(("source", image(GREEN, (200, 100))),), output=image(BLUE, (30, 60))),
    ]
    (path,) = contact_sheet(cases, tmp_path / "new" / "sheet.png", tile=160)
    sheet = Image.open(path)
    red, green, blue = (box_of(sheet, colour) for colour in (RED, GREEN, BLUE))
    assert red[2:] == (160, 80)
    assert green[0] == red[0] and green[1] > red[1] + red[3]
    assert blue[2] == 80 and blue[0] > red[0] + red[2]


def test_what_is_beside_an_output_is_right_of_it_on_sheet_and_page(tmp_path):
    shown = case(output=image(BLUE), beside=(("truth", image(GREEN)),))
    (path,) = contact_sheet([shown, case(output=image(BLUE))], tmp_path / "sheet.png", tile=160)
    with Image.open(path) as sheet:
        _, (x, _, *size) = (box_of(sheet, colour) for colour in (BLUE, GREEN))
        assert size == [160, 160] and x == sheet.width - 24 - 160
    html_page([shown], tmp_path / "page", title="t")
    drawn = [one["alt"].split(" of ")[0] for one in Page(tmp_path / "page" / "index.html").all("img")]
    assert drawn[-2:] == ["output", "truth"]


def test_a_very_thin_image_can_be_drawn(tmp_path):
    (path,) = contact_sheet([case(output=image(BLUE, (3000, 1)))], tmp_path / "sheet.png", tile=160)
    assert box_of(Image.open(path), BLUE)[2:] == (160, 1)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 9])
def test_sheet_draws_every_input(tmp_path, count):
    colours = [(250, 20 * n, 7) for n in range(count)]
    inputs = tuple((f"image {n}", image(colour)) for n, colour in enumerate(colours))
    (path,) = contact_sheet([case(inputs=inputs)], tmp_path / "sheet.png")
    boxes = [box_of(Image.open(path), colour) for colour in colours]  # an absent colour makes box_of fail
    assert len({(x, y) for x, y, _, _ in boxes}) == count


def test_long_runs_go_on_to_further_sheets(tmp_path):
    cases = [case(output=image((n, 100, 200))) for n in range(101)]
    paths = contact_sheet(cases, tmp_path / "sheet.png", tile=64)
    assert [path.name for path in paths] == ["sheet.png", "sheet_2.png", "sheet_3.png"]
    found = set()
    for path in paths:
        found |= {colour for _, colour in Image.open(path).getcolors(1 << 20)}
    assert {(n, 100, 200) for n in range(101)} <= found


def test_sheets_of_large_tiles_stay_within_what_viewers_open(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SHEET_HEIGHT", 700)
    paths = contact_sheet([case() for _ in range(5)], tmp_path / "sheet.png", tile=256)
    assert len(paths) == 3
    assert all(image_size(path)[1] < 700 for path in paths)


def test_sheet_numbers_the_markers(tmp_path, monkeypatch):
    texts = []
    wrap = report.wrap
    monkeypatch.setattr(report, "wrap", lambda text, *args, **kw: texts.append(text) or wrap(text, *args, **kw))
    contact_sheet([case("Put <imagehere> next to <ImageHere>.")], tmp_path / "sheet.png")
    assert "Put [1] next to [2]." in texts


def test_a_note_adds_a_banner(tmp_path):
    (plain,) = contact_sheet([case()], tmp_path / "plain.png")
    (noted,) = contact_sheet([case()], tmp_path / "noted.png", note="These weights are untrained.")
    assert image_size(noted)[1] > image_size(plain)[1]


@pytest.mark.parametrize("text", ["word " * 500, "x" * 3000, "a " + "x" * 300 + " end", "猫" * 400])
def test_wrapped_lines_fit_and_end_in_an_ellipsis(text):
    font = ImageFont.load_default(size=16)
    lines = report.wrap(text, font, 200, lines=2)
    assert len(lines) == 2
    assert all(0 < font.getlength(line) <= 200 for line in lines)
    assert lines[-1].endswith("…")


def test_wrapping_loses_no_word_when_there_is_room():
    font = ImageFont.load_default(size=16)
    text = "seat the cat at a small round table " + "y" * 60 + " at dusk"
    lines = report.wrap(text, font, 150, lines=50)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert not any("…" in line for line in lines)
    assert report.wrap(" \n ", font, 150, lines=3) == []


def test_text_that_the_font_lacks_is_folded():
    assert report._drawable("naïve café – “ok”") == 'naive cafe - "ok"'
    assert report._drawable("猫 cat") == "? cat"


@pytest.mark.parametrize("write", [contact_sheet, lambda cases, path: html_page(cases, path, title="t")])
def test_no_cases_is_an_error(tmp_path, write):
    with pytest.raises(ValueError, match="no cases"):
        write([], tmp_path / "report")
    assert list(tmp_path.iterdir()) == []


def test_page_is_complete_after_moving_the_folder(tmp_path):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    inside, outside, source = folder / "made" / "a #1 50%?.png", elsewhere / "b.png", elsewhere / "source.png"
    for path in (inside, outside, source):
        path.parent.mkdir(parents=True, exist_ok=True)
    image(GREEN).save(inside)
    image(BLUE).save(outside)
    image(RED, (1000, 500)).save(source)
    inputs = (("source", source),)
    cases = [case(inputs=inputs, output=inside), case(inputs=inputs, output=outside), case(output=image(RED))]
    assert html_page(cases, folder, title="t") == folder / "index.html"

    moved = folder.rename(tmp_path / "moved")
    for path in (outside, source):
        path.unlink()
    links = [link for link in Page(moved / "index.html").links() if not link.startswith("#")]
    assert links
    for link in links:
        assert ":" not in link and not link.startswith("/") and ".." not in Path(link).parts
        Image.open(moved / unquote(link)).load()
    assert "made/a%20%231%2050%25%3F.png" in links
    thumbnails = [image_size(path) for path in (moved / "inputs").iterdir()]
    assert sorted(thumbnails) == [(64, 64), (512, 256)]  # an image shared by two cases is kept once
    assert not [path for path in moved.iterdir() if path.name.startswith(".")]


def test_outputs_are_copied_without_loss(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 600, 3), dtype=np.uint8))
    html_page([case(output=noise)], tmp_path, title="t")
    (copy,) = (tmp_path / "outputs").iterdir()
    np.testing.assert_array_equal(np.asarray(Image.open(copy)), np.asarray(noise))


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.jpg"])
def test_an_output_that_is_turned_has_its_upright_shape(tmp_path, name):
    """In the page's folder, so that it is linked and not copied; Pillow turns a TIFF itself, but keeps its tag."""
    exif = Image.Exif()
    exif[274] = 6
    image(size=(40, 20)).save(tmp_path / name, exif=exif)
    page = Page(html_page([case(output=tmp_path / name)], tmp_path, title="t"))
    [shown] = page.all("img", src=name)
    assert (shown["width"], shown["height"]) == ("20", "40")


def test_an_image_of_any_mode_is_shown_as_it_is_read(tmp_path):
    """Transparency on black, sixteen bits scaled, turned upright: as when it is read from a file."""
    clear = Image.new("RGBA", (8, 4), (200, 100, 50, 0))
    deep = Image.fromarray(np.full((4, 8), 100 * 257, np.uint16))
    turned = image(size=(8, 4))
    turned.getexif()[274] = 6
    for given, size, colour in ((clear, (8, 4), (0, 0, 0)), (deep, (8, 4), (100, 100, 100)), (turned, (4, 8), RED)):
        folder = tmp_path / str(colour)
        html_page([case(output=given)], folder, title="t")
        [copy] = (folder / "outputs").iterdir()
        shown = Image.open(copy)
        assert (shown.size, shown.getpixel((0, 0))) == (size, colour)


def test_markers_become_chips_of_the_references(tmp_path):
    inputs = (("source", image(RED)), ("image 1", image(GREEN)), ("image 2", image(BLUE)))
    html_page([case("Put <IMAGEHERE>, <imagehere>, <imagehere>.", inputs=inputs)], tmp_path, title="t")
    page = Page(tmp_path / "index.html")
    with_image, without = page.all("a", **{"class": "chip"}), page.all("span", **{"class": "chip"})
    colours = [Image.open(tmp_path / chip["href"]).getpixel((32, 32)) for chip in with_image]
    assert np.abs(np.array(colours) - (GREEN, BLUE)).max() < 8  # JPEG
    assert len(without) == 1
    assert "Put 1, 2, 3." in page.text
    assert "<b>1</b></a>,</span> " in (tmp_path / "index.html").read_text()  # no line begins with the comma


def test_everything_written_by_users_is_escaped(tmp_path):
    evil = "<script>alert(\"1\")</script> & 'x' 猫"
    inputs = ((evil, image()),)
    cases = [case(evil + "<imagehere>", inputs=inputs, title=evil, task=task, detail=evil) for task in (evil, "edit")]
    html_page(cases, tmp_path, title=evil, note=evil, summary={evil: evil})
    page = Page(tmp_path / "index.html")
    assert not page.all("script")
    # Page title twice, note, two summary cells, task in link and heading; per case its title, text, detail and label
    assert page.text.count(evil) == 7 + 2 * 4
    assert {image["alt"] for image in page.all("img")} == {evil, f"{evil} of {evil}", f"output of {evil}"}


def test_page_groups_by_task_and_shows_the_summary(tmp_path):
    tasks = ("edit", "subject", "edit")
    cases = [case(title=f"record {n}", task=task) for n, task in enumerate(tasks)]
    html_page(cases, tmp_path, title="A run", note="Untrained.", summary={"model": "mini"})
    page = Page(tmp_path / "index.html")
    wanted = ["A run", "Untrained.", "model", "mini", "Instruction-based editing 2", "record 0", "record 2"]
    wanted += ["Subject-driven generation 1", "record 1"]
    at = 0
    for text in wanted:  # in this order
        at = page.text.index(text, at)
    assert [section["id"] for section in page.all("section")] == ["task-1", "task-2"]
    assert [link for link in page.links() if link.startswith("#")] == ["#task-1", "#task-2"]


def test_a_failing_write_leaves_the_old_page(tmp_path):
    html_page([case()], tmp_path, title="old")
    with pytest.raises(UnicodeEncodeError):
        html_page([case("\ud800")], tmp_path, title="new")
    assert "<h1>old</h1>" in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not list(tmp_path.glob(".*"))


def test_reports_leave_the_callers_images_alone(tmp_path):
    big = image(RED, (900, 900))
    cases = [case(inputs=(("source", big),))]
    contact_sheet(cases, tmp_path / "sheet.png")
    html_page(cases, tmp_path, title="t")
    assert big.size == (900, 900)


def test_a_missing_image_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.png"):
        html_page([case(output=tmp_path / "gone.png")], tmp_path, title="t")


# ---- large runs ------------------------------------------------------------------------------------------------------


def many(folder, number):
    """Cases that share an input file, their outputs in the folder."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    image(RED).save(folder / "given.png")
    cases = []
    for n in range(number):
        output = folder / "images" / f"r{n:03}.png"
        image((n % 256, n // 256, 9), (8, 8)).save(output)
        task = "subject" if n < 150 else "edit"
        cases.append(case(inputs=(("image 1", folder / "given.png"),), output=output, title=f"r{n:03}", task=task))
    return cases


def test_many_cases_go_to_pages_of_200_with_an_index(tmp_path):
    html_page(many(tmp_path, 401), tmp_path, title="A run", note="mine", summary={"seed": "0"})
    index = Page(tmp_path / "index.html")
    pages = [link for link in index.links() if link.startswith("page_")]
    assert pages == ["page_1.html", "page_2.html", "page_3.html"] and not index.all("img")
    assert "200 cases: r000 to r199" in index.text and "1 cases: r400 to r400" in index.text
    assert "Instruction-based editing251" in index.text and "seed0" in index.text
    shown = []
    for n, name in enumerate(pages, start=1):
        page = Page(tmp_path / name)
        assert f"page {n} of 3" in page.text and "mine" in page.text and "index.html" in page.links()
        shown += [image["alt"] for image in page.all("img") if image["alt"].startswith("output")]
        for link in page.links():
            assert link.startswith("#") or (tmp_path / link).is_file(), link
    assert shown == [f"output of r{n:03}" for n in range(401)]
    html_page(many(tmp_path, 3), tmp_path, title="A run")
    assert not list(tmp_path.glob("page_*.html")) and len(Page(tmp_path / "index.html").all("article")) == 3


def test_pages_written_again_open_no_image(tmp_path, monkeypatch):
    cases = many(tmp_path, 5)
    html_page(cases, tmp_path, title="t")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "inputs").iterdir()}
    monkeypatch.setattr(thumbnails, "load", lambda path: pytest.fail(f"{path} was decoded again"))
    html_page(cases, tmp_path, title="t", note="another")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "inputs").iterdir()} == before
    monkeypatch.undo()
    image(GREEN, (40, 20)).save(tmp_path / "given.png")  # another image under the same name
    html_page(cases, tmp_path, title="t")
    (shown,) = {image["src"] for image in Page(tmp_path / "index.html").all("img", alt="image 1 of r000")}
    assert image_size(tmp_path / shown) == (40, 20)
