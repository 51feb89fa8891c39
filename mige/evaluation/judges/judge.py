"""What a judge is: something with a name that answers a text about images."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from PIL import Image

from mige.evaluation.judges.answers import Reply
from mige.utils.errors import UserError


class JudgeError(UserError, RuntimeError):
    """The run cannot go on: a wrong key, no such model, an endpoint that does not answer."""


class NoReplyError(Exception):
    """One question got no reply, after all attempts; the message says why. The next may get one."""


class Judge(Protocol):
    """Answers questions about images."""

    @property
    def settings(self) -> Mapping[str, str]:
        """What decides its replies: model, weights or address, temperature; part of a report's protocol."""

    def ask(self, text: str, images: Sequence[Image.Image], repetition: int) -> Reply:
        """The reply to a text about images, in their order.

        repetition: seeds what is random. Raises NoReplyError where this question got none, JudgeError where no
        question will.
        """
