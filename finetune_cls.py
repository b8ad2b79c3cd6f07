"""Fine-tunes a model to classify texts, or pairs of texts: sentiment, paraphrase, a table of yours.

    python finetune_cls.py config/finetune_sst.py --data_dir=FOLDER
    python finetune_cls.py config/finetune_sst.py --data_dir=FOLDER --mode=last_layer
    python finetune_cls.py --init_from=gpt2 --train_file=mine.csv --text_column=review \\
        --label_column=stars
    python finetune_cls.py config/finetune_quora.py --data_dir=FOLDER --style=cloze --epochs=0
    torchrun --standalone --nproc_per_node=8 finetune_cls.py config/finetune_imdb.py
    python finetune_cls.py --init_from=out/finetune_sst --predict "A joy from start to end ."

style head: the hidden state of a text's last token through a linear layer of its own. style cloze:
the text stands in a prompt, and the logits of the words that answer it decide. A pair in style head
is text, end-of-text, second text. OUT/best, the model of the best epoch on dev, adapters merged, is
transformers' GPT2ForSequenceClassification, or (cloze) GPT2LMHeadModel with an untied head. A
fine-tuning takes minutes: one that was stopped starts again.
"""

import csv
import json
import math
import re
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import (
    Metrics,
    Skips,
    StopSignal,
    begin,
    figure,
    load_model,
    lr_scale,
    micro_batch_seed,
    save_best,
    set_aside,
)
from configurator import run
from data import normalize, read_table
from files import local_folder, read_json, read_pretrained, replacing, write_text
from lora import set_trainable
from model import GPT, GPTConfig
from tokenizer import open_tokenizer

# what and where
out_dir = "out/finetune_cls"  # the run's folder
init_from = "gpt2"  # a hub name, a Hugging Face or run folder; a trained run, to predict
data_dir: str | None = None  # where the three files are
train_file: str | None = None  # .csv, .tsv, .txt (tabs, no quoting), .json[l][.gz|.xz] or .parquet
dev_file: str | None = None  # None: dev_fraction of train_file is cut off, by seed
test_file: str | None = None  # its labels, if it has any, are only scored
dataset: str | None = None  # a hub data set, NAME or NAME:CONFIG, where train_file is not here
dev_fraction = 0.1
text_column = ["text", "sentence"]  # the first of these that the table has
text_pair_column: list[str] = []  # of a second text
label_column = ["label", "sentiment"]
classes: list[str] = []  # all labels, in order; empty: those that training has
lowercase = False  # lower case, punctuation apart: for a body that was trained on such text
max_tokens: int | None = None  # of a text, or pair with its prompt; None: the model's context
keep = "head"  # what is kept of a longer one: its head or its tail
score_test: bool | None = None  # None: where the test split has labels
# what is trained
mode = "full"  # full, last_layer, last_blocks (with the final LayerNorm), lora
train_blocks = 2  # of last_blocks
lora_rank = 16
lora_alpha = 32.0  # adapters are scaled by lora_alpha / lora_rank
lora_dropout = 0.0  # of what the adapters read
style = "head"  # or cloze
prompt = ""  # of cloze: {text}, and {text_pair} of pairs, and what asks for the answer
verbalizers: list[str] = []  # of cloze: the answer to each class in order, one token: " no", " yes"
dropout = 0.1  # in the body and before the linear layer
# the updates
epochs = 3  # 0: judges the model as it is
batch_size = 32  # texts an update, over all ranks
accumulation = 1  # micro-batches in which each rank takes its share of them
learning_rate = 5e-4  # its peak: warmup over the first tenth, then linear to zero
head_learning_rate: float | None = None  # of the linear layer; None: the same
weight_decay = 0.01  # of matrices
grad_clip = 1.0  # largest norm of the gradient; 0 for none
patience: int | None = None  # epochs without a better dev accuracy before it stops
cache_features = True  # last_layer: the body runs once
seed = 1337
# what is made of it
cs224n = False  # also writes OUT/predictions as the course's autograder reads them
predict: list[str] = []  # texts to classify with a trained run (of pairs: two and two)
predict_file: str | None = None  # a table to classify with it
log_interval = 20  # updates between lines
# the machine
device = "auto"  # cpu, cuda, cuda:1, mps
dtype = "auto"  # of autocast: float32, bfloat16, float16

FROM_ONE = ("batch_size", "accumulation", "log_interval", "max_tokens", "patience")
CHOICES = {"style": ("head", "cloze"), "keep": ("head", "tail")}
EVAL_TOKENS = {"cpu": 2**13, "cuda": 2**18}  # in a batch without gradients


# ---- tables ----

def written(value) -> str:
    """A value as it stands in a file; halves of surrogate pairs, which JSON can hold, as \\uD800."""
    return str(value).strip().encode(errors="backslashreplace").decode()


def label_name(value, where: str) -> str:
    """The name of a class: a word as it is, 1 of 1, 1.0 and "1.0"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    name = "" if value is None else written(value)
    whole = re.fullmatch(r"([+-]?\d+)(\.0*)?", name)
    if not whole and (isinstance(value, float) or re.fullmatch(r"|nan|[+-]?\d*\.\d+", name.lower())):
        raise ValueError(f"{where} has the label {value!r}, expected a word or a whole number")
    return str(int(whole[1])) if whole else name


def as_split(rows, where: str, labels: bool | None) -> dict:
    """{where, row, id, text: [(text,) or (text, pair)], label: [name] or None} of a table; row
    counts from 1, a header not. labels: True needs them, None takes them where they are, False does
    not look. ValueError for a missing column, a row without text or label; null is an empty text."""
    if not text_column or labels and not label_column:
        raise ValueError("text_column and label_column must name a column")
    rows = [row for row in rows  # without the four of another kind that end MRPC's training file
            if not (isinstance(row, dict) and row.get("#1 ID") == "-1")]
    if not rows or not isinstance(rows[0], dict):
        raise ValueError(f"{where} has no rows")
    columns = []
    for names in (text_column, text_pair_column, label_column):
        columns.append(next((name for name in names if name in rows[0]), None))
        if names and columns[-1] is None and (names is not label_column or labels):
            raise ValueError(f"{where} has no column {' or '.join(map(repr, names))}; it has "
                             f"{', '.join(repr(name) for name in rows[0] if name is not None)}")
    split = {"where": where, "row": [], "id": [], "text": [], "label": None}
    for number, row in enumerate(rows, 1):
        texts = [row.get(c, 0) if isinstance(row, dict) else 0 for c in columns[:2] if c]
        if not all(text is None or isinstance(text, str) for text in texts):
            raise ValueError(f"row {number} of {where} has no text: {row!r:.60}")
        split["row"].append(number)
        split["text"].append(tuple(text or "" for text in texts))
        split["id"].append(written(row.get("id", number)))
    found = [row.get(columns[2]) for row in rows]
    none = {"" if value is None else str(value).strip() for value in found} <= {"", "-1", "-1.0"}
    if columns[2] and (labels or labels is None and not none):  # blank or -1: the ways to have none
        split["label"] = [label_name(value, f"row {number} of {where}")
                          for number, value in enumerate(found, 1)]
    return split


def take(split: dict, rows) -> dict:
    """Some rows of a split."""
    return split | {key: [split[key][i] for i in rows] for key in ("row", "id", "text", "label")}


def read_splits() -> dict:
    """The splits train, dev and, where there is one, test, from files or the hub."""
    files = [file and Path(data_dir or "", file) for file in (train_file, dev_file, test_file)]
    if dataset and not data_dir and not (files[0] and files[0].is_file()):
        from datasets import load_dataset
        try:
            found = load_dataset(*dataset.split(":"))
        except Exception as e:  # noqa: BLE001 (whatever the hub's client raises)
            raise ValueError(f"cannot load {dataset} from the hub ({type(e).__name__}: {e}); give "
                             "local files with --data_dir=FOLDER") from None
        tables = {name: list(found[key]) for name, key in (
            ("train", "train"), ("dev", "validation"), ("test", "test")) if key in found}
        if "train" not in tables:
            raise ValueError(f"{dataset} has no split train, but {', '.join(found)}")
        where = {name: f"{dataset}, {name}" for name in tables}
    elif not files[0]:
        raise ValueError("nothing to train on: give --train_file, or a config such as "
                         "config/finetune_sst.py with --data_dir=FOLDER")
    else:
        where = {name: file for name, file in zip(("train", "dev", "test"), files) if file}
        tables = {name: read_table(file) for name, file in where.items()}
    if score_test and "test" not in tables:
        raise ValueError("there is no test split to score; give --test_file")
    splits = {name: as_split(table, str(where[name]), name != "test" or score_test)
              for name, table in tables.items()}
    if "dev" not in splits:
        train, n = splits["train"], max(1, round(dev_fraction * len(splits["train"]["id"])))
        if n >= len(train["id"]):
            raise ValueError(f"{train['where']} has {len(train['id'])} rows: with dev_fraction="
                             f"{dev_fraction} none is left to train on")
        order = np.random.default_rng(seed).permutation(len(train["id"]))
        splits["dev"], splits["train"] = take(train, order[:n]), take(train, order[n:])
    return splits


def class_numbers(split: dict, names: list[str]) -> np.ndarray | None:
    """Labels as numbers; ValueError, with the row, for one that is not among the names."""
    if split["label"] is None:
        return None
    number = {name: i for i, name in enumerate(names)}
    for row, name in zip(split["row"], split["label"]):
        if name not in number:
            raise ValueError(f"row {row} of {split['where']} has the label {name!r}, which is not "
                             f"among the classes of training: {', '.join(names)}"
                             + "; of a rare class dev may get all: try another --seed" * (not dev_file))
    return np.array([number[name] for name in split["label"]])


# ---- tokens and batches ----

def encode(split: dict, tokenizer, T: int) -> tuple[list[np.ndarray], str]:
    """(ids of each text, pair or filled prompt of a split, at most T; a note of what was cut and
    empty). Of a pair that is too long each keeps a half, or what the other leaves."""
    slots = ["text", "text_pair"][:len(split["text"][0])]
    form = re.split(r"\{(text|text_pair)\}", prompt if style == "cloze" else
                    "".join(f"{{{slot}}}" for slot in slots))
    if form[1::2] != slots:
        raise ValueError(f"prompt {prompt!r} has the slots {form[1::2]}, expected {slots}")
    fixed = [tokenizer.encode(part) for part in form[::2]]
    if style == "head" and len(slots) == 2:
        fixed[1] = np.array([tokenizer.eos_id])
    room, rows, cut, empty = T - sum(map(len, fixed)), [], 0, 0
    if room < len(slots):
        raise ValueError(f"max_tokens={T} leaves no room beside a prompt of {T - room} tokens")
    for number, text in zip(split["row"], split["text"]):
        try:
            ids = [tokenizer.encode(normalize(part) if lowercase else part) for part in text]
        except ValueError as e:
            raise ValueError(f"row {number} of {split['where']}: {e}") from None
        empty += not all(map(len, ids))
        if sum(map(len, ids)) > room:
            first = min(len(ids[0]), max(room - sum(map(len, ids[1:])), room // len(ids)))
            ids = [part[:n] if keep == "head" else part[max(0, len(part) - n):]
                   for part, n in zip(ids, (first, room - first))]
            cut += 1
        row = np.concatenate([fixed[0], *(part for pair in zip(ids, fixed[1:]) for part in pair)])
        real = np.flatnonzero(row != tokenizer.eos_id)  # transformers reads the last of these
        end = real[-1] + 1 if len(real) else 0
        rows.append(row[:end] if end else np.array([tokenizer.eos_id]))
    return rows, f"{cut:,} cut, {empty:,} empty"


def collate(rows, pad: int, device):
    """ids (B, T), padded on the right to the longest row: causal attention needs no mask for that;
    and last (B,), where each row ends."""
    ids = np.full((len(rows), max(map(len, rows))), pad, np.int64)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = row
    last = torch.tensor([len(row) - 1 for row in rows])
    return torch.from_numpy(ids).to(device), last.to(device)


def epoch_batches(lengths, epoch: int) -> list[np.ndarray]:
    """An epoch's batches in random order, rows of similar length together: sorted within random
    buckets of 64 batches. A pure function of seed and epoch."""
    rng, n, batches = np.random.default_rng((seed, epoch)), 64 * batch_size, []
    order = rng.permutation(len(lengths))
    for bucket in (order[i:i + n] for i in range(0, len(order), n)):
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[i:i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


# ---- the classifier ----

class Classifier(nn.Module):
    """A GPT and a linear layer without bias on the hidden state of a row's last real token."""

    def __init__(self, gpt: GPT, head_weight: torch.Tensor):
        super().__init__()
        self.gpt, self.head = gpt, nn.Linear(*head_weight.shape[::-1], bias=False)
        self.head.weight.data = head_weight.clone()

    def forward(self, ids, last=None):
        """Logits (B, classes) of ids (B, T) and last (B,), or of their features (B, C) alone."""
        x = ids if last is None else self.features(ids, last)
        return self.head(F.dropout(x, self.gpt.config.dropout, self.training))

    def features(self, ids, last):
        return self.gpt.hidden(ids)[torch.arange(len(ids), device=ids.device), last]


@torch.no_grad()
def over(compute, rows, width: int, pad: int, env) -> torch.Tensor:
    """compute(ids, last) of all rows, (N, width) in float32, in long batches of similar length; the
    ranks share the work."""
    out, lengths = torch.zeros(len(rows), width, device=env.device), np.array([*map(len, rows)])
    order, start, number = np.argsort(-lengths, kind="stable"), 0, 0
    while start < len(order):
        count = max(1, EVAL_TOKENS.get(env.type, 2**15) // lengths[order[start]])
        chunk = order[start:start + count]
        if number % env.world == env.rank:
            with env.autocast():
                out[chunk] = compute(*collate([rows[i] for i in chunk], pad, env.device)).float()
        start, number = start + count, number + 1
    if env.world > 1:
        torch.distributed.all_reduce(out)
    return out


def load(name: str) -> tuple:
    """(GPT in float32, its tokenizer, the linear layer's weight or None, its config.json)."""
    file = local_folder(name) / "config.json"
    config, weight = read_json(file) if file.is_file() else {}, None
    if config.get("architectures") == ["GPT2ForSequenceClassification"]:
        fields, tensors = read_pretrained(file.parent)
        if "transformer.score.weight" not in tensors:
            raise ValueError(f"{file.parent} has no tensor score.weight, its linear layer")
        weight = tensors.pop("transformer.score.weight")[1]().float()
        if "lm_head.weight" not in tensors:  # transformers' has none, tied or not
            fields["tie_word_embeddings"] = True
        gpt, tokenizer = GPT(GPTConfig(**fields | {"dropout": dropout})), open_tokenizer(file.parent)
        shapes = {key: tuple(p.shape) for key, p in gpt.state_dict().items()}
        if (shapes != {key: tuple(shape) for key, (shape, _) in tensors.items()}
                or tokenizer.vocab_size != gpt.config.vocab_size):
            raise ValueError(f"{file.parent}: its tensors or its tokenizer ({tokenizer.vocab_size} ids) "
                             "are not those that its config.json describes")
        gpt.load_state_dict({key: read() for key, (_, read) in tensors.items()})
    else:
        gpt, tokenizer = load_model(name, dtype=torch.float32, dropout=dropout)
    if tokenizer.eos_id is None:
        raise ValueError(f"the {tokenizer.name} tokenizer has no end-of-text to pad with")
    return gpt, tokenizer, weight, config


def saved_classes(config: dict) -> list:
    """The classes that a config.json names, in order."""
    labels = config.get("id2label") or {}
    return [labels.get(str(i)) for i in range(len(labels))]


def answer_ids(tokenizer, names) -> list[int]:
    """The token of each class's verbalizer; ValueError for a word that is several."""
    if len(verbalizers) != len(names):
        raise ValueError(f"verbalizers has {len(verbalizers)} words, there are {len(names)} "
                         f"classes: {', '.join(names)}")
    if len(set(verbalizers)) < len(verbalizers):
        raise ValueError(f"verbalizers {verbalizers} has a word twice; each class needs its own")
    ids = [tokenizer.encode(word).tolist() for word in verbalizers]
    for word, found in zip(verbalizers, ids):
        if len(found) != 1:
            raise ValueError(f"the verbalizer {word!r} is {len(found)} tokens, "
                             f"{[tokenizer.decode([i]) for i in found]}; choose a word that is one")
    return [found[0] for found in ids]


def save(out: Path, net: Classifier, tokenizer, names, answers, T: int, pairs: bool):
    """OUT/best, and in its config.json what `classify` must know."""
    if style == "head":
        net.gpt.score = net.head  # into the same file, under transformers' name
    else:
        net.gpt.lm_head.weight.data[answers] = net.head.weight.data
    save_best(out, net.gpt, tokenizer, architectures=[
        "GPT2ForSequenceClassification" if style == "head" else "GPT2LMHeadModel"],
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
        pad_token_id=tokenizer.eos_id, finetune_cls={
            "style": style, "prompt": prompt, "verbalizers": verbalizers, "keep": keep,
            "lowercase": lowercase, "max_tokens": T, "pairs": pairs})
    if style == "head":
        del net.gpt.score


# ---- what is measured and shown ----

def measures(labels, predicted, K: int) -> dict:
    """accuracy, macro_f1, confusion (true class, predicted class), and each class's precision,
    recall, f1 and support; what is divided by nothing is 0."""
    confusion = np.zeros((K, K), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    hits, support, claimed = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    f1 = 2 * hits / np.maximum(support + claimed, 1)
    return {"accuracy": float(hits.sum() / confusion.sum()),
            "macro_f1": float(f1[support + claimed > 0].mean()),  # classes that occur
            "precision": (hits / np.maximum(claimed, 1)).tolist(),
            "recall": (hits / np.maximum(support, 1)).tolist(), "f1": f1.tolist(),
            "support": support.tolist(), "confusion": confusion.tolist()}


def show(found: dict, names: list[str]) -> str:
    """Each class's measures, and what its texts were taken for."""
    width = max(6, *map(len, names)) + 1
    lines = [f"{'class':>{width}} precision recall    F1 support  taken for"
             + "".join(f"{name:>{width}}" for name in names)]
    for name, p, r, f, n, row in zip(names, *(found[key] for key in (
            "precision", "recall", "f1", "support", "confusion"))):
        lines.append(f"{name:>{width}} {p:9.3f} {r:6.3f} {f:5.3f} {n:7}" + " " * 11
                     + "".join(f"{count:{width}}" for count in row))
    return "\n".join(lines)


def draw(path: Path, confusion, names: list[str]):
    """The confusion matrix."""
    counts, at = np.array(confusion), range(len(names))
    with figure(path, (4.4, 3.8)) as table:
        table.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), "Blues", vmin=0, vmax=1)
        for (i, j), n in np.ndenumerate(counts) if len(names) <= 40 else ():
            table.text(j, i, str(n), ha="center", va="center",
                       color="white" if n > 0.6 * counts[i].sum() else "black")
        shown = [name.replace("$", r"\$") for name in names]  # no formula
        table.set(xlabel="predicted", ylabel="true", xticks=at, yticks=at, xticklabels=shown,
                  yticklabels=shown)


def write_predictions(path: Path, split: dict, logits, names: list[str]):
    """A CSV with id, label (where there are labels), prediction and its probability."""
    best = logits.softmax(-1).max(-1)
    columns = {"id": split["id"]} | ({"label": split["label"]} if split["label"] else {}) | {
        "prediction": [names[k] for k in best.indices.tolist()],
        "probability": [f"{p:.4f}" for p in best.values.tolist()]}
    with replacing(path) as tmp, open(tmp, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([list(columns), *zip(*columns.values())])


def write_cs224n(out: Path, part: str, split: dict, logits, names: list[str]):
    """OUT/predictions, under the names and in the form of the course's own scripts."""
    found = [names[k] for k in logits.argmax(-1).tolist()]
    how = {"full": "full-model", "last_layer": "last-linear-layer"}.get(mode, mode)
    task = "cfimdb" if "cfimdb" in str(train_file) else "sst"
    name, title = f"{how}-{task}-{part}-out.csv", "Sentiment"
    if len(split["text"][0]) == 2:  # GPT-2's tokens "yes" and "no"
        name, title = f"para-{part}-output.csv", "Is_Paraphrase"
        found = [8505 if k == 1 else 3919 for k in logits.argmax(-1).tolist()]  # 1: the second class,
        # the positive one, whatever its name
    write_text(out / "predictions" / name, f"id \t Predicted_{title} \n" + "".join(
        f"{i}, {k} \n" for i, k in zip(split["id"], found)))


def classify(env, gpt, tokenizer, head_weight, config: dict):
    """--predict and --predict_file: what a trained run makes of texts. The file's predictions lie
    beside the run, or in out_dir if that is on the hub."""
    if "finetune_cls" not in config:
        raise ValueError(f"{init_from} is no run of finetune_cls.py to predict with; name one with "
                         "--init_from")
    saved = config["finetune_cls"]
    globals().update({key: value for key, value in saved.items() if key != "pairs"})
    names = saved_classes(config)
    if head_weight is None:
        head_weight = gpt.lm_head.weight[answer_ids(tokenizer, names)].detach()
    net = Classifier(gpt, head_weight).to(env.device).eval()
    n = 1 + saved["pairs"]  # texts that go together
    split = {"text": list(zip(*[iter(predict)] * n)), "label": None, "where": "--predict",
             "row": range(1, len(predict) + 1)}
    if predict_file:
        split = as_split(read_table(predict_file), predict_file, score_test)
    if len(predict) % n or len(split["text"][0]) != n:
        raise ValueError(f"{init_from} classifies "
                         + ("pairs: give two texts" if saved["pairs"] else "single texts"))
    rows, note = encode(split, tokenizer, max_tokens)
    logits = over(net, rows, len(names), tokenizer.eos_id, env).cpu()
    for text, p in zip(() if predict_file else split["text"], logits.softmax(-1)):
        env.say(f"{names[p.argmax()]}  {p.max():.3f}  {' | '.join(text)}")
    if predict_file:
        run = Path(init_from if Path(init_from).is_dir() else out_dir)
        path = run / f"predictions_of_{Path(predict_file).stem}.csv"  # none of its own results' names
        if env.rank == 0:
            write_predictions(path, split, logits, names)
        env.say(f"{path}: {len(rows):,} texts, {note}")
        if split["label"]:
            found = measures(class_numbers(split, names), logits.argmax(-1).numpy(), len(names))
            env.say(f"accuracy {found['accuracy']:.4f}, macro-F1 {found['macro_f1']:.4f}\n"
                + show(found, names))
    env.close()


def main():
    settings, env, out = begin(globals(), FROM_ONE, CHOICES)
    say = env.say
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length of a batch
    gpt, tokenizer, head_weight, config = load(init_from)
    if predict or predict_file:
        return classify(env, gpt, tokenizer, head_weight, config)
    env.lock(out)

    # ---- the data ----
    clock = time.perf_counter()
    splits = read_splits()
    train = splits["train"]
    names = classes or sorted(set(train["label"]), key=lambda name: (
        (0, int(name), "") if re.fullmatch(r"-?\d+", name) else (1, 0, name)))
    absent = [name for name in names if name not in train["label"]]
    if len(set(names)) < len(names):
        raise ValueError(f"classes names one twice: {', '.join(names)}")
    if epochs and (absent or len(names) < 2):
        raise ValueError(f"no row of training has the class {absent[0]!r}" if absent else
                         f"all rows of training have one class, {names[0]!r}")
    T, K, pad = gpt.config.block_size, len(names), tokenizer.eos_id
    T, pairs = min(max_tokens or T, T), len(train["text"][0]) == 2
    labels, rows = {}, {}
    for name, split in splits.items():
        labels[name] = class_numbers(split, names)
        rows[name], note = encode(split, tokenizer, T)
        say(f"{name}: {len(rows[name]):,} texts, {sum(map(len, rows[name])):,} tokens, {note}"
            + ("" if split["label"] else ", no labels"))
    lengths, targets = np.array([*map(len, rows["train"])]), torch.from_numpy(labels["train"])

    # ---- the model ----
    answers = answer_ids(tokenizer, names) if style == "cloze" else None
    if answers:  # the rows of the answers are trained as a layer of their own, and written back
        head_weight = getattr(gpt, "lm_head", gpt.transformer.wte).weight.detach()
        gpt.config.tie_word_embeddings = False
        gpt.lm_head = nn.Linear(*head_weight.shape[::-1], bias=False)
        gpt.lm_head.weight.data = head_weight.clone()
        head_weight = head_weight[answers]
    elif head_weight is None or saved_classes(config) != names:
        there = "no linear layer" if head_weight is None else (
            f"a linear layer for the classes {', '.join(map(str, saved_classes(config)))}")
        if not epochs:
            raise ValueError(f"{init_from} has {there}, and epochs=0 trains none for "
                             f"{', '.join(names)}: give a run that has one, or --style=cloze")
        if head_weight is not None:
            say(f"{init_from} has {there}: a new one is made for {', '.join(names)}")
        head_weight = torch.randn(K, gpt.config.n_embd) * 0.02
    set_trainable(gpt, mode, train_blocks, lora_rank, lora_alpha, lora_dropout)
    if hasattr(gpt, "lm_head"):
        gpt.lm_head.requires_grad_(False)  # it takes no part
    net = Classifier(gpt, head_weight).to(env.device)
    frozen, trained = mode == "last_layer", [p for p in net.parameters() if p.requires_grad]
    parameters, trained_parameters = (sum(p.numel() for p in ps) for ps in (
        net.parameters(), trained))
    per_epoch = math.ceil(len(lengths) / batch_size)
    max_steps, parts = epochs * per_epoch, accumulation * env.world
    say(f"{init_from}: {parameters:,} parameters, {mode} trains {trained_parameters:,}; "
        f"{env.name()}, {str(env.dtype).removeprefix('torch.')}\n"
        f"read in {time.perf_counter() - clock:.1f} s; classes: {', '.join(names)}; {epochs} "
        f"epochs, {max_steps:,} updates of {batch_size} texts ({env.world} x {accumulation} x "
        f"{batch_size / parts:g}: ranks, micro-batches, texts)")
    clock, cached, seconds = time.perf_counter(), {}, 0.0  # of training, features included
    if frozen and cache_features and epochs:
        cached = {name: over(net.eval().features, part, gpt.config.n_embd, pad, env)
                  for name, part in rows.items()}
        seconds = time.perf_counter() - clock
        say(f"features of all texts in {seconds:.1f} s; from now on only the linear layer is run")

    def judge(name):
        net.eval()
        with torch.no_grad():
            logits = net(cached[name]) if cached else over(net, rows[name], K, pad, env)
        net.train()
        gpt.train(not frozen)
        logits = logits.float().cpu()
        if labels[name] is None:
            return logits, {}
        found = measures(labels[name], logits.argmax(-1).numpy(), K)
        if pairs and K == 2:
            found["positive_f1"] = found["f1"][1]
        loss = F.cross_entropy(logits, torch.from_numpy(labels[name])).item()
        return logits, found | {"loss": loss}

    rate, body = learning_rate, [p for p in trained if p is not net.head.weight]
    head_rate = rate if head_learning_rate is None else head_learning_rate
    groups = [{"params": [p for p in body if p.dim() > 1], "peak": rate},
              {"params": [p for p in body if p.dim() < 2], "peak": rate, "weight_decay": 0.0},
              {"params": [net.head.weight], "peak": head_rate}]
    update = torch.optim.AdamW([g for g in groups if g["params"]], learning_rate, (0.9, 0.999),
                               weight_decay=weight_decay, fused=True)
    model = env.parallel(net)
    if env.rank == 0:
        set_aside(out)
        metrics = Metrics(out)
    step, texts, tokens, loss_sum, counted = 0, 0, 0, 0.0, 0
    best, best_epoch, kept = (-1.0, 0.0), 0, None  # (accuracy, -loss) on dev
    stop, stopped, skips, norms, row = StopSignal(), False, Skips(env), [], {}

    # ---- the loop ----
    net.train()
    gpt.train(not frozen)
    for epoch in range(min(1, epochs), epochs + 1):
        clock = time.perf_counter()
        for batch in epoch_batches(lengths, epoch) if epoch else ():
            scale = lr_scale("linear", step, max_steps, round(0.1 * max_steps))
            for group in update.param_groups:
                group["lr"] = group["peak"] * scale
            for micro in range(accumulation):
                part = micro * env.world + env.rank
                mine, n = batch[part::parts], len(batch)
                weight = env.world / n * (len(mine) > 0)  # DDP takes the mean over the ranks
                mine = mine if len(mine) else batch[:1]  # a rank without a text still takes part
                torch.manual_seed(micro_batch_seed(seed, step, part))
                x = [cached["train"][mine]] if cached else collate(
                    [rows["train"][i] for i in mine], pad, env.device)
                between = env.world > 1 and micro + 1 < accumulation
                with model.no_sync() if between else nullcontext(), env.autocast():
                    loss = F.cross_entropy(model(*x).float(), targets[mine].to(env.device),
                                           reduction="sum")
                    env.scaler.scale(loss * weight).backward()
                loss_sum += loss.detach() * (weight > 0)
            norms.append(env.update(update, trained, grad_clip))
            step, texts, counted = step + 1, texts + n, counted + n
            tokens += int(lengths[batch].sum())
            shown = step % log_interval == 0 or step % per_epoch == 0
            stopped = step < max_steps and env.any(stop.received, shown)
            if stopped:
                say(f"stopped by {stop.received or 'a signal'} at update {step} of {max_steps}; "
                    + (f"epoch {best_epoch}, the best, is judged" if kept else "nothing saved yet"))
                break
            if shown:
                skips.see(norms, step, say)
                row = {"train_loss": env.sum(float(loss_sum))[0] / counted, "lr": rate * scale,
                       "skipped": skips.total or None}
                if env.rank == 0 and step % per_epoch:
                    metrics.log(step=step, tokens=tokens, **row)
                loss_sum, counted, norms = 0.0, 0, []
        spent = time.perf_counter() - clock
        seconds += spent
        if stopped:
            break
        _, found = judge("dev")
        say(f"epoch {epoch}: dev accuracy {found['accuracy']:.4f}, macro-F1 "
            f"{found['macro_f1']:.4f}, loss {found['loss']:.4f}"
            + f"; {len(lengths) / spent:,.0f} texts/s" * (epoch > 0))
        if env.rank == 0:
            metrics.log(step=step, tokens=tokens, **row, elapsed_s=seconds, **{
                f"val_{key}": found[key] for key in ("loss", "accuracy", "macro_f1")})
        if math.isfinite(found["loss"]) and (found["accuracy"], -found["loss"]) > best:
            best, best_epoch = (found["accuracy"], -found["loss"]), epoch
            kept = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            if env.rank == 0:
                save(out, net, tokenizer, names, answers, T, pairs)
        elif patience and epoch - best_epoch >= patience:
            say(f"no better for {patience} epochs: stopped")
            break

    # ---- judged by the best epoch ----
    stop.over()
    if not kept and not stopped:
        raise ValueError("the loss on dev was never finite; lower --learning_rate")
    if not kept:
        return env.close()
    net.load_state_dict(kept)
    results = {"best_epoch": best_epoch, "seconds": seconds, "seed": seed, "classes": names,
               "parameters": parameters, "trained_parameters": trained_parameters,
               "updates": step, "stopped": stopped, "texts_per_s": epochs and texts / seconds}
    for name in ("dev", "test"):
        if name not in splits:
            continue
        logits, found = judge(name)
        results |= {f"{name}_{key}": value for key, value in found.items()}
        if env.rank == 0:
            write_predictions(out / f"predictions_{name}.csv", splits[name], logits, names)
            if cs224n:
                write_cs224n(out, name, splits[name], logits, names)
            if found:
                say(f"{name}: " + ", ".join(f"{key} {found[key]:.4f}" for key in (
                    "accuracy", "macro_f1", "positive_f1", "loss") if key in found)
                    + f"\n{show(found, names)}")
                results |= {"split": name} | {key: found[key] for key in (  # test's, if scored
                    "accuracy", "macro_f1", "positive_f1") if key in found}
    if env.rank == 0:
        write_text(out / "results.json",
                   json.dumps(results | {"settings": settings}, indent=1) + "\n")
        metrics.plot(unit="text")
        draw(out / "confusion.png", results[f"{results['split']}_confusion"], names)
    say(f"{step:,} updates in {seconds:.0f} s, {results['texts_per_s']:.1f} texts/s; predictions, "
        f"results.json and confusion.png are in {out}\nclassify: "
        f"python finetune_cls.py --init_from={out} --predict \"…\"")
    env.close()


if __name__ == "__main__":
    run(main, globals())
