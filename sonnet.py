"""Fine-tunes a GPT on Shakespeare's sonnets and finishes others from their first three lines.

    python sonnet.py config/sonnet.py --data_dir=FOLDER
    python sonnet.py config/sonnet.py --data_dir=FOLDER --sweep
    python sonnet.py --data_dir=FOLDER --init_from=gpt2 --mode=lora --learning_rate=1e-3 --cs224n
    python sonnet.py --data_dir=FOLDER --init_from=out/sonnet --epochs=0 --num_beams=4 \\
        --out_dir=out/sonnet_beams

FOLDER has the files of the CS224n default project "Build GPT-2". OUT/best is the model of the epoch
with the lowest dev loss (nats a token, end-of-text included), OUT/generated_sonnets.txt the test
poems; the dev poems lie beside it, also one a line, as `sacrebleu REF -i HYP -m chrf` reads them.
"""

import json
import math
import re
import time
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from sacrebleu.metrics import CHRF

from common import (
    Metrics,
    Skips,
    begin,
    load_model,
    lr_scale,
    save_best,
    set_aside,
)
from configurator import run
from data import ngrams, words
from decode import beam_search, check_beams, left_padded, prepare
from files import read_text, write_text
from lora import set_trainable
from model import GPT, GPTConfig, check_sampling
from optim import build_optimizer
from tokenizer import open_tokenizer

# what and where
out_dir = "out/sonnet"  # the run's folder
data_dir: str | None = None  # the folder with the course's sonnets
allow_overlap = False  # held-out ids may be in the training set
init_from = "out/pretrain_plays"  # a run folder, Hugging Face folder or hub name; or scratch
seed = 1337
# the network, from scratch
tokenizer = "data/plays2k.json"  # with an end-of-text, which closes a poem
block_size = 512
n_layer = 4
n_head = 6
n_embd = 192
# what is trained, and how
mode = "full"  # full, lora, or last_blocks (with the final LayerNorm)
train_blocks = 2  # of last_blocks
lora_rank = 16
lora_alpha = 32.0  # adapters are scaled by lora_alpha / lora_rank
epochs = 10  # 0: the model as it is
patience = 2  # epochs without a better dev loss, then training ends
batch_size = 8  # poems
learning_rate = 1e-3  # its peak, after a linear warmup; then linear to zero
warmup_fraction = 0.1  # of the updates
weight_decay = 0.01  # of matrices
dropout = 0.1
# how the poems are finished
temperature = 0.8  # 0 is greedy
top_p: float | None = 0.9  # draw from the fewest tokens whose probability reaches p
top_k: int | None = None  # draw from the k most likely tokens
num_beams = 1  # more: beam search instead of drawing
candidates = 8  # drawn for each poem; the best by its mean log-probability is taken
max_new_tokens = 256  # of a poem that will not end
sweep = False  # try SWEEP on the dev poems; the test poems get what has the best chrF there
cs224n = False  # generated_sonnets.txt in the layout of the course's submissions
# the machine
device = "auto"  # cpu, cuda, cuda:1, mps

FILES = ("sonnets.txt", "sonnets_held_out_dev.txt", "TRUE_sonnets_held_out_dev.txt",
         "sonnets_held_out.txt")  # training, dev prompts, the whole dev poems, test prompts
FROM_ONE = ("patience", "batch_size", "candidates", "num_beams", "max_new_tokens")
CHOICES = {"mode": ("full", "lora", "last_blocks")}
LINES = 14
RHYMES = ((0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 13))  # ABAB CDCD EFEF GG
SWEEP = [{"temperature": 0.0}, {"num_beams": 2}, {"num_beams": 4},
         *({"temperature": t, "top_p": p} for t in (0.5, 0.8, 1.1) for p in (0.8, 0.9, 1.0))]


# ---- poems ----

def read_poems(path) -> dict[int, str]:
    """{number: poem} of a file in the course's format: what stands before the first number is
    dropped, blank lines too, indents stay. ValueError names what cannot be read."""
    _, *parts = re.split(r"^[ \t]*(\d+)[ \t]*$", read_text(path), flags=re.MULTILINE)
    if not parts:
        raise ValueError(f"{path} has no numbers: expected, for each poem, a line with its number, "
                         "a blank line, then its lines")
    poems = {}
    for number, body in zip(map(int, parts[::2]), parts[1::2]):
        lines = [line.rstrip() for line in body.split("\n") if line.strip()]
        if not lines or number in poems:
            raise ValueError(f"{path}: poem {number} " + ("is there twice" if lines else "is empty"))
        poems[number] = "\n".join(lines)
    return poems


def read_data(folder: str | None) -> list[dict[int, str]]:
    """The poems of FILES; ValueError, in one line with the poem's number, where they do not fit."""
    there = folder and [name for name in FILES if (Path(folder) / name).is_file()]
    if not folder or len(there) < len(FILES):
        found = f"{folder} has of these only {there}" if folder else "none is given"
        raise ValueError(
            f"--data_dir must name a folder with {', '.join(FILES)} ({found}). They come with the "
            "Stanford CS224n default project \"Build GPT-2\" (its folder data/); the text is the "
            "Folger Shakespeare Library's. Format: a header, then for each poem a line with its "
            "number, a blank line and its lines; sonnets_held_out* have the first three lines")
    paths = [Path(folder) / name for name in FILES]
    train, dev, gold, test = poems = [read_poems(path) for path in paths]
    for path, prompts in ((paths[1], dev), (paths[3], test)):
        for number in prompts:
            if number in train and not allow_overlap:
                raise ValueError(f"poem {number} of {path} is in the training set {paths[0]}, too; "
                                 "--allow_overlap takes it nevertheless")
    for number in sorted(dev.keys() | gold.keys()):
        if number not in dev or not gold.get(number, "").startswith(f"{dev[number]}\n"):
            raise ValueError(f"poem {number} is not begun in {paths[1]} and gone on with in {paths[2]}, "
                             f"which have {len(dev)} prompts and {len(gold)} whole poems")
    return poems


def encode(poems: dict[int, str], tok, T: int, whole: bool = True) -> list[list[int]]:
    """Token ids of poems between two end-of-texts, or of prompts behind one. ValueError names a poem
    that a context of T does not hold."""
    rows, room = [], T + 1 if whole else T - 1  # the last id of a poem is predicted, never read
    for number, poem in poems.items():
        try:
            ids = tok.encode(poem if whole else f"{poem}\n").tolist()
        except ValueError as e:
            raise ValueError(f"poem {number}: {e}") from None
        rows.append([tok.eos_id, *ids, *[tok.eos_id] * whole])
        if len(rows[-1]) > room:
            raise ValueError(f"poem {number} has {len(rows[-1])} tokens, end-of-text included; the "
                             f"context of {T} has room for {room}")
    return rows


def collate(rows, device):
    """(ids, targets), both (B, T), padded on the right; targets are -100 there. Causal attention
    needs no mask for that."""
    T = max(map(len, rows))
    padded = torch.tensor([row + [-100] * (T - len(row)) for row in rows], device=device)
    return padded[:, :-1].clamp(min=0), padded[:, 1:]


# ---- finishing them ----

def cut(new: list[int], lines: int, tok, breaks) -> list[int]:
    """Ids up to end-of-text or the break behind the fourteenth line; `lines` are there before."""
    for at, token in enumerate(new, 1):
        lines += breaks[token]
        if token == tok.eos_id or lines >= LINES:
            return new[:at]
    return new


@torch.inference_mode()
def continue_rows(model: GPT, tok, rows, generator, temperature=1.0, top_p=None, top_k=None,
                  num_beams=1) -> list[list[int]]:
    """The ids that the model adds to each prompt (a list of ids), `cut` where a sonnet ends. All
    are one left-padded batch, but for beam search, which takes no padding: poem by poem."""
    idx, mask = left_padded(rows, model.transformer.wte.weight.device)
    n = min(max_new_tokens, model.config.block_size - idx.size(1))
    breaks = [token.count(b"\n") for token in tok.tokens]
    begun = [sum(breaks[i] for i in row) for row in rows]
    if num_beams > 1:
        new = [beam_search(model, torch.tensor([row], device=idx.device), n, num_beams,
                           eos_id=tok.eos_id)[0][0, len(row):].tolist() for row in rows]
    else:
        lines, per_id = (torch.tensor(counts, device=idx.device) for counts in (begun, breaks))
        done, steps = torch.zeros_like(lines, dtype=torch.bool), []
        for token in model.stream(idx, n, temperature, top_k, top_p, tok.eos_id, generator, mask):
            steps.append(token)
            lines += per_id[token]
            done |= (token == tok.eos_id) | (lines >= LINES)
            if done.all():
                break
        new = torch.stack(steps, 1).tolist()
    return [cut(ids, count, tok, breaks) for ids, count in zip(new, begun)]


@torch.inference_mode()
def log_prob(model: GPT, row, new) -> float:
    """Mean log-probability (nats a token, temperature 1) of the ids `new` behind those of `row`."""
    ids, targets = collate([row + new], model.transformer.wte.weight.device)
    targets[:, :len(row) - 1] = -100
    return -model(ids, targets)[1].item()


def finish(model: GPT, tok, prompts: dict[int, str], decoding: dict) -> tuple[dict, dict]:
    """({number: poem}, {number: its mean log-probability}): of the candidates for each prompt, the
    one that the model itself finds likeliest. The same seed gives the same poems."""
    draws = decoding.get("temperature") != 0 and decoding.get("num_beams", 1) == 1
    each = candidates if draws else 1
    rows = [row for row in encode(prompts, tok, model.config.block_size, whole=False)
            for _ in range(each)]
    new = continue_rows(model, tok, rows, torch.Generator().manual_seed(seed), **decoding)
    scored = [(log_prob(model, *pair), pair[1]) for pair in zip(rows, new)]
    poems, scores = {}, {}
    for i, (number, prompt) in enumerate(prompts.items()):
        scores[number], ids = max(scored[i * each:(i + 1) * each])
        text = tok.decode([token for token in ids if token != tok.eos_id])
        lines = [line.rstrip() for line in f"{prompt}\n{text}".splitlines() if line.strip()]
        poems[number] = "\n".join(lines[:LINES])
    return poems, scores


# ---- measures ----

def rest(poem: str, prompt: str) -> str:
    """The lines of a poem behind those of its prompt."""
    return "\n".join(poem.split("\n")[prompt.count("\n") + 1:])


def rhyme_hits(poem: str, prompt: str) -> float | None:
    """Part of a sonnet's rhymes, of those not given with the prompt, that CMUdict knows for rhymes;
    None where all are given, or the library (pip install pronouncing) is missing."""
    try:
        from pronouncing import phones_for_word, rhyming_part
    except ImportError:
        return None
    ends = [(words(line) or [""])[-1] for line in poem.split("\n")] + [""] * LINES
    sounds = [{rhyming_part(phones) for phones in phones_for_word(end)} for end in ends]
    pairs = [(a, b) for a, b in RHYMES if b > prompt.count("\n")]
    hits = [ends[a] != ends[b] and bool(sounds[a] & sounds[b]) for a, b in pairs]
    return fmean(hits) if hits else None


def measure(poems, prompts, gold, known: set) -> dict:
    """What is said of finished poems: chrF with the prompt on both sides, as the course takes it,
    and of the continuation alone; of the continuation, lines, 5-grams of words that are `known`
    (of the training poems), different words and pairs; rhymes, where the library is there."""
    new = {number: rest(poem, prompts[number]) for number, poem in poems.items()}
    true = [rest(gold[number], prompts[number]) for number in poems]
    corpus_score = CHRF().corpus_score  # Popović 2015, 0 to 100
    five, one, two = ([gram for text in new.values() for gram in ngrams(words(text), n)] for n in (5, 1, 2))
    rhymes = [hits for number, poem in poems.items()
              if (hits := rhyme_hits(poem, prompts[number])) is not None]
    return {
        "chrf": corpus_score(list(poems.values()), [[gold[number] for number in poems]]).score,
        "chrf_continuation": corpus_score(list(new.values()), [true]).score,
        "lines": fmean(poem.count("\n") + 1 for poem in poems.values()),
        "copied_5grams": sum(gram in known for gram in five) / max(1, len(five)),
        "distinct_1": len(set(one)) / max(1, len(one)),
        "distinct_2": len(set(two)) / max(1, len(two)),
        "rhymes": fmean(rhymes) if rhymes else None}


def baselines(poems, prompts, gold, judge) -> dict[str, dict]:
    """The same measures of what no model wrote; of random sonnets the mean of 20 draws."""
    rng, draws = np.random.default_rng(seed), []
    for _ in range(20):
        drawn = rng.choice(list(poems), len(prompts), replace=len(prompts) > len(poems)).tolist()
        draws.append(judge({number: f"{prompt}\n{rest(poems[other], prompt)}"
                            for (number, prompt), other in zip(prompts.items(), drawn)}))
    mean = {k: None if v is None else fmean(row[k] for row in draws) for k, v in draws[0].items()}
    mean["deviation"] = stdev(row["chrf_continuation"] for row in draws)
    again = {n: "\n".join((prompt.split("\n") * LINES)[:LINES]) for n, prompt in prompts.items()}
    return {"random training sonnets": mean, "the prompt repeated": judge(again),
            "the true poems": judge(gold)}


def table(rows: dict[str, dict]) -> str:
    """Measures by name as a table; `deviation` is that of chrF on the continuation."""
    columns = {"chrf": "chrF", "chrf_continuation": "continued", "lines": "lines",
               "copied_5grams": "copied", "distinct_1": "dist-1", "distinct_2": "dist-2",
               "rhymes": "rhymes", "log_prob": "log-prob"}
    text = [" " * 28 + "".join(f"{shown:>10}" for shown in columns.values())]
    for name, row in rows.items():
        cells = ["" if row.get(key) is None else f"{row[key]:.2f}" for key in columns]
        text.append(f"{name:28}" + "".join(f"{cell:>10}" for cell in cells).rstrip()
                    + (f"  (continued ± {row['deviation']:.2f})" if "deviation" in row else ""))
    return "\n".join(text)


def label(decoding: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in decoding.items())


# ---- the whole ----

def train(model: GPT, tok, rows, dev, out: Path, env) -> tuple[float, int]:
    """Fine-tunes; OUT/best is the model of the epoch with the lowest dev loss, which is returned
    with the epoch's number (0: before training)."""
    set_aside(out)
    where, metrics, skips = env.device, Metrics(out), Skips(env)
    per_epoch = math.ceil(len(rows) / batch_size)
    max_steps = epochs * per_epoch
    update = build_optimizer(model, "adamw", learning_rate, weight_decay, (0.9, 0.999))
    best, at, step, tokens, elapsed = math.inf, 0, 0, 0, 0.0
    for epoch in range(epochs + 1):
        model.train()
        loss_sum, count, norms, clock = 0.0, 0, [], time.perf_counter()
        order = np.random.default_rng((seed, epoch)).permutation(len(rows))
        for batch in np.array_split(order, per_epoch) if epoch else ():
            for group in update.param_groups:
                group["lr"] = learning_rate * lr_scale("linear", step, max_steps,
                                                       round(warmup_fraction * max_steps))
            ids, targets = collate([rows[i] for i in batch], where)
            loss = model(ids, targets)[1]
            loss.backward()
            norms.append(env.update(update, model.parameters(), 1.0))
            n = int((targets >= 0).sum())
            loss_sum, count, step, tokens = loss_sum + loss.item() * n, count + n, step + 1, tokens + n
        elapsed += time.perf_counter() - clock
        if norms:
            skips.see(norms, step, print)
        model.eval()
        with torch.inference_mode():
            found = model(*collate(dev, where))[1].item()
        row = {"train_loss": loss_sum / count} if count else {}
        metrics.log(step=step, tokens=tokens, val_loss=found, val_ppl=math.exp(min(found, 700)),
                    elapsed_s=elapsed, **row)
        print(f"epoch {epoch:2}: " + "".join(f"training loss {v:.4f}, " for v in row.values())
              + f"dev loss {found:.4f}{' (best so far)' * (found < best)}", flush=True)
        if found < best:
            best, at = found, epoch
            save_best(out, model, tok)
        elif epoch - at >= patience:
            break
    metrics.plot()
    return best, at


def main():
    settings, env, out = begin(globals(), FROM_ONE, CHOICES)
    poems, prompts, gold, test = read_data(data_dir)
    if env.world > 1:
        raise ValueError("sonnet.py runs in one process: python sonnet.py, without torchrun")
    where, clock = env.device, time.perf_counter()
    if init_from == "scratch":
        tok = open_tokenizer(tokenizer)
        model = GPT(GPTConfig(block_size, tok.vocab_size, n_layer, n_head, n_embd, dropout))
    else:
        model, tok = load_model(init_from, dropout=dropout, dtype=torch.float32)
    if tok.eos_id is None:
        raise ValueError(f"the {tok.name} tokenizer has no end-of-text to close a poem with; "
                         "prepare its data with --separator, or with a BPE (tokenizer.py train)")
    T = model.config.block_size
    rows, dev = encode(poems, tok, T), encode(gold, tok, T)
    check_sampling(model.config, torch.zeros(1, 1), max_new_tokens, temperature, top_k, top_p)
    check_beams(model.config, num_beams, 1.0)
    for held_out in (prompts, test):  # refused now rather than after training
        encode(held_out, tok, T, whole=False)
    trained = set_trainable(model, mode, train_blocks, lora_rank, lora_alpha)
    model.to(where)
    print(f"{init_from}: {model.num_params():,} parameters, {trained:,} trained ({mode}), {tok.name} "
          f"tokens; {len(rows)} poems of {fmean(map(len, rows)):.0f} tokens", flush=True)
    env.lock(out)
    dev_loss, epoch = train(model, tok, rows, dev, out, env)
    nats = dev_loss * sum(len(row) - 1 for row in dev)
    dev_bpb = nats / math.log(2) / sum(len(poem.encode()) for poem in gold.values())

    model = prepare(GPT.from_pretrained(out / "best").to(where))
    known = {gram for poem in poems.values() for gram in ngrams(words(poem), 5)}
    judge, tried = partial(measure, prompts=prompts, gold=gold, known=known), []
    asked = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    asked = {"num_beams": num_beams} if num_beams > 1 else {
        name: value for name, value in asked.items() if value is not None}
    for decoding in SWEEP if sweep else [asked]:
        done, scores = finish(model, tok, prompts, decoding)
        tried.append((judge(done) | {"log_prob": fmean(scores.values())}, decoding, done, scores))
    row, decoding, done, scores = max(tried, key=lambda each: each[0]["chrf_continuation"])
    each = {f"poem {n}": judge({n: poem}) | {"log_prob": scores[n]} for n, poem in done.items()}
    named = {label(options): found for found, options, *_ in tried}
    others = baselines(poems, prompts, gold, judge)
    print(f"{table(each)}\n\nall dev poems, lowest dev loss {dev_loss:.4f} ({dev_bpb:.3f} bits a "
          f"byte) at epoch {epoch}\n{table(named | others)}\n")

    finished = finish(model, tok, test, decoding)[0]
    head, form = ("--Generated Sonnets-- \n\n", "\n{}\n{}\n\n") if cs224n else ("", "{}\n\n{}\n\n")
    for file, texts in (("generated_dev.txt", done), ("generated_sonnets.txt", finished)):
        write_text(out / file, head + "".join(form.format(*pair) for pair in texts.items()))
    for kind, texts in (("hypotheses", done), ("references", gold)):  # one a line, for sacrebleu
        for name, lines in (("poems", [texts[n] for n in done]),
                            ("continuations", [rest(texts[n], prompts[n]) for n in done])):
            write_text(out / f"dev_{name}_{kind}.txt", "".join(
                f"{' '.join(text.split())}\n" for text in lines))
    write_text(out / "results.json", json.dumps({
        "split": "dev", **row, "decoding": decoding, "dev_loss": dev_loss, "bits_per_byte": dev_bpb,
        "best_epoch": epoch, "baselines": others, "tried": named, "poems": each,
        "seconds": time.perf_counter() - clock, "seed": seed, "settings": settings}, indent=1) + "\n")
    first = next(iter(finished))
    print(f"{first}\n\n{finished[first]}\n\n{label(decoding)}: the {len(finished)} test poems are in "
          f"{out / 'generated_sonnets.txt'}")
    env.close()


if __name__ == "__main__":
    run(main, globals())
