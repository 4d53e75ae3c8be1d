"""How many answers a tokenizer would write in other tokens than the model drew them in.

    python jobs/bench/drawn_tokens.py RUN_DIR

Reads the synthesis of a run whose teacher has the student's vocabulary. Of each answer: whether its text has the tokens
that were drawn; where not, whether training takes those that were drawn, which it does if they are the same text.
"""

import argparse
from collections import Counter

from rdpo.execution.reader import RunReader
from rdpo.modeling.chat import Answer, Chat, student_chat
from rdpo.records import DRAWN, Row


def kind_of(chat: Chat, row: Row, name: str) -> str:
    """What becomes of one answer."""
    finished = row[f"{name}_finish_reason"] == "stop"
    drawn = tuple(row[f"{name}{DRAWN}"])
    answers = {"text": Answer(row[name], finished), "kept": Answer(row[name], finished, drawn=drawn)}
    ids = chat.pair_ids(row["prompt"], answers)
    ending = chat.ending if finished else ()
    if ids["text"] == [*drawn, *ending]:
        return "same tokens"
    return "others, as drawn" if ids["kept"] == [*drawn, *ending] else "others, as the text has them"


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir")
    run = RunReader(parser.parse_args().run_dir)
    chat = student_chat(run.job)

    counts: Counter[str] = Counter()
    for part in run.folder("synthesis").tables():
        names = [name.removesuffix(DRAWN) for name in part.column_names if name.endswith(DRAWN)]
        for row in part.to_pylist():
            for name in names:
                counts[kind_of(chat, row, name)] += 1
    total = sum(counts.values())
    print(f"{total} answers of {run.job.student.model}")
    for kind, count in counts.most_common():
        print(f"{count:>6}  {count / total:.3f}  {kind}")


if __name__ == "__main__":
    main()
