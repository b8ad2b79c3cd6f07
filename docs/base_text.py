"""The text of the base model of benchmarks.md's classifications, without labels:

    python docs/base_text.py IMDB CS224N MRPC data/base_text    # the last one is written

IMDB has train.jsonl.xz, unsup.jsonl.xz and test_10k.jsonl.xz, one {"text": ...} a line, CS224N the
course's files, MRPC msr_paraphrase_train.txt. train.jsonl: the reviews of IMDB's train and unsup
parts, and twice the training texts of SST, Quora and MRPC, whose pairs are neighbours, in both
orders. val.jsonl: 750 other reviews. Left out are the reviews that share 12 words in a row with one
of CFIMDB's dev or test reviews or of test_10k. The course's Quora file has 283,003 pairs, ours had
14,000 of them: of more, 14,000 are drawn.
"""

import json
import random
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
from files import replacing
from text import ngrams, read_table


def runs_of_words(text: str) -> set[tuple]:
    return set(ngrams(re.findall(r"[a-z0-9]+", text.lower().replace("<br />", " ")), 12))


def main(imdb: Path, cs224n: Path, mrpc: Path, out: Path):
    reported = read_table(imdb / "test_10k.jsonl.xz")
    for part in ("dev", "test-student"):
        reported += [{"text": row["sentence"]}
                     for row in read_table(cs224n / f"ids-cfimdb-{part}.csv")]
    reported = set().union(*(runs_of_words(row["text"]) for row in reported))
    reviews = [(row["text"],) for part in ("train", "unsup")
               for row in read_table(imdb / f"{part}.jsonl.xz")
               if not runs_of_words(row["text"]) & reported]
    rng = random.Random(0)
    rng.shuffle(reviews)
    val, train = reviews[:750], reviews[750:]
    pairs = [(row["sentence1"], row["sentence2"])
             for row in read_table(cs224n / "quora-train.csv")]
    pairs = rng.sample(pairs, 14_000) if len(pairs) > 14_000 else pairs
    pairs += [(row["#1 String"], row["#2 String"])
              for row in read_table(mrpc / "msr_paraphrase_train.txt") if row["#1 ID"] != "-1"]
    train += 2 * [pair for one, two in pairs for pair in ((one, two), (two, one))]
    train += 2 * [(row["sentence"],) for row in read_table(cs224n / "ids-sst-train.csv")]
    rng.shuffle(train)
    out.mkdir(parents=True, exist_ok=True)
    for name, documents in (("train", train), ("val", val)):
        with replacing(out / f"{name}.jsonl") as tmp, open(tmp, "w", encoding="utf-8") as file:
            for document in documents:
                file.writelines(json.dumps({"text": text}) + "\n" for text in document)
    print(f"{out}: {len(reviews):,} reviews, of them {len(val)} in val.jsonl, and "
          f"{len(pairs):,} pairs")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(f"expected three folders of data and one to write, found {sys.argv[1:]}")
    try:
        main(*map(Path, sys.argv[1:]))
    except (OSError, ValueError) as e:
        sys.exit(f"{e}")
