"""How fast this machine trains, decodes and loads, beside transformers and nanoGPT, in turn.

    python bench.py train --peer=../nanoGPT                # a training step of GPT-2 124M
    python bench.py train --batch_size=1 --block_size=1024 --kinds float32 bfloat16
    python bench.py growth                                 # a step's time against T, B, layers, V
    python bench.py race --dataset=ts --peer=../nanoGPT    # seconds to a validation loss
    python bench.py instruct --data=FILE                   # LoRA, beside transformers and PEFT
    python bench.py decode --new 64 256 --batch 1 8 --peer=../nanoGPT --repeats=5
    python bench.py load --preset=gpt2-xl
"""

import contextlib
import importlib.util
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import Device, Metrics, figure, keep_freed_memory, read_settings
from configurator import run
from data import Split, WindowOrder, data_folder, fill_template, read_table
from decode import prepare
from model import GPT, PRESETS, GPTConfig
from ops import linear
from optim import build_optimizer
from tokenizer import open_tokenizer

peer: str | None = None  # folder of a nanoGPT checkout
repeats = 3  # of each measurement, in turn; the median counts
device = "auto"  # cpu, cuda, cuda:1, mps
preset = "gpt2"  # gpt2, gpt2-medium, gpt2-large or gpt2-xl, with random weights
kinds = ["float32", "bfloat16", "int8"]  # decode: of our weights; train: of autocast (no int8)
compile: bool | None = None  # train: torch.compile, None: on GPUs; decode: of a GPU's step, None: no
# train
batch_size = 4  # sequences of a step
block_size = 256
steps = 3  # measured in each repeat, after one that warms up
optimizer = "adamw"  # ours: adamw or muon
# race
dataset: str | None = None  # data/NAME of prepare_text.py with characters; the peer has the same text
target = 1.898  # loss over the whole validation split
seeds = [1, 2, 3]
race_config = "config/race.py"
png = "race.png"  # loss against seconds
# instruct
data: str | None = None  # records, as finetune_instruct.py reads them
init_from = "weights"
# decode
prompt = 16  # tokens of the prompt
new = [64, 256, 960]  # tokens decoded behind it: a row for each
batch = [1, 8, 64]  # prompts decoded together: a row for each
max_seconds = 60.0  # what would take longer is left out, what would three times over runs once

HERE = Path(__file__).resolve().parent
COMMANDS = "train", "growth", "race", "instruct", "decode", "load", "step"


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
    for kind in (torch.cuda, torch.mps):
        if kind.is_available():
            kind.synchronize()


def weights_mb(model) -> float:
    """MB of all tensors that a model holds, whatever their layout; shared ones count once."""
    held = {id(t): t.numel() * t.element_size() for module in model.modules()
            for t in (*vars(module).values(), *module._parameters.values(),
                      *module._buffers.values()) if isinstance(t, torch.Tensor)}
    return sum(held.values()) / 1e6


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


def another(who: str, env):
    """The preset's network as transformers or nanoGPT builds it, without dropout."""
    c = PRESETS[preset]
    sizes = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd}
    if who == "nanoGPT":
        module, padded = load_peer(), -(-c.vocab_size // 64) * 64  # 50,304, its own default
        return module.GPT(module.GPTConfig(bias=True, vocab_size=padded, **sizes)).to(env.device)
    import transformers
    transformers.logging.set_verbosity_error()
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes)).to(env.device)


def decoders(env) -> dict:
    """{name: (function(idx, n) that decodes n tokens greedily, bytes of a weight, MB of weights)};
    all of ours start from the same weights."""
    torch.manual_seed(0)
    config, found = PRESETS[preset], {}
    weights = GPT(config).state_dict()

    def add(name, width, model, work):
        found[name] = work, width, weights_mb(model)

    def ours(kind, fast=True):
        model = GPT(config)
        model.load_state_dict(weights)
        model.to(env.device, torch.bfloat16 if kind == "bfloat16" else torch.float32).eval()
        if fast:
            prepare(model, "int8" if kind == "int8" else None, bool(compile))
        return model, lambda idx, n: model.generate(idx, n, temperature=0)

    widths = {"float32": 4, "bfloat16": 2, "int8": 1}
    for kind in kinds:
        if kind not in widths:
            raise ValueError(f"kinds: {kind!r} is unknown: {', '.join(widths)}")
        if kind == "int8" and env.type != "cpu":
            print("int8 weights are for CPUs: no row for them on this device")
            continue
        add(f"ours {kind}", widths[kind], *ours(kind))
    add("ours, unprepared", 4, *ours("float32", fast=False))
    try:
        hf = another("transformers", env)
        add("transformers", 4, hf, lambda idx, n: hf.eval().generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, min_new_tokens=n,
            do_sample=False, pad_token_id=0))
    except ImportError:
        print("transformers is not installed: no row for it (pip install transformers)")
    if peer:
        nano = another("nanoGPT", env).eval()
        add("nanoGPT", 4, nano, lambda idx, n: nano.generate(idx, n, top_k=1))
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
import os, sys, threading, time, warnings
os.environ["HF_HUB_OFFLINE"] = "1"
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
                text = script("-c", LOAD, name, folder, who=name)
                measured.append([float(x) for x in text.split()])
    print(f"{preset}, {size:,.0f} MB in float32, from the page cache; median of {repeats}, in turn\n"
          f"{'':14}{'seconds':>9}{'peak MB':>10}{'of its size':>13}")
    for name, measured in found.items():
        seconds, peak, _ = (statistics.median(column) for column in zip(*measured[1:]))
        print(f"{name:14}{seconds:9.2f}{peak:10,.0f}{peak / size:13.2f}")


# ---- training steps ----

def matmul_rate(env) -> float:
    """FLOP/s of a product of two square matrices, large enough for the device, in the dtype of env."""
    n = 8192 if env.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=env.device, dtype=env.dtype) for _ in range(2))
    return 2 * n**3 / median_seconds(lambda: linear(a, b), 9)


def trainee(who: str, env):
    """(model, loss(x, y), optimizer) of ours, transformers or nanoGPT, as each one's users train."""
    torch.manual_seed(0)
    model = GPT(PRESETS[preset]).to(env.device) if who == "ours" else another(who, env).train()
    if who == "transformers":
        update = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
        # they shift the labels themselves: y behind the first token of x
        return model, lambda x, y: model(
            x, labels=torch.cat([x[:, :1], y[:, :-1]], 1)).loss, update
    update = (build_optimizer(model, optimizer, 6e-4, 0.1, (0.9, 0.95)) if who == "ours" else
              model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), env.type))
    net = torch.compile(model) if compile or compile is None and env.type == "cuda" else model
    return model, lambda x, y: net(x, y)[1], update


def measure_steps(who: str, kind: str):
    """Runs training steps of one of them and prints their times, as JSON: `train` calls this in a
    process of its own, so that its peak memory is its own too."""
    env = Device(device, kind)
    if who == "ours" and env.type == "cpu":
        keep_freed_memory()  # as train.py does; the others are measured as they are used
    with contextlib.redirect_stdout(sys.stderr):
        model, loss_of, update = trainee(who, env)
    V, B, T = PRESETS[preset].vocab_size, batch_size, block_size
    with tempfile.TemporaryDirectory() as folder:
        np.random.default_rng(0).integers(V, size=2**20, dtype=np.uint16).tofile(f"{folder}/t.bin")
        split = Split([f"{folder}/t.bin"], "<u2", V)
        order = WindowOrder(split.tokens, T, 0)
        parts = []
        for step in range(steps + 1):
            at = [time.perf_counter()]

            def lap(at=at):
                synchronize()
                at.append(time.perf_counter())
            ids = torch.from_numpy(split.rows(order(step * B, B), T + 1)).to(env.device)
            lap()
            with env.autocast():
                loss = loss_of(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            lap()
            loss.backward()
            lap()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            update.step()
            update.zero_grad(set_to_none=True)
            lap()
            parts.append([b - a for a, b in itertools.pairwise(at)])
    print(json.dumps({"parts": parts[1:], "peak": (env.peak_memory() or 0) / 1e9}))


def train_step():
    autocast = [kind for kind in kinds if kind != "int8"]
    if not autocast:
        raise ValueError(f"kinds={kinds} has nothing to train in: float32, bfloat16 or float16")
    names = ["ours"] + ["transformers"] * bool(importlib.util.find_spec("transformers")) + [
        "nanoGPT"] * bool(peer)
    if peer:
        load_peer()
    found = {(who, kind): [] for kind in autocast for who in names}
    words = [f"--{name}={globals()[name]}" for name in (
        "peer", "device", "preset", "compile", "batch_size", "block_size", "steps", "optimizer")
        if globals()[name] is not None]
    for _ in tqdm(range(repeats), desc="repeats", disable=None):
        for (who, kind), measured in found.items():
            measured.append(json.loads(script(
                HERE / "bench.py", "step", who, kind, *words, cwd=None, who=who)))
    model = GPT(PRESETS[preset])
    env = Device(device, autocast[0])
    print(f"{preset}, {env.name()}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
          f"steps of {batch_size} x {block_size} tokens, median of {repeats} x {steps}, in turn")
    per_token = model.flops_per_token(block_size)
    for kind in autocast:
        rate = env.peak_flops() if env.type == "cuda" else None
        rate = rate or matmul_rate(Device(device, kind))
        print(f"\n{kind}; 1.00 of peak is {rate / 1e12:.3f} TFLOP/s"
              f"\n{'':13}{'tok/s':>9}{'of peak':>9}{'peak GB':>9}{'data':>9}{'forward':>9}"
              f"{'backward':>9}{'update':>9}{'x ours':>8}")
        speed = {}
        for who in names:
            runs = found[who, kind]
            parts = [statistics.median(column) for column in zip(
                *(step for run in runs for step in run["parts"]))]
            total = statistics.median(sum(step) for run in runs for step in run["parts"])
            speed[who] = batch_size * block_size / total
            peak = statistics.median(run["peak"] for run in runs)
            print(f"{who:13}{speed[who]:9,.0f}{speed[who] * per_token / rate:9.2f}{peak:9.2f}"
                  + "".join(f"{1e3 * part:7.1f}ms" for part in parts)
                  + f"{speed[who] / speed['ours']:8.2f}")


def growth():
    """Step time of a small network as one size at a time grows."""
    env = Device(device, kinds[0])
    if env.type == "cpu":
        keep_freed_memory()
    rate = matmul_rate(env)
    base = {"T": 256, "B": 8, "layers": 4, "vocabulary": 4096, "width": 192}
    print(f"{env.name()}, {torch.get_num_threads()} threads, {kinds[0]}, 1.00 of peak is "
          f"{rate / 1e12:.3f} TFLOP/s; else {base}\n{'':11}{'':>8}{'ms a step':>11}{'tok/s':>9}"
          f"{'of peak':>9}")
    for name, values in (("T", (64, 128, 256, 512, 1024)), ("B", (1, 2, 4, 8, 16, 32)),
                         ("layers", (2, 4, 8, 16)), ("vocabulary", (256, 4096, 16384, 50257)),
                         ("width", (96, 192, 384, 768))):
        for value in values:
            size = base | {name: value}
            torch.manual_seed(0)
            model = GPT(GPTConfig(size["T"], size["vocabulary"], size["layers"], size["width"] // 32,
                                  size["width"])).to(env.device)
            update = build_optimizer(model, optimizer, 6e-4, 0.1, (0.9, 0.95))
            x = torch.randint(size["vocabulary"], (size["B"], size["T"]), device=env.device)

            def step(model=model, update=update, x=x):
                with env.autocast():
                    loss = model(x, x)[1]
                loss.backward()
                env.update(update, model.parameters(), 1.0)
            seconds = median_seconds(step, 5 * repeats)
            speed = x.numel() / seconds
            print(f"{name:11}{value:8,}{1e3 * seconds:11.1f}{speed:9,.0f}"
                  f"{speed * model.flops_per_token(size['T']) / rate:9.2f}", flush=True)


# ---- a race to a validation loss ----

NANOGPT_RACE = """
import runpy, sys, torch
seed, start = int(sys.argv.pop(1)), torch.manual_seed
torch.manual_seed = lambda s: start(s + seed)  # its own seed cannot be set
runpy.run_path("train.py", run_name="__main__")
"""


def script(*words, cwd=HERE, who=None) -> str:
    """Output of a Python command; ValueError with its last line if it fails."""
    out = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True,
                         check=False)
    if out.returncode:
        last = (out.stderr.strip() or "-").splitlines()[-1]
        raise ValueError(f"{who or words[0]} failed: {last}")
    return out.stdout


def race_nanogpt(seed: int, folder: Path):
    """(seconds, loss) points of the README recipe's training loss, and its loss at the end over the
    whole validation split. Seconds are those of its steps, without evaluation."""
    text = script(
        "-c", NANOGPT_RACE, seed, "config/train_shakespeare_char.py", "--device=cpu",
        "--compile=False", "--eval_interval=2000", "--eval_iters=1", "--log_interval=1",
        "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128",
        "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0",
        "--always_save_checkpoint=True", f"--out_dir={folder.resolve()}", cwd=peer)
    steps = [(float(loss), float(ms) / 1e3) for loss, ms in
             re.findall(r"iter \d+: loss ([\d.]+), time ([\d.]+)ms", text)]
    usual = statistics.median(seconds for _, seconds in steps)
    seconds = np.cumsum([min(s, usual) if i in (0, 2000) else s for i, (_, s) in enumerate(steps)])
    script("convert.py", f"--input={folder}/ckpt.pt", f"--out={folder}/hf",
           f"--tokenizer={Path(peer).resolve()}/data/shakespeare_char/meta.pkl")
    text = script("train.py", "--eval_only", f"--init_from={folder}/hf", f"--dataset={dataset}",
                  "--block_size=64", "--device=cpu")
    return (list(zip(seconds, (loss for loss, _ in steps))),
            float(re.search(r"loss ([\d.]+)", text)[1]))


def race_ours(seed: int, folder: Path):
    script("train.py", race_config, f"--dataset={dataset}", f"--seed={seed}", f"--out_dir={folder}",
           "--device=cpu")
    rows = Metrics.read(folder / "metrics.jsonl")
    return [(row["elapsed_s"], row["train_loss"]) for row in rows], rows[-1]["val_loss"]


def race():
    if not peer or not dataset:
        raise ValueError("a race needs --peer=FOLDER of a nanoGPT checkout with its "
                         "data/shakespeare_char prepared, and --dataset=NAME of the same text")
    sizes = [data_folder(dataset) / "val_00000.bin", Path(peer) / "data/shakespeare_char/val.bin"]
    for file in sizes:
        if not file.is_file():
            raise ValueError(f"{file} is missing: prepare that data set first")
    tokens = [file.stat().st_size // width for file, width in zip(sizes, (1, 2))]
    if tokens[0] != tokens[1]:
        raise ValueError(f"not the same text: {sizes[0]} has {tokens[0]} tokens, {sizes[1]} "
                         f"{tokens[1]}")
    print(f"loss over the whole validation split, target {target}; cpu, {torch.get_num_threads()} "
          f"threads\nseed {'':8}seconds     loss  reached   ratio")
    ratios = []
    with tempfile.TemporaryDirectory() as folder, figure(png) as ax:
        for seed in tqdm(seeds, desc="seeds", disable=None):
            seconds = {}
            for who, racer, colour in (("nanoGPT", race_nanogpt, "tab:orange"),
                                       ("ours", race_ours, "tab:blue")):
                points, loss = racer(seed, Path(folder) / f"{who}{seed}")
                seconds[who] = points[-1][0]
                x, y = np.array(points).T
                width = max(1, len(y) // 50)
                smooth = np.convolve(y, np.ones(width) / width, "valid")
                ax.plot(x[width - 1:], smooth, color=colour, lw=0.8, alpha=0.7)
                ax.plot(x[-1], loss, "o", color=colour, label=who if seed == seeds[0] else None)
                ratio = f"{seconds['nanoGPT'] / seconds[who]:8.2f}"
                print(f"{seed:4} {who:8}{seconds[who]:7.1f}{loss:9.4f}"
                      f"{'yes' if loss <= target else 'no':>9}{ratio}", flush=True)
            ratios.append(seconds["nanoGPT"] / seconds["ours"])
        ax.axhline(target, color="gray", lw=0.8, ls="--")
        ax.set(xlabel="seconds of training", ylabel="loss (nats a character)", ylim=(1.2, 3.2),
               title="training loss (lines), whole validation split at the end (dots)")
        ax.legend(frameon=False)
    print(f"median ratio {statistics.median(ratios):.2f}; picture: {png}")


# ---- fine-tuning ----

PEFT_LOOP = """
import json, random, sys, time, torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2LMHeadModel
from common import Device
rows, env = json.load(open(sys.argv[1])), Device(sys.argv[3], "float32")
body = GPT2LMHeadModel.from_pretrained(sys.argv[2]).float()  # else it keeps the dtype of the file
model = get_peft_model(body, LoraConfig(
    r=16, lora_alpha=32, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True,
    task_type="CAUSAL_LM")).to(env.device).train()
update = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
random.Random(0).shuffle(rows)
start = time.perf_counter()
for i in range(0, len(rows), 8):
    batch = rows[i:i + 8]
    T = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids = torch.tensor([p + a + [0] * (T - len(p + a)) for p, a in batch])
    mask = torch.tensor([[1] * len(p + a) + [0] * (T - len(p + a)) for p, a in batch])
    labels = torch.tensor([[-100] * len(p) + a + [-100] * (T - len(p + a)) for p, a in batch])
    model(input_ids=ids.to(env.device), attention_mask=mask.to(env.device),
          labels=labels.to(env.device)).loss.backward()
    update.step()
    update.zero_grad()
seconds = time.perf_counter() - start
print(json.dumps([sum(len(answer) for _, answer in rows) / seconds, (env.peak_memory() or 0) / 1e6]))
"""


def instruct():
    """An epoch of instruction records with adapters of rank 16 that start at random, 8 records an
    update: by finetune_instruct.py, and by a loop of transformers and PEFT that pads batches."""
    if not data or not Path(data).is_file():
        raise ValueError("give records as finetune_instruct.py reads them: --data=FILE"
                         + f"; {data} is none" * bool(data))
    found, body = {"ours": [], "PEFT": []}, Path(init_from)
    with tempfile.TemporaryDirectory() as folder:
        best, rows = Path(folder, "run/best"), []
        for turn in tqdm(range(repeats), desc="repeats", disable=None):
            script("finetune_instruct.py", f"--data={Path(data).resolve()}", f"--device={device}",
                   f"--init_from={body.resolve() if body.is_dir() else body}", "--epochs=1",
                   f"--out_dir={folder}/run", "--dtype=float32", "--mode=lora", "--lora_align=0",
                   "--max_new_tokens=1", "--num_answers=0")
            result = json.loads(Path(folder, "run/results.json").read_text())
            found["ours"].append((result["tokens_per_s"], result["peak_memory_mb"]))
            if turn == 0:
                tokenizer, form = open_tokenizer(best), (best / "template.txt").read_text().rstrip()
                for row in read_table(data):
                    prompt = "".join(fill_template(form, row["instruction"], row.get("input") or ""))
                    rows.append((tokenizer.encode(prompt).tolist(),
                                 [*tokenizer.encode(row["output"]).tolist(), tokenizer.eos_id]))
                Path(folder, "rows.json").write_text(json.dumps(rows))
                base = json.loads(Path(folder, "run/adapter/adapter_config.json").read_text())
            found["PEFT"].append(json.loads(script(
                "-c", PEFT_LOOP, f"{folder}/rows.json", base["base_model_name_or_path"], device)))
    print(f"{init_from}, LoRA of rank 16, 8 of {len(rows):,} records an update, float32, "
          f"{torch.get_num_threads()} threads; median of {repeats}, in turn\n"
          f"{'':6}{'answer tokens/s':>17}{'peak MB':>9}{'x PEFT':>8}")
    median = {who: [statistics.median(column) for column in zip(*runs)] for who, runs in found.items()}
    for who, (rate, peak) in median.items():
        print(f"{who:6}{rate:17,.0f}{peak:9,.0f}{rate / median['PEFT'][0]:8.2f}")


def main(command, *words):
    warnings.simplefilter("ignore")
    if command == "step" and len(words) != 2:
        raise ValueError("step WHO KIND is what bench.py train runs")
    if command != "step" and words:
        raise ValueError(f"unexpected word {words[0]!r}; a setting is written --key=value")
    read_settings(globals(), ("repeats", "prompt", "batch_size", "block_size", "steps"),
                  {"preset": tuple(PRESETS)})
    if block_size > PRESETS[preset].block_size:
        raise ValueError(f"block_size must be at most {PRESETS[preset].block_size}, got {block_size}")
    {"train": train_step, "growth": growth, "race": race, "instruct": instruct, "decode": decode, "load": load,
     "step": measure_steps}[command](*words)


if __name__ == "__main__":
    run(main, globals(), commands=COMMANDS, positionals=True)
