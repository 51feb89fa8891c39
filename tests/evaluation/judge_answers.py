"""Forty answers as judges write them, by hand, with the numbers that are in each or what is wrong with it.

(name, question, reply, scores or the beginning of the error, a part of the reason).
"""

import json

from mige.evaluation.judges.answers import Reply
from mige.evaluation.judges.rubrics import EDIT, rubric

TWO = EDIT.questions[0]  # success, preservation: 0 to 10
ONE = rubric("dreambench_plus", {"group": "animal"}).questions[0]  # likeness: 0 to 4
THREE = rubric("imgedit", {"group": "add"}).questions[0]  # compliance, seamlessness, fidelity: 1 to 5

ANSWERS = [
    # right
    ("plain", TWO, '{"reasoning": "The hat is red now.", "score": [9, 8]}', (9, 8), "hat is red"),
    ("score_first", TWO, '{"score": [4, 10], "reasoning": "Nothing was lost."}', (4, 10), "Nothing was lost"),
    ("spread_over_lines", TWO, '{\n  "reasoning": "ok",\n  "score": [\n    7,\n    6\n  ]\n}\n', (7, 6), "ok"),
    ("halves", TWO, '{"reasoning": "close", "score": [7.5, 8.0]}', (7.5, 8), "close"),
    ("one_number", ONE, '{"reasoning": "the same cat", "score": 4}', (4,), "same cat"),
    ("one_in_a_list", ONE, '{"reasoning": "another cat", "score": [1]}', (1,), "another cat"),
    ("zero", ONE, '{"reasoning": "a car", "score": [0]}', (0,), "a car"),
    ("three", THREE, '{"reasoning": "seam at the left", "score": [5, 3, 4]}', (5, 3, 4), "seam"),
    ("scores", TWO, '{"Reasoning": "fine", "Scores": [6, 6]}', (6, 6), "fine"),
    ("by_name", TWO, '{"reasoning": "ok", "score": {"preservation": 2, "success": 8}}', (8, 2), "ok"),
    ("texts", TWO, '{"reasoning": "ok", "score": ["8", "9/10"]}', (8, 9), "ok"),
    ("chinese", TWO, '{"reasoning": "帽子变红了。", "score": [9, 9]}', (9, 9), "帽子"),
    # verbose
    ("fenced", TWO, '```json\n{"reasoning": "good", "score": [8, 8]}\n```', (8, 8), "good"),
    ("fenced_within_text", TWO,
     'Here is my assessment.\n\n```json\n{"reasoning": "good", "score": [8, 7]}\n```\nLet me know!', (8, 7), "good"),
    ("after_talk", TWO,
     'In image A {a dog}, in B none.\n{"reasoning": "gone", "score": [10, 9]}', (10, 9), "gone"),
    ("after_thoughts", TWO,
     '<think>Maybe {"score": [1, 1]}? No.</think>{"reasoning": "good", "score": [9, 9]}', (9, 9), "good"),
    ("said_twice", TWO, '{"reasoning": "a", "score": [3, 4]}\nFinal: {"reasoning": "b", "score": [3, 4]}', (3, 4), "a"),
    ("wrapped", TWO, '{"evaluation": {"reasoning": "inner", "score": [5, 6]}}', (5, 6), "inner"),
    ("line", ONE, "Analysis: The ears differ.\nScore: 3", (3,), "ears differ"),
    ("bold_line", ONE, "**Score:** 2\n", (2,), ""),
    ("sentence", ONE, "I would rate it as follows. Score: 3.", (3,), ""),
    ("of_the_scale", ONE, "Score: 4/4", (4,), ""),
    ("criterion_lines", THREE,
     "Brief reasoning: no seam.\nCompliance: 4\nSeamlessness: 5\n- Fidelity: 4/5\n", (4, 5, 4), "no seam"),
    # malformed, and still one reading alone
    ("comma_at_the_end", TWO, '{"reasoning": "ok", "score": [7, 7,],}', (7, 7), "ok"),
    ("single_quotes", TWO, "{'reasoning': 'it works', 'score': [6, 9]}", (6, 9), "it works"),
    ("quotes_inside", TWO, '{"reasoning": "The sign says "OPEN" now", "score": [8, 9]}', (8, 9), "The sign says"),
    ("no_brace_at_the_end", TWO, '{"reasoning": "ok", "score": [5, 5]', (5, 5), "ok"),
    ("line_break_inside", TWO, '{"reasoning": "first\nsecond", "score": [2, 3]}', (2, 3), "first"),
    # not to be read
    ("empty", TWO, "", "empty", ""),
    ("no_number", TWO, "The edit was carried out well and the rest was kept.", "no score in it", ""),
    ("the_form_itself", TWO, '{"reasoning": "...", "score": [<success>, <preservation>]}', "no score in it", ""),
    ("words", TWO, '{"reasoning": "ok", "score": ["high", "low"]}', "score high, expected a number", ""),
    ("null", TWO, '{"reasoning": "cannot say", "score": [null, 5]}', "score None, expected a number", ""),
    ("one_too_few", TWO, '{"reasoning": "ok", "score": [8]}', "1 scores, expected 2", ""),
    ("out_of_range", TWO, '{"reasoning": "superb", "score": [11, 9]}', "score 11, expected 0 to 10", ""),
    ("negative", ONE, "Score: -1", "score -1, expected 0 to 4", ""),
    ("another_scale", ONE, "Score: 85/100", "score 85/100, expected one of 4", ""),
    ("two_that_differ", TWO,
     '{"reasoning": "draft", "score": [3, 4]}\n{"reasoning": "final", "score": [5, 4]}', "2 answers that differ", ""),
    ("refusing", TWO, "I'm sorry, but I can't assist with that request.", "refused: I'm sorry", ""),
    ("cut", TWO, Reply('{"reasoning": "The image shows a very long', "length"), "cut off before a score", ""),
]  # fmt: skip
MORE = [  # beyond the forty: what an endpoint says beside the text
    ("filtered", TWO, Reply("", "content_filter"), "refused (content_filter)", ""),
    ("refusal_field", TWO, Reply("I can't help.", "refusal"), "refused (refusal): I can't help.", ""),
    ("thoughts_without_end", TWO, Reply('<think>perhaps {"score": [1, 1]}', "length"), "empty", ""),
    ("infinite", TWO, '{"reasoning": "", "score": [Infinity, 5]}', "score inf, expected 0 to 10", ""),
    ("true", ONE, '{"reasoning": "", "score": true}', "score True, expected a number", ""),
    ("out_of_words", ONE, "Score: 3 out of 10", "score 3/10, expected one of 4", ""),
    ("wrapped_by_name", TWO, '{"rating": {"score": {"success": 5, "preservation": 6}}}', (5, 6), ""),
    ("half_a_surrogate_pair", TWO, '{"reasoning": "so \\ud83d", "score": [5, 6]}', (5, 6), "so ?"),
    ("half_a_pair_as_name", TWO, '{"score": {"\\ud83d": 5}}', "scores of ?; expected success, preservation", ""),
    ("more_than_a_float_holds", ONE, '{"score": ' + "9" * 400 + "}", "score 999", ""),
    ("list_in_a_list", TWO, '{"score": [[5, 6]]}', "score [5, 6], expected a number", ""),
    ("deep", TWO, '{"a":' * 3_999, "no score in it", ""),
    ("endless", TWO, "8" * 20_001, "20,001 characters, 20,000 at most", ""),
]


def reply(given: str | Reply) -> Reply:
    return given if isinstance(given, Reply) else Reply(given)


def completion(given: str | Reply) -> bytes:
    """The body of an endpoint's response that carries it."""
    said = reply(given)
    message = {"role": "assistant", "content": said.text}
    if said.stop == "refusal":
        message |= {"content": None, "refusal": said.text}
    choice = {"index": 0, "message": message, "finish_reason": said.stop}
    return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()
