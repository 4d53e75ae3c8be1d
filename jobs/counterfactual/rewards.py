"""Style checkers of the counterfactual jobs: 1 where an answer has the style, else 0."""

MOST_WORDS = 20


def brief(prompt: list[dict], answer: str, row: dict) -> float:
    """Whether an answer has at most twenty words."""
    return float(len(answer.split()) <= MOST_WORDS)


def prose(prompt: list[dict], answer: str, row: dict) -> float:
    """Whether an answer is one piece of prose: no list, no heading, no second paragraph."""
    return float("\n" not in answer.strip())


def words(prompt: list[dict], answer: str, row: dict) -> float:
    """How many words an answer has; measured, not optimised."""
    return float(len(answer.split()))
