"""A reward that goes by who asks: made-up readers of two opposed tastes, for short answers and for long ones."""

import json

WORDS = 20


def taste(prompt: list[dict], answer: str, row: dict) -> float:
    """How much the row's reader likes the length of an answer, per 20 words; readers of odd numbers like short ones."""
    annotator = json.loads(row.get("extra") or "{}").get("annotator") or "reader-00"
    likes_short = int(str(annotator).rpartition("-")[2]) % 2 == 1
    length = len(answer.split()) / WORDS
    return -length if likes_short else length
