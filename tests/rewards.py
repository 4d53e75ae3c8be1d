"""Reward functions that the tests' jobs name."""


def length(prompt, answer, row):
    return float(len(answer))


def fails_on_seven(prompt, answer, row):
    if "7" in prompt[-1]["content"]:
        raise RuntimeError("seven")
    return 1.0


def not_a_number(prompt, answer, row):
    return float("nan")


def by_taste(prompt, answer, row):
    """How much the row's annotator likes an answer's letter; those of odd numbers have the opposite taste."""
    import json

    annotator = int(json.loads(row["extra"]).get("annotator") or 0)
    rank = "DHAFCGBE".find(answer[:1])
    return float(rank if annotator % 2 else -rank)
