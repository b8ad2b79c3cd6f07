"""How good are the stories? Several ways of decoding side by side, on the same prompts.

    python evaluate.py --dataset=tinystories_4k
    python evaluate.py --init_from=weights --decoding greedy top_p=0.9,temperature=0.7 num_beams=4

Prompts are the first words of validation stories; the stories' own endings are the reference row.
All measures but perplexity are taken on the words of the endings, lower-cased and without
punctuation, so that models with other tokenizers compare:

    words      mean length of an ending
    ended      share of endings that reach end-of-text within max_new_tokens
    ppl        perplexity a token, end-of-text included, of the endings under the model itself
    dist-n     distinct n-grams over all n-grams, all endings together (Li et al. 2016); it falls
               with the amount of text, so compare rows of like length
    rep-4      share of an ending's 4-grams that occurred before in it, mean over endings
    copy       longest run of words that also stands in one training story: median; and largest
"""

import json
import math
import random
import re
import sys
from collections import defaultdict
from itertools import count, islice

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import Device, command_line, load_model, newest_run, read_settings
from configurator import run
from data import Data, ngrams, words
from decode import beam_search, check_beams, left_padded, prepare
from files import write_text
from model import check_sampling

init_from: str | None = None  # run folder, Hugging Face folder or hub name; None: newest in out/,
    # or weights/
dataset = "tinystories"  # data/NAME: prompts from its val, copies looked for in its train; its
    # tokenizer need not be the model's
num_prompts = 100  # drawn from the stories that are long enough
prompt_words = 30  # words of a prompt
max_new_tokens = 256  # of an ending; the real ones are cut there too
decoding = ["greedy", "temperature=0.8", "temperature=1", "top_p=0.95", "num_beams=4"]
    # each a setting or several: temperature (else 1), top_k, top_p, num_beams, length_penalty
batch_size = 50  # prompts decoded together
seed = 1337
out: str | None = "out/quality"  # .md gets the table, .json all figures; None: only print
stories: str | None = None  # a .jsonl file for the prompts and endings themselves
device = "auto"  # cpu, cuda, cuda:1, mps
dtype = "auto"  # of the weights: float32, bfloat16, float16

KEYS = {"temperature": float, "top_k": int, "top_p": float, "num_beams": int,
        "length_penalty": float}


# ---- measures ----

def distinct(texts: list[list[str]], n: int) -> float:
    """Distinct n-grams over all n-grams of lists of words; nan where there is none."""
    found = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(found)) / len(found) if found else math.nan


def repetition(text: list[str], n: int = 4) -> float:
    """Share of the n-grams of a list of words that occurred before in it; 0 where there is none."""
    found = ngrams(text, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def longest_copies(texts: list[list[str]], training, chunk: int = 2_000_000) -> list[int]:
    """For each list of words its longest run that is a run of one training story. training: an
    iterable of lists of words, read once, about `chunk` words in memory at a time.

    Exact. The texts and a chunk become one sequence, whose suffixes are sorted by prefix doubling
    (Karp, Miller and Rosenberg 1972): ranks[k] numbers the runs of 2**k words in alphabetical
    order. What a suffix shares with any training suffix, it shares with one of its two neighbours
    among them; the ranks, from long to short, say how much.
    """
    best, training = np.zeros(len(texts), int), iter(training)
    size = sum(map(len, texts)) + len(texts)
    levels = max(map(len, texts), default=0).bit_length()
    owner = np.repeat(np.arange(len(texts)), [len(text) + 1 for text in texts])
    while True:
        # 0: past the end, 1: the end of a text, 2: of a training story, so that no end is shared
        number = defaultdict(count(3).__next__)
        ids = [i for text in texts for i in (*(number[word] for word in text), 1)]
        for story in training:
            ids += [*(number[word] for word in story), 2]
            if len(ids) > size + chunk:
                break
        if len(ids) == size:
            return best.tolist()
        n, ranks = len(ids), [np.array([*ids, 0], np.int32)]
        for k in range(levels):
            after = np.zeros(n, np.int64)
            after[:max(0, n - 2**k)] = ranks[k][2**k:n]
            pairs = np.unique(ranks[k][:n] * np.int64(n + 3) + after, return_inverse=True)[1]
            ranks.append(np.append(pairs + 1, 0).astype(np.int32))
        order = np.argsort(ranks[-1][:n], kind="stable")
        at = np.flatnonzero(order < size)
        train = np.flatnonzero(order >= size)
        after = np.searchsorted(train, at)
        for near in (after - 1, after):
            a, b = order[at], order[train[near.clip(0, len(train) - 1)]]
            shared = np.zeros(size, int)
            for k in reversed(range(len(ranks))):
                same = ranks[k][np.minimum(a + shared, n)] == ranks[k][np.minimum(b + shared, n)]
                shared += same * 2**k
            np.maximum.at(best, owner[a], shared)


# ---- stories ----

def documents(data, name: str):
    """The documents of a split of prepared data, as text."""
    split, tokenizer, rest, at = getattr(data, name), data.tokenizer(), [], 0
    while at < split.tokens:
        ids = split.rows([at], min(1 << 20, split.tokens - at))[0]
        at += len(ids)
        *whole, last = np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1)
        for part in whole:
            yield tokenizer.decode([*rest, *part[:-1].tolist()])
            rest = []
        rest += last.tolist()
    if rest:
        yield tokenizer.decode(rest)


def cut(text: str) -> tuple[str, str] | None:
    """(prompt, ending) of a story; None if it is too short. The ending begins with white space,
    where no token runs across."""
    ends = [word.end() for word in islice(re.finditer(r"\S+", text), prompt_words + 1)]
    if len(ends) <= prompt_words:
        return None
    return text[:ends[-2]].lstrip(), text[ends[-2]:].rstrip()


# ---- the model ----

def parse_decoding(text: str) -> dict:
    """The options of `greedy` or `key=value[,key=value …]`; ValueError for anything else."""
    options = {"temperature": 0.0} if text == "greedy" else {}
    for part in [] if options else text.split(","):
        key, _, value = part.partition("=")
        try:
            options[key] = KEYS[key](value)
        except (KeyError, ValueError):
            raise ValueError(f"decoding {text!r}: expected greedy, or key=value with one of "
                             f"{', '.join(KEYS)}, commas between several") from None
    if "num_beams" in options and options.keys() & {"temperature", "top_k", "top_p"}:
        raise ValueError(f"decoding {text!r}: beam search draws nothing, num_beams goes only with "
                         "length_penalty")
    if "length_penalty" in options and "num_beams" not in options:
        raise ValueError(f"decoding {text!r}: length_penalty is of beam search, give num_beams too")
    return options


def check(text: str, options: dict, config):
    """ValueError for options of a decoding that are out of range for a model."""
    try:
        check_sampling(config, torch.zeros(1, 1), max_new_tokens, options.get("temperature", 1.0),
                       options.get("top_k"), options.get("top_p"))
        check_beams(config, options.get("num_beams", 1), options.get("length_penalty", 1.0))
    except ValueError as e:
        raise ValueError(f"decoding {text!r}: {e}") from None


def decode_all(model, prompts: list[list[int]], options: dict, eos_id: int, bar) -> list[list[int]]:
    """The new ids for each prompt, end-of-text included where it was reached."""
    groups, made = defaultdict(list), [[]] * len(prompts)
    for i, prompt in enumerate(prompts):  # beam search takes no padding: prompts of one length
        groups[len(prompt) if "num_beams" in options else 0].append(i)
    for group in groups.values():
        for rows in (group[i:i + batch_size] for i in range(0, len(group), batch_size)):
            idx, mask = left_padded([prompts[i] for i in rows], model.transformer.wte.weight.device)
            if "num_beams" in options:
                ids = beam_search(model, idx, max_new_tokens, eos_id=eos_id, **options)[0]
            else:
                generator = torch.Generator().manual_seed(seed + rows[0])
                ids = model.generate(idx, max_new_tokens, eos_id=eos_id, generator=generator,
                                     attention_mask=None if mask.all() else mask, **options)
            for i, new in zip(rows, ids[:, idx.size(1):].tolist()):
                made[i] = new[:new.index(eos_id) + 1] if eos_id in new else new
            bar.update(len(rows))
    return made


@torch.inference_mode()
def loss(model, prompt: list[int], ending: list[int]) -> float:
    """Summed cross-entropy in nats of an ending behind its prompt. What is longer than the context
    is read in windows that each begin with half a context of what was read before."""
    T, ids, done, total = model.config.block_size, prompt + ending, len(prompt), 0.0
    while done < len(ids):
        start = 0 if len(ids) <= T + 1 or done <= T // 2 else done - max(1, T // 2)
        window = torch.tensor([ids[start:start + T + 1]], device=model.transformer.wte.weight.device)
        logits = model(window[:, :-1])[0][0, done - start - 1:].float()
        total += F.cross_entropy(logits, window[0, done - start:], reduction="sum").item()
        done = start + window.size(1)
    return total


def measure(model, prompts, endings, tok) -> dict:
    """The measures of some endings (ids), all but `copy`."""
    texts = [words(tok.decode([i for i in ending if i != tok.eos_id])) for ending in endings]
    nats = sum(loss(model, prompt, ending) for prompt, ending in zip(prompts, endings) if ending)
    return {"words": sum(map(len, texts)) / len(texts),
            "ended": sum(tok.eos_id in ending for ending in endings) / len(endings),
            "ppl": math.exp(min(nats / max(1, sum(map(len, endings))), 700)),
            **{f"dist-{n}": distinct(texts, n) for n in (1, 2, 3)},
            "rep-4": sum(map(repetition, texts)) / len(texts)}


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table that can be read as it stands."""
    forms = {"decoding": "", "words": ".0f", "ended": ".0%", "ppl": ".4g", "rep-4": ".1%",
             "copy": "g", "largest": ".0f"}
    cells = [list(rows[0])] + [[format(value, forms.get(key, ".3f")) for key, value in row.items()]
                               for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, [":" + "-" * (widths[0] - 1), *("-" * (w - 1) + ":" for w in widths[1:])])
    return "\n".join(f"| {row[0]:<{widths[0]}} | " + " | ".join(
        f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:])) + " |" for row in cells)


def main():
    read_settings(globals(), ("num_prompts", "prompt_words", "max_new_tokens", "batch_size"))
    ways = {"real endings": None} | {text: parse_decoding(text) for text in decoding}
    data = Data(dataset)
    if data.eos_id is None:
        raise ValueError(f"{dataset} has no end-of-text between its documents")
    env = Device(device, dtype)
    name = init_from or newest_run()
    model, tok = load_model(name, dtype=env.dtype)
    for way in decoding:  # now rather than at its turn
        check(way, ways[way], model.config)
    if tok.eos_id is None:
        raise ValueError(f"the {tok.name} tokenizer of {name} has no end-of-text that ends a story")
    pairs = [pair for pair in map(cut, documents(data, "val")) if pair]
    if len(pairs) < num_prompts:
        raise ValueError(f"{len(pairs)} stories have more than {prompt_words} words, num_prompts is "
                         f"{num_prompts}")
    pairs = random.Random(seed).sample(pairs, num_prompts)
    prompts = [tok.encode(prompt).tolist() for prompt, _ in pairs]
    parameters = model.num_params()  # prepare() takes the linear layers' away
    model = prepare(model.to(env.device))
    endings, rows = {}, []
    with tqdm(total=num_prompts * len(decoding), unit=" stories", disable=None) as bar:
        for way, options in ways.items():
            bar.set_description(way)
            endings[way] = ([[*tok.encode(ending).tolist(), tok.eos_id][:max_new_tokens]
                             for _, ending in pairs] if options is None else
                            decode_all(model, prompts, options, tok.eos_id, bar))
            rows.append({"decoding": way} | measure(model, prompts, endings[way], tok))
    texts = {way: [tok.decode([i for i in ending if i != tok.eos_id]) for ending in made]
             for way, made in endings.items()}
    training = tqdm(documents(data, "train"), "copies", unit=" training stories", disable=None)
    copies = iter(longest_copies([words(text) for made in texts.values() for text in made],
                                 map(words, training)))
    for row in rows:
        lengths = list(islice(copies, num_prompts))
        row |= {"copy": float(np.median(lengths)), "largest": max(lengths)}
    shown = table(rows)
    print(f"{name}: {num_prompts} prompts of {prompt_words} words, at most {max_new_tokens} new "
          f"tokens\n\n{shown}")
    if out is not None:
        facts = {"command": command_line(), "model": str(name), "parameters": parameters,
                 "num_prompts": num_prompts, "prompt_words": prompt_words, "seed": seed,
                 "max_new_tokens": max_new_tokens, "rows": [
                     {key: None if str(value) == "nan" else value for key, value in row.items()}
                     for row in rows]}  # JSON has no nan
        for suffix, text in ((".md", f"`{command_line()}`\n\n{shown}\n"),
                             (".json", json.dumps(facts, indent=1) + "\n")):
            write_text(out + suffix, text)
        print(f"\nwritten: {out}.md, {out}.json", file=sys.stderr)
    if stories is not None:
        lines = ({"prompt": prompt} | {way: made[i] for way, made in texts.items()}
                 for i, (prompt, _) in enumerate(pairs))
        write_text(stories, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines))


if __name__ == "__main__":
    run(main, globals())
