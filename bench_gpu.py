"""What a GPU makes of this, in an hour or less: its tests, training, decoding, whole runs.

    python bench_gpu.py --peer=../nanoGPT                   # make gpu
    python bench_gpu.py --parts step-adamw decode           # those whose names begin so
    python bench_gpu.py --batch 16 32 48 64 --parts step
    python bench_gpu.py --alone=run --device=cpu            # one part here, and nothing is kept

The parts stand in the order of their worth, take up to a minute or two each, and do without each
other. Each result is in OUT/results.json as soon as it is there, and its part is skipped from then
on; one that fails is named in a line and tried again by the next call. Needed are torch, numpy and
safetensors; for whole runs what requirements.txt names. The text is the Python source of what is
installed here, as such a machine may have no network.
"""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch

from configurator import run as run_script
from decode import prepare
from device import Device
from files import HERE, read_json, write_text
from model import GPT, GPTConfig
from optim import build_optimizer

# the others of our modules want more than torch, numpy and safetensors: imported where needed

out = "out/gpu"  # folder of results.json, and of what the parts write
parts: list[str] = []  # beginnings of the names of parts; none: all
alone: str | None = None  # the one part to run in this process, which prints its result
peer: str | None = None  # folder of a nanoGPT checkout
limit = 180  # seconds, after which a part is ended
device = "auto"  # cpu, cuda, cuda:1
dtype = "auto"  # of autocast
# the network of training steps and runs: GPT-2 124M
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
batch = [16, 32]  # sequences of a step: 48 and 64 for large GPUs
seconds = 60.0  # of a race; of steps and of decoding a tenth is measured
total_batch_tokens = 262_144  # of an update in a race
# decoding
decode_batch = [1, 8, 64, 256]  # texts decoded together
new = 256  # tokens of each
# the text
text_mb = 96.0  # of Python source
vocab_size = 16_384  # of a BPE that is learned from it


# ---- clocks and processes ----

def now() -> float:
    """Seconds of a clock, read when a GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work, burst: int = 5) -> float:
    """Mean seconds of some work, repeated for a tenth of `seconds`; a GPU is waited for only after
    each burst."""
    for _ in range(3):
        work()
    start, count = now(), 0
    while now() < start + seconds / 10:
        for _ in range(burst):
            work()
        count += burst
    return (now() - start) / count


def python(*words, cwd=None, stop_at: str | None = None) -> list[tuple[float, str]]:
    """(seconds, line) of what a Python command prints, also to stderr; it gets SIGTERM at the line
    with stop_at in it. ValueError with its last line if it fails."""
    start, lines = time.perf_counter(), [(0.0, "")]
    with subprocess.Popen([sys.executable, "-u", *map(str, words)], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors="replace",
                          cwd=cwd) as process:
        for line in process.stdout:
            sys.stderr.write(line)
            lines.append((time.perf_counter() - start, line.strip()))
            if stop_at and stop_at in line:
                process.terminate()
    if process.returncode:
        raise ValueError(f"exit status {process.returncode}: {lines[-1][1]}")
    return lines


def measure(name: str) -> dict:
    """The result of a part in a process of its own, with its own memory."""
    lines = python(__file__, *sys.argv[1:], f"--alone={name}")
    result = next(line for _, line in reversed(lines) if line.startswith("{"))
    return json.loads(result, parse_float=lambda number: float(f"{float(number):.5g}"))


def when(lines, word: str) -> float:
    """Seconds after which the first line with a word in it came."""
    for second, line in lines:
        if word in line:
            return second
    raise ValueError(f"no line has {word!r}")


def script(name: str, folder: str, *words, **more) -> list[tuple[float, str]]:
    """The same of a training script of ours, which writes into a folder of its own."""
    data()
    return python(HERE / name, *words, f"--out_dir={out}/{folder}", f"--device={device}",
                  f"--dtype={dtype}", f"--overwrite={'--init_from=resume' not in words}", **more)


def train(folder: str, B: int, *words, **more) -> list[tuple[float, str]]:
    """The same of train.py, with the network and the text."""
    return script("train.py", folder, *words, f"--dataset={out}/data/", *network(),
                  f"--batch_size={B}", "--log_interval=1", "--sample_tokens=0", **more)


def network() -> list[str]:
    """The options of its sizes, for train.py and for nanoGPT's."""
    names = "n_layer", "n_head", "n_embd", "block_size"
    return [f"--{name}={globals()[name]}" for name in names]


def data() -> dict:
    """Makes, where they are missing, OUT/source.jsonl, a document for each file of the installed
    packages, with the fields that fine-tunings read; OUT/sample.jsonl, some of them; and OUT/data,
    token shards of all."""
    if Path(out, "data/meta.json").is_file():
        return {}
    files = sorted(Path(np.__file__).parents[1].rglob("*.py"))
    random.Random(0).shuffle(files)
    rows, size = [], 0
    n = min(200, block_size // 4)  # letters, of which a question and its answer fit the context
    for file in files:
        with suppress(OSError, UnicodeDecodeError):
            text = file.read_text("ascii")
            rows.append(json.dumps({
                "text": text, "label": "classes" if "\nclass " in text else "none",
                "instruction": "Go on.", "input": text[:n], "output": text[n:2 * n]}))
            size += len(text)
        if size > text_mb * 1e6:
            break
    write_text(Path(out, "source.jsonl"), "\n".join(rows))
    write_text(Path(out, "sample.jsonl"), "\n".join(rows[:2000]))
    python(HERE / "tokenizer.py", "train", f"--input={out}/sample.jsonl", f"--out={out}/bpe.json",
           f"--vocab_size={vocab_size}")
    python(HERE / "prepare_text.py", f"--name={out}/data/", f"--input={out}/source.jsonl",
           f"--tokenizer={out}/bpe.json")
    return {"files": len(rows), "mb": size / 1e6}


# ---- parts: the machine and its tests ----

def machine() -> dict:
    """Names and versions, and what the chip does at the most: a product and a copy."""
    env = Device(device, dtype)
    n = 8192 if env.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=env.device, dtype=env.dtype) for _ in range(2))
    return {"device": env.name(), "cpus": os.cpu_count(), "dtype": str(env.dtype),
            "torch": torch.__version__, "python": sys.version.split()[0],
            "product_tflops": 2 * n**3 / timed(lambda: a @ a) / 1e12,
            "copy_gb_per_s": 2 * a.nbytes / timed(lambda: b.copy_(a)) / 1e9}


def tests() -> dict:
    """What tests/test_gpu.py finds, on the chip itself."""
    lines = python("-m", "pytest", "-q", "--tb=short", HERE / "tests/test_gpu.py", cwd=HERE)
    return {"summary": lines[-1][1]}


# ---- parts: steps ----

def trainer(who: str, B: int) -> tuple:
    """(function of a training step, Device, FLOPs of a token) of a network and optimizer."""
    env, rate, betas, decay = Device(device, dtype), 6e-4, (0.9, 0.95), 0.1
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, 50257, n_layer, n_head, n_embd))
    flops = model.flops_per_token(block_size)
    if who == "nanogpt":
        sys.path.insert(0, peer)
        sys.modules.pop("model")  # ours, of the same name
        import model as theirs
        config = theirs.GPTConfig(block_size, 50304, n_layer, n_head, n_embd)
        model = theirs.GPT(config).to(env.device)
        optimizer = model.configure_optimizers(decay, rate, betas, env.type)
    else:
        env.place(model)
        optimizer = build_optimizer(model, who, rate, decay, betas)
    net = torch.compile(model.train()) if env.type == "cuda" else model.train()
    parameters = [*model.parameters()]
    x, y = torch.randint(50257, (2, B, block_size), device=env.device)

    def work():
        with env.autocast():
            loss = net(x, y)[1]
        env.scaler.scale(loss).backward()
        env.update(optimizer, parameters, 1.0)
    return work, env, flops


def step(who: str, B: int) -> dict:
    """Speed and memory of steps with an update in each; the first one compiles."""
    work, env, flops = trainer(who, B)
    start = now()
    work()
    first = now() - start
    rate, peak = B * block_size / timed(work), env.peak_flops()
    return {"tokens_per_s": rate, "mfu": peak and flops * rate / peak,
            "peak_gb": (env.peak_memory() or 0) / 1e9, "first_step_s": first}


def profile() -> dict:
    """torch's table of the operations and kernels that take longest, of three steps."""
    work, env, _ = trainer("adamw", batch[0])
    step_s = timed(work)
    with torch.profiler.profile() as found:
        for _ in range(3):
            work()
        now()
    order = f"self_{'device' if env.type == 'cuda' else 'cpu'}_time_total"
    table = found.key_averages().table(order, row_limit=25)
    busy = sum(getattr(event, order) for event in found.key_averages()) / 3e6  # seconds of a step
    return {"step_ms": 1e3 * step_s, "gaps": 1 - busy / step_s, "table": table.splitlines()}


def decoding(B: int) -> dict:
    """Tokens/s of greedy texts: by plain steps, and by prepared ones, of a GPU compiled, too."""
    env, found = Device(device, dtype), {}
    idx = torch.randint(50257, (B, min(16, block_size // 2)), device=env.device)
    n = min(new, block_size - idx.size(1))
    for name in ("plain", "fast", "compiled")[:3 if env.type == "cuda" else 2]:
        model = GPT(GPTConfig(block_size, 50257, n_layer, n_head, n_embd)).eval()
        model = model.to(env.device, env.dtype)
        if name != "plain":
            prepare(model, compile=name == "compiled")
        found[name] = B * n / timed(partial(model.generate, idx, n, 0), burst=1)
    return found


# ---- parts: whole runs ----

def run() -> dict:
    """Seconds of what a run does beside steps: its beginning, with a compilation; the second
    evaluation, with the best model's saving; a checkpoint; a stop by SIGTERM, from which it goes
    on. And the losses around that."""
    from run import Metrics
    words = ["--max_steps=20", "--eval_interval=6", "--eval_tokens=1000000"]
    lines = train("run", batch[0], *words, stop_at="step    14/")
    s1, s10, s11, s12, s13, s14 = (when(lines, f"step {n:5}/") for n in (1, 10, 11, 12, 13, 14))
    stopped, step_s = when(lines, "stopped by SIGTERM"), s11 - s10
    train("run", batch[0], *words, "--init_from=resume")
    losses = [row["train_loss"] for row in Metrics.read(Path(out, "run/metrics.jsonl"))]
    return {"begin_s": s1, "step_s": step_s, "evaluation_s": s12 - s11 - step_s,
            "saving_s": s13 - s12 - step_s, "stopped_after_s": stopped - s14, "losses": losses}


def fine_tuning(kind: str, *words) -> dict:
    """The numbers in results.json of an epoch of fine-tuning: texts/s or answer tokens/s, losses,
    seconds of the updates. It starts from a run of one update."""
    if not Path(out, "base/ckpt.pt").is_file():
        train("base", 1, "--max_steps=1", "--eval_tokens=1", "--compile=False")
    script(f"finetune_{kind}.py", kind, f"--init_from={out}/base", "--epochs=1", *words)
    found = read_json(Path(out, kind, "results.json"))
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def race() -> dict:
    """Loss against seconds of config/tinystories_fast.py's recipe."""
    from run import Metrics
    B, steps, warmup = updates("muon")
    train("race", B, "config/tinystories_fast.py", f"--total_batch_tokens={total_batch_tokens}",
          f"--max_steps={steps}", f"--warmup_steps={warmup}")
    rows = Metrics.read(Path(out, "race/metrics.jsonl"))
    return {"val_loss": rows[-1]["val_loss"],
            "curve": [(row["elapsed_s"], row["train_loss"]) for row in rows]}


def updates(who: str) -> tuple[int, int, int]:
    """(B, updates of a race that `seconds` are enough for, updates of its warmup)."""
    name = f"step-{who}-{batch[-1]}"
    found = kept().get(name) or measure(name)
    steps = max(4, int(seconds * found["tokens_per_s"] / total_batch_tokens))
    return batch[-1], steps, min(20, steps // 4)


def race_nanogpt() -> dict:
    """The same of nanoGPT's train.py and its recipe, on the same text. Its validation loss is of 50
    random batches, ours of the first 2 M tokens."""
    data()
    B, steps, warmup = updates("nanogpt")
    kind, folder = Device(device).type, Path(out, "nanogpt").resolve()
    folder.mkdir(exist_ok=True)
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    for split in ("train", "val"):
        shutil.copyfile(Path(out, "data", f"{split}_00000.bin"), folder / f"{split}.bin")
    lines = python(
        "train.py", *network(), f"--dataset={folder}", f"--out_dir={folder}", f"--device={kind}",
        f"--compile={kind == 'cuda'}", f"--batch_size={B}", f"--max_iters={steps}",
        f"--gradient_accumulation_steps={max(1, total_batch_tokens // (B * block_size))}",
        f"--lr_decay_iters={steps}", f"--warmup_iters={warmup}", f"--eval_interval={steps}",
        "--eval_iters=50", "--log_interval=1", cwd=peer)
    text = "\n".join(line for _, line in lines)
    found = re.findall(r"iter \d+: loss ([\d.]+), time ([\d.]+)ms", text)
    losses, ms = np.array(found, float).T[:, :steps]
    ms[0] = np.median(ms)  # which holds an evaluation and the compilation
    return {"val_loss": float(re.findall(r"val loss ([\d.]+)", text)[-1]),
            "curve": np.stack([ms.cumsum() / 1e3, losses], 1).tolist()}


# ---- all of it ----

def contents() -> dict:
    """{name: function} of all parts, in the order of their worth."""
    found = {"machine": machine, "tests": tests}
    for B in batch:
        for who in ("adamw", "nanogpt", "muon"):
            found[f"step-{who}-{B}"] = partial(step, who, B)
    found["profile"] = profile
    found |= {f"decode-{B}": partial(decoding, B) for B in decode_batch}
    found |= {"data": data, "run": run,
              "classification": partial(fine_tuning, "cls", f"--train_file={out}/sample.jsonl",
                                        "--max_tokens=256"),
              "instruction": partial(fine_tuning, "instruct", f"--data={out}/sample.jsonl",
                                     "--max_new_tokens=32", "--num_answers=0"),
              "race": race, "race-nanogpt": race_nanogpt}
    return {name: work for name, work in found.items() if peer or "nanogpt" not in name}


def kept() -> dict:
    """The results that are there."""
    path = Path(out, "results.json")
    return read_json(path) if path.is_file() else {}


def main():
    works = contents()
    chosen = [name for name in works if not parts or name.startswith(tuple(parts))]
    if not chosen or alone not in (None, *works):
        raise ValueError(f"no part of that name; parts: {', '.join(works)}")
    if alone:
        signal.alarm(limit)  # a script that it runs ends, too: its output is closed then
        print(json.dumps(works[alone]()))
        return
    for name in chosen:
        if name in kept():
            continue
        start = time.perf_counter()
        try:
            found = measure(name)
            text = json.dumps(kept() | {name: found}, indent=1)
            write_text(Path(out, "results.json"), f"{text}\n")
        except ValueError as e:
            found = f"failed: {e}"
        print(f"{name:16}{time.perf_counter() - start:6.1f} s  {found!s:.200}", flush=True)


if __name__ == "__main__":
    run_script(main, globals())
