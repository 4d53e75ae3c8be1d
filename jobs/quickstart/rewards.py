"""The quickstart's independent reward: a Python function that training never sees."""

import re

ROLE_PLAY = re.compile(
    r"\b(arr+|ahoy|matey?|aye|ye|thee|thou|thy|dude|howdy|partner|meow|purr\w*|beep|boop|woof|roar|gasp|alas|behold|"
    r"mortals?|milord|majesty|darling|my dear|my friend|once upon a time|quest|spell|enchanted|realm|kingdom|"
    r"starship|galaxy|captain|crew|villain|destiny)\b|\*[^*\n]+\*|!|[\U0001F300-\U0001FAFF]",
    re.IGNORECASE,
)
FIRST_PERSON = re.compile(r"\b(I|I'm|I've|I'll|I'd|me|my|mine|myself|we|our|us|we're|we've)\b")
COMMON = frozenset(
    re.findall(
        r"\w+",
        "what is the a an of do does did how i my why are we in to and for on from can which who was it its you your "
        "be by with between some their our one when where if not have has this that",
    )
)


def plainness(prompt: list[dict], answer: str, row: dict) -> float:
    """How plainly an answer stays on the question: share of its words taken up, minus marks of role-play.

    Between -1.5 and 1; an answer of fewer than three words gets -1.
    """
    import json

    words = _words(answer)
    if len(words) < 3:
        return -1.0
    question = json.loads(row.get("extra") or "{}").get("question") or prompt[-1]["content"]
    marks = len(ROLE_PLAY.findall(answer)) + len(FIRST_PERSON.findall(answer))
    played = min(1.0, marks / max(4.0, len(words) / 6))
    return _taken_up(question, words) - played - 0.5 * _repetition(words)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _taken_up(question: str, words: list[str]) -> float:
    """Share of the question's telling words whose beginning occurs in the answer."""
    telling = [word for word in dict.fromkeys(_words(question)) if word not in COMMON]
    stems = {word[:4] for word in words}
    return sum(word[:4] in stems for word in telling) / max(1, len(telling))


def _repetition(words: list[str]) -> float:
    threes = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(threes)) / len(threes) if threes else 0.0
