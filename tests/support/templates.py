"""The chat templates that TRL ships, with tokenizers in which every byte is a token, and pairs to render."""

import datetime
from importlib.util import find_spec
from pathlib import Path

from tests.support.models import byte_tokenizer

# Only its files are read: to import it takes a while.
FOLDER = Path(str(find_spec("trl").origin)).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|return|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|end|>",
    "<|eot|>",
)
DAY = datetime.date(2025, 3, 4)
USER = {"role": "user", "content": "Name a fruit."}


def tokenizer_of(name, marks=()):
    return byte_tokenizer((FOLDER / f"{name}.jinja").read_text(), "<s>", (*ENDS, *marks, "</s>"), "</s>")


def pair_of(messages, chosen, rejected):
    sides = {"chosen": chosen, "rejected": rejected}
    row = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
    return {"prompt": messages, **row, "chosen_finished": True, "rejected_finished": False}
