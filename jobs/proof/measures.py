"""Measures that the proofs' trainings do not see."""

import re

ITEM = re.compile(r"^\s*(?:[-*\u2022]|\d{1,2}[.)])\s+\S", re.MULTILINE)


def unlisted(prompt: list[dict], answer: str, row: dict) -> float:
    """Minus the number of lines that begin as an item of a list does."""
    return -float(len(ITEM.findall(answer)))
