"""Fine-tunes a model to follow instructions, all of it or by low-rank adapters, and judges it.

    python finetune_instruct.py config/finetune_instruct.py --data=FILE
    python finetune_instruct.py --init_from=gpt2 --data=tatsu-lab/alpaca --epochs=1 --mode=full
    python finetune_instruct.py config/finetune_instruct.py --data=FILE --init_from=resume
    torchrun --standalone --nproc_per_node=8 finetune_instruct.py --init_from=gpt2
    python sample.py --init_from=out/finetune_instruct --instruct "Name three colours."

Its data are records with `instruction`, `input` (may be empty) and `output`, as Alpaca's (Taori et
al. 2023). OUT/best is the best model on the dev split, adapters merged; OUT/adapter holds them
alone, in PEFT's format. Losses are nats a token of the answers, end-of-text included.
"""

import json
import math
import shutil
import time
from collections import Counter
from itertools import zip_longest
from os.path import commonprefix
from pathlib import Path
from textwrap import wrap

import numpy as np
import torch
import torch.nn.functional as F
from sacrebleu.metrics import CHRF
from torch import nn
from tqdm import tqdm

from common import (
    Metrics,
    Skips,
    StopSignal,
    begin,
    fitting,
    load_model,
    lr_scale,
    micro_batch_seed,
    read_checkpoint,
    restore,
    same_settings,
    save_best,
    save_checkpoint,
    set_aside,
)
from configurator import run
from data import digest, prompt_ids, read_table
from decode import left_padded, prepare
from files import local_folder, read_text, write_text
from lora import align, save_adapter, set_trainable
from model import GPT, GPTConfig
from optim import build_optimizer
from tokenizer import from_json

# what and where
out_dir = "out/finetune_instruct"  # the run's folder
data = "tatsu-lab/alpaca"  # a .json, .jsonl[.gz|.xz] or .parquet file, or a hub data set
template: str | None = None  # a file with {instruction}, {input} and, at its end, {output}; a
    # paragraph of the input is left out where that is empty. None: Alpaca's
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
lora_align = 100  # batches along whose gradient the adapters start; 0: at random
lora_targets = ["c_attn", "c_proj", "c_fc"]  # layers whose names end so; attn.c_proj would do too
train_on_all = False  # the loss covers the prompts too
# the updates
epochs = 3
batch_size = 8  # records an update, over all ranks; the loss is the mean over all their tokens
learning_rate = 1e-3  # its peak, then linear to zero
warmup_fraction = 0.1  # of the updates
weight_decay = 0.01  # of matrices
grad_clip = 1.0  # largest norm of the gradient; 0 for none
# what is seen of it
log_interval = 20  # updates between lines
eval_interval: int | None = None  # updates between evaluations on dev; None: an epoch
max_new_tokens = 128  # of an answer
num_answers = 10  # printed at the end; all are in OUT/answers.jsonl
# the machine
device = "auto"  # cpu, cuda, cuda:1, mps
dtype = "auto"  # of autocast: float32, bfloat16, float16
compile = False  # torch.compile: for long runs on a GPU

ALPACA = """\
Below is an instruction that describes a task. Write a response that appropriately completes the \
request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
{output}"""
FIELDS = ("instruction", "input", "output")
FROM_ONE = ("epochs", "batch_size", "log_interval", "max_new_tokens", "eval_interval")
CHOICES = {"mode": ("full", "lora", "last_blocks")}
FIXED = ("data", "template", "block_size", "seed", "mode", "train_blocks", "lora_rank",
         "lora_alpha", "lora_targets", "train_on_all", "batch_size")  # a resumed run keeps these


# ---- records ----

def read_records(name: str, say=print) -> list[dict]:
    """The records of a file or hub data set, stripped. ValueError for one that cannot be used, with
    its number, counted from 1; of a hub data set, which nobody here can mend, it is left out, and
    how many were is said."""
    here, faults = Path(name).is_file(), []
    if here:
        rows = read_table(name)
    else:
        from datasets import load_dataset
        try:
            rows = load_dataset(name, split="train")
        except Exception as e:  # noqa: BLE001 (whatever the hub's client raises)
            raise ValueError(f"{name} is neither a file nor a hub data set that can be loaded "
                             f"({type(e).__name__}: {e})") from None
    records = []
    for number, row in enumerate(rows, 1):
        record = {f: row.get(f) if isinstance(row, dict) else None for f in FIELDS}
        record["input"] = record["input"] or ""
        bad = [field for field, text in record.items()
               if not isinstance(text, str) or not text.strip() and field != "input"]
        if bad:
            faults.append(f"record {number} of {name}: {bad[0]} is {record[bad[0]]!r:.40}, expected "
                          f"some text; the record is {row!r:.70}")
        else:
            records.append({field: text.strip() for field, text in record.items()})
    if faults and (here or not records):
        raise ValueError(faults[0])
    if faults:
        say(f"{len(faults):,} of {len(records) + len(faults):,} records left out; {faults[0]}")
    return records


def split(records) -> list[list[int]]:
    """The numbers of the records for training, dev and test. Those whose prompt is there twice go
    to training, so that none is both learned and asked."""
    prompts = [(record["instruction"], record["input"]) for record in records]
    seen, n = Counter(prompts), len(prompts)
    order = np.random.default_rng(seed).permutation(n).tolist()
    order.sort(key=lambda i: seen[prompts[i]] == 1)  # stable
    test = n - max(1, round(0.10 * n))
    dev = test - max(1, round(0.05 * n))
    once = sum(count == 1 for count in seen.values())
    if dev < 1 or n - dev > once:
        raise ValueError(f"{data} has {n} records, {once} with a prompt of their own: too few for dev "
                         "and test and one to train on")
    return [order[:dev], order[dev:test], order[test:]]


def read_template() -> str:
    """The template's text; ValueError for one without a slot."""
    form = ALPACA if template is None else read_text(template).rstrip()
    lacks = [slot for slot in FIELDS if f"{{{slot}}}" not in form]
    if lacks or not form.endswith("{output}"):
        raise ValueError(f"template {template} " + (f"has no slot {{{lacks[0]}}}" if lacks else
                                                    "must end with its slot {output}"))
    return form


def encode(records, tokenizer, form: str, T: int) -> tuple[list[tuple], int]:
    """([(prompt ids, answer ids with end-of-text)], prompts cut). A prompt too long for a context
    of T loses the end of its input (of the instruction, where there is none)."""
    if tokenizer.eos_id is None:
        raise ValueError(f"the {tokenizer.name} tokenizer has no end-of-text to close answers with")
    rows, cuts = [], 0
    for number, record in enumerate(records, 1):
        try:
            answer = [*tokenizer.encode(record["output"]).tolist(), tokenizer.eos_id]
            room = T + 1 - len(answer)  # the last id is predicted, never read
            if room < 1:
                raise ValueError(f"its answer has {len(answer)} tokens, end-of-text included, and "
                                 f"does not fit a context of {T} behind a prompt")
            prompt, cut = prompt_ids(tokenizer, form, record["instruction"], record["input"], room)
        except ValueError as e:
            raise ValueError(f"record {number} of {data} ({record['instruction']!r:.40}): {e}"
                             ) from None
        cuts += cut
        rows.append((prompt, answer))
    return rows, cuts


# ---- batches and losses ----

class Prefix:
    """A cache for `GPT.hidden` that lets gradients through: keys and values of what all prompts of
    a batch begin with (the template's first words) are computed once, and seen by every row."""

    def __init__(self):
        self.layers, self.length = [], 0

    def append(self, layer, k, v):
        if not self.length:
            self.layers.append((k, v))  # (1, nh, P, hs)
            return k, v
        return tuple(torch.cat([first.expand(rest.size(0), -1, -1, -1), rest], dim=2)
                     for first, rest in zip(self.layers[layer], (k, v)))


class AnswerLoss(nn.Module):
    """Summed cross-entropy at chosen positions; no other logits are made. A module for DDP."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt

    def forward(self, prefix, ids, at, targets):
        """prefix: (1, P) what all rows begin with; ids: (B, T) what follows in each; at: (n,)
        positions in (B * T,); targets: (n,) the ids that come next there."""
        cache = Prefix() if prefix.numel() else None
        if cache:
            self.gpt.hidden(prefix, cache=cache)
        x = self.gpt.hidden(ids, cache=cache).flatten(0, 1)[at]
        return F.cross_entropy(self.gpt.logits(x), targets, reduction="sum")


def collate(rows, on_all: bool, device):
    """The tensors of AnswerLoss for some records, padded on the right to the longest of them:
    causal attention needs no mask for that."""
    prefix = [] if on_all else commonprefix([prompt[:-1] for prompt, _ in rows])
    T = max(len(prompt) + len(answer) for prompt, answer in rows) - len(prefix) - 1
    ids, at, targets = np.zeros((len(rows), T), np.int64), [], []
    for i, (prompt, answer) in enumerate(rows):
        row, first = (prompt + answer)[len(prefix):], 1 if on_all else len(prompt) - len(prefix)
        ids[i, :len(row) - 1] = row[:-1]
        at += range(i * T + first - 1, i * T + len(row) - 1)
        targets += row[first:]
    return [torch.as_tensor(t, dtype=torch.long).to(device) for t in ([prefix], ids, at, targets)]


def epoch_batches(rows, epoch: int) -> list[np.ndarray]:
    """The batches of an epoch in random order, records of a length together: a pure function of
    seed and epoch."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(rows))
    order = order[np.argsort([sum(map(len, rows[i])) for i in order], kind="stable")]
    batches = np.array_split(order, math.ceil(len(rows) / batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


@torch.inference_mode()
def evaluate(net: AnswerLoss, rows, env) -> float:
    """Mean loss a token of the answers, in nats; the ranks share the work."""
    rows, total = sorted(rows, key=lambda row: sum(map(len, row))), 0.0
    net.eval()
    for start in range(32 * env.rank, len(rows), 32 * env.world):
        with env.autocast():
            total += net(*collate(rows[start:start + 32], False, env.device)).item()
    net.train()
    return env.sum(total)[0] / sum(len(answer) for _, answer in rows)


def answers(gpt: GPT, tokenizer, prompts) -> list[str]:
    """Greedy answers to prompts (lists of ids), in left-padded batches with the KV cache."""
    texts, order = [""] * len(prompts), sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for chunk in (order[start:start + 32] for start in range(0, len(order), 32)):
        idx, mask = left_padded([prompts[i] for i in chunk], gpt.transformer.wte.weight.device)
        new = gpt.generate(idx, max_new_tokens, temperature=0.0, eos_id=tokenizer.eos_id,
                           attention_mask=mask)[:, idx.size(1):]
        for i, ids in zip(chunk, new.tolist()):
            end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
            texts[i] = tokenizer.decode(ids[:end]).strip()
    return texts


# ---- what is shown ----

def table(rows: list[dict], columns) -> str:
    """Rows as a table that fits the terminal, long cells over several lines."""
    width = max(1, (shutil.get_terminal_size((100, 24)).columns + 3) // len(columns) - 3)
    lines = []
    for row in [dict(zip(columns, columns)), *rows]:
        cells = zip_longest(*(wrap(row[column], width) for column in columns), fillvalue="")
        lines += [" | ".join(cell.ljust(width) for cell in line).rstrip() for line in cells]
        lines.append("-+-".join(["-" * width] * len(columns)))
    return "\n".join(lines)


def main():
    settings, env, out = begin(globals(), FROM_ONE, CHOICES)
    say = env.say
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length of a batch

    # ---- the model, pretrained or resumed ----
    checkpoint = None
    begun = Path(init_from).resolve()
    if begun == out.resolve() or begun.is_dir() and out.resolve() in begun.parents:
        raise ValueError(f"init_from={init_from} lies in the run's own folder, which this run "
                         "overwrites; give another --out_dir")
    if init_from == "resume" and not (out / "ckpt.pt").is_file():
        raise ValueError(f"no {out / 'ckpt.pt'} to resume from; give a model with --init_from")
    env.lock(out)
    if init_from == "resume":
        checkpoint = read_checkpoint(out / "ckpt.pt", before=float, loss_sum=float, counted=int,
                                     base=str, template=str, data=str)
        same_settings(out / "ckpt.pt", checkpoint, settings, FIXED)
        with fitting(out / "ckpt.pt"):
            raw_model = GPT(GPTConfig(**checkpoint["config"] | {"dropout": dropout}))
            tokenizer = from_json(checkpoint["tokenizer"])
        base, form = checkpoint["base"], checkpoint["template"]
    else:
        raw_model, tokenizer = load_model(init_from, block_size=block_size, dropout=dropout,
                                          dtype=torch.float32)
        folder, form = local_folder(init_from), read_template()
        if mode == "lora" and (folder / "adapter_config.json").is_file():
            raise ValueError(f"{init_from} is an adapter, and adapters on top of one would have no base; "
                             "give the model in which it is merged, the best/ beside it")
        base = str(folder.resolve()) if folder.is_dir() else init_from  # by which PEFT finds it
    trained = set_trainable(raw_model, mode, train_blocks, lora_rank, lora_alpha,
                            lora_dropout, lora_targets)
    raw_model.to(env.device).train()
    config, parameters = raw_model.config, raw_model.num_params()

    # ---- the records ----
    records = read_records(data, say)
    known = digest(records)
    if checkpoint is not None and checkpoint["data"] != known:
        raise ValueError(f"{out / 'ckpt.pt'} was trained on other records than {data} has now, which "
                         "would mix its splits; bring those back, or begin anew with another "
                         f"--out_dir and --init_from={out / 'best'}")
    rows, cuts = encode(records, tokenizer, form, config.block_size)
    parts = split(records)
    train, dev, test = ([rows[i] for i in part] for part in parts)
    per_epoch = math.ceil(len(train) / batch_size)
    max_steps, interval = epochs * per_epoch, eval_interval or per_epoch
    say(f"{base}: {parameters:,} parameters, {trained:,} trained ({mode}, "
        f"{trained / parameters:.2%}); {env.name()}, {str(env.dtype).removeprefix('torch.')}\n"
        f"{len(train):,}/{len(dev):,}/{len(test):,} records for training/dev/test, {cuts} prompts "
        f"cut to fit; {sum(len(answer) for _, answer in train):,} answer tokens an epoch; "
        f"{epochs} epochs, {max_steps:,} updates")

    net = AnswerLoss(raw_model)
    if mode == "lora" and lora_align and checkpoint is None:
        def backward():
            seen = np.concatenate(epoch_batches(train, 0)[:lora_align])
            pairs = np.array_split(seen, math.ceil(len(seen) / 2))  # in little memory
            for pair in tqdm(pairs, "aligning", leave=False, disable=env.rank > 0 or None):
                with env.autocast():
                    loss = net(*collate([train[i] for i in pair], train_on_all, env.device))
                loss.backward()
        align(raw_model, backward)
    update = build_optimizer(raw_model, "adamw", learning_rate, weight_decay, (0.9, 0.999))
    step, tokens, elapsed, best_loss, before, skipped = 0, 0, 0.0, math.inf, None, 0
    loss_sum, counted = 0.0, 0  # of the tokens since the last row, on all ranks
    if checkpoint is not None:
        with fitting(out / "ckpt.pt"):
            raw_model.load_state_dict(checkpoint["model"])
            restore(checkpoint, update, env.scaler)
        step, tokens, elapsed, best_loss, before, skipped, loss_sum, counted = (checkpoint[key] for key in (
            "step", "tokens", "elapsed_s", "best_loss", "before", "skipped", "loss_sum", "counted"))
        if step >= max_steps and (out / "results.json").is_file():
            say(f"{out} is finished: {step} updates, best dev loss {best_loss:.4f}; see "
                f"{out / 'results.json'}, or: python sample.py --init_from={out} --instruct \"…\"")
            return env.close()
        say(f"resuming {out} at update {step}")
    else:
        before = evaluate(net, test, env)
    del checkpoint
    model = env.parallel(torch.compile(net, dynamic=True) if compile else net)
    if env.rank == 0:
        if step == 0:
            set_aside(out)
        (out / "results.json").unlink(missing_ok=True)  # also of a run that is given more epochs
        metrics = Metrics(out, step or -1)

    def log(row, seen: bool):
        """Logs a row; `seen`: evaluates on dev for it and keeps the best model."""
        nonlocal best_loss
        if seen:
            row["val_loss"] = loss = evaluate(net, dev, env)
            row["val_ppl"] = math.exp(min(loss, 700))
            better, best_loss = loss < best_loss, min(loss, best_loss)
            say(f"update {step}: dev loss {loss:.4f}, perplexity {row['val_ppl']:.2f}"
                + " (best so far)" * better)
            if better and env.rank == 0:
                if mode == "lora":
                    save_adapter(raw_model, out / "adapter", base)
                save_best(out, raw_model, tokenizer)
                write_text(out / "best" / "template.txt", f"{form}\n")  # for sample.py
        if env.rank == 0:
            metrics.log(**row)

    skips = Skips(env, total=skipped)
    if step == 0:
        log({"step": 0, "tokens": 0, "elapsed_s": 0.0}, True)
    stop, norms, batches = StopSignal(), [], None
    mine_sum = torch.tensor(loss_sum if env.rank == 0 else 0.0, device=env.device)
    # ---- the loop ----
    clock, since = time.perf_counter(), tokens
    while step < max_steps:
        epoch, at = divmod(step, per_epoch)
        if batches is None or at == 0:
            batches = epoch_batches(train, epoch)
        lr = learning_rate * lr_scale("linear", step, max_steps, round(warmup_fraction * max_steps))
        for group in update.param_groups:
            group["lr"] = lr
        torch.manual_seed(micro_batch_seed(seed, step, env.rank))
        rows = [train[i] for i in batches[at]]
        n = sum(len(answer) + (len(prompt) - 1) * train_on_all for prompt, answer in rows)
        mine = rows[env.rank::env.world]  # a rank without a record still takes part
        with env.autocast():
            loss = model(*collate(mine or rows[:1], train_on_all, env.device)) * bool(mine)
        env.scaler.scale(loss * (env.world / n)).backward()  # DDP takes the mean over the ranks
        norms.append(env.update(update, raw_model.parameters(), grad_clip))
        mine_sum += loss.detach()
        step, tokens, counted = step + 1, tokens + n, counted + n

        last = step == max_steps
        seen = last or step % interval == 0
        shown = seen or step % log_interval == 0
        stopping = env.any(stop.received, shown)
        if not (shown or stopping):
            continue
        loss_sum = env.sum(mine_sum.item())[0]
        mean = loss_sum / counted
        norm = norms[-1].item()
        skips.see(norms, step, say)
        now = time.perf_counter()
        elapsed, rate = elapsed + now - clock, (tokens - since) / (now - clock)
        say(f"update {step:5}/{max_steps}  loss {mean:.4f}  lr {lr:.2e}  norm {norm:.2f}  "
            f"{rate:,.0f} tok/s")
        if shown:  # else this stop would leave a row of its own
            log({"step": step, "tokens": tokens, "train_loss": mean, "lr": lr, "grad_norm": norm,
                 "skipped": skips.total or None, "tokens_per_s": rate, "elapsed_s": elapsed}, seen)
            mine_sum.zero_()
            loss_sum, counted = 0.0, 0
        if env.rank == 0 and (seen or stopping):
            save_checkpoint(out / "ckpt.pt", {
                "model": raw_model.state_dict(), "optimizer": update.state_dict(),
                "scaler": env.scaler.state_dict(), "step": step, "tokens": tokens,
                "elapsed_s": elapsed, "best_loss": best_loss, "before": before, "base": base,
                "loss_sum": loss_sum, "counted": counted, "skipped": skips.total,
                "template": form, "config": vars(config), "settings": settings,
                "tokenizer": tokenizer.to_json(), "data": known})
            metrics.plot()
        if stopping and not last:
            say(f"stopped by {stop.received or 'a signal'} at update {step}; go on with the same "
                "command and --init_from=resume")
            return env.close()
        norms, clock, since = [], time.perf_counter(), tokens

    # ---- judged on the test split ----
    stop.over()
    env.sum(0)  # the best model is on disk
    best = GPT.from_pretrained(out / "best").to(env.device)
    after = evaluate(AnswerLoss(best), test, env)
    if env.rank == 0:
        room = max(config.block_size // 2, config.block_size - max_new_tokens)
        texts = answers(prepare(best), tokenizer, [  # `test`'s are cut by the true answer's length
            prompt_ids(tokenizer, form, records[i]["instruction"], records[i]["input"], room)[0]
            for i in parts[2]])
        judged = [records[i] | {"answer": text} for i, text in zip(parts[2], texts)]
        references = [row["output"] for row in judged]
        nats = after * sum(len(answer) for _, answer in test)
        results = {
            "split": "test", "records": len(test), "loss_before": before, "loss": after,
            "perplexity_before": math.exp(min(before, 700)),
            "perplexity": math.exp(min(after, 700)),
            "bits_per_byte": nats / math.log(2) / sum(len(text.encode()) for text in references),
            "chrf": CHRF().corpus_score(texts, [references]).score,
            "exact_match": sum(map(str.__eq__, texts, references)) / len(test),
            "dev_loss": best_loss, "parameters": parameters, "trained_parameters": trained,
            "tokens_per_s": tokens / elapsed, "peak_memory_mb": env.peak_memory() and env.peak_memory() / 1e6,
            "seconds": elapsed, "seed": seed, "settings": settings}
        write_text(out / "answers.jsonl", "".join(f"{json.dumps(row)}\n" for row in judged))
        write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
        print(table(judged[:num_answers], (*FIELDS, "answer")) if num_answers else "")
        print(f"{step:,} updates in {elapsed:.0f} s; the {len(test):,} test answers: " + ", ".join(
            f"{name} {results[name]:.4g}" for name in ("loss_before", "loss", "perplexity", "chrf",
                                                       "exact_match"))
            + f"\nall: {out / 'answers.jsonl'}; ask: python sample.py --init_from={out} "
            "--instruct \"…\"")
    return env.close()


if __name__ == "__main__":
    run(main, globals())
