"""Values that are none of a field's, in every field and through every route."""

import secrets

import pytest
from tiny_page import edit, events, http, tiny_service, upload

from mige.web.service import GenerationService

__all__ = ["events", "http", "tiny_service"]  # fixtures

NAN, INF, HUGE = float("nan"), float("inf"), 10**400
NUMBERS = {  # of the API -> in sentences, least and most, whether a fraction is one
    "seed": ("seed", 0, 2**32 - 1, False),
    "pictures": ("number of pictures", 1, 8, False),
    "steps": ("number of steps", 1, 100, False),
    "guidance": ("guidance", 0, 20, True),
    "source_guidance": ("source guidance", 0, 10, True),
    "width": ("width", 64, 256, False),
    "height": ("height", 64, 256, False),
}
"""For the tiny model, whose images have 128 px."""


@pytest.mark.parametrize("field", NUMBERS)
def test_a_number_that_is_none_of_the_fields_is_refused_by_its_name(http, monkeypatch, field):
    """Of a wrong type, not finite, not whole, one beyond either end, or of hundreds of digits: never rounded or cut."""
    ran = []
    monkeypatch.setattr(GenerationService, "_make", lambda *arguments: ran.append(arguments))
    name, least, most, is_fraction = NUMBERS[field]
    path = upload(http)
    wrong = [None, True, False, "1", "", [1], {"a": 1}, NAN, INF, -INF, least - 1, most + 1, HUGE, -HUGE]
    for value in [*wrong, least - 0.1, most + 0.1] if is_fraction else [*wrong, most - 0.5, 1e300]:
        said = edit(http, picture_1={"path": path}, **{field: value})
        remedies = (
            "expected a ",
            ": choose a multiple of 16 px from 64",
            f": choose one from {least} to",
            ": write a ",
        )
        assert f'"error": "The {name} is ' in said and any(remedy in said for remedy in remedies), (value, said)
    assert ran == []


@pytest.mark.parametrize("field", NUMBERS)
def test_both_ends_and_a_whole_number_written_as_a_fraction_are_taken(http, monkeypatch, field):
    """As JSON of other languages writes it: 4.0 is 4, exactly, up to the largest seed."""
    made = []
    monkeypatch.setattr(GenerationService, "_make", lambda self, request, *rest: made.append(request) or 1 / 0)
    _, least, most, _ = NUMBERS[field]
    for value in (least, most, float(least), float(most)):
        edit(http, **{field: value})
        asked = {"seed": made[-1].seeds[0], "pictures": len(made[-1].seeds)}
        assert asked.get(field, getattr(made[-1], field, None)) == value
    assert len(made) == 4


def test_a_list_of_another_length_starts_no_event(http, events):
    """One too few, one too many, none and thousands, for every event and through every route."""
    for event in events:
        many = len(event["inputs"])
        routes = ["queue/join"] if event["queue"] else ["run/predict", "queue/join"]
        routes += [f"call/{event['api_name']}"] if event["api_name"] in ("generate", "edit") else []
        for length in {0, many - 1, many + 1, 5000} - {many, -1}:
            body = {"data": [None] * length, "fn_index": event["id"], "session_hash": secrets.token_hex(8)}
            for route in routes if not event["cancels"] else []:
                answer = http.post(f"/gradio_api/{route}", json=body)
                assert answer.status_code == 400, (event["api_name"], route, length, answer.text)
                assert answer.json()["error"] == f"“data” has {length} values: this event takes {many}."
    for data in (None, {}, "data", 3, True):
        answer = http.post("/gradio_api/call/edit", json={"data": data})
        assert answer.status_code == 400 and answer.json()["error"].startswith("“data” is ")
