"""Fine-tunes a model to classify texts, or pairs of texts: sentiment, paraphrase, a table of yours.

    python finetune_cls.py config/finetune_sst.py --data_dir=FOLDER --mode=last_layer
    python finetune_cls.py config/gpt2_cls.py --train_file=mine.csv --label_column=stars
    python finetune_cls.py config/finetune_quora.py --data_dir=FOLDER --style=cloze --epochs=0
    torchrun --standalone --nproc_per_node=8 finetune_cls.py config/finetune_imdb.py
    python finetune_cls.py --init_from=out/finetune_sst --predict "A joy from start to end ."

A linear layer reads the hidden state of a text's last token. style head: it starts at random, and
end-of-text divides a pair; with --pooling=mean it reads the mean of all hidden states. style cloze:
the text stands in a prompt, and the layer starts as the language model's logits of the words that
answer it. OUT/best, the model of the best epoch on dev, adapters merged, is transformers'
GPT2ForSequenceClassification where the layer reads the last token, and with cloze GPT2LMHeadModel.
"""

import csv
import math
import re
import shlex
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from checkpoint import (
    adapter_base,
    check_data,
    load_model,
    model_tokenizer,
    open_run,
    save_best,
    take_settings,
)
from configurator import run as run_script
from data import digest
from device import begin, to_device
from files import read_json, replacing, write_text
from hf import find_file, fitting_tensors, make_config, read_pretrained
from lora import set_trainable
from model import GPT, GPTConfig
from optim import build_optimizer
from run import Run, figure
from text import first_of, hub_rows, normalize, read_table, say_once, typed
from tokenizer import from_json, open_tokenizer

# what and where
out_dir = "out/finetune_cls"  # the run's folder
overwrite = False  # begin anew in a folder that holds a run
init_from = "gpt2"  # a hub name, a Hugging Face or run folder; resume; a trained run, to predict
data_dir: str | None = None  # where the three files are
train_file: str | None = None  # .csv, .tsv, .txt (tabs, no quoting), .json[l][.gz|.xz], .parquet …
dev_file: str | None = None  # None: dev_fraction of train_file is cut off, by seed
test_file: str | None = None  # its labels, if it has any, only measure the best model
dataset: str | None = None  # a hub data set, NAME or NAME:CONFIG, where train_file is not here
dev_fraction = 0.1
text_column = ["text", "sentence"]  # the first of these that the table has
text_pair_column: list[str] = []  # of a second text
label_column = ["label", "sentiment"]
classes: list[str] = []  # all labels, in order; empty: those that training has
lowercase = False  # lower case, punctuation apart: for a base model that was trained on such text
max_tokens: int | None = None  # of a text, or pair with its prompt; None: the model's context
keep = "head"  # what is kept of a longer one: its head or its tail
# what is trained
mode = "full"  # full, last_layer, last_blocks (with the final LayerNorm), lora
train_blocks = 2  # of last_blocks
lora_rank = 16
lora_alpha = 32.0  # adapters are scaled by lora_alpha / lora_rank
lora_dropout = 0.0  # of what the adapters read
style = "head"  # or cloze
pooling = "last"  # of head: whose hidden state is read, the last token's, or mean: of all tokens
prompt = ""  # of cloze: {text}, and {text_pair} of pairs, and what asks for the answer
verbalizers: list[str] = []  # of cloze: the answer to each class in order, one token: " no", " yes"
dropout = 0.1  # in the base model and before the linear layer
word_dropout = 0.0  # share of tokens that training reads as end-of-text; not of cached features
# the updates
epochs = 3  # 0: only evaluates the model as it is
batch_size = 32  # texts of an update, over all ranks
accumulation = 1  # micro-batches of a rank, which divide these texts
optimizer = "adamw"  # or another of optim.OPTIMIZERS
learning_rate = 5e-4  # its peak (GPT-2 itself: 2e-5): warmup over a tenth, then linear to zero
adamw_learning_rate: float | None = None  # under muon, of embeddings and vectors; None: the same
head_learning_rate: float | None = None  # of the linear layer; None: that of the embeddings
weight_decay = 0.01  # of matrices
grad_clip = 1.0  # largest norm of the gradient; 0 for none
patience: int | None = None  # epochs without a better dev accuracy before it stops
cache_features = True  # last_layer: the base model runs once
seed = 1337
# what is made of it
cs224n = False  # also writes OUT/predictions as the course's autograder reads them
predict: list[str] = []  # texts to classify with a trained run (of pairs: two and two)
predict_file: str | None = None  # a table to classify with it
log_interval = 20  # updates between lines
wandb_project: str | None = None  # also log to Weights & Biases (pip install wandb)
tensorboard = False  # also log for TensorBoard (pip install tensorboard)
# the machine
device = "auto"  # cpu, cuda, cuda:1, mps
dtype = "auto"  # of autocast: float32, bfloat16, float16
compile: bool | None = None  # torch.compile; None: on GPUs

FROM_ONE = ("batch_size", "accumulation", "log_interval", "max_tokens", "patience")
CHOICES = {"style": ("head", "cloze"), "keep": ("head", "tail"), "pooling": ("last", "mean")}
FIXED = ("seed", "mode", "style", "pooling", "prompt", "verbalizers", "keep", "lowercase",
         "max_tokens", "train_blocks", "lora_rank", "lora_alpha", "batch_size",
         "optimizer")  # of a resumed run
LIKE_TRANSFORMERS = {"style": "head", "pooling": "last"}  # how its classifiers read a text
HEADLINE = ("accuracy", "macro_f1", "positive_f1")  # of results.json, also without a split's name
NO_LABEL = ("", "None", "nan")  # an empty cell; null; pandas' missing value
EVAL_TOKENS = {"cpu": 2**13, "cuda": 2**16}  # in a batch without gradients


# ---- tables ----

class Example(NamedTuple):
    where: str  # row 7 of dev.csv
    id: str
    text: tuple[str, ...]  # one text, or the two of a pair
    label: str | None  # the name of its class


def make_examples(table: list[dict], where: str, needs_labels: bool) -> list[Example]:
    """The examples of a table, whose rows count from 1; null is an empty text. Labels that are not
    needed may be missing, but then all. ValueError for a row without a text, and for one whose
    label is missing or a fraction."""
    if not table or not all(isinstance(row, dict) for row in table):
        raise ValueError(f"{where} has no rows, or some without named columns")
    columns = {"text": text_column, "text_pair": text_pair_column, "label": label_column}
    for kind, names in columns.items():
        needed = needs_labels if kind == "label" else names
        if needed and all(first_of(row, names, where) is where for row in table):  # no such column
            raise ValueError(f"{where} has no column {' or '.join(names)}; its columns are "
                             f"{', '.join(table[0])}: name the right one by --{kind}_column")
    examples = []
    for number, row in enumerate(table, 1):
        if row.get("#1 ID") == "-1":  # MRPC's training file ends with four rows of another kind
            continue
        texts = [first_of(row, names, 0) for names in (text_column, text_pair_column) if names]
        if not all(text is None or isinstance(text, str) for text in texts):
            raise ValueError(f"row {number} of {where} has no text in the columns "
                             f"{text_column + text_pair_column}: {row!r:.80}")
        label = first_of(row, label_column, None)
        if type(label) in (list, dict):
            raise ValueError(f"row {number} of {where} has the label {label!r:.80}, expected one "
                             "class for a text")
        label = str(label).strip()
        label = re.sub(r"^([+-]?\d+)\.0*$", r"\1", label)  # 1.0 is 1
        examples.append(Example(f"row {number} of {where}", str(row.get("id", number)).strip(),
                                tuple(text or "" for text in texts), label))
    if not needs_labels and all(example.label in (*NO_LABEL, "-1") for example in examples):
        return [example._replace(label=None) for example in examples]
    for example in examples:
        if example.label in NO_LABEL or re.fullmatch(r"[+-]?\d*\.\d+", example.label):
            raise ValueError(f"{example.where} has the label {example.label!r} in the columns "
                             f"{label_column}, expected a word or a whole number{hint()}")
    return examples


def hint() -> str:
    """What helps where the labels of a table are wrong that needs none."""
    return "; --label_column=none predicts without labels" if predict_file else ""


def read_splits() -> dict[str, list[Example]]:
    """The splits train, dev and, where there is one, test, from files or the hub."""
    files = {"train": train_file, "dev": dev_file, "test": test_file}
    files = {name: Path(data_dir or "", file) for name, file in files.items() if file}
    splits = {}
    if dataset and not data_dir and not any(file.is_file() for file in files.values()):
        say_once(f"{', '.join(map(str, files.values())) or 'no file'}: not here; {dataset} is read "
                 "from the hub")
        hint = "give local files with --data_dir=FOLDER"
        found = {}
        for split, row in hub_rows(dataset, ("train", "validation", "test"), hint):
            found.setdefault(split, []).append(row)
        for split, rows in found.items():
            name = "dev" if split == "validation" else split
            splits[name] = make_examples(rows, f"{dataset}, {split}", name != "test")
    elif train_file is None:
        raise ValueError("nothing to train on: give --train_file, or a config such as "
                         "config/finetune_sst.py with --data_dir=FOLDER")
    else:
        for name, file in files.items():
            if name == "test" and not file.is_file():
                raise ValueError(f"there is no {file}; without a test set: --test_file=")
            splits[name] = make_examples(read_table(file), file, name != "test")
    if "dev" not in splits:
        if not 0 < dev_fraction < 1:
            raise ValueError(f"dev_fraction must be in (0, 1), got {dev_fraction}")
        train = splits["train"]
        n = max(1, round(dev_fraction * len(train)))
        shuffled = [train[i] for i in np.random.default_rng(seed).permutation(len(train))]
        splits["dev"], splits["train"] = shuffled[:n], shuffled[n:]
        rare = {e.label for e in train} - {e.label for e in splits["train"]}
        if rare and epochs:
            raise ValueError(f"all rows of class {min(rare)} are among the {n} that dev_fraction "
                             "cuts off for dev; give another --seed, or a --dev_file")
    return splits


def class_names(train: list[Example]) -> list[str]:
    """All classes in order; ValueError where training has not all of them, or one alone."""
    found = {example.label for example in train}
    names = classes or sorted(found, key=lambda name: (
        (0, int(name), "") if re.fullmatch(r"-?\d+", name) else (1, 0, name)))
    if len(set(names)) < len(names) or epochs and (len(names) < 2 or set(names) - found):
        raise ValueError("training needs two classes or more, each named once, and rows of each; "
                         f"classes: {names}, in its rows: {sorted(found)}")
    return names


def class_numbers(examples: list[Example], names: list[str]) -> torch.Tensor:
    """Labels as numbers (N,); ValueError for one that is not among the names."""
    for example in examples:
        if example.label not in names:
            raise ValueError(f"{example.where} has the label {example.label!r}, which is not among "
                             f"the classes of training: {', '.join(names)}{hint()}")
    return torch.tensor([names.index(example.label) for example in examples])


# ---- tokens and batches ----

def encode(examples: list[Example], tokenizer, T: int) -> tuple[list[np.ndarray], str]:
    """(ids of each text, pair or filled prompt, at most T; a note of how many were cut and empty).
    Of a pair that is too long each keeps a half, or what the other leaves."""
    slots = ["text", "text_pair"][:len(examples[0].text)]
    template = prompt if style == "cloze" else "".join(f"{{{slot}}}" for slot in slots)
    form = re.split(r"\{(text|text_pair)\}", template)
    if form[1::2] != slots:
        raise ValueError(f"prompt {prompt!r} has the slots {form[1::2]}, expected {slots}")
    fixed = [tokenizer.encode(part, special=True, whole=False).tolist() for part in form[::2]]
    if style == "head" and len(slots) == 2:
        fixed[1] = [tokenizer.eos_id]
    fixed[0], fixed[-1] = tokenizer.frame[0] + fixed[0], fixed[-1] + tokenizer.frame[1]
    limit = T - sum(map(len, fixed))
    if limit < len(slots):
        raise ValueError(f"max_tokens={T} leaves nothing beside the prompt of {T - limit} tokens")
    rows, cut, empty = [], 0, 0
    for example in examples:
        texts = map(normalize, example.text) if lowercase else example.text
        try:
            ids = [tokenizer.encode(text, whole=False) for text in texts]
        except ValueError as e:
            raise ValueError(f"{example.where}: {e}") from None
        empty += not all(map(len, ids))
        if sum(map(len, ids)) > limit:
            first = min(len(ids[0]), max(limit - sum(map(len, ids[1:])), limit // len(ids)))
            ids = [part[:n] if keep == "head" else part[max(0, len(part) - n):]
                   for part, n in zip(ids, (first, limit - first))]
            cut += 1
        parts = [fixed[0]]
        for part, after in zip(ids, fixed[1:]):
            parts += [part, after]
        row = np.concatenate(parts).astype(np.int64)
        if tokenizer.pad_id is not None:  # transformers reads the last token that pads nothing
            real = np.flatnonzero(row != tokenizer.pad_id)
            row = row[:real[-1] + 1] if len(real) else row[:0]
        rows.append(row if len(row) else np.array([tokenizer.eos_id]))
    return rows, f"{cut:,} cut, {empty:,} empty"


def collate(rows, device):
    """[ids (B, T), padded on the right to the longest row: causal attention needs no mask for that,
    whatever stands there; last (B,), where each row ends]."""
    ids = pad_sequence([torch.from_numpy(row.astype(np.int64)) for row in rows], batch_first=True)
    last = torch.tensor([len(row) - 1 for row in rows])
    return [to_device(ids, device), to_device(last, device)]


def epoch_batches(lengths, epoch: int) -> list[np.ndarray]:
    """An epoch's batches in random order, rows of similar length together: sorted within random
    buckets of 64 batches. A pure function of seed and epoch."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    bucket = np.arange(len(order)) // (64 * batch_size)
    order = order[np.lexsort((lengths[order], bucket))]  # by bucket, then by length
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


# ---- the classifier ----

class Classifier(nn.Module):
    """A GPT and a linear layer without bias on what `pooling` makes of a row's hidden states."""

    def __init__(self, gpt: GPT, head_weight: torch.Tensor):
        super().__init__()
        self.gpt, self.head = gpt, nn.Linear(*head_weight.shape[::-1], bias=False, device="meta")
        self.head.weight = nn.Parameter(head_weight.clone())

    def forward(self, ids, last=None):
        """Logits (B, classes) of ids (B, T) and last (B,), or of their features (B, C) alone."""
        x = ids if last is None else self.features(ids, last)
        return self.head(F.dropout(x, self.gpt.config.dropout, self.training))

    def features(self, ids, last):
        x = self.gpt.hidden(ids)  # (B, T, C)
        if style == "head" and pooling == "mean":
            real = torch.arange(x.size(1), device=x.device) <= last[:, None]  # (B, T)
            return (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return x[torch.arange(len(ids), device=ids.device), last]


@torch.no_grad()
def batched_forward(net, rows, env, features: bool = False) -> torch.Tensor:
    """Logits (N, classes) of all rows, or their features (N, C), in float32, without dropout, in
    long batches of similar length; the ranks share the work."""
    net.eval()
    width = net.head.in_features if features else net.head.out_features
    out, lengths = torch.zeros(len(rows), width, device=env.device), np.array([*map(len, rows)])
    order, start, number = np.argsort(-lengths, kind="stable"), 0, 0
    bar = tqdm(total=len(rows), unit=" texts", delay=2, leave=False, disable=env.rank > 0 or None)
    while start < len(order):
        count = max(1, EVAL_TOKENS.get(env.type, 2**15) // lengths[order[start]])
        chunk = order[start:start + count]
        if number % env.world == env.rank:
            inputs = collate([rows[i] for i in chunk], env.device)
            with env.autocast():
                out[chunk] = (net.features(*inputs) if features else net(*inputs)).float()
        start, number = start + count, number + 1
        bar.update(len(chunk))
    bar.close()
    if env.world > 1:
        torch.distributed.all_reduce(out)
    return out


def answer_ids(tokenizer, names: list[str]) -> list[int]:
    """The token of each class's verbalizer; ValueError where these are not one token for each."""
    words = [tokenizer.encode(word, whole=False).tolist() for word in verbalizers]
    ids = [word[0] for word in words if len(word) == 1]
    if not len(words) == len(names) == len(set(ids)):
        tokens = [[tokenizer.decode([i]) for i in word] for word in words]
        raise ValueError(f"verbalizers needs a word of one token for each of the classes {names}, "
                         f"none twice; its words are the tokens {tokens}")
    return ids


def read_config(name: str) -> tuple[dict, list[str]]:
    """config.json of a model, {} without one, and the classes in it, in order."""
    file = find_file(name, "config.json")
    config = read_json(file) if file else {}
    architectures = str(config.get("architectures"))
    if "finetune_cls" not in config and "ForSequenceClassification" not in architectures:
        return config, []  # a language model, whose id2label, if any, says nothing
    names = range(config.get("num_labels", 2))  # which transformers does not write down
    labels = config.get("id2label") or {number: f"LABEL_{number}" for number in names}
    return config, [labels[number] for number in sorted(labels, key=int)]


def load(name: str, names: list[str], env) -> tuple:
    """(Classifier, its tokenizer) from a model: with the linear layer that it brings, if that is
    for these classes and this style, or a new one."""
    weight, (config, own) = None, read_config(name)
    fields, tensors = read_pretrained(name) if config else ({}, {})
    if "score.weight" in tensors:  # without lm_head.weight, as transformers writes them
        weight = tensors.pop("score.weight")[1]().float()
        fields |= {"dropout": dropout, "tie_word_embeddings": "lm_head.weight" not in tensors}
        gpt = GPT(make_config(GPTConfig, fields, name))
        gpt.load_state_dict(fitting_tensors(tensors, gpt.state_dict(), name))
        tokenizer = model_tokenizer(name) or open_tokenizer("gpt2")
        if len(weight) != len(own) or tokenizer.vocab_size > gpt.config.vocab_size:
            raise ValueError(f"{name}: its linear layer has {len(weight)} rows for {len(own)} "
                             f"classes, its embedding {gpt.config.vocab_size} for "
                             f"{tokenizer.vocab_size} ids")
    else:
        gpt, tokenizer = load_model(name, dtype=torch.float32, dropout=dropout)
    if tokenizer.eos_id is None:
        raise ValueError(f"the {tokenizer.name} tokenizer has no end-of-text to pad with")
    how = LIKE_TRANSFORMERS | config.get("finetune_cls", {})
    if weight is None or (own, how["style"], how["pooling"]) != (names, style, pooling):
        if style == "cloze":  # the answers' rows are trained apart, and written back by `save`
            head = gpt.transformer.wte if gpt.config.tie_word_embeddings else gpt.lm_head
            rows, gpt.config.tie_word_embeddings = head.weight.detach().clone(), False
            gpt.lm_head = nn.Linear(*rows.shape[::-1], bias=False)
            gpt.lm_head.weight.data = rows
            weight = rows[answer_ids(tokenizer, names)]
        elif epochs:
            env.say(f"{name} has {f'the classes {own}' if own else 'no classes yet'}: a new linear "
                    f"layer is made for {len(names)} classes")
            weight = torch.randn(len(names), gpt.config.n_embd) * 0.02
        else:
            raise ValueError(f"{name} has no linear layer for the classes {names}, and epochs=0 "
                             "trains none; give a run that has one, or --style=cloze")
    env.place(gpt)
    return Classifier(gpt, weight).to(env.device), tokenizer


def save(out: Path, net: Classifier, tokenizer, names: list[str], T: int, pairs: bool):
    """OUT/best, in its config.json what `classify` must know, in its README.md what others must."""
    how = {"style": style, "pooling": pooling, "prompt": prompt, "verbalizers": verbalizers,
           "keep": keep, "lowercase": lowercase, "max_tokens": T, "pairs": pairs,
           "text_column": text_column, "text_pair_column": text_pair_column,
           "label_column": label_column}
    kind, files = {"architectures": ["GPT2LMHeadModel"]}, {}
    if style == "head":
        kind = {"architectures": ["GPT2ForSequenceClassification"]}
        if pooling == "mean":  # transformers would read the last token: it must not know this kind
            kind = {"architectures": ["TaleGPTForSequenceClassification"], "model_type": "talegpt"}
        side = {"head": "right", "tail": "left"}[keep]
        files = {"pairs": pairs, "padding_side": "right", "truncation_side": side,
                 "model_max_length": T}
        net.gpt.score = net.head  # into the same file, under transformers' name
    else:
        net.gpt.lm_head.weight.data[answer_ids(tokenizer, names)] = net.head.weight.data
    save_best(out, net.gpt, tokenizer, files, id2label=dict(enumerate(names)),
              label2id={name: i for i, name in enumerate(names)}, finetune_cls=how, **kind)
    if style == "head":
        del net.gpt.score
        before = "It reads texts that went through `text.normalize` of taleGPT. "
        reader = {"last": 'transformers loads it by `pipeline("text-classification", FOLDER, '
                          "truncation=True)`",
                  "mean": "finetune_cls.py reads it, transformers has no such classifier"}[pooling]
        write_text(out / "best" / "README.md", (
            f"{before if lowercase else ''}A GPT-2 that classifies texts, trained with taleGPT; "
            f"{reader}. Classes: {', '.join(names)}. How it reads a text: {how}\n"))


# ---- what is measured and shown ----

def measures(logits, labels) -> dict:
    """loss, accuracy, macro_f1, confusion (true class, predicted class), and each class's
    precision, recall, f1 and support, of logits (N, K); what is divided by nothing is 0."""
    K = logits.size(1)
    confusion = (labels * K + logits.argmax(-1)).bincount(minlength=K * K).view(K, K).numpy()
    hits, support, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    f1 = 2 * hits / np.maximum(support + predicted, 1)
    return {"loss": F.cross_entropy(logits, labels).item(),
            "accuracy": float(hits.sum() / confusion.sum()),
            "macro_f1": float(f1[support + predicted > 0].mean()),  # classes that occur
            "precision": (hits / np.maximum(predicted, 1)).tolist(),
            "recall": (hits / np.maximum(support, 1)).tolist(), "f1": f1.tolist(),
            "support": support.tolist(), "confusion": confusion.tolist()}


def show(found: dict, names: list[str]) -> str:
    """The measures of all texts, of each class's, and the confusion matrix."""
    width, support = max(6, *map(len, names)) + 1, found["support"]
    scores = ", ".join(f"{key} {found[key]:.4f}" for key in ("accuracy", "macro_f1", "loss"))
    columns = "".join(f"{name:>{width}}" for name in names)
    lines = [f"{scores}; always {names[np.argmax(support)]}: {max(support) / sum(support):.4f}",
             f"{'class':>{width}} precision recall    F1   predicted:{columns}"]
    for name, p, r, f, row in zip(names, *(found[key] for key in (
            "precision", "recall", "f1", "confusion"))):
        counts = "".join(f"{count:{width}}" for count in row)
        lines.append(f"{name:>{width}} {p:9.3f} {r:6.3f} {f:5.3f} {' ' * 12}{counts}")
    return "\n".join(lines)


def draw(path: Path, confusion, names: list[str]):
    """The confusion matrix as a picture."""
    counts, ticks = np.array(confusion), range(len(names))
    with figure(path, (4.4, 3.8)) as table:
        table.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), "Blues", vmin=0, vmax=1)
        for (i, j), n in np.ndenumerate(counts) if len(names) <= 40 else ():
            color = "white" if n > 0.6 * counts[i].sum() else "black"
            table.text(j, i, str(n), ha="center", va="center", color=color)
        labels = [name.replace("$", r"\$") for name in names]  # no formula
        table.set(xlabel="predicted", ylabel="true", xticks=ticks, yticks=ticks,
                  xticklabels=labels, yticklabels=labels)


def write_predictions(path: Path, examples: list[Example], logits, names: list[str]):
    """A CSV with id, label (empty where there is none), prediction and its probability; and, for
    cs224n, predictions/ beside it, under the names and in the form of the course's own scripts."""
    best, pairs = logits.softmax(-1).max(-1), len(examples[0].text) == 2
    rows = [("id", "label", "prediction", "probability")]
    lines = [f"id \t Predicted_{'Is_Paraphrase' if pairs else 'Sentiment'} \n"]
    for example, k, p in zip(examples, best.indices.tolist(), best.values.tolist()):
        rows.append((example.id, example.label, names[k], f"{p:.4f}"))
        answer = (3919, 8505)[k == 1] if pairs else names[k]  # GPT-2's tokens "no" and "yes"
        lines.append(f"{example.id}, {answer} \n")
    with replacing(path) as tmp, open(tmp, "w", encoding="utf-8", errors="backslashreplace",
                                      newline="") as file:
        csv.writer(file).writerows(rows)
    if cs224n:
        part = path.stem.removeprefix("predictions_")
        task = "cfimdb" if "cfimdb" in str(train_file) else "sst"
        how = {"full": "full-model", "last_layer": "last-linear-layer"}.get(mode, mode)
        name = f"para-{part}-output.csv" if pairs else f"{how}-{task}-{part}-out.csv"
        write_text(path.parent / "predictions" / name, "".join(lines))


def evaluate(net: Classifier, path: Path, examples: list[Example], rows, names, env) -> dict:
    """Writes the predictions, and shows the measures of examples that have labels."""
    labelled = examples[0].label is not None
    labels = class_numbers(examples, names) if labelled else None  # before what takes time
    logits = batched_forward(net, rows, env).cpu()
    if env.rank == 0:
        write_predictions(path, examples, logits, names)
    if not labelled:
        return {}
    found = measures(logits, labels)
    if len(names) == len(examples[0].text) == 2:  # of pairs
        found["positive_f1"] = found["f1"][1]
    env.say(f"{path.name}: {show(found, names)}")
    return found


def classify(env):
    """--predict and --predict_file: what a trained run makes of texts. The file's predictions lie
    beside the run, or in out_dir if that is on the hub."""
    config, names = read_config(init_from)
    if predict and predict_file:
        raise ValueError("give texts by --predict or a table by --predict_file, not both")
    if not names:
        merge = ("; of adapters merge_and_unload the model by PEFT first"
                 if adapter_base(init_from) else "")
        raise ValueError(f"{init_from} is no classifier; name one with --init_from{merge}")
    problem = config.get("problem_type") or ("regression" if len(names) < 2 else "")
    if problem in ("regression", "multi_label_classification"):
        raise ValueError(f"{init_from} is for {problem}, not for one class of several")
    file = find_file(init_from, "tokenizer_config.json")
    limits = read_json(file) if file else {}
    how = LIKE_TRANSFORMERS | {
        "lowercase": False, "pairs": False, "max_tokens": limits.get("model_max_length"),
        "keep": "tail" if limits.get("truncation_side") == "left" else "head"}
    how |= config.get("finetune_cls", {})  # which those of others lack
    n = 1 + how["pairs"]  # texts that go together
    given = how.keys() & globals()["_given"]
    fixed = given - {"text_column", "text_pair_column", "label_column"}
    other = [f"{key}={how[key]}" for key in sorted(fixed) if how[key] != globals()[key]]
    if other and "finetune_cls" in config:  # one of others says nothing of most of these
        raise ValueError(f"{init_from} was trained with {', '.join(other)}: leave such settings "
                         "out")
    how = {key: value for key, value in how.items() if key not in given}
    globals().update(how, epochs=0)
    net, tokenizer = load(init_from, names, env)
    if "finetune_cls" not in config:  # without one transformers reads a row's last token
        tokenizer.pad_id = config.get("pad_token_id")
    T = min(max_tokens or net.gpt.config.block_size, net.gpt.config.block_size)
    if predict_file:
        examples = make_examples(read_table(predict_file), predict_file, False)
    else:
        texts = [tuple(predict[i:i + n]) for i in range(0, len(predict), n)]
        examples = [Example("--predict", "", text, None) for text in texts]
    if any(len(example.text) != n for example in examples):
        raise ValueError(f"{init_from} classifies {'pairs' if n == 2 else 'single'} texts")
    rows, note = encode(examples, tokenizer, T)
    if predict_file:
        folder = Path(init_from if Path(init_from).is_dir() else out_dir)
        path = folder / f"predictions_of_{Path(predict_file).stem}.csv"  # its own keep theirs
        evaluate(net, path, examples, rows, names, env)
        env.say(f"{path}: {len(rows):,} texts, {note}")
    else:
        for example, p in zip(examples, batched_forward(net, rows, env).softmax(-1)):
            env.say(f"{names[p.argmax()]}  {p.max():.3f}  {' | '.join(example.text)}")
    env.close()


def main():
    take_settings(globals())
    globals().update(prompt=typed(prompt), verbalizers=[*map(typed, verbalizers)])
    settings, env, out = begin(globals(), FROM_ONE, CHOICES)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length of a batch
    if predict or predict_file:
        return classify(env)
    if not 0 <= word_dropout < 1:
        raise ValueError(f"word_dropout must be in [0, 1), got {word_dropout}")
    checkpoint = open_run(env, out, settings, FIXED, data=str, base=str)
    base = checkpoint["base"] if checkpoint else init_from

    # ---- the data and the model ----
    splits = read_splits()
    names, pairs = class_names(splits["train"]), len(splits["train"][0].text) == 2
    own = read_config(base)[1]
    numbers = [str(number) for number in range(len(own))]
    if names == numbers and not set(numbers) & set(own):  # labels that count the base's classes
        by_number = dict(zip(names, own))
        splits = {name: [example._replace(label=by_number.get(example.label, example.label))
                         for example in split] for name, split in splits.items()}
        names = own
    net, tokenizer = load(base, names, env)
    gpt = net.gpt
    T = min(max_tokens or gpt.config.block_size, gpt.config.block_size)
    if checkpoint and (
            make_config(GPTConfig, checkpoint["config"] | {"dropout": dropout}, out) != gpt.config
            or from_json(checkpoint["tokenizer"]).definition() != tokenizer.definition()):
        raise ValueError(f"{checkpoint['path']} was begun from another model than {base} is now; "
                         "bring that back, or begin anew with another --out_dir")
    targets = {name: class_numbers(split, names) for name, split in splits.items()
               if split[0].label is not None}
    rows = {}
    for name, split in splits.items():
        rows[name], note = encode(split, tokenizer, T)
        env.say(f"{name}: {len(split):,} texts, {sum(map(len, rows[name])):,} tokens, {note}")
    lengths = np.array([*map(len, rows["train"])])
    known = digest([names, [example[2:] for example in splits["train"] + splits["dev"]]])
    check_data(checkpoint, known, train_file or dataset)
    set_trainable(gpt, mode, train_blocks, lora_rank, lora_alpha, lora_dropout)
    if not gpt.config.tie_word_embeddings:
        gpt.lm_head.requires_grad_(False)  # it takes no part
    parameters = sum(p.numel() for p in net.parameters())
    trained_parameters = sum(p.numel() for p in net.parameters() if p.requires_grad)
    per_epoch, parts = math.ceil(len(lengths) / batch_size), accumulation * env.world
    max_steps = epochs * per_epoch
    env.say(f"{base}: {parameters:,} parameters, {mode} trains {trained_parameters:,}; "
            f"{env.name()}, {str(env.dtype).removeprefix('torch.')}\nclasses: {', '.join(names)}; "
            f"epochs: {epochs}, {max_steps:,} steps of {batch_size} texts"
            + (f" in {parts} micro-batches" if parts > 1 else ""))

    # ---- the run ----
    update = build_optimizer(net, optimizer, learning_rate, weight_decay, (0.9, 0.999),
                             adamw_learning_rate=adamw_learning_rate, head=[net.head.weight],
                             head_learning_rate=head_learning_rate)
    run = Run(env, out, net, update, settings, max_steps, per_epoch, checkpoint)
    del checkpoint
    cached = {}
    frozen = mode == "last_layer"
    if frozen and cache_features and epochs:
        clock = time.perf_counter()
        cached = {name: batched_forward(net, rows[name], env, True) for name in ("train", "dev")}
        seconds = time.perf_counter() - clock
        run.elapsed_s += seconds
        env.say(f"all features took {seconds:.1f} s; from now on only the linear layer is run")
    net.train()
    gpt.train(not frozen)
    tried = rows["train"][:math.ceil(batch_size / parts)]  # as many as of a micro-batch
    model, fast = env.compiled(
        net, False if cached else compile, dynamic=True,
        loss=lambda model: model(*collate(tried, env.device)).sum())

    def evaluate_and_keep(epoch: int) -> dict:
        """The measures on dev; the best model is kept."""
        net.eval()
        with torch.no_grad():
            logits = net(cached["dev"]) if cached else batched_forward(fast, rows["dev"], env)
        net.train()
        gpt.train(not frozen)  # features are made without dropout
        found = measures(logits.cpu(), targets["dev"])
        accuracy = found["accuracy"] if math.isfinite(found["loss"]) else -math.inf
        if run.is_best(-accuracy, found["loss"], epoch) and env.rank == 0:
            run.write(save, run.folder, net, tokenizer, names, T, pairs)
        return {f"val_{key}": found[key] for key in ("loss", "accuracy", "macro_f1")}

    # ---- the loop ----
    if not epochs:
        run.log(**evaluate_and_keep(0))
    batches = []
    for step in run.steps():
        epoch, number = divmod(step, per_epoch)
        if patience and number == 0 and epoch - max(1, run.best[-1]) >= patience:
            env.say(f"no better for {patience} epochs: stopped")
            break
        if not batches or number == 0:
            batches = epoch_batches(lengths, epoch + 1)
        batch, n = batches[number], len(batches[number])
        for part in run.micro_batches(model, accumulation):
            mine = batch[part::parts]
            texts = mine if len(mine) else batch[:1]  # a rank without a text still takes part
            numbers = to_device(torch.from_numpy(texts), env.device)
            inputs = [cached["train"][numbers]] if cached else collate(
                [rows["train"][i] for i in texts], env.device)
            if word_dropout and not cached:
                dropped = torch.rand(inputs[0].shape, device=env.device) < word_dropout
                inputs[0] = inputs[0].masked_fill(dropped, tokenizer.eos_id)
            labels = to_device(targets["train"][texts], env.device)
            with env.autocast():
                logits = model(*inputs)
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            run.backward(loss if len(mine) else loss * 0.0, n)
        run.update(n, tokens=int(lengths[batch].sum()))
        run.log(**(evaluate_and_keep(epoch + 1) if run.evaluates else {}))
        if run.saves:
            run.save(config=vars(gpt.config), tokenizer=tokenizer.to_json(), data=known, base=base)
    if run.stopped:
        return env.close()

    # ---- the best model on dev and test ----
    if run.best == (math.inf,):
        raise ValueError("the loss on dev was never finite; lower --learning_rate")
    env.sum(0)  # the best model is on disk
    best, _ = load(run.folder, names, env)
    texts_per_s = len(lengths) * run.step / per_epoch / run.elapsed_s if epochs else 0
    results = {"best_epoch": run.best[-1], "seconds": run.elapsed_s, "seed": seed, "classes": names,
               "parameters": parameters, "trained_parameters": trained_parameters,
               "updates": run.step, "texts_per_s": texts_per_s}
    for name in sorted(splits.keys() - {"train"}):
        path = run.folder / f"predictions_{name}.csv"
        found = evaluate(best, path, splits[name], rows[name], names, env)
        results |= {f"{name}_{key}": value for key, value in found.items()}
        if found:  # of test, if it has labels
            results |= {"split": name, **{key: found[key] for key in HEADLINE if key in found}}
            confusion = found["confusion"]
    if env.rank == 0:
        draw(run.folder / "confusion.png", confusion, names)
        run.metrics.plot(unit="text")
    run.results(results)
    if cs224n:
        env.say(f"to hand in: {out / 'predictions'}")
    env.say(f"epoch {run.best[-1]} was the best; {run.step:,} steps in {run.elapsed_s:.0f} s, "
            f"{texts_per_s:.1f} texts/s; all numbers: {out / 'results.json'}\n"
            f"classify: python finetune_cls.py --init_from={shlex.quote(str(out))} --predict \"…\"")
    env.close()


if __name__ == "__main__":
    run_script(main, globals())
