"""Fine-tunes a GPT on Shakespeare's sonnets and finishes others from their first three lines.

    python sonnet.py config/sonnet.py --data_dir=FOLDER
    python sonnet.py config/sonnet.py --data_dir=FOLDER --sweep
    python sonnet.py --data_dir=FOLDER --init_from=gpt2 --mode=lora --learning_rate=1e-3 --cs224n
    python sonnet.py config/sonnet.py --data_dir=FOLDER --init_from=resume --num_beams=4

FOLDER has the files of the CS224n default project "Build GPT-2". OUT/best is the model of the epoch
with the lowest dev loss (nats per token, end-of-text included), OUT/generated_sonnets.txt the test
poems; the dev poems lie beside it, also one a line, as `sacrebleu REF -i HYP -m chrf` reads them.
"""

import math
import re
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from sacrebleu.metrics import CHRF
from torch.nn.utils.rnn import pad_sequence
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
from decode import beam_search, check_beams, left_padded, prepare
from device import begin, to_device
from files import read_text, write_text
from lora import set_trainable
from model import GPT, GPTConfig, check_sampling
from optim import build_optimizer
from run import Run
from text import ngrams, words
from tokenizer import open_tokenizer

# what and where
out_dir = "out/sonnet"  # the run's folder
overwrite = False  # begin anew in a folder that holds a run
data_dir: str | None = None  # the folder with the course's sonnets
allow_overlap = False  # held-out numbers may be in the training set
init_from = "out/pretrain_plays"  # a run or Hugging Face folder, a hub name, scratch, or resume
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
optimizer = "adamw"  # or another of optim.OPTIMIZERS
learning_rate = 1e-3  # its peak, after a linear warmup; then linear to zero
warmup_fraction = 0.1  # of the updates
weight_decay = 0.01  # of matrices
dropout = 0.1
log_interval = 20  # updates between lines
wandb_project: str | None = None  # also log to Weights & Biases (pip install wandb)
tensorboard = False  # also log for TensorBoard (pip install tensorboard)
# how the poems are finished
temperature = 0.8  # 0 is greedy
top_p: float | None = 0.9  # draw from the fewest tokens whose probability reaches p
top_k: int | None = None  # draw from the k most likely tokens
num_beams = 1  # more: beam search instead of drawing
candidates = 8  # drawn for each poem; the likeliest by its mean log-probability is kept
max_new_tokens = 256  # of a poem that will not end
sweep = False  # try SWEEP on the dev poems; the test poems get what has the best chrF there
cs224n = False  # generated_sonnets.txt in the layout of the course's submissions
# the machine
device = "auto"  # cpu, cuda, cuda:1, mps

FILES = ("sonnets.txt", "sonnets_held_out_dev.txt", "TRUE_sonnets_held_out_dev.txt",
         "sonnets_held_out.txt")  # training, dev prompts, the whole dev poems, test prompts
FROM_ONE = ("patience", "batch_size", "log_interval", "candidates", "num_beams", "max_new_tokens")
FIXED = ("tokenizer", "block_size", "n_layer", "n_head", "n_embd", "seed", "mode", "train_blocks",
         "lora_rank", "lora_alpha", "batch_size", "optimizer")  # a resumed run keeps these
CHOICES = {"mode": ("full", "lora", "last_blocks")}
LINES = 14
READ = {"cuda": 16}  # tokens that are read together, as each time a GPU is waited for
RHYMES = ((0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 13))  # ABAB CDCD EFEF GG
SWEEP = [{"temperature": 0.0}, {"num_beams": 2}, {"num_beams": 4},
         *({"temperature": t, "top_p": p} for t in (0.5, 0.8, 1.1) for p in (0.8, 0.9, 1.0))]


# ---- poems ----

def read_poems(path) -> dict[int, str]:
    """{number: poem} of a file in the course's format: what stands before the first number is
    dropped, blank lines too, indents stay. ValueError names what cannot be read."""
    _, *parts = re.split(r"^[ \t]*(\d+)[ \t]*$", read_text(path), flags=re.MULTILINE)
    if not parts:
        raise ValueError(f"{path} has no numbers: expected a line with its number before each poem")
    poems = {}
    for number, text in zip(map(int, parts[::2]), parts[1::2]):
        lines = [line.rstrip() for line in text.split("\n") if line.strip()]
        if not lines or number in poems:
            raise ValueError(f"{path}: poem {number} is {'there twice' if lines else 'empty'}")
        poems[number] = "\n".join(lines)
    return poems


def read_data(folder: str | None) -> list[dict[int, str]]:
    """The poems of FILES; ValueError, in one line with the poem's number, where they do not fit."""
    paths = [Path(folder or "") / name for name in FILES]
    missing = [path.name for path in paths if not folder or not path.is_file()]
    if missing:
        given = f"--data_dir={folder} lacks" if folder else "give --data_dir=FOLDER with"
        raise ValueError(f"{given} {', '.join(missing)} of the CS224n project "
                         "\"Build GPT-2\": a header, then for each poem a line with its number, a "
                         "blank line and its lines, in sonnets_held_out* the first three")
    train, dev, gold, test = poems = [read_poems(path) for path in paths]
    overlap = (dev.keys() | test.keys()) & train.keys()
    if overlap and not allow_overlap:
        raise ValueError(f"poem {min(overlap)} of {paths[0]} is among those held out, too; "
                         "--allow_overlap trains on it nevertheless")
    for number in sorted(dev.keys() | gold.keys()):
        if number not in dev or not gold.get(number, "").startswith(f"{dev[number]}\n"):
            raise ValueError(f"poem {number} is not begun in {paths[1]} and whole in {paths[2]}")
    return poems


def encode(poems: dict[int, str], tok, T: int, whole: bool = True) -> list[list[int]]:
    """Token ids of poems between two end-of-texts, or of prompts behind one. ValueError names a
    poem that does not fit a context of T."""
    rows, end = [], [tok.eos_id]
    limit = T - 1 if whole else T - 2  # the last id of a poem is predicted, never read
    for number, poem in poems.items():
        try:
            ids = tok.encode(poem if whole else f"{poem}\n", whole=False).tolist()
        except ValueError as e:
            raise ValueError(f"poem {number}: {e}") from None
        if len(ids) > limit:
            raise ValueError(f"poem {number} has {len(ids)} tokens, a context of {T} fits {limit}")
        rows.append([*end, *ids, *end] if whole else [*end, *ids])
    return rows


def collate(rows, device):
    """(ids, targets), both (B, T), padded on the right (targets with -100): that needs no mask."""
    T = max(map(len, rows))
    padded = torch.tensor([row + [-100] * (T - len(row)) for row in rows])
    padded = to_device(padded, device)
    return padded[:, :-1].clamp(min=0), padded[:, 1:]


# ---- finishing them ----

@torch.inference_mode()
def continue_rows(model: GPT, tok, rows, generator, temperature=1.0, top_p=None, top_k=None,
                  num_beams=1) -> list[list[int]]:
    """The ids that the model adds to each prompt (a list of ids), up to end-of-text or the break
    behind the fourteenth line; in one left-padded batch, but poem by poem for beam search."""
    idx, mask = left_padded(rows, model.transformer.wte.weight.device)
    n = min(max_new_tokens, model.config.block_size - idx.size(1))
    if num_beams > 1:
        found = [beam_search(model, idx.new_tensor([row]),
                             min(max_new_tokens, model.config.block_size - len(row)), num_beams,
                             eos_id=tok.eos_id)[0][0, len(row):] for row in rows]
        steps = pad_sequence(found, padding_value=tok.eos_id)  # (n, B), as the stream gives them
    else:
        steps = model.stream(idx, n, temperature, top_k, top_p, tok.eos_id, generator, mask)
    breaks = [b"\n" in token for token in tok.tokens]

    def finished_lines(ids) -> int:  # blank ones do not count
        return sum(bool(line.strip()) for line in tok.decode(ids).split("\n")[:-1])

    lines = [finished_lines(row) for row in rows]
    new, open_rows = [[] for _ in rows], range(len(rows))
    steps = iter(tqdm(steps, "poems", n, unit=" tokens of each", delay=2, leave=False,
                      disable=None))
    while open_rows and (read := [*islice(steps, READ.get(idx.device.type, 1))]):
        for tokens in torch.stack(read).tolist():
            for i in open_rows:
                new[i].append(tokens[i])
                if breaks[tokens[i]]:
                    lines[i] = finished_lines(rows[i] + new[i])
            open_rows = [i for i in open_rows if tokens[i] != tok.eos_id and lines[i] < LINES]
    return new


@torch.inference_mode()
def finish(model: GPT, tok, prompts: dict[int, str], decoding: dict) -> tuple[dict, dict]:
    """({number: poem}, {number: the mean log-probability of its new tokens, in nats}): of the
    candidates for each prompt, the likeliest by it. The same seed gives the same poems."""
    draws = decoding.get("temperature") != 0 and decoding.get("num_beams", 1) == 1
    count = candidates if draws else 1
    encoded = encode(prompts, tok, model.config.block_size, whole=False)
    rows = [row for row in encoded for _ in range(count)]
    scored, poems, scores = [], {}, {}
    generator = torch.Generator().manual_seed(seed)
    for row, new in zip(rows, continue_rows(model, tok, rows, generator, **decoding)):
        ids, targets = collate([row + new], model.transformer.wte.weight.device)
        targets[:, :len(row) - 1] = -100  # the prompt
        scored.append((-model(ids, targets)[1].item(), new))
    for i, (number, prompt) in enumerate(prompts.items()):
        scores[number], ids = max(scored[i * count:(i + 1) * count])
        text = f"{prompt}\n{tok.decode([token for token in ids if token != tok.eos_id])}"
        lines = [line.rstrip() for line in text.split("\n") if line.strip()]
        poems[number] = "\n".join(lines[:LINES])
    return poems, scores


# ---- measures ----

def rest(poem: str, prompt: str) -> str:
    """The lines of a poem behind those of its prompt."""
    return "\n".join(poem.split("\n")[prompt.count("\n") + 1:])


def rhyme_hits(poem: str, prompt: str) -> float | None:
    """Part of a sonnet's rhymes, but for those given with the prompt, that are rhymes by CMUdict;
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
    """What is reported of finished poems: chrF with the prompt on both sides, as in the course, and
    of the continuation alone; lines; the continuation's 5-grams of words that are `known` (of the
    training poems), different words and pairs; rhymes, where the library is there."""
    new = {number: rest(poem, prompts[number]) for number, poem in poems.items()}
    true = [rest(gold[number], prompts[number]) for number in poems]
    corpus_score = CHRF().corpus_score  # Popović 2015, 0 to 100
    texts = [words(text) for text in new.values()]
    rhymes = [rhyme_hits(poem, prompts[number]) for number, poem in poems.items()]
    rhymes = [hits for hits in rhymes if hits is not None]
    runs = {n: [gram for text in texts for gram in ngrams(text, n)] for n in (1, 2, 5)}
    return {
        "chrf": corpus_score(list(poems.values()), [[gold[number] for number in poems]]).score,
        "chrf_continuation": corpus_score(list(new.values()), [true]).score,
        "lines": fmean(poem.count("\n") + 1 for poem in poems.values()),
        "copied_5grams": sum(gram in known for gram in runs[5]) / max(1, len(runs[5])),
        "distinct_1": len(set(runs[1])) / max(1, len(runs[1])),
        "distinct_2": len(set(runs[2])) / max(1, len(runs[2])),
        "rhymes": fmean(rhymes) if rhymes else None}


def baselines(poems, prompts, gold, measure) -> dict[str, dict]:
    """The measures of poems that no model wrote; of random sonnets the mean of 20 draws."""
    rng, draws = np.random.default_rng(seed), []
    for _ in range(20):
        drawn = rng.choice(list(poems), len(prompts), replace=len(prompts) > len(poems)).tolist()
        draws.append(measure({number: f"{prompt}\n{rest(poems[other], prompt)}"
                              for (number, prompt), other in zip(prompts.items(), drawn)}))
    mean = {key: None if value is None else fmean(row[key] for row in draws)
            for key, value in draws[0].items()}
    mean["deviation"] = stdev(row["chrf_continuation"] for row in draws)
    again = {n: "\n".join((prompt.split("\n") * LINES)[:LINES]) for n, prompt in prompts.items()}
    return {"random training sonnets": mean, "the prompt repeated": measure(again),
            "the true poems": measure(gold)}


def table(rows: dict[str, dict]) -> str:
    """The measures that there are, by name, as a table; `deviation` is that of chrF on the
    continuation."""
    columns = {"chrf": "chrF", "chrf_continuation": "continued", "lines": "lines",
               "copied_5grams": "copied", "distinct_1": "dist-1", "distinct_2": "dist-2",
               "rhymes": "rhymes", "log_prob": "log-prob"}
    columns = {key: title for key, title in columns.items()
               if any(row.get(key) is not None for row in rows.values())}
    widths = [max(map(len, rows)), *(max(7, len(title) + 1) for title in columns.values())]
    lines, notes = [["", *columns.values()]], []
    for name, row in rows.items():
        values = [row.get(key) for key in columns]
        lines.append([name, *("" if value is None else f"{value:.2f}" for value in values)])
        if "deviation" in row:
            notes.append(f"{name}: continued ± {row['deviation']:.2f}")
    text = ["".join([f"{name:{widths[0]}}", *map(str.rjust, cells, widths[1:])]).rstrip()
            for name, *cells in lines]
    return "\n".join(text + notes)


# ---- the whole ----

def main():
    take_settings(globals())
    settings, env, out = begin(globals(), FROM_ONE, CHOICES)
    if env.world > 1:
        raise ValueError("sonnet.py runs in one process: python sonnet.py, without torchrun")
    poems, prompts, gold, test = read_data(data_dir)
    checkpoint = open_run(env, out, settings, FIXED, data=str)

    # ---- the model: resumed, new or pretrained ----
    if checkpoint is not None:
        model, tok = saved_model(checkpoint, dropout)
    elif init_from == "scratch":
        tok = open_tokenizer(tokenizer)
        model = GPT(GPTConfig(block_size, tok.vocab_size, n_layer, n_head, n_embd, dropout))
    else:
        model, tok = load_model(init_from, dropout=dropout, dtype=torch.float32)
    if tok.eos_id is None:
        raise ValueError(f"the {tok.name} tokenizer has no end-of-text to close a poem with; "
                         "prepare its data with --separator, or with a BPE (tokenizer.py train)")
    T = model.config.block_size
    rows, dev = encode(poems, tok, T), encode(gold, tok, T)
    check_sampling(torch.zeros(1, 1), max_new_tokens, temperature, top_k, top_p)
    check_beams(model.config, num_beams, 1.0)
    encode(prompts | test, tok, T, whole=False)  # refused now rather than after training
    known = digest([rows, dev])
    check_data(checkpoint, known, data_dir)
    env.place(model)
    trained = set_trainable(model, mode, train_blocks, lora_rank, lora_alpha)
    name = out if init_from == "resume" else init_from
    env.say(f"{name}: {model.num_params():,} parameters, {trained:,} trained ({mode}); "
            f"{len(rows)} poems of {fmean(map(len, rows)):.0f} tokens ({tok.name})")

    # ---- the run ----
    per_epoch = math.ceil(len(rows) / batch_size)
    max_steps = epochs * per_epoch
    update = build_optimizer(model, optimizer, learning_rate, weight_decay, (0.9, 0.999))
    run = Run(env, out, model, update, settings, max_steps, per_epoch, checkpoint)
    del checkpoint

    def evaluate_and_keep(epoch: int) -> dict:
        model.eval()
        with torch.inference_mode():
            loss = model(*collate(dev, env.device))[1].item()
        model.train()
        if run.is_best(loss, epoch):
            run.write(save_best, run.folder, model, tok)
        return {"val_loss": loss, "val_ppl": math.exp(min(loss, 700))}

    # ---- the loop ----
    if run.step == 0:  # epoch 0 is the model before training
        run.log(**evaluate_and_keep(0))
    for step in run.steps():
        epoch, number = divmod(step, per_epoch)
        if number == 0 and epoch - run.best[-1] >= patience:
            break
        order = np.random.default_rng((seed, epoch + 1)).permutation(len(rows))
        batch = np.array_split(order, per_epoch)[number]
        ids, targets = collate([rows[i] for i in batch], env.device)
        n = sum(len(rows[i]) - 1 for i in batch)  # the first of a poem is not predicted
        run.backward(model(ids, targets)[1] * n, n)
        run.update(n)
        run.log(**(evaluate_and_keep(epoch + 1) if run.evaluates else {}))
        if run.saves:
            run.save(config=vars(model.config), tokenizer=tok.to_json(), data=known)
    if run.stopped:
        return env.close()

    # ---- the best model finishes the dev poems, then the test poems ----
    dev_loss, epoch = run.best
    bits = dev_loss / math.log(2) * sum(len(row) - 1 for row in dev)
    dev_bpb = bits / sum(len(poem.encode()) for poem in gold.values())
    env.say(f"the model of epoch {epoch}, with the lowest dev loss, {dev_loss:.4f}, is in "
            f"{out / 'best'}; it finishes the poems")
    model = prepare(load_model(run.folder / "best")[0].to(env.device))
    grams = {gram for poem in poems.values() for gram in ngrams(words(poem), 5)}
    measured = partial(measure, prompts=prompts, gold=gold, known=grams)
    asked, tried = {"temperature": temperature, "top_p": top_p, "top_k": top_k}, {}
    asked = {name: value for name, value in asked.items() if value is not None}
    if num_beams > 1:
        asked = {"num_beams": num_beams}
    for decoding in SWEEP if sweep else [asked]:
        done, scores = finish(model, tok, prompts, decoding)
        row = measured(done) | {"log_prob": fmean(scores.values())}
        name = ", ".join(f"{option} {value}" for option, value in decoding.items())
        tried[name] = row, decoding, done, scores
    best = max(tried, key=lambda name: tried[name][0]["chrf_continuation"])
    row, decoding, done, scores = tried[best]
    each = {f"poem {n}": measured({n: poem}) | {"log_prob": scores[n]} for n, poem in done.items()}
    named = {name: found for name, (found, *_) in tried.items()}
    others = baselines(poems, prompts, gold, measured)
    print(f"{table(each)}\n\nall dev poems, lowest dev loss {dev_loss:.4f} ({dev_bpb:.3f} bits per "
          f"byte) at epoch {epoch}\n{table(named | others)}\n")
    finished = finish(model, tok, test, decoding)[0]
    head, form = ("--Generated Sonnets-- \n\n", "\n{}\n{}\n\n") if cs224n else ("", "{}\n\n{}\n\n")
    for file, texts in (("generated_dev.txt", done), ("generated_sonnets.txt", finished)):
        write_text(run.folder / file, head + "".join(form.format(*pair) for pair in texts.items()))
    for kind, texts in (("hypotheses", done), ("references", gold)):  # one a line, for sacrebleu
        new = {n: rest(texts[n], prompts[n]) for n in done}
        for name, by_number in (("poems", texts), ("continuations", new)):
            lines = [f"{' '.join(by_number[n].split())}\n" for n in done]
            write_text(run.folder / f"dev_{name}_{kind}.txt", "".join(lines))
    run.results({
        "split": "dev", **row, "decoding": decoding, "dev_loss": dev_loss, "bits_per_byte": dev_bpb,
        "best_epoch": epoch, "baselines": others, "tried": named, "poems": each,
        "seconds": run.elapsed_s, "seed": seed})
    print(f"{finished[min(finished)]}\n\n{best}: the {len(finished)} test poems are in "
          f"{out / 'generated_sonnets.txt'}")
    env.close()


if __name__ == "__main__":
    run_script(main, globals())
