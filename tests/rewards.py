"""Reward functions that the tests' jobs name."""


def length(prompt, answer, row):
    return float(len(answer))


def fails_on_seven(prompt, answer, row):
    if "7" in prompt[-1]["content"]:
        raise RuntimeError("seven")
    return 1.0


def not_a_number(prompt, answer, row):
    return float("nan")
