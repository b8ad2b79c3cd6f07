"""TinyStories (Eldan and Li 2023) into token shards: about 474 M GPT-2 tokens.

    python prepare_tinystories.py                       # from the Hugging Face hub, streamed
    python prepare_tinystories.py --limit=20000         # a first taste
    python prepare_tinystories.py --train_input=train.txt --val_input=valid.txt
"""

import shlex
from itertools import islice

import ftfy

from configurator import run
from data import describe, write_data
from text import find_files, hub_rows, note_repeats, read_documents, text_field, typed
from tokenizer import open_tokenizer

name = "tinystories"  # data/NAME is written; or a path with a slash in it
train_input: list[str] = []  # local files as of prepare_text.py, not the hub's
val_input: list[str] = []  # the same, for validation
tokenizer = "gpt2"  # gpt2, bytes, or a trained tokenizer's file
column = "text"  # of a table; the archive of the first author's .json files has `story`
limit: int | None = None  # stories of each split; None: all
parse_special = False  # special tokens written out in a text become such tokens
separator = "<|endoftext|>"  # between the stories of a .txt file
hub_dataset = "roneneldan/TinyStories"  # CDLA-Sharing-1.0


def read_stories(files: list, split: str):
    """The stories of a split: of files, or of the hub's data set where there are none."""
    if files:
        return (text for file in files for text in read_documents(file, typed(separator), column))
    rows = hub_rows(hub_dataset, [split], "download its files where there is a network and give "
                    "them with --train_input and --val_input", streaming=True)
    where = f"{hub_dataset}, split {split}"
    return (text_field(row, column, where) or "" for _, row in rows)


def stories(texts, counts: dict):
    """Stripped, repaired, not empty; what was dropped and repaired is counted."""
    for text in map(str.strip, islice(texts, limit)):
        if not text:
            counts["empty"] += 1
            continue
        if any(c in text for c in "\u00e2\u00c2\u00c3"):  # UTF-8 once read as Windows-1252
            repaired = ftfy.fix_encoding(text)
            counts["repaired"] += repaired != text
            text = repaired
        yield text


def main():
    if bool(train_input) != bool(val_input):
        raise ValueError("give both --train_input and --val_input, or neither for the hub's")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    counts, train, val = {"empty": 0, "repaired": 0}, find_files(train_input), find_files(val_input)
    note_repeats(train, val)
    splits = {"train": stories(read_stories(train, "train"), counts),
              "val": stories(read_stories(val, "validation"), counts)}
    print(describe(write_data(name, open_tokenizer(tokenizer), splits, special=parse_special)))
    print(f"{counts['empty']:,} empty stories dropped, {counts['repaired']:,} with broken "
          "quotation marks repaired")
    config = "tinystories" if tokenizer == "gpt2" else "tinystories_cpu"
    print(f"next: python train.py config/{config}.py --dataset={shlex.quote(name)}")


if __name__ == "__main__":
    run(main, globals())
