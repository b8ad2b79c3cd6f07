"""How good are the stories? Several decoding strategies side by side, on the same prompts.

    python evaluate.py --dataset=tinystories_4k
    python evaluate.py --init_from=weights --decoding greedy top_p=0.9,temperature=0.7 num_beams=4

The prompts are the first words of validation stories, whose own endings are the table's first row.
The text is compared in words, in lower case and without punctuation, whatever the tokenizer:

    words      mean length of an ending
    ended      share of the endings that reach end-of-text within max_new_tokens
    ppl        perplexity per token, end-of-text included, of the endings under the model itself
    dist-n     distinct n-grams over all n-grams of all endings (Li et al. 2016); it falls with the
               amount of text, so compare rows of similar length
    rep-4      share of the 4-grams of an ending that occurred earlier in it, mean over endings
    copied     share of the 8-grams of all endings that stand in a training story
"""

import json
import math
import random
import re
import sys
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import load_model, newest_run
from configurator import command_line, run
from data import Data
from decode import beam_search, check_beams, left_padded, prepare
from device import Device, read_settings
from files import write_text
from model import check_sampling
from text import ngrams, words

init_from: str | None = None  # run or Hugging Face folder, hub name; None: newest run or weights/
dataset = "tinystories"  # data/NAME with any tokenizer: prompts from val, copies found in train
num_prompts = 100  # drawn from the stories that are long enough
prompt_words = 30  # words of a prompt
max_new_tokens = 256  # of an ending; the real ones are cut to it, too
decoding = ["greedy", "temperature=0.8", "temperature=1", "top_p=0.95", "num_beams=4"]
    # each one option or several: temperature (else 1), top_k, top_p, num_beams, length_penalty
batch_size = 50  # prompts decoded together
seed = 1337
out: str | None = "out/quality"  # .md gets the table, .json all figures; None: only print
stories: str | None = None  # a .jsonl file for the prompts and endings themselves
device = "auto"  # cpu, cuda, cuda:1, mps
dtype = "auto"  # of the weights: float32, bfloat16, float16

SAMPLING = {"temperature": float, "top_k": int, "top_p": float}
BEAM_SEARCH = {"num_beams": int, "length_penalty": float}
FORMATS = {"words": "6.0f", "ended": "6.0%", "ppl": "6.3g", "rep-4": "6.1%", "copied": "6.1%"}


# ---- measures ----

def distinct(texts: list[list[str]], n: int) -> float:
    """Number of distinct n-grams over that of all n-grams of lists of words; 0 if there is none."""
    found = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(found)) / max(1, len(found))


def repetition(text: list[str]) -> float:
    """Share of the 4-grams of a list of words that occurred earlier in it; 0 if there is none."""
    return 1 - distinct([text], 4) if len(text) >= 4 else 0.0


def copied(groups: list[list[str]], training, n: int = 8) -> list[float]:
    """For each group of texts the share of its n-grams of words that stand in a training story; 0
    if there is none. The training stories, an iterable of texts, are read once and not kept."""
    found = [[gram for text in group for gram in ngrams(words(text), n)] for group in groups]
    missing = set().union(*found)
    for story in training:
        missing.difference_update(ngrams(words(story), n))
    return [sum(gram not in missing for gram in grams) / max(1, len(grams)) for grams in found]


# ---- stories ----

def documents(data, name: str):
    """The documents of a split of prepared data, as text."""
    split, tokenizer = getattr(data, name), data.tokenizer()

    def text(ids):  # without what the tokenizer puts around a whole text
        first, last = tokenizer.frame
        ids = ids[len(first):] if ids[:len(first)] == first else ids
        last = [i for i in last if i != tokenizer.eos_id]
        return tokenizer.decode(ids[:-len(last)] if last and ids[-len(last):] == last else ids)

    rest = np.zeros(0, int)  # a document that goes on in the next block
    for start in range(0, split.tokens, 2**20):  # blocks of a million tokens
        block = split.rows([start], min(2**20, split.tokens - start))[0]
        ids = np.concatenate([rest, block])
        *whole, rest = np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1)
        for document in whole:
            yield text(document[:-1].tolist())
    if len(rest):
        yield text(rest.tolist())


def split_story(text: str) -> tuple[str, str] | None:
    """(prompt, ending) of a story; None if it is too short. The ending begins with white space,
    where every tokenizer begins a new token."""
    match = re.match(rf"((?:\S+\s+){{{prompt_words - 1}}}\S+)(\s.*)", text.strip(), re.DOTALL)
    return match and match.groups()


# ---- the model ----

def parse_decoding(text: str, config) -> dict:
    """The options that `greedy` or `key=value[,key=value …]` means; ValueError if it is wrong."""
    if text == "greedy":
        return {"temperature": 0.0}
    given = dict(part.partition("=")[::2] for part in text.split(","))
    kinds = BEAM_SEARCH if "num_beams" in given else SAMPLING
    try:
        if not given.keys() <= kinds.keys() or len(given) <= text.count(","):
            raise ValueError("expected greedy, or key=value, each once, with commas between: of "
                             f"{', '.join(SAMPLING)}, or of {', '.join(BEAM_SEARCH)}")
        options = {key: kinds[key](value) for key, value in given.items()}
        check_beams(config, options.get("num_beams", 1), options.get("length_penalty", 1.0))
        check_sampling(torch.zeros(1, 1), max_new_tokens, options.get("temperature", 1.0),
                       options.get("top_k"), options.get("top_p"))
    except ValueError as e:
        raise ValueError(f"decoding {text!r}: {e}") from None
    return options


def decode_all(model, prompts: list[list[int]], options: dict, stop_ids, bar) -> list[list[int]]:
    """The new ids after each prompt up to the first of stop_ids, which is included."""
    beams = "num_beams" in options
    groups = defaultdict(list)
    for i, prompt in enumerate(prompts):  # beam search needs prompts of one length: no padding
        groups[len(prompt) if beams else 0].append(i)
    batches = [group[i:i + batch_size] for group in groups.values()
               for i in range(0, len(group), batch_size)]
    endings = [[] for _ in prompts]
    for batch in batches:
        idx, mask = left_padded([prompts[i] for i in batch], model.transformer.wte.weight.device)
        if beams:
            ids = beam_search(model, idx, max_new_tokens, eos_id=stop_ids, **options)[0]
        else:
            generator = torch.Generator().manual_seed(seed + batch[0])
            ids = model.generate(idx, max_new_tokens, eos_id=stop_ids, generator=generator,
                                 attention_mask=None if mask.all() else mask, **options)
        for i, new in zip(batch, ids[:, idx.size(1):].tolist()):
            end = next((n for n, token in enumerate(new, 1) if token in stop_ids), None)
            endings[i] = new[:end]
        bar.update(len(batch))
    return endings


@torch.inference_mode()
def ending_loss(model, prompt: list[int], ending: list[int]) -> float:
    """Summed cross-entropy in nats of an ending after its prompt. What is longer than the context
    is evaluated in windows that each begin with half a context of earlier tokens."""
    T, device = model.config.block_size, model.transformer.wte.weight.device
    ids, done, total = prompt + ending, len(prompt), 0.0
    while done < len(ids):
        start = 0 if len(ids) <= T + 1 else max(0, done - max(1, T // 2))
        window = torch.tensor([ids[start:start + T + 1]], device=device)
        logits = model(window[:, :-1])[0][0, done - start - 1:].float()
        total += F.cross_entropy(logits, window[0, done - start:], reduction="sum").item()
        done = start + window.size(1)
    return total


def measure(model, prompts, endings, texts: list[str], stop_ids) -> dict:
    """All measures but `copied` of some endings, given as ids and as texts."""
    lists, count = [words(text) for text in texts], len(texts)
    nats = sum(ending_loss(model, prompt, ending) for prompt, ending in zip(prompts, endings))
    ended = sum(ending[-1] in stop_ids for ending in endings)
    return {"words": sum(map(len, lists)) / count, "ended": ended / count,
            "ppl": math.exp(min(nats / sum(map(len, endings)), 700)),  # exp overflows past that
            **{f"dist-{n}": distinct(lists, n) for n in (1, 2, 3)},
            "rep-4": sum(map(repetition, lists)) / count}


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table with aligned columns."""
    _, *keys = rows[0]
    width = max(len(row["decoding"]) for row in rows)
    lines = [["decoding".ljust(width), *(key.rjust(6) for key in keys)],
             [":".ljust(width, "-"), *["-----:"] * len(keys)]]
    for row in rows:
        cells = [format(row[key], FORMATS.get(key, "6.3f")) for key in keys]
        lines.append([row["decoding"].ljust(width), *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main():
    read_settings(globals(), ("num_prompts", "prompt_words", "max_new_tokens", "batch_size"))
    data = Data(dataset)
    if data.eos_id is None:
        raise ValueError(f"{dataset} has no end-of-text between its documents")
    env = Device(device, dtype)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length
    name = init_from or newest_run()
    model, tok = load_model(name, dtype=env.dtype)
    strategies = {text: parse_decoding(text, model.config) for text in decoding}
    if tok.eos_id is None:
        raise ValueError(f"the {tok.name} tokenizer of {name} has no end-of-text that ends a story")
    pairs = [pair for pair in map(split_story, documents(data, "val")) if pair]
    if len(pairs) < num_prompts:
        raise ValueError(f"num_prompts: only {len(pairs)} stories have over {prompt_words} words")
    pairs = random.Random(seed).sample(pairs, num_prompts)
    prompts = [tok.frame[0] + tok.encode(prompt, whole=False).tolist() for prompt, _ in pairs]
    stop_ids = {tok.eos_id, *tok.stop_ids}
    parameters = model.num_params()  # fewer after prepare(), whose layers hold no parameters
    model = prepare(model.to(env.device))

    real = [[*tok.encode(ending, whole=False).tolist(), tok.eos_id] for _, ending in pairs]
    endings = {"real endings": [ending[:max_new_tokens] for ending in real]}
    with tqdm(total=num_prompts * len(strategies), unit=" stories", disable=None) as bar:
        for strategy, options in strategies.items():
            bar.set_description(strategy)
            endings[strategy] = decode_all(model, prompts, options, tok.stop_ids, bar)
    texts, rows = {}, []
    for strategy, made in endings.items():
        texts[strategy] = [tok.decode([i for i in ending if i not in stop_ids]) for ending in made]
        rows.append({"decoding": strategy,
                     **measure(model, prompts, made, texts[strategy], stop_ids)})
    training = tqdm(documents(data, "train"), "copies", unit=" training stories", disable=None)
    for row, share in zip(rows, copied(texts.values(), training)):
        row["copied"] = share
    markdown = table(rows)
    print(f"{name}: {num_prompts} prompts of {prompt_words} words, at most {max_new_tokens} new "
          f"tokens\n\n{markdown}")
    if out is not None:
        figures = {"command": command_line(), "model": str(name), "parameters": parameters,
                   "num_prompts": num_prompts, "prompt_words": prompt_words, "seed": seed,
                   "max_new_tokens": max_new_tokens, "rows": rows}
        write_text(out + ".md", f"`{command_line()}`\n\n{markdown}\n")
        write_text(out + ".json", json.dumps(figures, indent=1) + "\n")
        print(f"\nwritten: {out}.md, {out}.json", file=sys.stderr)
    if stories is not None:
        lines = [{"prompt": prompt} | {strategy: made[i] for strategy, made in texts.items()}
                 for i, (prompt, _) in enumerate(pairs)]
        write_text(stories, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))


if __name__ == "__main__":
    run(main, globals())
