"""The three tasks, their official settings, and the marker that stands for an image in a prompt."""

from dataclasses import dataclass
from enum import StrEnum

PLACEHOLDER = "<imagehere>"
MOST_REFERENCES = 4  # the model was trained with at most this many pictures in a prompt


class Task(StrEnum):
    """What is asked for; which of the three follows from the pictures of a record."""

    SUBJECT = "subject"
    EDIT = "edit"
    SUBJECT_EDIT = "subject_edit"


@dataclass(frozen=True)
class TaskSettings:
    """How the official code runs one task; all but `training_prefix` is about inference."""

    prefix: str  # stands before the prompt
    clean_prefix: bool  # whether the prefix goes through the caption cleaner together with the prompt
    training_prefix: str  # stands before the cleaned prompt in training, as it is
    steps: int  # solver steps
    guidance: float  # text guidance
    source_guidance: float  # guidance towards the source picture
    batch_size: int
    letterbox: bool  # VAE references: True fits the whole picture on black, False crops the centre


TASKS: dict[Task, TaskSettings] = {
    Task.SUBJECT: TaskSettings(
        prefix="Follow the text instruction to generate an image with the given objects' images, "
        "preserving the subject's identity:\n ",
        clean_prefix=True,
        training_prefix="Follow the text instruction to generate an image with the given objects, "
        "preserving the subject's identity:\n ",
        steps=50,
        guidance=7.0,
        source_guidance=1.0,
        batch_size=5,
        letterbox=True,
    ),
    Task.EDIT: TaskSettings(
        prefix="Follow the instruction to edit the image:\n ",
        clean_prefix=False,
        training_prefix="Follow the instruction to edit the image:\n ",
        steps=60,
        guidance=5.0,
        source_guidance=1.0,
        batch_size=25,
        letterbox=False,
    ),
    Task.SUBJECT_EDIT: TaskSettings(
        prefix="Subject-driven editing:\n ",
        clean_prefix=True,
        training_prefix="Subject-driven editing:\n ",
        steps=60,
        guidance=5.0,
        source_guidance=1.0,
        batch_size=25,
        letterbox=False,
    ),
}


def placeholders(prompt: str) -> int:
    """How many pictures the prompt asks for: occurrences of `<imagehere>` in any case."""
    return prompt.lower().count(PLACEHOLDER)
