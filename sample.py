"""Writes text with a trained model.

    python sample.py --start "Once upon a time"
    python sample.py --init_from=out/tinystories --num_samples=5 --temperature=0.7 --top_p=0.95
    python sample.py --init_from=gpt2 --start FILE:prompt.txt --num_beams=4
    python sample.py --interactive --quantize=int8
    python sample.py --init_from=out/finetune_instruct --instruct "Name three colours."
"""

import itertools
import os
import sys
import time

import torch

from checkpoint import load_model, newest_run
from configurator import run
from decode import beam_search, prepare, stream_text
from device import Device
from files import read_text
from hf import local_folder
from text import prompt_ids, prompt_limit, typed

init_from: str | None = None  # run or Hugging Face folder, hub name; None: newest run, or weights/
revision: str | None = None  # of a hub name
start = ""  # the prompt, or FILE:path; empty: a fresh document
instruct: str | None = None  # instead of start: an instruction, for a run of finetune_instruct.py
instruct_input = ""  # what the instruction is about, if anything
interactive = False  # ask for prompts (of such a run, for instructions) until Ctrl-D
num_samples = 1  # decoded as one batch; a single one is printed as it comes
max_new_tokens = 256
temperature = 0.8  # 0 is greedy
top_k: int | None = None  # draw from the k most likely tokens
top_p: float | None = None  # draw from the fewest tokens whose probability reaches p
num_beams = 1  # more: beam search for the likeliest text instead of drawing
length_penalty = 1.0  # of beams: above 1 prefers longer text
seed = 1337
tokenizer: str | None = None  # gpt2, bytes, a file or a folder; None: the model's own
quantize: str | None = None  # int8: weights in 8 bits, on a CPU
device = "auto"  # cpu, cuda, cuda:1, mps
dtype = "auto"  # of the weights: float32, bfloat16, float16


def encode_prompt(text: str, tok, block_size: int) -> list[int]:
    """Ids of a prompt or of the text in `FILE:path`; of an empty one, end-of-text or a line break.
    One longer than the context keeps its last tokens, with a note."""
    if text.startswith("FILE:"):
        text = read_text(os.path.expanduser(text[5:]))
    else:
        text = typed(text)
    ids = tok.encode(text, special=True).tolist() or [tok.start_id]
    if len(ids) > block_size:
        print(f"note: the prompt has {len(ids)} tokens, the context {block_size}: "
              "its last ones are kept")
    return ids[-block_size:]


def read_template(name: str) -> str | None:
    """The template of the instructions that a model was fine-tuned on, None for other models."""
    file = local_folder(name) / "template.txt"
    return file.read_text(encoding="utf-8").rstrip() if file.is_file() else None


def write(model, tok, text: str, number: int, template: str | None = None):
    """Prints how the model continues a prompt (or, with a template, answers an instruction), then
    the number of tokens and their rate. The random numbers are those of `seed` plus `number`."""
    T = model.config.block_size
    if template:
        ids, cut = prompt_ids(tok, template, text.strip(), instruct_input.strip(),
                              prompt_limit(T, max_new_tokens))
        if cut:
            print(f"note: the prompt does not fit the context of {T}: its end was cut")
        shown = []
    else:
        ids = encode_prompt(text, tok, T)
        shown = [i for i in ids if i not in (tok.eos_id, tok.bos_id)]

    def whole(new):  # decoded with the prompt: a tokenizer may write a token otherwise alone
        return tok.decode([*shown, *itertools.takewhile(lambda i: i not in tok.stop_ids, new)])

    idx = torch.tensor([ids], device=model.transformer.wte.weight.device)
    options = (max_new_tokens, temperature, top_k, top_p, tok.stop_ids,
               torch.Generator().manual_seed(seed + number))
    clock, count = time.perf_counter(), 0
    if num_beams > 1:
        ids, scores = beam_search(model, idx, max_new_tokens, num_beams, length_penalty,
                                  tok.stop_ids)
        count = ids.size(1) - idx.size(1)
        print(f"{whole(ids[0, idx.size(1):].tolist())}\n(score {scores[0].item():.4f})")
    elif num_samples == 1:
        print(whole([]), end="", flush=True)
        for piece, count in stream_text(model, tok, idx, *options, before=shown):
            print(piece, end="", flush=True)
        print()
    else:
        new = model.generate(idx.expand(num_samples, -1), *options)[:, idx.size(1):].tolist()
        for n, row in enumerate(new, 1):
            ended = [i for i, token in enumerate(row, 1) if token in tok.stop_ids]
            count += min([*ended, len(row)])
            print(f"--- {n}\n{whole(row)}")
    seconds = time.perf_counter() - clock
    print(f"\n{count:,} tokens in {seconds:.2f} s, {count / seconds:,.1f} tokens/s")


def main():
    if num_samples < 1 or num_beams < 1:
        raise ValueError(f"num_samples={num_samples} and num_beams={num_beams} must be at least 1")
    if num_samples > 1 and num_beams > 1:
        raise ValueError("beam search writes one text: give num_samples or num_beams")
    of_the_other = {"temperature", "top_k", "top_p"} if num_beams > 1 else {"length_penalty"}
    for name in sorted(globals()["_given"] & of_the_other):
        print(f"note: {name} does nothing with num_beams={num_beams}")
    if start and instruct is not None:
        raise ValueError("give start or instruct, not both")
    env = Device(device, dtype)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length
    name = init_from or newest_run()
    model, tok = load_model(name, tokenizer, revision=revision, dtype=env.dtype)
    print(f"{name}: {model.num_params():,} parameters, {tok.name} tokens, seed {seed}\n")
    model = prepare(model.to(env.device), quantize, rows=max(num_samples, num_beams))
    template = read_template(name)
    if instruct is not None and template is None:
        raise ValueError(f"{name} has no template.txt: instructions are for runs of "
                         "finetune_instruct.py; give the prompt with --start")
    if instruct_input and not (template and (interactive or instruct is not None)):
        raise ValueError("instruct_input is what an instruction is about; give one with --instruct")
    given = start if instruct is None else instruct
    if given or not interactive:
        write(model, tok, given, 0, template if instruct is not None else None)
    if not interactive:
        return
    sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text get an answer, too
    print("type an instruction, then Enter; quit or Ctrl-D ends" if template else
          "type a prompt, then Enter; an empty line writes a fresh document, quit or Ctrl-D ends")
    for number in itertools.count(1 if given else 0):
        try:
            text = input("\n> ").rstrip("\r")  # of lines that end as on Windows
        except EOFError:
            print()
            return
        if text.strip() in ("quit", "exit"):
            return
        try:
            write(model, tok, text, number, template)
        except (ValueError, OSError) as e:  # such as a character outside the alphabet: ask again
            print(f"error: {e}")


if __name__ == "__main__":
    run(main, globals())
