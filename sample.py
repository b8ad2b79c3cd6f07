"""Writes text with a trained model.

    python sample.py --start "Once upon a time"
    python sample.py --init_from=out/tinystories --num_samples=5 --temperature=0.7 --top_p=0.95
    python sample.py --init_from=gpt2 --start FILE:prompt.txt
"""

import codecs
import time
from pathlib import Path

import torch

from common import Device, load_model
from configurator import run

init_from: str | None = None  # run folder, Hugging Face folder or hub name; None: the newest in out/
start = ""  # the prompt, or FILE:path; empty: a fresh document
num_samples = 1  # decoded as one batch; a single one is printed as it comes
max_new_tokens = 256
temperature = 0.8  # 0 is greedy
top_k: int | None = None  # draw from the k most likely tokens
top_p: float | None = None  # draw from the fewest tokens whose probability reaches p
seed = 1337
tokenizer: str | None = None  # gpt2, bytes, a file or a folder; None: the model's own
device = "auto"  # cpu, cuda, cuda:1, mps
dtype = "auto"  # of the weights: float32, bfloat16, float16


def newest_run() -> str:
    """The run folder under out/ that was written last; ValueError if there is none."""
    runs = [file.parent for file in Path("out").glob("*/ckpt.pt")]
    if not runs:
        raise ValueError("no trained model under out/; train one (make run, or python train.py "
                         "config/quickstart.py) or name one with --init_from")
    return str(max(runs, key=lambda run: (run / "ckpt.pt").stat().st_mtime))


def encode_prompt(text: str, tok, block_size: int) -> torch.Tensor:
    """(1, T) ids of a prompt, `FILE:path` read first; an empty one is end-of-text or a line break.
    One longer than the context keeps its last tokens, with a note."""
    if text.startswith("FILE:"):
        text = Path(text[5:]).read_text(encoding="utf-8")
    ids = tok.encode(text).astype("int64")
    if not len(ids):
        ids = tok.encode("\n").astype("int64") if tok.eos_id is None else [tok.eos_id]
    if len(ids) > block_size:
        print(f"note: the prompt has {len(ids)} tokens, the context {block_size}: "
              "its last ones are kept")
    return torch.tensor(ids)[None, -block_size:]


def main():
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    env = Device(device, dtype)
    name = init_from or newest_run()
    model, tok = load_model(name, tokenizer, dtype=env.dtype)
    model.to(env.device)
    print(f"{name}: {model.num_params():,} parameters, {tok.name} tokens, seed {seed}\n")
    idx = encode_prompt(start, tok, model.config.block_size).to(env.device)
    prompt = tok.decode([i for i in idx[0].tolist() if i != tok.eos_id])
    clock, count = time.perf_counter(), 0
    tokens = model.stream(idx.expand(num_samples, -1), max_new_tokens, temperature, top_k, top_p,
                          tok.eos_id, torch.Generator().manual_seed(seed))
    if num_samples == 1:
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span tokens
        print(prompt, end="", flush=True)
        for token in tokens:
            count += 1
            if token.item() != tok.eos_id:
                print(utf8.decode(tok.decode_bytes([token.item()])), end="", flush=True)
        print()
    else:
        rows = torch.stack(list(tokens), dim=1).tolist()
        for number, row in enumerate(rows, 1):
            text = row[:row.index(tok.eos_id)] if tok.eos_id in row else row
            count += min(len(text) + 1, len(row))
            print(f"--- {number}\n{prompt}{tok.decode(text)}")
    seconds = time.perf_counter() - clock
    print(f"\n{count:,} tokens in {seconds:.1f} s, {count / seconds:,.1f} tokens/s")


if __name__ == "__main__":
    run(main, globals())
