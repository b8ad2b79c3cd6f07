"""How fast this machine decodes and loads, beside transformers and nanoGPT, in turn in one run.

    python bench.py decode
    python bench.py decode --new 64 256 --batch 1 8 --peer=../nanoGPT --repeats=5
    python bench.py load --preset=gpt2-xl
"""

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import Device
from configurator import run
from decode import prepare
from model import GPT, PRESETS

preset = "gpt2"  # gpt2, gpt2-medium, gpt2-large or gpt2-xl, with random weights
prompt = 16  # tokens of the prompt
new = [64, 256, 960]  # tokens decoded behind it: a row for each
batch = [1, 8, 64]  # prompts decoded together: a row for each
kinds = ["float32", "bfloat16", "int8"]  # of our weights
peer: str | None = None  # folder of a nanoGPT checkout
repeats = 3  # of each measurement, in turn; the median counts
max_seconds = 60.0  # what would take longer is left out, what would three times over runs once
device = "auto"  # cpu, cuda, cuda:1, mps
compile = False  # decode: also fuse the kernels of a GPU's one-token step


def matvec_rate(model, M: int) -> float:
    """Passes a second of one-token products alone: x (M, in) through every weight once."""
    weights = [p for name, p in model.named_parameters() if p.dim() == 2 and "wpe" not in name]
    x = {w.size(1): torch.randn(M, w.size(1), device=w.device, dtype=w.dtype) for w in weights}

    def products():
        for w in weights:
            F.linear(x[w.size(1)], w)
    return 1 / median_seconds(products, 9)


def read_rate(device) -> float:
    """Bytes a second of reading memory that no cache holds."""
    x = torch.ones(2**27, device=device)
    return x.numel() * 4 / median_seconds(x.sum, 7)


def timed(work, *args) -> float:
    """Seconds that work(*args) takes, the GPU's part of it included."""
    synchronize()
    start = time.perf_counter()
    work(*args)
    synchronize()
    return time.perf_counter() - start


def median_seconds(work, times: int) -> float:
    work()
    return statistics.median(timed(work) for _ in range(times))


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def resident_mb() -> float:
    """Resident memory of this process in MB; of the GPU where one is used."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e6
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def load_peer():
    """The `model` module of the nanoGPT checkout that `peer` names; ValueError if there is none."""
    file = Path(peer) / "model.py"
    if not file.is_file():
        raise ValueError(f"peer={peer} holds no model.py; expected a nanoGPT checkout")
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


def decoders(env) -> dict:
    """{name: (function(idx, n) that decodes n tokens greedily, bytes of a weight, MB it added)};
    all of ours start from the same weights."""
    torch.manual_seed(0)
    config, found = PRESETS[preset], {}
    weights = GPT(config).state_dict()

    def add(name, width, build):
        before = resident_mb()
        found[name] = build(), width, resident_mb() - before

    def ours(kind, fast=True):
        model = GPT(config)
        model.load_state_dict(weights)
        model.to(env.device, torch.bfloat16 if kind == "bfloat16" else torch.float32).eval()
        if fast:
            prepare(model, "int8" if kind == "int8" else None, compile)
        return lambda idx, n: model.generate(idx, n, temperature=0)

    widths = {"float32": 4, "bfloat16": 2, "int8": 1}
    for kind in kinds:
        if kind not in widths:
            raise ValueError(f"kinds: {kind!r} is unknown: {', '.join(widths)}")
        add(f"ours {kind}", widths[kind], lambda kind=kind: ours(kind))
    add("ours, unprepared", 4, lambda: ours("float32", fast=False))
    try:
        import transformers
        transformers.logging.set_verbosity_error()

        def theirs():
            hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
                n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)).to(env.device)
            return lambda idx, n: hf.eval().generate(
                idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, min_new_tokens=n,
                do_sample=False, pad_token_id=0)
        add("transformers", 4, theirs)
    except ImportError:
        print("transformers is not installed: no row for it (pip install transformers)")
    if peer:
        module = load_peer()

        def nano():
            model = module.GPT(module.GPTConfig(
                n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, bias=True,
                vocab_size=config.vocab_size)).to(env.device).eval()
            return lambda idx, n: model.generate(idx, n, top_k=1)
        add("nanoGPT", 4, nano)
    return found


def decode():
    env = Device(device, "float32")
    config = PRESETS[preset]
    longest = config.block_size - prompt
    if not all(0 < n <= longest for n in new) or not all(B > 0 for B in batch):
        raise ValueError(f"new must be in 1 … {longest} and batch at least 1, got {new} and {batch}")
    models = decoders(env)
    plain = GPT(config).to(env.device)
    weights = plain.num_params() - plain.transformer.wpe.weight.numel()
    rates = {M: matvec_rate(plain, M) for M in batch}
    reads = read_rate(env.device)
    del plain
    print(f"{preset}, {env.name()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"median of {repeats}, in turn")
    print("products: every weight once through F.linear in float32: " + ", ".join(
        f"B={M} {rate * M:.1f} tok/s" for M, rate in rates.items()))
    print(f"reads: {reads / 1e9:.1f} GB/s, which is " + ", ".join(
        f"{reads / weights / width:.0f} passes a second through {name} weights"
        for name, width in (("float32", 4), ("bfloat16", 2), ("int8", 1))))
    print(f"\n{'B':>3} {'tokens':>7}  {'decoder':17}{'MB':>6}{'tok/s':>8}{'of products':>13}"
          f"{'of reads':>10}{'x transformers':>16}")
    for B in batch:
        for n in new:
            idx = torch.randint(config.vocab_size, (B, prompt), device=env.device,
                                generator=torch.Generator(env.device).manual_seed(0))
            turns, seconds = {}, {name: [] for name in models}
            for name, (work, _, _) in models.items():
                work(idx, min(8, n))  # warms up, and tells what the whole would take
                estimate = timed(work, idx, min(8, n)) * n / min(8, n)
                turns[name] = (0 if estimate > max_seconds else
                               1 if estimate * repeats > max_seconds else repeats)
            for turn in tqdm(range(repeats), desc=f"B={B} n={n}", leave=False, disable=None):
                for name, (work, _, _) in models.items():
                    if turn < turns[name]:
                        seconds[name].append(timed(work, idx, n))
            speed = {name: B * n / statistics.median(s) for name, s in seconds.items() if s}
            for name, (_, width, mb) in models.items():
                row = f"{B:3} {f'{prompt}+{n}':>7}  {name:17}{mb:6,.0f}"
                if name not in speed:
                    print(f"{row}   over {max_seconds:.0f} s, left out")
                    continue
                rate = speed[name]
                beside = (f"{rate / speed['transformers']:16.2f}" if "transformers" in speed
                          else f"{'-':>16}")
                print(f"{row}{rate:8.1f}{rate / rates[B] / B:13.2f}"
                      f"{rate / B * weights * width / reads:10.2f}{beside}", flush=True)


LOAD = """
import sys, threading, time, warnings
warnings.simplefilter("ignore")
if sys.argv[1] == "ours":
    from model import GPT as Model
else:
    from transformers import GPT2LMHeadModel as Model
    from transformers.utils import logging
    logging.disable_progress_bar()
def anonymous():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("RssAnon")) / 1e3
peak, base, done = 0, anonymous(), False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
model = Model.from_pretrained(sys.argv[2])
total = sum(p.sum().item() for p in model.parameters())  # every weight is there, not only promised
seconds = time.perf_counter() - start
done = True
thread.join()
print(seconds, peak - base, total)
"""


def load():
    """Loads one saved model in fresh processes, ours and transformers' in turn."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = GPT(PRESETS[preset])
        model.save_pretrained(folder)
        size = model.num_params() * 4 / 1e6
        del model
        found = {"ours": [], "transformers": []}
        for _ in range(repeats + 1):
            for name, measured in found.items():
                out = subprocess.run(
                    [sys.executable, "-c", LOAD, name, folder], cwd=Path(__file__).parent,
                    capture_output=True, text=True, check=False,
                    env=os.environ | {"HF_HUB_OFFLINE": "1"})
                if out.returncode:
                    raise ValueError(f"{name} failed: {out.stderr.strip().splitlines()[-1]}")
                measured.append([float(x) for x in out.stdout.split()])
    print(f"{preset}, {size:,.0f} MB in float32, from the page cache; median of {repeats}, in turn\n"
          f"{'':14}{'seconds':>9}{'peak MB':>10}{'of its size':>13}")
    for name, measured in found.items():
        seconds, peak, _ = (statistics.median(column) for column in zip(*measured[1:]))
        print(f"{name:14}{seconds:9.2f}{peak:10,.0f}{peak / size:13.2f}")


def main(command):
    warnings.simplefilter("ignore")
    if repeats < 1 or prompt < 1:
        raise ValueError(f"repeats and prompt must be at least 1, got {repeats} and {prompt}")
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is unknown: {', '.join(PRESETS)}")
    {"decode": decode, "load": load}[command]()


if __name__ == "__main__":
    run(main, globals(), commands=("decode", "load"))
