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
from mige.web.service import Step

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

CSS = """
.gradio-container { max-width: 84rem !important; margin: 0 auto; }
.mige-header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem 1rem; padding-top: .25rem; }
.mige-header h1 { margin: 0; font-size: 1.5rem; font-weight: 650; letter-spacing: -.01em; }
.mige-header p { margin: 0; color: var(--body-text-color-subdued); font-size: .9rem; }
.mige-note { margin: .5rem 0 0; padding: .6rem .9rem; border-radius: .5rem; background: #fbf1d9; color: #5c4508;
  font-size: .9rem; }
.dark .mige-note { background: #3a301a; color: #f0dcab; }
.html-container { padding: 0 !important; }
.mige-slots { display: grid !important; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); }
.mige-slots > * { min-width: 0 !important; }
.mige-reads { font-size: .9rem; line-height: 1.9; overflow-wrap: anywhere; }
.mige-reads .lead { color: var(--body-text-color-subdued); }
.mige-reads .odd { color: var(--body-text-color-subdued); font-size: .85rem; line-height: 1.4; }
.mige-reads .wrong { color: #a3400f; line-height: 1.4; }
.dark .mige-reads .wrong { color: #f5a97a; }
.mige-chip { display: inline-flex; align-items: center; vertical-align: middle; height: 1.6rem; margin: 0 .15rem;
  padding-right: .4rem; border: 1px solid var(--border-color-primary); border-radius: .4rem; overflow: hidden;
  background: var(--background-fill-secondary); font-size: .8rem; font-weight: 650; line-height: 1; }
.mige-chip img { width: 1.6rem; height: 1.6rem; margin: 0 .4rem 0 0 !important; object-fit: cover; }
.mige-chip.empty { padding-left: .4rem; border-style: dashed; font-weight: 400; }
.gradio-container { --body-text-color-subdued: var(--neutral-600); --block-info-text-color: var(--neutral-600); }
.dark .gradio-container, .gradio-container.dark { --body-text-color-subdued: var(--neutral-400);
  --block-info-text-color: var(--neutral-400); }
.gradio-container [role=tab][aria-selected=true] { color: var(--primary-700); }
.dark [role=tab][aria-selected=true] { color: var(--primary-300); }
.gradio-container footer, .gradio-container footer * { color: var(--body-text-color-subdued); }
.mige-gallery .grid-wrap { max-height: none !important; overflow: visible !important; }
.mige-compare label { max-width: calc(100% - 4.5rem); height: auto !important; white-space: normal; }
.mige-result .generating { border: none !important; }
.mige-stage { display: flex; flex-direction: column; gap: .6rem; min-height: 5rem; }
.mige-stage p { margin: 0; color: var(--body-text-color-subdued); font-size: .9rem; }
.mige-stage.empty { align-items: center; justify-content: center; min-height: 18rem; text-align: center;
  border: 1px dashed var(--border-color-primary); border-radius: .75rem; }
.mige-stage.done { min-height: 0; }
.mige-bar { height: .4rem; border-radius: .2rem; overflow: hidden; background: var(--border-color-primary); }
.mige-bar span { display: block; height: 100%; background: var(--primary-600); transition: width .3s; }
.mige-previews { display: grid; gap: .5rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
.mige-previews:has(> :only-child) { grid-template-columns: minmax(0, 1fr); }
.mige-previews img { width: 100%; margin: 0 !important; border-radius: .5rem; }
footer .divider { display: none !important; }
@media (max-width: 640px) {
  .gradio-container > main { padding: .75rem !important; }
  .tab-container { height: auto !important; }
  .tab-container button { flex: 1 1 0; height: auto !important; padding: .4rem .25rem !important; font-size: .8rem;
    line-height: 1.2; white-space: normal; }
}
"""


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
    remarks = "".join(f'<div class="odd">Note: {escape(remark)}.</div>' for remark in odd)
    return f'<div class="mige-reads">{"".join(html)}{remarks}</div>'


_EMPTY_CHIP = '<span class="mige-chip empty">nothing</span>'


def _chip(number: int, paths: Mapping[int, Path]) -> str:
    link = "gradio_api/file=" + quote(str(paths[number]))  # relative: the page may be served below a path
    return f'<span class="mige-chip"><img src="{link}" alt="">{number}</span>'


def wrong(sentence: str) -> str:
    """In place of the instruction: why it cannot be read yet."""
    return f'<div class="mige-reads"><div class="wrong">{escape(sentence)}</div></div>'


EMPTY_STAGE = '<div class="mige-stage empty"><p>The result appears here.</p></div>'
WAITING = '<div class="mige-stage empty"></div>'  # the page lays the place in the queue over it
NOTHING_NEW = '<div class="mige-stage done"><p>Nothing new was made. Below is the result from before.</p></div>'
NOTHING_MADE = '<div class="mige-stage empty"><p>Nothing was made.</p></div>'  # after an error, or stopped
NOTHING_READ = '<div class="mige-reads"></div>'


def progress(step: Step, seconds: float, previews: Sequence[str]) -> str:
    """A bar, the step, the time that is left at this pace, and the pictures so far (`preview`)."""
    left = seconds / step.number * (step.of - step.number)
    pictures = "".join(f'<img src="{link}" alt="Preview">' for link in previews)
    return (
        f'<div class="mige-stage"><div class="mige-bar"><span style="width:{100 * step.number / step.of:.0f}%"></span>'
        f"</div><p>Step {step.number} of {step.of}, about {left:.0f} s left</p>"
        f'<div class="mige-previews">{pictures}</div></div>'
    )


def done(pictures: int, seconds: float) -> str:
    """The line above a result."""
    return f'<div class="mige-stage done"><p>{pictures} picture{"s"[: pictures != 1]} in {seconds:.1f} s</p></div>'


def preview(image: Image.Image) -> str:
    """A small picture as a data URI: a few kB, and no file."""
    small = image.copy()
    small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    encoded = io.BytesIO()
    small.save(encoded, "WEBP", quality=70)
    return "data:image/webp;base64," + base64.b64encode(encoded.getbuffer()).decode()
