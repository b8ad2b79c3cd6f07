"""The text of the base model of docs/benchmarks.md's classifications, labels left out:

    python docs/base_text.py IMDB CS224N MRPC OUT    # three folders with data, one to write into

OUT/train.jsonl: the reviews of IMDB's train and unsup parts, and twice the training texts of SST,
Quora and MRPC, whose pairs are neighbours, in both orders; OUT/val.jsonl: 750 other reviews. Left
out are reviews that share 12 words in a row with a review of CFIMDB's dev or test set or of
IMDB's test set, so that no text that is reported on was pretrained on.
"""

import csv
import json
import lzma
import random
import re
import sys
from pathlib import Path


def reviews(name: str) -> list[str]:
    with lzma.open(imdb / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def table(path: Path, quoting: int = csv.QUOTE_MINIMAL) -> list[dict]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=quoting))


def runs(text: str) -> set[str]:
    """All runs of 12 words."""
    words = re.findall(r"[a-z0-9]+", text.lower().replace("<br />", " "))
    return {" ".join(words[i:i + 12]) for i in range(len(words) - 11)}


csv.field_size_limit(2**30)
imdb, cs224n, mrpc, out = map(Path, sys.argv[1:])
reported = reviews("test_10k")
for part in ("dev", "test-student"):
    reported += [row["sentence"] for row in table(cs224n / f"ids-cfimdb-{part}.csv")]
reported = set().union(*map(runs, reported))
texts = [(text,) for part in ("train", "unsup") for text in reviews(part)
         if not runs(text) & reported]
random.seed(0)
random.shuffle(texts)
val, train = texts[:750], texts[750:]
pairs = [(row["sentence1"], row["sentence2"]) for row in table(cs224n / "quora-train.csv")]
pairs += [(row["#1 String"], row["#2 String"])
          for row in table(mrpc / "msr_paraphrase_train.txt", csv.QUOTE_NONE)
          if row["#1 ID"] != "-1"]
train += 2 * [pair for one, two in pairs for pair in ((one, two), (two, one))]
train += 2 * [(row["sentence"],) for row in table(cs224n / "ids-sst-train.csv")]
random.shuffle(train)
out.mkdir(parents=True, exist_ok=True)
for name, documents in (("train", train), ("val", val)):
    with open(out / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for document in documents:
            file.writelines(json.dumps({"text": text}) + "\n" for text in document)
print(f"{len(texts):,} reviews ({len(reported):,} runs of words reported on), {len(pairs):,} pairs")
