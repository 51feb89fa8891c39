"""Errors as what the page and its API show: a refusal in its own words, a fault of ours without its details."""

from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr
import torch

from mige.web.file_store import StoreFullError
from mige.web.instructions import RefusedError
from mige.web.request import Stopped


@contextmanager
def as_messages() -> Iterator[None]:
    """Raise gr.Error in place of any exception; it stays on the page until it is closed."""
    try:
        yield
    except RefusedError as refusal:
        raise _error(str(refusal), "This cannot run", expected=True) from refusal
    except StoreFullError as error:
        raise _error("The server holds too many files: try again in an hour.", "This cannot run", True) from error
    except torch.OutOfMemoryError as error:
        message = "The model ran out of memory: ask for fewer pictures at once, a smaller size, or name fewer pictures."
        raise _error(message, "This cannot run", expected=False) from error
    except Stopped as stopped:
        raise _error("The server is closing.", "Stopped", expected=True) from stopped
    except gr.Error:
        raise
    except Exception as error:
        message = "Something went wrong at our end: the log of the server says what."
        raise _error(message, "A fault of ours", expected=False) from error


def _error(message: str, title: str, expected: bool) -> gr.Error:
    return gr.Error(message, duration=None, title=title, print_exception=not expected)
