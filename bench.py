"""How fast this machine trains and decodes, beside transformers and nanoGPT, in turn.

    python bench.py train --peer=../nanoGPT                # a training step of GPT-2 124M
    python bench.py train --batch_size=1 --block_size=1024 --kinds float32 bfloat16
    python bench.py race --dataset=ts --peer=../nanoGPT    # seconds to a validation loss
    python bench.py instruct --data=FILE                   # LoRA, beside transformers and PEFT
    python bench.py decode --new 64 256 --batch 1 8 --peer=../nanoGPT --repeats=5
"""

import contextlib
import importlib.util
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from configurator import run as run_script
from data import Data
from decode import PackedLinear, packs, prepare
from device import Device, keep_freed_memory, read_settings
from files import HERE
from model import GPT, PRESETS
from optim import build_optimizer
from run import Metrics, figure
from text import instruction_record, prompt_ids, read_table
from tokenizer import open_tokenizer

peer: str | None = None  # folder of a nanoGPT checkout
repeats = 3  # of each measurement, in turn; the median counts
device = "auto"  # cpu, cuda, cuda:1, mps
preset = "gpt2"  # gpt2, gpt2-medium, gpt2-large or gpt2-xl, with random weights
kinds = ["float32", "bfloat16", "int8"]  # decode: of our weights; train: of autocast (no int8)
compile: bool | None = None  # train: torch.compile, None: on GPUs; decode: of GPU steps, None: no
# train
batch_size = 4  # sequences of a step
block_size = 256
steps = 3  # measured in each repeat, after one that warms up
optimizer = "adamw"  # ours: adamw or muon
# race
dataset: str | None = None  # data/NAME with characters of the text that the peer has, too
target = 1.898  # loss over the whole validation split
seeds = [1, 2, 3]
race_config = "config/race.py"
png = "race.png"  # loss against seconds
# instruct
data: str | None = None  # records, as finetune_instruct.py reads them
init_from = "weights"
# decode
prompt = 16  # tokens of the prompt
new = [64, 256]  # tokens decoded after it: a row for each
batch = [1, 8]  # prompts decoded together: a row for each

KINDS = ("float32", "bfloat16", "float16", "int8")


# ---- clocks and processes ----

def now() -> float:
    """Seconds of a clock, read when a GPU has done all that it was given."""
    for kind in (torch.cuda, torch.mps):
        if kind.is_available():
            kind.synchronize()
    return time.perf_counter()


def timed(work, *args) -> float:
    """Seconds that work(*args) takes, the GPU's part of it included."""
    start = now()
    work(*args)
    return now() - start


def median_seconds(work) -> float:
    work()
    return statistics.median(timed(work) for _ in range(9))


def in_turn(contestants: dict) -> dict:
    """{name: array (repeats, ...) of what its function returned}."""
    found = {name: [] for name in contestants}
    for _ in tqdm(range(repeats), desc="repeats", leave=False, disable=None):
        for name, work in contestants.items():
            found[name].append(work())
    return {name: np.array(values) for name, values in found.items()}


def script(*words, cwd=HERE) -> str:
    """Output of a Python command; ValueError with its last line if it fails."""
    out = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True,
                         text=True, check=False)
    if out.returncode:
        last = (out.stderr.strip() or "-").splitlines()[-1]
        raise ValueError(f"{words[0]} failed: {last}")
    return out.stdout


def child(*words) -> list:
    """What a command of this script returns in a process of its own, with its own memory."""
    settings = [f"--{name}={value}" for name, value in read_settings(globals(), ()).items()
                if value is not None]
    return json.loads(script(HERE / "bench.py", *words, *settings, cwd=None))


def describe(env) -> str:
    units = (f"cuDNN {torch.backends.cudnn.version()}" if env.type == "cuda" else
             torch.backends.cpu.get_cpu_capability())
    return (f"{preset}, {env.name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
            f", {units}; median of {repeats}, in turn")


# ---- the networks ----

def load_peer():
    """The `model` module of the nanoGPT checkout that `peer` names."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(peer) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


def others() -> list[str]:
    """What is here to be measured beside ours."""
    names = ["transformers"] if importlib.util.find_spec("transformers") else []
    return [*names, "nanoGPT"] if peer else names


def build(who: str, env):
    """The preset's network as `ours`, `transformers` or `nanoGPT` build it, without dropout."""
    torch.manual_seed(0)
    c = PRESETS[preset]
    sizes = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd}
    if who == "ours":
        return GPT(c).to(env.device)
    if who == "nanoGPT":
        module = load_peer()
        return module.GPT(module.GPTConfig(**sizes)).to(env.device)  # its vocabulary: 50,304
    import transformers
    transformers.logging.set_verbosity_error()
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes)).to(env.device)


# ---- training steps ----

def train():
    """A table of training steps, each network measured in processes of its own."""
    autocast = [kind for kind in kinds if kind != "int8"]
    if not autocast:
        raise ValueError(f"kinds={kinds} has nothing to train in: float32, bfloat16 or float16")
    names = ["ours", *others()]
    found = in_turn({(who, kind): partial(child, "step", who, kind)
                     for kind in autocast for who in names})  # (repeats, steps, 4)
    print(f"{describe(Device(device))}: {steps} steps of {batch_size} x {block_size} tokens each")
    flops = GPT(PRESETS[preset]).flops_per_token(block_size)
    for kind in autocast:
        env = Device(device, kind)
        peak = env.peak_flops() or matmul_rate(env)
        print(f"\n{kind}; 1.00 of peak is {peak / 1e12:.3f} TFLOP/s"
              f"\n{'':13}{'tok/s':>9}{'of peak':>9}{'peak GB':>9}{'forward':>9}{'backward':>9}"
              f"{'update':>9}{'x ours':>8}")
        speed = {}
        for who in names:
            *parts, memory = np.median(found[who, kind], (0, 1))
            seconds = np.median(found[who, kind][..., :3].sum(-1))  # of a step
            speed[who] = batch_size * block_size / seconds
            columns = "".join(f"{1e3 * part:7.0f}ms" for part in parts)
            print(f"{who:13}{speed[who]:9,.0f}{speed[who] * flops / peak:9.2f}{memory:9.2f}"
                  f"{columns}{speed[who] / speed['ours']:8.2f}")


def step(who: str, kind: str) -> list:
    """[seconds forward, backward, of the update, peak of memory in GB] of each step of one network,
    trained as its users train it."""
    env = Device(device, kind)
    if who == "ours" and env.type == "cpu":
        keep_freed_memory()  # as train.py does; the others are measured as they are used
    model = build(who, env).train()
    loss_of, update = trainer(who, model, env)
    V, parts = PRESETS[preset].vocab_size, []
    for _ in range(steps + 1):
        ids = torch.randint(V, (batch_size, block_size + 1), device=env.device)
        x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        clock = [now()]
        with env.autocast():
            loss = loss_of(x, y)
        clock.append(now())
        loss.backward()
        clock.append(now())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update.step()
        update.zero_grad(set_to_none=True)
        clock.append(now())
        parts.append([*np.diff(clock), (env.peak_memory() or 0) / 1e9])
    return parts[1:]


def trainer(who: str, model, env) -> tuple:
    """(loss(x, y), optimizer) of a network."""
    lr, betas, weight_decay = 6e-4, (0.9, 0.95), 0.1
    if who == "transformers":  # it shifts the labels itself: y after the first token of x
        update = torch.optim.AdamW(model.parameters(), lr, betas, weight_decay=weight_decay)
        return lambda x, y: model(x, labels=torch.cat([x[:, :1], y[:, :-1]], 1)).loss, update
    if who == "ours":
        update = build_optimizer(env.place(model), optimizer, lr, weight_decay, betas)
    else:
        update = model.configure_optimizers(weight_decay, lr, betas, env.type)
    net = torch.compile(model) if compile or compile is None and env.type == "cuda" else model
    return lambda x, y: net(x, y)[1], update


def matmul_rate(env) -> float:
    """FLOP/s of a product of two square matrices, as large as the device needs, in env's dtype."""
    n = 8192 if env.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=env.device, dtype=env.dtype) for _ in range(2))
    seconds = [median_seconds(lambda: F.linear(a, b))]
    if packs(b):  # oneDNN, which training uses too
        seconds.append(median_seconds(partial(PackedLinear(b, None), a)))
    return 2 * n**3 / min(seconds)


# ---- a race to a validation loss ----

NANOGPT_RACE = """
import runpy, sys, torch
seed, start = int(sys.argv.pop(1)), torch.manual_seed
torch.manual_seed = lambda s: start(s + seed)  # its own seed cannot be set
runpy.run_path("train.py", run_name="__main__")
"""


def race_nanogpt(seed: int, out: Path) -> tuple:
    """(seconds, training losses, loss over the whole validation split at the end) of the recipe in
    nanoGPT's README. Seconds are those of its steps, without evaluation."""
    text = script(
        "-c", NANOGPT_RACE, seed, "config/train_shakespeare_char.py", "--device=cpu",
        "--compile=False", "--eval_interval=2000", "--eval_iters=1", "--log_interval=1",
        "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128",
        "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0",
        "--always_save_checkpoint=True", f"--out_dir={out.resolve()}", cwd=peer)
    lines = re.findall(r"iter \d+: loss ([\d.]+), time ([\d.]+)ms", text)
    losses, seconds = np.array(lines, float).T / [[1], [1000]]
    seconds[::2000] = np.minimum(seconds[::2000], np.median(seconds))  # which hold an evaluation
    script("convert.py", f"--input={out}/ckpt.pt", f"--out={out}/hf",
           f"--tokenizer={Path(peer).resolve()}/data/shakespeare_char/meta.pkl")
    text = script("train.py", "--eval_only", f"--init_from={out}/hf", f"--dataset={dataset}",
                  "--block_size=64", "--device=cpu")
    return seconds.cumsum(), losses, float(re.search(r"loss ([\d.]+)", text)[1])


def race_ours(seed: int, out: Path) -> tuple:
    """The same of race_config."""
    script("train.py", race_config, f"--dataset={dataset}", f"--seed={seed}", f"--out_dir={out}",
           "--device=cpu")
    rows = Metrics.read(out / "metrics.jsonl")
    seconds, losses = np.array([(row["elapsed_s"], row["train_loss"]) for row in rows]).T
    return seconds, losses, rows[-1]["val_loss"]


def race():
    """Both trained to the end from each seed, in turn, and a picture of it."""
    if not peer or not dataset:
        raise ValueError("a race needs --peer=FOLDER of a nanoGPT checkout with its "
                         "data/shakespeare_char prepared, and --dataset=NAME of the same text")
    theirs = Path(peer, "data/shakespeare_char/val.bin")
    tokens = Data(dataset).val.tokens, theirs.stat().st_size // 2
    if tokens[0] != tokens[1]:
        raise ValueError(f"not the same text: {dataset} has {tokens[0]} validation tokens, "
                         f"{theirs} {tokens[1]}")
    print(f"loss over the whole validation split, target {target}; cpu, {torch.get_num_threads()} "
          f"threads\nseed {'':8}seconds     loss  reached   ratio")
    ratios = []
    with tempfile.TemporaryDirectory() as folder, figure(png) as ax:
        for seed in tqdm(seeds, desc="seeds", disable=None):
            total = {}
            for who, racer, colour in (("nanoGPT", race_nanogpt, "tab:orange"),
                                       ("ours", race_ours, "tab:blue")):
                seconds, losses, final = racer(seed, Path(folder, f"{who}{seed}"))
                total[who] = seconds[-1]
                width = max(1, len(losses) // 50)
                smooth = np.convolve(losses, np.ones(width) / width, "valid")
                ax.plot(seconds[width - 1:], smooth, color=colour, lw=0.8, alpha=0.7)
                ax.plot(seconds[-1], final, "o", color=colour, label=None if ratios else who)
                reached = "yes" if final <= target else "no"
                print(f"{seed:4} {who:8}{seconds[-1]:7.1f}{final:9.4f}{reached:>9}"
                      f"{total['nanoGPT'] / total[who]:8.2f}", flush=True)
            ratios.append(total["nanoGPT"] / total["ours"])
        ax.axhline(target, color="gray", lw=0.8, ls="--")
        ax.set(xlabel="seconds of training", ylabel="loss (nats per character)", ylim=(1.2, 3.2),
               title="training loss (lines), whole validation split at the end (dots)")
        ax.legend(frameon=False)
    print(f"median ratio {statistics.median(ratios):.2f}; picture: {png}")


# ---- fine-tuning ----

def instruct():
    """An epoch of instruction records with adapters of rank 16 that start at random, 8 records an
    update: by finetune_instruct.py, and by a loop of transformers and PEFT that pads batches."""
    if not data:
        raise ValueError("give records as finetune_instruct.py reads them: --data=FILE")
    base = Path(init_from).resolve() if Path(init_from).is_dir() else init_from
    with tempfile.TemporaryDirectory() as folder:
        def ours():
            script("finetune_instruct.py", f"--data={Path(data).resolve()}", f"--device={device}",
                   f"--init_from={base}", "--epochs=1", f"--out_dir={folder}", "--dtype=float32",
                   "--mode=lora", "--overwrite", "--max_new_tokens=1", "--num_answers=0")
            results = json.loads(Path(folder, "results.json").read_text())
            return results["tokens_per_s"], results["peak_memory_mb"]

        found = in_turn({"ours": ours, "PEFT": partial(child, "peft", folder)})
    print(f"{init_from}, LoRA of rank 16, 8 of {len(read_table(data)):,} records an update, float32"
          f", {torch.get_num_threads()} threads; median of {repeats}, in turn\n"
          f"{'':6}{'answer tokens/s':>17}{'peak MB':>9}{'x PEFT':>8}")
    for who, runs in found.items():
        rate, peak = np.median(runs, 0)
        print(f"{who:6}{rate:17,.0f}{peak:9,.0f}{rate / np.median(found['PEFT'][:, 0]):8.2f}")


def peft(run: str) -> list:
    """(answer tokens/s, peak MB) of an epoch by PEFT, of the base model and records of our run."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2LMHeadModel
    env, best = Device(device, "float32"), Path(run, "best")
    tokenizer, template = open_tokenizer(best), (best / "template.txt").read_text().rstrip()
    rows = []  # (prompt ids, answer ids)
    for row in filter(itemgetter("output"), map(instruction_record, read_table(data))):
        text = row["instruction"], row["input"]
        answer = [*tokenizer.encode(row["output"]).tolist(), tokenizer.eos_id]
        rows.append((prompt_ids(tokenizer, template, *text, limit=10**9)[0], answer))
    random.Random(0).shuffle(rows)
    adapter = json.loads(Path(run, "adapter/adapter_config.json").read_text())
    base = adapter["base_model_name_or_path"]
    model = GPT2LMHeadModel.from_pretrained(base).float()  # else it keeps the dtype of the file
    model = get_peft_model(model, LoraConfig(
        r=16, lora_alpha=32, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True,
        task_type="CAUSAL_LM")).to(env.device).train()
    update = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    start = now()
    for i in range(0, len(rows), 8):
        whole = [torch.tensor(p + a) for p, a in rows[i:i + 8]]
        labels = [torch.tensor([-100] * len(p) + a) for p, a in rows[i:i + 8]]
        mask = [torch.ones(len(ids)) for ids in whole]
        whole, labels, mask = (pad_sequence(t, True, fill).to(env.device) for t, fill in (
            (whole, 0), (labels, -100), (mask, 0)))
        model(input_ids=whole, attention_mask=mask, labels=labels).loss.backward()
        update.step()
        update.zero_grad()
    seconds = now() - start
    return [sum(len(answer) for _, answer in rows) / seconds, (env.peak_memory() or 0) / 1e6]


# ---- decoding ----

def decoders(env) -> dict:
    """{name: function(idx, n) that decodes n tokens greedily}; all of ours have equal weights."""
    found = {}
    for kind in kinds:
        if kind == "int8" and env.type != "cpu":
            continue  # decode.py has it for CPUs only
        model = build("ours", env).eval()
        if kind != "int8":
            model.to(getattr(torch, kind))
        prepare(model, "int8" if kind == "int8" else None, bool(compile))
        found[f"ours {kind}"] = partial(model.generate, temperature=0)
    found["ours, unprepared"] = partial(build("ours", env).generate, temperature=0)
    for who in others():
        model = build(who, env).eval()
        if who == "nanoGPT":
            found[who] = partial(model.generate, top_k=1)
        else:
            found[who] = lambda idx, n, model=model: model.generate(
                idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, min_new_tokens=n,
                do_sample=False, pad_token_id=0)
    return found


def products_rate(model, B: int) -> float:
    """Tokens/s of a step's matrix products alone: x (B, in) through every weight once."""
    weights = [p for name, p in model.named_parameters() if p.dim() == 2 and "wpe" not in name]
    x = {w.size(1): torch.randn(B, w.size(1), device=w.device, dtype=w.dtype) for w in weights}

    def products():
        for w in weights:
            F.linear(x[w.size(1)], w)
    return B / median_seconds(products)


def decode():
    """A table of tokens/s of all decoders, by prompts decoded together and tokens decoded."""
    env, config = Device(device, "float32"), PRESETS[preset]
    longest = config.block_size - prompt
    if not all(0 < n <= longest for n in new) or not all(B > 0 for B in batch):
        raise ValueError(f"new must be in 1 … {longest}, batch at least 1; got {new} and {batch}")
    models, plain = decoders(env), build("ours", env)
    products = {B: products_rate(plain, B) for B in batch}
    del plain
    rates = ", ".join(f"B={B} {rate:.1f} tok/s" for B, rate in products.items())
    print(f"{describe(env)}\nproducts: every weight once through F.linear in float32: {rates}\n\n"
          f"{'B':>3} {'tokens':>7}  {'decoder':17}{'tok/s':>8}{'of products':>13}"
          f"{'x transformers':>16}")
    for B in batch:
        for n in new:
            idx = torch.randint(config.vocab_size, (B, prompt), device=env.device,
                                generator=torch.Generator(env.device).manual_seed(0))
            for work in models.values():  # warm up
                work(idx, min(8, n))
            found = in_turn({name: partial(timed, work, idx, n) for name, work in models.items()})
            speed = {name: B * n / np.median(seconds) for name, seconds in found.items()}
            for name, rate in speed.items():
                row = f"{B:3} {f'{prompt}+{n}':>7}  {name:17}{rate:8.1f}{rate / products[B]:13.2f}"
                if "transformers" in speed:
                    row += f"{rate / speed['transformers']:16.2f}"
                print(row, flush=True)


COMMANDS = {"train": train, "race": race, "instruct": instruct, "decode": decode}
PARTS = {"step": step, "peft": peft}  # of these, in processes of their own


def main(command, *words):
    warnings.simplefilter("ignore")
    if words and command in COMMANDS:
        raise ValueError(f"unexpected word {words[0]!r}; a setting is written --key=value")
    read_settings(globals(), ("repeats", "prompt", "batch_size", "block_size", "steps"),
                  {"preset": tuple(PRESETS)})
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"kinds: {min(unknown)!r} is unknown: {', '.join(KINDS)}")
    if peer and not Path(peer, "model.py").is_file():
        raise ValueError(f"peer={peer} holds no model.py; expected a nanoGPT checkout")
    if command in COMMANDS:
        return COMMANDS[command]()
    with contextlib.redirect_stdout(sys.stderr):  # where others' messages go
        found = PARTS[command](*words)
    print(json.dumps(found))


if __name__ == "__main__":
    parts = PARTS if {*PARTS} & {*sys.argv} else ()
    run_script(main, globals(), commands=(*COMMANDS, *parts), positionals=True)
