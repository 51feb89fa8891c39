"""How the page looks: theme, style sheet, and the pieces of HTML that Gradio has no component for."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import gradio as gr
from PIL import Image

from mige.models.instruction import clean
from mige.tasks import PLACEHOLDER, TASKS, Task
from mige.web.file_store import Results
from mige.web.history import Entry
from mige.web.request import Step

PREVIEW_SIDE = 320  # px, most; a preview is sent with every few steps

_SYSTEM = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # nothing to download
THEME = gr.themes.Default(
    primary_hue=gr.themes.colors.teal,
    secondary_hue=gr.themes.colors.teal,
    neutral_hue=gr.themes.colors.stone,
    radius_size=gr.themes.sizes.radius_lg,
    font=_SYSTEM,
    font_mono=("ui-monospace", "Consolas", "monospace"),
).set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    button_primary_text_color="white",
    button_cancel_background_fill="#b91c1c",  # Gradio's red is too light for white letters
    button_cancel_background_fill_hover="#991b1b",
    button_cancel_background_fill_dark="#b91c1c",
    button_cancel_background_fill_hover_dark="#991b1b",
    input_placeholder_color="*neutral_600",
    input_placeholder_color_dark="*neutral_400",
)

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
SCRIPT = f"<script>{(Path(__file__).parent / 'page.js').read_text(encoding='utf-8')}</script>"


def header(name: str, native: int, machine: str, is_miniature: bool) -> str:
    """The top of the page: what model this is, and what a small one cannot do."""
    note = (
        '<p class="mige-note">This small model knows only its drawn world: pictures of emoji on plain scenes, and the '
        "instructions of the examples. Photographs and free words need the full model.</p>"
    )
    return (
        f'<div class="mige-header"><h1>MIGE</h1><p>{escape(name)} · pictures of {native} × {native} px · '
        f"{escape(machine)}</p></div>" + (note if is_miniature else "")
    )


def instruction(task: Task, text: str, numbers: Sequence[int], paths: Mapping[int, Path], odd: Sequence[str]) -> str:
    """What the model is given: its text with every picture where it stands, as a thumbnail with its number."""
    settings = TASKS[task]
    lead = clean(settings.prefix) if settings.clean_prefix else settings.prefix
    first, *rest = text.removeprefix(lead).split(PLACEHOLDER)
    html = [f'<span class="lead">The model reads: {escape(lead)}</span> ', escape(first)]
    for place, words in enumerate(rest):
        html += [_chip(numbers[place], paths) if place < len(numbers) else _EMPTY_CHIP, escape(words)]
    return f'<div class="mige-reads">{"".join(html)}{_remarks(odd)}</div>'


def noted(odd: Sequence[str]) -> str:
    """In place of the instruction while there is none: what is odd about the pictures."""
    return f'<div class="mige-reads">{_remarks(odd)}</div>'


def _remarks(odd: Sequence[str]) -> str:
    return "".join(f'<div class="odd">Note: {escape(remark)}.</div>' for remark in odd)


_EMPTY_CHIP = '<span class="mige-chip empty">nothing</span>'


def _chip(number: int, paths: Mapping[int, Path]) -> str:
    return f'<span class="mige-chip"><img src="{_link(str(paths[number]))}" alt="Picture">{number}</span>'


def wrong(sentence: str) -> str:
    """In place of the instruction: why it cannot be read yet."""
    return f'<div class="mige-reads"><div class="wrong">{escape(sentence)}</div></div>'


EMPTY_STAGE = '<div class="mige-stage empty"><p>The result appears here.</p></div>'
WAITING = '<div class="mige-stage empty"><p>Waiting for the model …</p></div>'
NOTHING_NEW = '<div class="mige-stage done"><p>Nothing new was made. Below is the result from before.</p></div>'
NOTHING_MADE = '<div class="mige-stage empty"><p>Nothing was made.</p></div>'  # after an error, or stopped
NOTHING_READ = '<div class="mige-reads"></div>'
NO_HISTORY = '<p class="mige-none">What you make is listed here, for as long as this server runs.</p>'
MASK = """
<p class="mige-mask-none">Put a picture into “Picture 1” first.</p>
<div class="mige-mask-area" hidden>
<p>Paint over what may change; everything else stays as it is, bit for bit. By keyboard: arrows move the brush, the
space bar paints, Backspace takes the last stroke back.</p>
<div class="mige-mask-tools"><label>Brush <input type="range" min="1" max="25" value="6"></label>
<button type="button" data-do="undo">Undo</button><button type="button" data-do="clear">Clear</button></div>
<div class="mige-mask-canvas"><img alt="Picture 1, to paint on">
<canvas tabindex="0" role="application" aria-label="Mask over picture 1"></canvas></div>
<output></output>
</div>"""


def waiting(place: int, seconds: float | None) -> str:
    """The place in the queue, from 1, and about how long until the turn comes."""
    ahead = "Your turn is next" if place == 1 else f"Place {place} in the queue"
    left = "" if seconds is None else f", in about {_duration(seconds)}"
    return f'<div class="mige-stage empty"><p>{ahead}{left}.</p></div>'


def progress(step: Step, seconds: float, previews: Sequence[str]) -> str:
    """A bar, the step, the time that is left at this pace, and the pictures so far (`preview`)."""
    left = seconds / step.number * (step.of - step.number)
    pictures = "".join(f'<img src="{link}" alt="Preview">' for link in previews)
    part = f"{100 * step.number / step.of:.0f}"
    bar = (
        f'<div class="mige-bar" role="progressbar" aria-label="Steps" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{part}"><span style="width:{part}%"></span></div>'
    )
    return (
        f'<div class="mige-stage" aria-live="off">{bar}<p>Step {step.number} of {step.of}, about {_duration(left)} '
        f'left</p><div class="mige-previews">{pictures}</div></div>'
    )


def done(pictures: int, seconds: float, withheld: int = 0, masked: bool = False) -> str:
    """The line above a result."""
    text = f"{pictures} picture{'s'[: pictures != 1]} in {seconds:.1f} s"
    text += ", changed inside the mask alone" * masked
    text += f"; the safety check of this server withheld {withheld}" if withheld else ""
    return f'<div class="mige-stage done"><p>{text}</p></div>'


def compare(before: str, after: str, caption: str) -> str:
    """A result over its input; a slider says how much of the input is seen, a little at first."""
    return (
        f'<div class="mige-compare" style="--at:8%"><div class="mige-pair">'
        f'<img class="after" src="{_link(after)}" alt="After: {escape(caption)}">'
        f'<img class="before" src="{_link(before)}" alt="Before: the input">'
        '<span class="mige-edge"></span></div>'
        '<label><span>Before</span><input type="range" min="0" max="100" value="8" '
        'aria-label="How much of the input is shown, from the left"><span>After</span></label></div>'
    )


def history(found: Sequence[tuple[Entry, Results | None]]) -> str:
    """A button for every run of a visitor; of one whose files were deleted, what was asked for stays."""
    return '<div class="mige-entries">' + "".join(_entry(*one) for one in found) + "</div>" if found else NO_HISTORY


def _entry(entry: Entry, results: Results | None) -> str:
    what = escape(entry.request.instruction)
    number = len(entry.request.seeds)
    detail = f"seed {entry.request.seeds[0]}" + (f" and {number - 1} more" if number > 1 else "")
    picture = (
        '<span class="expired">expired</span>'
        if results is None
        else f'<img src="{_link(results.images[0][0])}" alt="" loading="lazy">'
    )
    return (
        f'<button type="button" class="mige-entry" data-token="{escape(entry.token)}">{picture}'
        f'<span class="what">{what}</span><span class="detail">{detail}</span></button>'
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _link(path: str) -> str:
    """Relative: the page may be served below a path."""
    return "gradio_api/file=" + quote(path)


def preview(image: Image.Image) -> str:
    """A small picture as a data URI: a few kB, and no file."""
    small = image.copy()
    small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    encoded = io.BytesIO()
    small.save(encoded, "WEBP", quality=70)
    return "data:image/webp;base64," + base64.b64encode(encoded.getbuffer()).decode()
