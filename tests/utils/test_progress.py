"""Progress: a bar on a terminal, lines elsewhere, the same words in both."""

import ast
import io

import pytest
from conftest import ROOT
from tqdm import tqdm

from mige.utils import progress
from mige.utils.progress import Progress


class Stream(io.StringIO):
    """A stream that says whether it is a terminal."""

    def __init__(self, is_terminal: bool):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that bars see, s."""
    now = [1000.0]
    opened = tqdm.__init__

    def with_clock(self, *args, **options):
        opened(self, *args, **options)
        if not self.disable:
            self._time = lambda: now[0]
            self.start_t = self.last_print_t = now[0]

    monkeypatch.setattr(tqdm, "__init__", with_clock)
    return now


def test_a_log_gets_a_line_at_first_one_a_minute_and_one_at_the_end(clock):
    log = Stream(False)
    with Progress(total=600, unit="image", desc="inference", file=log) as bar:
        for second in range(1, 181):
            clock[0] = 1000 + second
            bar.update(2, failed=second == 100)
    assert log.getvalue() == (
        "inference: 0/600 images, 00:00 gone\n"
        "inference: 120/600 images, 2.00 images/s, 04:00 left\n"
        "inference: 240/600 images, 2.00 images/s, 03:00 left, 1 failed\n"
        "inference: 360/600 images, 2.00 images/s, 02:00 left, 1 failed\n"
        "inference: 360/600 images, 2.00 images/s, 02:00 left, 1 failed\n"
    )


def test_what_takes_longer_than_a_second_is_told_by_its_seconds(clock):
    log = Stream(False)
    with Progress(total=4, initial=1, unit="case", file=log) as bar:
        clock[0] += 125
        bar.update(2.5)
    assert log.getvalue().splitlines()[-1] == "3.5/4 cases, 50.00 s/case, 00:25 left"


def test_without_a_total_nothing_is_left(clock):
    log = Stream(False)
    with Progress(total=None, unit="row", file=log) as bar:
        clock[0] += 60
        bar.update(120)
    assert log.getvalue().splitlines() == ["0 rows, 00:00 gone", *["120 rows, 2.00 rows/s, 01:00 gone"] * 2]


def test_a_terminal_gets_a_bar_on_one_line(clock):
    screen = Stream(True)
    with Progress(total=4, unit="image", desc="inference", file=screen) as bar:
        clock[0] += 2
        bar.update(2, failed=1)
        shown = str(bar)
    assert shown.startswith("inference:  50%|") and shown.endswith("| 2/4 images, 1.00 images/s, 00:02 left, 1 failed")
    assert shown in screen.getvalue() and screen.getvalue().count("\n") == 1


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_is_disabled_says_nothing(is_terminal):
    stream = Stream(is_terminal)
    with Progress(total=4, unit="image", disable=True, file=stream) as bar:
        bar.update(1, failed=1)
    assert list(Progress([1, 2], unit="image", disable=True, file=stream)) == [1, 2]
    assert stream.getvalue() == "" and list(Progress([1, 2], unit="image", file=stream)) == [1, 2]


def test_everything_that_counts_does_it_in_this_style():
    files = [
        path for folder in ("mige", "tools", "infer_scripts", "train_scripts") for path in (ROOT / folder).rglob("*.py")
    ]
    using = {
        str(path.relative_to(ROOT))
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom | ast.Import)
        and "tqdm" in [getattr(node, "module", ""), *(alias.name for alias in node.names)]
    }
    assert using == {str(progress.__file__).removeprefix(f"{ROOT}/")}
