"""What a GPU makes of this, in an hour or less: its tests, training, decoding, whole runs.

    python bench_gpu.py --peer=../nanoGPT                   # make gpu
    python bench_gpu.py --parts step-adamw decode           # those whose names begin so
    python bench_gpu.py --batch 16 32 48 64 --parts step
    python bench_gpu.py stop --device=cpu                   # one part alone; nothing is kept

The parts stand in the order of their worth, take up to a minute or two each, and do without each
other. Each result is in OUT/results.json as soon as it is there, and its part is skipped from then
on; one that fails is named in a line and tried again by the next call. Needed are torch, numpy and
safetensors; for whole runs what requirements.txt names. The text is the Python source of what is
installed here, as such a machine may have no network.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

from configurator import run as run_script
from files import HERE, write_text

# torch and what else may be missing on a bare machine is imported where it is needed

out = "out/gpu"  # folder of results.json, and of what the parts write
parts: list[str] = []  # beginnings of the names of parts; none: all
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
vocab_size = 16_384  # of a BPE that is learned from it; 256: bytes


# ---- processes ----

def python(*words, at: str | None = None, do=None) -> list[tuple[float, str]]:
    """(seconds, line) of what a Python command prints; do(process) after the first line with `at`
    in it. ValueError with its last line if it fails."""
    start, lines = time.perf_counter(), []
    words = [sys.executable, "-u", *map(str, words)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace") as process:
        for line in process.stdout:
            lines.append((time.perf_counter() - start, line.rstrip()))
            if at and at in line:
                do(process)
                at = None
    if process.returncode:
        last = next((line for _, line in reversed(lines) if line), "-")
        raise ValueError(f"{Path(words[2]).name} failed: {last}")
    return lines


def script(name: str, folder: str, *words, config="", **more) -> list[tuple[float, str]]:
    """The same of a training script of ours, which writes into a folder of its own."""
    return python(HERE / name, *config.split(), f"--out_dir={out}/{folder}", "--overwrite",
                  f"--device={device}", f"--dtype={dtype}", "--log_interval=1", *words, **more)


def when(lines, word: str) -> float:
    """Seconds at which the first line with a word in it came."""
    return next(second for second, line in lines if word in line)


# ---- the text, and a model ----

def source() -> Path:
    """A file with the Python source of the installed packages, a document and package a line."""
    path = Path(out, "source.jsonl")
    if path.is_file():
        return path
    import numpy
    rows, size, folder = [], 0, Path(numpy.__file__).parents[1]
    files = sorted(folder.rglob("*.py"))
    random.Random(0).shuffle(files)
    for file in files:
        with suppress(OSError, UnicodeDecodeError):
            text, package = file.read_text(encoding="utf-8"), file.relative_to(folder).parts[0]
            rows.append(json.dumps({"text": text, "package": package}))
            size += len(text)
        if size > text_mb * 1e6:
            break
    write_text(path, "\n".join(rows) + "\n")
    return path


def dataset() -> str:
    """The option --dataset for token shards of the source."""
    folder, tokenizer = Path(out, "data"), "bytes"
    if not (folder / "meta.json").is_file():
        if vocab_size > 256:
            tokenizer, sample = Path(out, "bpe.json"), Path(out, "sample.jsonl")
            with open(source(), encoding="utf-8") as file:
                write_text(sample, "".join(islice(file, 0, None, 8)))
            python(HERE / "tokenizer.py", "train", f"--input={sample}", f"--out={tokenizer}",
                   f"--vocab_size={vocab_size}")
        python(HERE / "prepare_text.py", f"--name={folder}/", f"--input={source()}",
               f"--tokenizer={tokenizer}", "--val_fraction=0.1")
    return f"--dataset={folder}/"


def base() -> str:
    """The option --init_from for a model with random weights, and the tokenizer of the text."""
    from checkpoint import save_best
    from model import GPT, GPTConfig
    from tokenizer import open_tokenizer
    dataset()
    tokenizer = open_tokenizer(Path(out, "data", "tokenizer.json"))
    model = GPT(GPTConfig(block_size, tokenizer.vocab_size, n_layer, n_head, n_embd))
    save_best(Path(out, "base"), model, tokenizer)
    return f"--init_from={out}/base/best"


def network() -> list[str]:
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size}
    return [f"--{name}={value}" for name, value in sizes.items()]


# ---- parts: the machine and its tests ----

def wait():
    """Until a GPU has done all that it was given."""
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work) -> float:
    """Mean seconds of some work that is repeated for a tenth of `seconds`."""
    for _ in range(3):
        work()
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() < start + seconds / 10:
        for _ in range(5):
            work()
        wait()
        count += 5
    return (time.perf_counter() - start) / count


def machine() -> dict:
    """Names and versions, and what the chip does at the most: a product and a copy."""
    import torch

    from device import Device
    env = Device(device, dtype)
    found = {"device": env.name(), "dtype": str(env.dtype), "torch": torch.__version__,
             "python": sys.version.split()[0], "cpus": os.cpu_count(),
             "peak_tflops": (env.peak_flops() or 0) / 1e12 or None}
    if env.type == "cuda":
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
                  "memory_gb": torch.cuda.get_device_properties(env.device).total_memory / 1e9}
    n = 8192 if env.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=env.device, dtype=env.dtype) for _ in range(2))
    return found | {"product_tflops": 2 * n**3 / timed(lambda: a @ a) / 1e12,
                    "copy_gb_per_s": 2 * a.nbytes / timed(lambda: b.copy_(a)) / 1e9}


def tests() -> dict:
    """What tests/test_gpu.py finds, on the chip itself."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "--tb=line", "-rfE",
                           HERE / "tests" / "test_gpu.py"], cwd=HERE, capture_output=True,
                          text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    if not re.search("passed|failed", lines[-1]):  # no test was run
        raise ValueError(lines[-1])
    return {"summary": lines[-1], "failed": [line for line in lines if line[:6] == "FAILED"]}


# ---- parts: steps ----

def trainer(who: str, B: int):
    """(forward and backward pass, update, Device, FLOPs of a token) of a network and optimizer."""
    import torch

    from device import Device
    from model import GPT, GPTConfig
    from optim import build_optimizer
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

    def micro():
        with env.autocast():
            loss = net(x, y)[1]
        env.scaler.scale(loss).backward()

    def update():
        env.update(optimizer, parameters, 1.0)
    return micro, update, env, flops


def step(who: str, B: int) -> dict:
    """Speed of micro-steps, and of whole steps with an update in each."""
    micro, update, env, flops = trainer(who, B)

    def whole():
        micro()
        update()
    start = time.perf_counter()
    whole()
    wait()
    first = time.perf_counter() - start
    step_s, micro_s = timed(whole), timed(micro)
    tokens, peak = B * block_size, env.peak_flops()
    return {"tokens_per_s": tokens / step_s, "micro_tokens_per_s": tokens / micro_s,
            "update_ms": 1e3 * (step_s - micro_s), "mfu": peak and flops * tokens / step_s / peak,
            "micro_mfu": peak and flops * tokens / micro_s / peak,
            "peak_gb": (env.peak_memory() or 0) / 1e9, "first_step_s": first}


def profile() -> dict:
    """The longest kernels of three steps, and how long the GPU has nothing to do."""
    import torch
    from torch.profiler import ProfilerActivity
    micro, update, env, _ = trainer("adamw", batch[0])
    gpu = env.type == "cuda"
    kinds = [ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]
    for _ in range(3):
        micro()
        update()
    with torch.profiler.profile(activities=kinds) as prof:
        start = time.perf_counter()
        for _ in range(3):
            micro()
            update()
        wait()
        wall = 1e6 * (time.perf_counter() - start)
    of = "self_device_time_total" if gpu else "self_cpu_time_total"
    events = sorted(prof.key_averages(), key=lambda event: -getattr(event, of))
    busy = sum(getattr(event, of) for event in events)
    return {"step_ms": wall / 3e3, "gaps": 1 - busy / wall, "kernels": [
        {"name": event.key[:90], "ms": getattr(event, of) / 3e3, "count": event.count / 3,
         "share": getattr(event, of) / busy} for event in events[:20]]}


def decoding(B: int) -> dict:
    """Tokens/s of greedy texts, by plain steps, by a CUDA graph, and that of fused kernels."""
    import torch

    import decode
    from device import Device
    from model import GPT, GPTConfig
    env, found = Device(device, dtype), {}
    idx = torch.randint(50257, (B, min(16, block_size // 2)), device=env.device)
    n = min(new, block_size - idx.size(1))
    for name, compile in {"plain": None, "fast": False, "compiled": True}.items():
        if compile and env.type != "cuda":
            continue
        model = GPT(GPTConfig(block_size, 50257, n_layer, n_head, n_embd)).eval()
        model = model.to(env.device, env.dtype)
        if compile is not None:
            decode.prepare(model, compile=compile)
        model.generate(idx, n, temperature=0)
        start, count = time.perf_counter(), 0
        while time.perf_counter() < start + seconds / 10:
            model.generate(idx, n, temperature=0).tolist()  # which waits for it
            count += B * n
        found[name] = count / (time.perf_counter() - start)
    return found


# ---- parts: whole runs ----

def records(count: int) -> list[dict]:
    with open(source(), encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, count)]


def results(folder: str, *names) -> dict:
    """Measures of a fine-tuning, and the seconds that its updates took."""
    found = json.loads(Path(out, folder, "results.json").read_text(encoding="utf-8"))
    return {name: found[name] for name in ("seconds", *names)}


def metrics(folder: str) -> list[dict]:
    text = Path(out, folder, "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def evaluation() -> dict:
    """Seconds of what a run does beside steps: its beginning (with a compilation), and, the second
    time, evaluation with the best model's saving, a sample, and a checkpoint."""
    lines = script("train.py", "evaluation", dataset(), *network(), f"--batch_size={batch[0]}",
                   "--max_steps=14", "--eval_interval=6")
    begun = when(lines, "training tokens; ")
    step_1, step_10, step_11, step_12, step_13 = (when(lines, f"step {n:5}/")
                                                  for n in (1, 10, 11, 12, 13))
    sample = when([line for line in lines if line[0] > step_12], "--- a sample")
    step_s = step_11 - step_10
    return {"begin_s": begun, "first_step_s": step_1 - begun, "step_s": step_s,
            "evaluation_s": step_12 - step_11 - step_s, "sample_s": sample - step_12,
            "saving_s": step_13 - sample - step_s}


def classification() -> dict:
    """Texts/s of finetune_cls.py, which tells from which of two packages a file is."""
    rows = records(4000)
    classes = [name for name, _ in Counter(row["package"] for row in rows).most_common(2)]
    texts = [json.dumps({"text": row["text"][:1000], "label": row["package"]})
             for row in rows if row["package"] in classes]
    write_text(Path(out, "texts.jsonl"), "\n".join(texts) + "\n")
    script("finetune_cls.py", "classification", base(), f"--train_file={out}/texts.jsonl",
           "--epochs=1", "--log_interval=20")
    return results("classification", "texts_per_s", "updates", "dev_accuracy")


def instruction() -> dict:
    """Answer tokens/s of finetune_instruct.py, which goes on with a file."""
    n = min(200, block_size // 4)  # bytes at the most, so that both fit the context
    parts = [(row["text"][:n], row["text"][n:2 * n]) for row in records(1000)]
    write_text(Path(out, "records.json"), json.dumps([
        {"instruction": "Go on.", "input": begin, "output": end} for begin, end in parts
        if end.strip() and f"{begin}{end}".isascii()]))
    script("finetune_instruct.py", "instruction", base(), f"--data={out}/records.json",
           "--epochs=1", "--max_new_tokens=32", "--num_answers=0", "--log_interval=20")
    return results("instruction", "tokens_per_s", "loss_before", "loss", "peak_memory_mb")


def race() -> dict:
    """Loss against seconds of config/tinystories_fast.py's recipe, in as many updates as `seconds`
    are enough for."""
    name = f"step-muon-{batch[-1]}"
    speed = kept().get(name) or json.loads(python(__file__, name, *sys.argv[2:])[-1][1])
    steps = max(4, int(seconds * speed["tokens_per_s"] / total_batch_tokens))
    script("train.py", "race", dataset(), *network(),
           f"--batch_size={batch[-1]}", f"--total_batch_tokens={total_batch_tokens}",
           f"--max_steps={steps}", f"--warmup_steps={min(20, steps // 4)}", "--sample_tokens=0",
           config="config/tinystories_fast.py")
    rows = metrics("race")
    curve = [(row["elapsed_s"], row["train_loss"]) for row in rows]
    return {"val_loss": rows[-1]["val_loss"], "seconds": curve[-1][0], "steps": steps,
            "curve": curve[::len(curve) // 50 + 1]}


def stop() -> dict:
    """SIGTERM after step 12 of a run, which then goes on: seconds, and losses around it."""
    signalled = []

    def end(process):
        process.send_signal(signal.SIGTERM)
        signalled.append(time.perf_counter())
    argv = [dataset(), *network(), f"--batch_size={batch[0]}", "--max_steps=20",
            "--eval_tokens=100000", "--sample_tokens=0", "--compile=False"]
    lines = script("train.py", "stop", *argv, at="step    12/", do=end)
    waited = time.perf_counter() - signalled[0]
    if not any("stopped by SIGTERM" in line for _, line in lines):
        raise ValueError("the run did not stop at SIGTERM")
    script("train.py", "stop", *argv, "--init_from=resume", "--overwrite=False")
    losses = {row["step"]: row["train_loss"] for row in metrics("stop")}
    return {"stopped_after_s": waited, "losses": [losses.get(n) for n in range(10, 21)]}


# ---- all of it ----

def contents() -> dict:
    """{name: function} of all parts, in the order of their worth."""
    found = {"machine": machine, "tests": tests}
    for B in batch:
        for who in ("adamw", "nanogpt", "muon"):
            found[f"step-{who}-{B}"] = partial(step, who, B)
    found["profile"] = profile
    found |= {f"decode-{B}": partial(decoding, B) for B in decode_batch}
    found |= {"data": dataset, "evaluation": evaluation, "classification": classification,
              "instruction": instruction, "race": race, "stop": stop}
    return {name: work for name, work in found.items() if peer or "nanogpt" not in name}


def kept() -> dict:
    """The results that are there."""
    path = Path(out, "results.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def show(value) -> str:
    """Numbers and names in a line, without lists."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{key} {entry:,.4g}" if isinstance(entry, float) else f"{key} {entry}"
                     for key, entry in value.items() if not isinstance(entry, list))


def main(*words):
    works = contents()
    if words:
        if unknown := {*words} - {*works}:
            raise ValueError(f"there is no part {min(unknown)}; parts: {', '.join(works)}")
        for name in words:
            print(json.dumps(works[name]()))
        return
    chosen = [name for name in works if not parts or name.startswith(tuple(parts))]
    if not chosen:
        raise ValueError(f"no part begins with {parts}; parts: {', '.join(works)}")
    for name in chosen:
        if name not in kept():
            measure(name)


def measure(name: str):
    """A part in a process of its own, with its own memory, and its result in results.json."""
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, __file__, name, *sys.argv[1:]], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0) as child:
        try:
            text, errors = child.communicate(timeout=limit)
        except BaseException as e:
            os.killpg(child.pid, signal.SIGKILL)  # with the runs that it has started
            if not isinstance(e, subprocess.TimeoutExpired):
                raise
            text, errors = "", f"it was ended after {limit} seconds"
    head = f"{name:16}{time.perf_counter() - start:6.1f} s  "
    if child.returncode:
        print(f"{head}failed: {(errors.strip() or '-').splitlines()[-1]}", flush=True)
        return
    value = json.loads(text.splitlines()[-1])
    write_text(Path(out, "results.json"), json.dumps(kept() | {name: value}, indent=1) + "\n")
    print(f"{head}{show(value)}", flush=True)


if __name__ == "__main__":
    run_script(main, globals(), positionals=True)
