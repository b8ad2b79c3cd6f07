"""Fine-tunes a model to follow instructions, in full or by low-rank adapters, and evaluates it.

    python finetune_instruct.py config/finetune_instruct.py --data=FILE
    python finetune_instruct.py --init_from=gpt2 --data=tatsu-lab/alpaca --epochs=1 --mode=full
    python finetune_instruct.py config/finetune_instruct.py --data=FILE --init_from=resume
    torchrun --standalone --nproc_per_node=8 finetune_instruct.py --init_from=gpt2
    python sample.py --init_from=out/finetune_instruct --instruct "Name three colours."

Its data are records with `instruction`, `input` (may be empty) and `output`, as Alpaca's (Taori et
al. 2023). OUT/best is the best model on the dev split, adapters merged; OUT/adapter holds them
alone, in PEFT's format. Losses are nats per token of the answers, end-of-text included.
"""

import json
import math
import re
import shlex
import shutil
from collections import Counter
from itertools import zip_longest
from os.path import commonprefix
from pathlib import Path
from textwrap import wrap

import numpy as np
import torch
from sacrebleu.metrics import CHRF
from torch import nn
from tqdm import tqdm

from checkpoint import (
    check_data,
    load_model,
    open_run,
    save_best,
    saved_model,
    take_settings,
)
from configurator import run as run_script
from data import digest
from decode import left_padded, prepare
from device import begin, to_device
from files import read_text, write_text
from hf import local_folder
from lora import save_adapter, set_trainable
from model import GPT
from optim import build_optimizer
from run import Run
from text import hub_rows, instruction_record, prompt_ids, prompt_limit, read_table

# what and where
out_dir = "out/finetune_instruct"  # the run's folder
overwrite = False  # begin anew in a folder that holds a run
data = "tatsu-lab/alpaca"  # .json, .jsonl[.gz|.xz], .csv, .parquet … or a hub data set
template: str | None = None  # a file with {instruction}, {input}, {output}; None: Alpaca's
init_from = "gpt2"  # a hub name, a Hugging Face or run folder; or resume
block_size: int | None = None  # crops the context of the model
dropout = 0.0
seed = 1337  # of the split too: 85 % training, 5 % dev, 10 % test
# what is trained
mode = "lora"  # full, lora, or last_blocks (with the final LayerNorm)
train_blocks = 2  # of last_blocks
lora_rank = 16
lora_alpha = 32.0  # adapters are scaled by lora_alpha / lora_rank
lora_dropout = 0.0  # of what the adapters read
lora_targets = ["c_attn", "c_proj", "c_fc"]  # layers whose names end so; attn.c_proj would do too
train_on_all = False  # the loss of training covers the prompts too
# the updates
epochs = 3
batch_size = 8  # records of an update, over all ranks; the loss is the mean over all their tokens
optimizer = "adamw"  # or another of optim.OPTIMIZERS
learning_rate = 1e-3  # its peak, after a linear warmup; then linear to zero
warmup_fraction = 0.1  # of the updates
weight_decay = 0.01  # of matrices
grad_clip = 1.0  # largest norm of the gradient; 0 for none
# what is shown and kept of it
log_interval = 20  # updates between lines
eval_interval: int | None = None  # updates between evaluations on dev; None: an epoch
max_new_tokens = 128  # of an answer
num_answers = 10  # printed at the end; all are in OUT/answers.jsonl
wandb_project: str | None = None  # also log to Weights & Biases (pip install wandb)
tensorboard = False  # also log for TensorBoard (pip install tensorboard)
# the machine
device = "auto"  # cpu, cuda, cuda:1, mps
dtype = "auto"  # of autocast: float32, bfloat16, float16
compile: bool | None = None  # torch.compile; None: on GPUs

ALPACA = """\
Below is an instruction that describes a task. Write a response that appropriately completes the \
request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
{output}"""
FROM_ONE = ("epochs", "batch_size", "log_interval", "max_new_tokens", "eval_interval")
CHOICES = {"mode": ("full", "lora", "last_blocks")}
FIXED = ("template", "block_size", "seed", "mode", "train_blocks", "lora_rank", "lora_alpha",
         "lora_targets", "train_on_all", "batch_size", "optimizer")  # a resumed run keeps these


# ---- records ----

def read_records(name: str, say=print) -> list[dict]:
    """The records of a file or hub data set, stripped; those with an empty answer are left out with
    a note. ValueError for one that is no instruction with an answer; of a hub data set, which
    nobody here can mend, it is left out, too."""
    records, faults, wrong = [], [], []
    is_file = Path(name).is_file() or Path(name, "state.json").is_file()  # datasets' folder
    if is_file:
        rows = read_table(name)
    else:
        hint = "nor is it a file; give one with --data=FILE"
        rows = (row for _, row in hub_rows(name, ["train"], hint))
    for number, row in enumerate(rows, 1):
        try:
            record = instruction_record(row)
            if record["output"]:
                records.append(record)
                continue
            found, kind = "an empty answer", faults
        except (ValueError, AttributeError, TypeError) as e:
            found, kind = e, wrong
        kind.append(f"record {number} of {name} needs texts as instruction and output (input may "
                    "be empty), prompt and completion, or a chat of one question and one answer "
                    f"in messages or conversations; found {found}; it is {row!r:.90}")
    if wrong and is_file or not records and wrong + faults:
        raise ValueError((wrong + faults)[0])
    faults = wrong + faults
    if faults:
        say(f"{len(faults):,} of {len(records) + len(faults):,} records left out; {faults[0]}")
    return records


def split(records) -> list[list[int]]:
    """The numbers of the records for training, dev and test. Those whose prompt occurs twice go to
    training, so that no prompt is both trained on and tested."""
    prompts = [(record["instruction"], record["input"]) for record in records]
    count, n = Counter(prompts), len(prompts)
    order = np.random.default_rng(seed).permutation(n).tolist()
    order.sort(key=lambda i: count[prompts[i]] == 1)  # stable
    test = n - max(1, round(0.10 * n))
    dev = test - max(1, round(0.05 * n))
    single = sum(c == 1 for c in count.values())
    if dev < 1 or n - dev > single:
        raise ValueError(f"{data} has {n} records, {single} with a prompt of their own: too few")
    return [order[:dev], order[dev:test], order[test:]]


def read_template() -> str:
    """The template's text; ValueError for one without its slots."""
    form = ALPACA if template is None else read_text(template).rstrip()
    slots = sorted(re.findall(r"\{\w+\}", form))
    whole = {*slots} == {"{instruction}", "{input}", "{output}"} and form.endswith("{output}")
    if not whole or slots.count("{output}") > 1:
        raise ValueError(f"template {template} must have the slots {{instruction}} and {{input}}, "
                         "no other, and end with {output}, its only one; it has "
                         f"{', '.join(slots)}")
    return form


def encode(records, tokenizer, form: str, T: int) -> tuple[list[dict], list[tuple], int]:
    """(records whose answers fit a context of T, [(prompt ids, answer ids with end-of-text)] of
    these, prompts cut). A prompt too long beside its answer loses the end of its input (of the
    instruction, where there is none)."""
    if tokenizer.eos_id is None:
        raise ValueError(f"the {tokenizer.name} tokenizer has no end-of-text to close answers with")
    kept, rows, cuts = [], [], 0
    for record in records:
        instruction = record["instruction"]
        try:
            answer = [*tokenizer.encode(record["output"], whole=False).tolist(),
                      tokenizer.eos_id]
            limit = T + 1 - len(answer)  # of the prompt: the last id is predicted, never read
            if limit < 1:
                continue
            prompt, cut = prompt_ids(tokenizer, form, instruction, record["input"], limit)
        except ValueError as e:
            raise ValueError(f"record {instruction!r:.40} of {data}: {e}") from None
        kept.append(record)
        rows.append((prompt, answer))
        cuts += cut
    return kept, rows, cuts


# ---- batches and losses ----

class Prefix:
    """A cache for `GPT.hidden` that lets gradients through: keys and values of what all prompts of
    a batch begin with (the template's first words) are computed once, for every row."""

    def __init__(self):
        self.layers, self.length = [], 0

    def append(self, layer, k, v):
        if not self.length:
            self.layers.append((k, v))  # (1, nh, P, hs)
            return k, v
        B, (first_k, first_v) = k.size(0), self.layers[layer]
        return (torch.cat([first_k.expand(B, -1, -1, -1), k], dim=2),
                torch.cat([first_v.expand(B, -1, -1, -1), v], dim=2))


class AnswerLoss(nn.Module):
    """The model's loss at chosen positions, summed; no other logits are made. A module for DDP."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt

    def forward(self, prefix, ids, positions, targets):
        """prefix: (1, P) what all rows begin with; ids: (B, T) what follows in each; positions:
        (n,) in (B * T,); targets: (n,) the ids that come next there."""
        cache = Prefix() if prefix.numel() else None
        if cache:
            self.gpt.hidden(prefix, cache=cache)
        x = self.gpt.hidden(ids, cache=cache).flatten(0, 1)[positions]
        return self.gpt.loss(x, targets) * len(targets)


def collate(rows, device):
    """The tensors of AnswerLoss for some records, padded on the right: that needs no mask."""
    prefix = commonprefix([prompt[:-1] for prompt, _ in rows])
    T = max(len(prompt) + len(answer) for prompt, answer in rows) - len(prefix) - 1
    ids, positions, targets = np.zeros((len(rows), T), np.int64), [], []
    for i, (prompt, answer) in enumerate(rows):
        row = (prompt + answer)[len(prefix):-1]
        ids[i, :len(row)] = row
        end = i * T + len(row)
        positions += range(end - len(answer), end)
        targets += answer
    tensors = [prefix], ids, positions, targets
    return [to_device(torch.as_tensor(values, dtype=torch.long), device) for values in tensors]


def training_batches(rows) -> list[np.ndarray]:
    """The batches of all epochs, as numbers of rows: in random order, of rows alike in length."""
    batches, lengths = [], [len(prompt) + len(answer) for prompt, answer in rows]
    for epoch in range(epochs):
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(rows))
        order = order[np.argsort([lengths[i] for i in order], kind="stable")]
        parts = np.array_split(order, math.ceil(len(rows) / batch_size))
        batches += [parts[i] for i in rng.permutation(len(parts))]
    return batches


@torch.inference_mode()
def evaluate(net, rows, env) -> float:
    """Mean loss in nats per token of the answers; the ranks share the work."""
    rows, losses = sorted(rows, key=lambda row: sum(map(len, row))), []
    net.eval()
    for start in range(32 * env.rank, len(rows), 32 * env.world):
        with env.autocast():
            losses.append(net(*collate(rows[start:start + 32], env.device)))
    net.train()
    total = sum(loss.item() for loss in losses)  # a GPU is waited for only here
    return env.sum(total)[0] / sum(len(answer) for _, answer in rows)


def answers(gpt: GPT, tokenizer, prompts: list[list[int]]) -> list[str]:
    """Greedy answers to prompts, in left-padded batches with the KV cache."""
    texts = []
    stop_ids = [*{tokenizer.eos_id, *tokenizer.stop_ids}]
    batches = range(0, len(prompts), 32)
    for start in tqdm(batches, "answers", unit=" batches", delay=2, leave=False, disable=None):
        idx, mask = left_padded(prompts[start:start + 32], gpt.transformer.wte.weight.device)
        new = gpt.generate(idx, max_new_tokens, temperature=0.0, eos_id=stop_ids,
                           attention_mask=mask)[:, idx.size(1):]
        for row in new.tolist():
            texts.append(tokenizer.decode([i for i in row if i not in stop_ids]).strip())
    return texts


def table(rows: list[dict]) -> str:
    """Rows as a table that fits the terminal, long cells over several lines."""
    columns, lines = [*rows[0]], []
    width = max(1, (shutil.get_terminal_size((100, 24)).columns + 3) // len(columns) - 3)
    for texts in [columns, *(row.values() for row in rows)]:
        for line in zip_longest(*(wrap(text, width) for text in texts), fillvalue=""):
            lines.append(" | ".join(cell.ljust(width) for cell in line).rstrip())
        lines.append("-+-".join(["-" * width] * len(columns)))
    return "\n".join(lines)


# ---- the whole ----

def main():
    take_settings(globals())
    settings, env, out = begin(globals(), FROM_ONE, CHOICES)
    quoted = shlex.quote(str(out))
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length of a batch
    checkpoint = open_run(env, out, settings, FIXED, before=float, base=str, template=str, data=str)

    # ---- the model, resumed or pretrained ----
    if checkpoint is not None:
        form, base = checkpoint["template"], checkpoint["base"]
        if template and Path(template).is_file() and read_template() != form:
            raise ValueError(f"{checkpoint['path']} was trained with another text than {template} "
                             "has now; bring that back, or give another --out_dir")
        raw_model, tokenizer = saved_model(checkpoint, dropout)
    else:
        form, folder = read_template(), local_folder(init_from)
        base = str(folder.resolve()) if folder.is_dir() else init_from  # by which PEFT finds it
        if out.resolve() in (Path(base), *Path(base).parents):
            raise ValueError(f"init_from={init_from} lies in --out_dir: give another --out_dir")
        if mode == "lora" and (folder / "adapter_config.json").is_file():
            raise ValueError(f"init_from={init_from} is an adapter: give the best/ it is merged in")
        raw_model, tokenizer = load_model(init_from, block_size=block_size, dropout=dropout,
                                          dtype=torch.float32)
    env.place(raw_model)
    trained = set_trainable(raw_model, mode, train_blocks, lora_rank, lora_alpha, lora_dropout,
                            lora_targets)
    T, parameters = raw_model.config.block_size, raw_model.num_params()

    # ---- the records ----
    records = read_records(data, env.say)
    known = digest(records)
    check_data(checkpoint, known, data)
    found = len(records)
    records, rows, cuts = encode(records, tokenizer, form, T)
    if len(records) < found:
        env.say(f"{found - len(records):,} of {found:,} records left out, whose answers exceed the "
                f"context of {T}")
    numbers = split(records)
    train, dev, test = ([rows[i] for i in part] for part in numbers)
    if train_on_all:  # then only the first token is given
        train = [(prompt[:1], prompt[1:] + answer) for prompt, answer in train]
    batches = training_batches(train)
    max_steps = len(batches)
    env.say(f"{base}: {parameters:,} parameters, {trained / parameters:.2%} trained ({mode}); "
            f"{env.name()}, {str(env.dtype).removeprefix('torch.')}\n"
            f"{len(train):,}/{len(dev):,}/{len(test):,} records for training/dev/test, {cuts} "
            f"prompts cut to fit; epochs: {epochs}, {max_steps:,} steps")

    # ---- the run ----
    net = AnswerLoss(raw_model)
    update = build_optimizer(raw_model, optimizer, learning_rate, weight_decay, (0.9, 0.999))
    run = Run(env, out, raw_model, update, settings, max_steps,
              eval_interval or max_steps // epochs, checkpoint)
    if run.step >= max_steps and (out / "results.json").is_file():
        env.say(f"{out} is finished: {run.step} steps, best dev loss {run.best[0]:.4f}; see "
                f"{out / 'results.json'}, or: python sample.py --init_from={quoted} --instruct …")
        return env.close()
    before = evaluate(net, test, env) if checkpoint is None else checkpoint["before"]
    del checkpoint
    tried = train[:math.ceil(batch_size / env.world)]  # as many as a rank has of a batch
    model, fast = env.compiled(net, compile, dynamic=True,
                               loss=lambda model: model(*collate(tried, env.device)))

    def keep(folder, model):
        if mode == "lora":
            save_adapter(model, folder / "adapter", base)
            tokenizer.save(folder / "adapter", model_max_length=T)
            write_text(folder / "adapter" / "template.txt", f"{form}\n")  # for sample.py
        save_best(folder, model, tokenizer)
        write_text(folder / "best" / "template.txt", f"{form}\n")

    def evaluate_and_keep() -> dict:
        loss = evaluate(fast, dev, env)
        if run.is_best(loss) and env.rank == 0:
            run.write(keep, run.folder, raw_model)
        return {"val_loss": loss, "val_ppl": math.exp(min(loss, 700))}

    # ---- the loop ----
    if run.step == 0:
        run.log(**evaluate_and_keep())
    for step in run.steps():
        batch = [train[i] for i in batches[step]]
        n = sum(len(answer) for _, answer in batch)
        mine = batch[env.rank::env.world]
        with env.autocast():
            loss = model(*collate(mine or batch[:1], env.device))
        run.backward(loss if mine else loss * 0.0, n)  # a rank without a record still takes part
        run.update(n)
        run.log(**(evaluate_and_keep() if run.evaluates else {}))
        if run.saves:
            run.save(config=vars(raw_model.config), tokenizer=tokenizer.to_json(), data=known,
                     before=before, base=base, template=form)
    if run.stopped:
        return env.close()

    # ---- the best model on the test split ----
    env.sum(0)  # it is on disk
    best = env.place(load_model(out / "best")[0])
    loss = evaluate(AnswerLoss(best), test, env)
    if env.rank == 0:
        asked = [records[i] for i in numbers[2]]
        references = [record["output"] for record in asked]
        limit = prompt_limit(T, max_new_tokens)  # whatever the reference is
        prompts = [prompt_ids(tokenizer, form, record["instruction"], record["input"], limit)[0]
                   for record in asked]
        texts = answers(prepare(best), tokenizer, prompts)
        answered = [record | {"answer": text} for record, text in zip(asked, texts)]
        write_text(out / "answers.jsonl", "".join(f"{json.dumps(row)}\n" for row in answered))
        bits = loss / math.log(2) * sum(len(answer) for _, answer in test)
        measures = {
            "loss_before": before, "loss": loss, "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": bits / sum(len(text.encode()) for text in references),
            "chrf": CHRF().corpus_score(texts, [references]).score,
            "exact_match": sum(map(str.__eq__, texts, references)) / len(test)}
        peak = env.peak_memory()
        run.results({
            "split": "test", "records": len(test), **measures, "dev_loss": run.best[0],
            "perplexity_before": math.exp(min(before, 700)), "parameters": parameters,
            "trained_parameters": trained, "tokens_per_s": run.tokens / run.elapsed_s,
            "peak_memory_mb": peak and peak / 1e6, "seconds": run.elapsed_s, "seed": seed})
        if num_answers:
            print(table(answered[:num_answers]))
        shown = ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
        print(f"{run.step:,} steps in {run.elapsed_s:.0f} s; {len(test):,} test answers: {shown}\n"
              f"all: {out / 'answers.jsonl'}\n"
              f"ask: python sample.py --init_from={quoted} --instruct …")
    env.close()


if __name__ == "__main__":
    run_script(main, globals())
