"""The body of an event, checked against the event it is for and written anew with nothing else in it."""

import re
from collections.abc import Mapping
from typing import Any

import gradio as gr
from gradio.blocks import BlockFunction

from mige.web.file_store import FileStore

MAX_DEPTH = 20  # levels of lists and objects
ID = re.compile(r"[\w-]{1,80}", re.ASCII)  # of a session or an event

NOT_UPLOADED = {"path": None}
"""In place of a file that this server did not hand out, and of an address."""


class BadRequestError(Exception):
    """A request that is none of the page's. The message is a sentence for whoever sent it."""

    def __init__(self, sentence: str, status: int = 400):
        super().__init__(sentence)
        self.status = status


def of_event(page: gr.Blocks, store: FileStore, route: str, name: str | None, sent: Any) -> dict[str, Any]:
    """The body of a request that starts an event, as Gradio takes it. Raises BadRequestError for any that cannot.

    Args:
        route: "queue/join", "run", "api", "call" or "call/v2"; `name` follows it in the address.
    """
    if not isinstance(sent, dict):
        raise BadRequestError(f"The request is {kind(sent)}: send an object.")
    if route == "call/v2":
        event = _named(page, name)
        values = _in_order(page, name, sent)
    else:
        event = _named(page, name) if route == "call" else _indexed(page, name, sent)
        values = sent.get("data")
        if not isinstance(values, list):
            raise BadRequestError(f"“data” is {kind(values)}: send the list of the event's values.")
    visible = sum(not block.skip_api for block in event.inputs)
    lengths = {len(event.inputs), visible}  # a client leaves out what is the page's own
    if event.fn is None:
        raise BadRequestError("This event runs in the browser: there is nothing to send.")
    if route in ("run", "api") and event.queue:
        raise BadRequestError(f"This event waits its turn: send it to /gradio_api/call/{event.api_name}.", 404)
    if len(values) not in lengths and not event.cancels:
        expected = " or ".join(str(length) for length in sorted(lengths))
        raise BadRequestError(f"“data” has {len(values)} values: this event takes {expected}.")
    if len(values) == visible:
        sent_ones = iter(values)
        values = [None if block.skip_api else next(sent_ones) for block in event.inputs]
    body: dict[str, Any] = {"data": without_paths(values, store)}
    if route.startswith("call"):
        return body
    session, trigger = sent.get("session_hash"), sent.get("trigger_id")
    is_known = _is_whole(trigger) and trigger in [target for target, _ in event.targets]
    if session is None and route == "queue/join":
        raise BadRequestError("“session_hash” is missing: send a text of your own choice.")
    return body | {
        "fn_index": event._id,
        "session_hash": None if session is None else _id(session, "session_hash"),
        "event_data": without_paths(sent.get("event_data"), store),
        "trigger_id": trigger if is_known else None,
    }


def of_cancel(sent: Any) -> dict[str, Any]:
    """The body of a request that cancels an event."""
    if not isinstance(sent, dict):
        raise BadRequestError(f"The request is {kind(sent)}: send an object.")
    index = sent.get("fn_index", 0)
    if not _is_whole(index):
        raise BadRequestError(f"“fn_index” is {kind(index)}: send a whole number.")
    ids = {key: _id(sent.get(key), key) for key in ("session_hash", "event_id") if key in sent}
    if "event_id" not in ids:
        raise BadRequestError("“event_id” is missing: send the one that the event's start was answered with.")
    return {"session_hash": ids["event_id"]} | ids | {"fn_index": index}


def without_paths(value: Any, store: FileStore, depth: int = 0) -> Any:
    """The value with every object that could name a file or an address reduced to the path of an upload, or to none."""
    if depth > MAX_DEPTH:
        raise BadRequestError(f"The request has more than {MAX_DEPTH} levels of lists and objects: send fewer.")
    if isinstance(value, dict):
        if value.keys() & {"path", "url", "meta"}:
            found = store.find(value.get("path"))
            return NOT_UPLOADED if found is None else {"path": str(found)}
        return {key: without_paths(inner, store, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner, store, depth + 1) for inner in value]
    return value


def kind(value: Any) -> str:
    """What a value of JSON is, in a word."""
    names = {type(None): "empty", bool: "true or false", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _id(value: Any, key: str) -> str:
    if not isinstance(value, str) or not ID.fullmatch(value):
        raise BadRequestError(f"“{key}” is {kind(value)}: send a text of 1 to 80 letters, digits, “-” and “_”.")
    return value


def _indexed(page: gr.Blocks, name: str | None, sent: Mapping[str, Any]) -> BlockFunction:
    index = sent.get("fn_index")
    if index is None and name is not None:
        return _named(page, name)
    if not _is_whole(index) or index not in page.fns:
        raise BadRequestError("“fn_index” names no event of this page.", 404)
    return page.fns[index]


def _named(page: gr.Blocks, name: str | None) -> BlockFunction:
    for event in page.fns.values():
        if event.api_name == name and event.api_name:
            return event
    raise BadRequestError("The page has no event of this name.", 404)


def _in_order(page: gr.Blocks, name: str | None, sent: Mapping[str, Any]) -> list[Any]:
    """The values of a request that names them, in the order of the parameters; what is left out has its default."""
    endpoint = page.get_api_info()["named_endpoints"].get(f"/{name}")
    if endpoint is None:
        raise BadRequestError("The page has no event of this name.", 404)
    parameters = {parameter["parameter_name"]: parameter for parameter in endpoint["parameters"]}
    if unknown := sorted(sent.keys() - parameters.keys()):
        raise BadRequestError(f"{unknown[0][:40]!a} is no parameter of /{name}: it takes {', '.join(parameters)}.")
    missing = [key for key, one in parameters.items() if key not in sent and not one["parameter_has_default"]]
    if missing:
        raise BadRequestError(f"“{missing[0]}” is missing: /{name} cannot do without.")
    return [sent.get(key, one["parameter_default"]) for key, one in parameters.items()]
