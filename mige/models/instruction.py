"""The multimodal instruction: a record's prompt -> the text the model was trained on -> token ids around images."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mige.tasks import PLACEHOLDER, TASKS, Task, placeholders

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_WORDS = 88
"""Blank-separated words the training captions were cut to."""

_BLANKED = re.compile(r'[.!"()*#:;~]')
_THE_IMAGE = re.compile(r"\b(the|this) (image|photo|picture)\b", re.IGNORECASE)
_RELEASED_THE_IMAGE = re.compile(
    r"(the|this) (image|photo|picture)", re.IGNORECASE
)  # finds "the photo" in "the photograph"


@dataclass(frozen=True)
class Instruction:
    """Token ids of the text between images; an image goes between every two neighbouring segments.

    The last segment ends with the end-of-sentence token. `["a", <imagehere>, "in snow"]` has two segments.
    """

    segments: tuple[tuple[int, ...], ...]

    @property
    def num_images(self) -> int:
        """Images the instruction has room for."""
        return len(self.segments) - 1

    def length(self, num_queries: int) -> int:
        """Positions it takes in the text encoder, an image taking `num_queries`."""
        return sum(map(len, self.segments)) + self.num_images * num_queries


def clean(text: str) -> str:
    """Caption cleaning of training: lower case, some punctuation to blanks, runs of blanks to one, at most 88 words."""
    text = _BLANKED.sub(" ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).strip()
    return " ".join(text.split(" ")[:MAX_WORDS])


def point_at_source(text: str, edit_type: str | None = None) -> str:
    """Give a plain editing instruction its placeholder, as the released model's Emu Edit evaluation does.

    "the photo" and the like become the placeholder; where none occurs, "of" (edit type "global") or "in" and the
    placeholder are appended. Text that has a placeholder is returned as it is.

    edit_type: of an Emu Edit row ("" where it names none): "the photo" is found inside words too, as released. None for
      any other text: whole words only, so that "the photographer" stays.
    """
    if placeholders(text):
        return text
    mention = _THE_IMAGE if edit_type is None else _RELEASED_THE_IMAGE
    pointed, found = mention.subn(f" {PLACEHOLDER} ", text)
    if found:
        return pointed
    preposition = "of" if edit_type == "global" else "in"
    return f"{text.strip().removesuffix('.')} {preposition}{PLACEHOLDER}"


def full_text(task: Task, prompt: str, edit_type: str | None = None) -> str:
    """Prefix and prompt as the model reads them in inference, placeholders in lower case."""
    settings = TASKS[task]
    if task is Task.EDIT:
        prompt = point_at_source(prompt, edit_type)
    return clean(settings.prefix + prompt) if settings.clean_prefix else settings.prefix + clean(prompt)


def negative_text(task: Task, prompt: str) -> str:
    """Prefix and negative prompt: text alone, to which no placeholder is added."""
    settings = TASKS[task]
    return clean(settings.prefix + prompt) if settings.clean_prefix else settings.prefix + clean(prompt)


def training_text(task: Task, prompt: str, edit_type: str | None = None) -> str:
    """The same in training: another prefix for subject-driven samples, and never cleaned."""
    if task is Task.EDIT:
        prompt = point_at_source(prompt, edit_type)
    return TASKS[task].training_prefix + clean(prompt)


def tokenize(text: str, tokenizer: "PreTrainedTokenizerBase") -> Instruction:
    """Token ids of every segment, each tokenised alone as in training.

    Special tokens that a user writes (`</s>`, `<pad>`) are text, not control tokens.
    """
    segments = [
        list(tokenizer(_as_text(segment, tokenizer), add_special_tokens=False).input_ids) if segment.strip() else []
        for segment in text.split(PLACEHOLDER)
    ]
    segments[-1].append(tokenizer.eos_token_id)
    return Instruction(tuple(map(tuple, segments)))


def read_prompt(task: Task, prompt: str, edit_type: str | None, tokenizer: "PreTrainedTokenizerBase") -> Instruction:
    """A record's prompt as the model reads it in inference: `full_text`, tokenised."""
    return tokenize(full_text(task, prompt, edit_type), tokenizer)


def _as_text(segment: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Special tokens taken apart by blanks: they are pieces of T5's vocabulary too, so no option of its would do."""
    if "<" in segment:
        for token in tokenizer.all_special_tokens:
            segment = segment.replace(token, f"{token[:1]} {token[1:-1]} {token[-1:]}")
    return segment


def unspelled(prompt: str, instruction: Instruction, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, list[str]]:
    """How many tokens of a prompt are unknown to the tokenizer, and the special tokens (`</s>`) written out in it.

    instruction: the prompt as it is read. Where all its tokens are known, the prompt is not tokenised again.
    """
    text = clean(prompt)
    special = [token for token in tokenizer.all_special_tokens if token in text]
    if not any(tokenizer.unk_token_id in segment for segment in instruction.segments):
        return 0, special
    for token in special:  # told by name: their brackets, unknown as well, are not counted
        text = text.replace(token, " ")
    return sum(segment.count(tokenizer.unk_token_id) for segment in tokenize(text, tokenizer).segments), special
