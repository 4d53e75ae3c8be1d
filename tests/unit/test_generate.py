"""Two models' answers side by side."""

from rdpo.evaluation.generate import side_by_side


def answered(name, contender, answer, dropped=None):
    columns = {f"{side}{end}": None for side in ("start", "trained") for end in ("", "_tokens")}
    own = {contender: answer, f"{contender}_tokens": len(answer)}
    return {"prompt_id": name, "prompt": "q", **columns, **own, "contender": contender, "dropped": dropped}


def test_a_prompt_gets_both_answers_whatever_their_order():
    rows = [
        answered("b", "start", "one"),
        answered("a", "trained", "four"),
        answered("b", "trained", ""),
        answered("a", "start", "six"),
    ]
    merged = {row["prompt_id"]: row for row in side_by_side(rows, ["start", "trained"])}
    assert len(merged) == 2
    assert (merged["a"]["start"], merged["a"]["trained"], merged["a"]["trained_tokens"]) == ("six", "four", 4)
    assert (merged["b"]["start"], merged["b"]["trained"], merged["b"]["start_tokens"]) == ("one", "", 3)
    assert "contender" not in merged["a"]


def test_a_prompt_that_one_model_cannot_answer_is_dropped():
    rows = [answered("a", "start", "", "no room"), answered("a", "trained", "yes")]
    assert side_by_side(rows, ["start", "trained"])[0]["dropped"] == "no room"
    assert side_by_side(rows[::-1], ["start", "trained"])[0]["dropped"] == "no room"
