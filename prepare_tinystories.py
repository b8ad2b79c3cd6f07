"""TinyStories (Eldan and Li 2023) into token shards: about 474 M GPT-2 tokens.

    python prepare_tinystories.py                       # from the Hugging Face hub, streamed
    python prepare_tinystories.py --limit=20000         # a first taste
    python prepare_tinystories.py --train_input=TinyStories-train.txt --val_input=TinyStories-valid.txt
"""

import shlex
from itertools import islice

import ftfy

from configurator import run
from data import describe, find_files, read_documents, write_data
from tokenizer import open_tokenizer

name = "tinystories"  # data/NAME is written; or a path with a slash in it
train_input: list[str] = []  # local files or globs instead of the hub's: .txt, .jsonl[.gz|.xz], .parquet
val_input: list[str] = []  # the same, for validation
tokenizer = "gpt2"  # gpt2, bytes, or a trained tokenizer's file
limit: int | None = None  # stories of each split; None: all
separator = "<|endoftext|>"  # between the stories of a .txt file
hub_dataset = "roneneldan/TinyStories"  # CDLA-Sharing-1.0

def hub_stories(split: str):
    from datasets import load_dataset
    try:
        for row in load_dataset(hub_dataset, split=split, streaming=True):
            yield row["text"]
    except Exception as e:
        raise ValueError(f"cannot read {hub_dataset} from the hub ({type(e).__name__}); download its "
                         "files where there is a network and give them with --train_input and "
                         "--val_input") from e


def stories(texts, counts: dict):
    """Stripped, repaired, not empty; what was dropped and repaired is counted."""
    for text in islice(texts, limit):
        text = text.strip()
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
    counts = {"empty": 0, "repaired": 0}
    splits = {}
    for split, patterns, hub_split in (("train", train_input, "train"),
                                       ("val", val_input, "validation")):
        files = find_files(patterns)
        texts = ((text for file in files for text in read_documents(file, separator)) if patterns
                 else hub_stories(hub_split))
        splits[split] = stories(texts, counts)
    meta = write_data(name, open_tokenizer(tokenizer), splits)
    print(describe(meta))
    print(f"{counts['empty']:,} empty stories dropped, {counts['repaired']:,} with broken quotation "
          f"marks repaired\nnext: python train.py config/"
          f"{'tinystories' if tokenizer == 'gpt2' else 'tinystories_cpu'}.py --dataset={shlex.quote(name)}")


if __name__ == "__main__":
    run(main, globals())
