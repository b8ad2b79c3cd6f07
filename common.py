"""What several scripts need: devices and ranks, schedules, checkpoints, the metrics of a run."""

import atexit
import ctypes
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import warnings
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from files import (
    hub_file,
    load_torch,
    local_folder,
    naming,
    read_json,
    replacing,
    write_text,
)
from lora import load_adapter, merge, unmerge
from model import GPT
from tokenizer import from_json, open_tokenizer

# Dense bfloat16 peak of chips in FLOP/s, from the makers' data sheets, by a part of the name that
# torch.cuda.get_device_name gives. A chip that is not here has no MFU rather than a wrong one.
PEAK_FLOPS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "GH200": 989e12,
    "B200": 2250e12, "A100": 312e12, "A40": 149.7e12, "A10G": 70e12, "A10": 125e12, "A6000": 155e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
    "V100": 125e12, "T4": 65e12,  # these two in float16: they have no bfloat16
}


class Device:
    """Where and how this process computes: device, dtype, autocast, rank and world size.

    device: auto, cpu, cuda, cuda:N or mps. dtype: auto, float32, bfloat16 or float16; auto is
    bfloat16 on a GPU that has it, float16 on one that has not, float32 elsewhere. Started by
    torchrun, it joins the process group (nccl on GPUs, gloo on CPUs). ValueError for what this
    machine has not.
    """

    def __init__(self, device: str = "auto", dtype: str = "auto"):
        self.rank, self.world, local_rank = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
        if device == "auto":
            mps = torch.backends.mps.is_available() and self.world == 1  # gloo cannot reduce there
            device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        try:
            self.device = torch.device(device)
            if self.device == torch.device("cuda"):
                self.device = torch.device("cuda", local_rank)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as e:
            raise ValueError(f"device={device} cannot be used here ({str(e).splitlines()[0]}); "
                             "try --device=cpu") from None
        self.type, self.held = self.device.type, None
        if self.type not in ("cpu", "cuda", "mps"):
            raise ValueError(f"device={device} cannot be used here; try --device=cpu")
        if self.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32
        has_bf16 = self.type != "cuda" or torch.cuda.get_device_capability(self.device) >= (8, 0)
        if dtype == "auto":
            dtype = ("bfloat16" if has_bf16 else "float16") if self.type == "cuda" else "float32"
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={dtype!r} is unknown: auto, float32, bfloat16 or float16")
        if dtype == "bfloat16" and not has_bf16:
            raise ValueError(f"{self.name()} has no bfloat16; --dtype=float16 serves there")
        if dtype == "float16" and self.type == "cpu":
            raise ValueError("dtype=float16 is for GPUs; on a CPU use float32 or bfloat16")
        self.dtype = getattr(torch, dtype)
        self.scaler = torch.amp.GradScaler(self.type, enabled=dtype == "float16")
        if self.world > 1 and not dist.is_initialized():
            # After a restart torchrun's store still has the addresses of the processes that died
            # (pytorch issue 135712), so that each attempt needs keys of its own. Several nodes do not
            # count alike: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 must be set.
            alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                store = dist.PrefixStore(f"attempt {attempt}", next(dist.rendezvous("env://"))[0])
                dist.init_process_group("nccl" if self.type == "cuda" else "gloo", store=store,
                                        rank=self.rank, world_size=self.world)

    def autocast(self):
        """The context of forward passes."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.type, self.dtype)

    def parallel(self, model):
        """The model, in DDP where there are several ranks."""
        if self.world == 1:
            return model
        return DDP(model, device_ids=[self.device] if self.type == "cuda" else None)

    def lock(self, folder: Path):
        """Keeps a run's folder for this run, by a lock that rank 0 holds until `close` or the end of
        the process, however it ends. ValueError, on every rank, where another process has it."""
        from filelock import FileLock, Timeout
        self.held, fault = FileLock(folder / ".lock", blocking=False), None
        if self.rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.held.acquire()
                for tmp in [*folder.glob("*.[0-9]*.tmp"), *folder.glob("best/*.[0-9]*.tmp")]:
                    tmp.unlink()  # of a run that was killed
            except Timeout:
                fault = ValueError(f"another run is using {folder}; wait for it to end, or give "
                                   "another --out_dir")
            except OSError as e:
                fault = OSError(f"cannot write into {folder}: {e.strerror or e}")
        if self.sum(fault is not None)[0]:
            raise fault or ValueError(f"rank 0 cannot use {folder}")

    def say(self, *text):
        """Prints at once, on rank 0."""
        if self.rank == 0:
            print(*text, flush=True)

    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.type == "cuda" else self.type

    def peak_flops(self) -> float | None:
        """Dense 16-bit peak of this chip in FLOP/s; None where it is unknown or not what runs."""
        if self.type != "cuda" or self.dtype == torch.float32:
            return None
        return next((peak for chip, peak in PEAK_FLOPS.items()
                     if re.search(rf"\b{chip}\b(?! Ti| D| Laptop)", self.name())), None)

    def sum(self, *values: float) -> list[float]:
        """Sums of each value over all ranks."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64 if self.type != "mps" else torch.float32,
                             device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag, waited: bool) -> bool:
        """Whether a rank has the flag, the same answer on all; on several GPUs it is asked only where
        they are waited for anyway, else every step would wait."""
        ask = waited or self.world == 1 or self.type == "cpu"
        return ask and self.sum(bool(flag))[0] > 0

    def peak_memory(self) -> int | None:
        """The most bytes that this process has held: of the GPU, or resident."""
        if self.type == "cuda":
            return torch.cuda.max_memory_allocated()
        try:
            from resource import RUSAGE_SELF, getrusage
        except ImportError:  # Windows
            return None
        return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def update(self, optimizer, parameters, grad_clip: float) -> torch.Tensor:
        """One update from the gradients, which are then cleared; float16's scale is taken out and
        their norm, returned as it was, cut to grad_clip (0: not at all). It changes nothing where
        the norm is not finite."""
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
        elif self.type != "mps" and getattr(optimizer, "_step_supports_amp_scaling", False):
            # as the scaler does it: a GPU need not be waited for. On MPS found_inf is ignored.
            optimizer.grad_scale, optimizer.found_inf = None, 1 - norm.isfinite().float()
            optimizer.step()
        elif norm.isfinite():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def close(self):
        """The end of the script. With several ranks it does not return: DDP leaves gloo's threads
        running, and one that frees a tensor while Python shuts down aborts the process (pytorch
        issue 190489), so the process ends here, its exit handlers run and its output written."""
        if self.held:
            self.held.release()
        if dist.is_initialized():
            dist.destroy_process_group()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def read_settings(script: dict, from_one: tuple, choices: dict | None = None) -> dict:
    """The settings among a script's globals, by name; ValueError for a number that is not finite,
    below 0, or below 1 where its name is in from_one, and for what is none of its choices."""
    settings = {k: v for k, v in script.items() if not k.startswith("_") and k.islower()
                and isinstance(v, (int, float, str, list, type(None)))}
    for name, value in settings.items():
        low, high = int(name in from_one), math.inf if isinstance(value, float) else 2**62
        if isinstance(value, (int, float)) and not low <= value < high:
            bound = f"at least {low}" if value < low else "a number below 2**62"
            raise ValueError(f"{name} must be {bound}, got {value}")
    for name, known in (choices or {}).items():
        if settings[name] not in known:
            raise ValueError(f"{name} must be {' or '.join(known)}, got {settings[name]!r}")
    return settings


def begin(script: dict, from_one: tuple, choices: dict | None = None):
    """(settings, Device, run folder) with which a training script starts, from its globals; torch is
    seeded and, on a CPU, freed memory kept."""
    settings = read_settings(script, from_one, choices)
    env = Device(settings["device"], settings.get("dtype", "float32"))
    if env.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(settings["seed"])
    return settings, env, Path(settings["out_dir"])


def keep_freed_memory():
    """Makes malloc keep what is freed, for training on a CPU. glibc gives large blocks back at once,
    and waiting for new pages takes a quarter of a step of GPT-2 124M. And it makes oneDNN keep 64 kernels
    instead of 1,024: fine-tunings, whose every batch has another length, fill them, 160 MB, for nothing."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for what is large
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def lr_scale(schedule: str, step: int, max_steps: int, warmup_steps: int, min_scale: float = 0.0,
             decay_fraction: float = 0.2) -> float:
    """Fraction of the peak learning rate for update `step`, counted from 0.

    Linear warmup (the first update takes 1 / warmup_steps), then `cosine` (Loshchilov and Hutter
    2017) or `linear` decay towards min_scale, which the update after the last would reach, `wsd`
    (warmup, stable, then linear decay over the last decay_fraction; Hu et al. 2024) or `constant`.
    ValueError for another name.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    begin = warmup_steps
    if schedule == "wsd":
        begin = max(begin, round(max_steps * (1 - decay_fraction)))
    done = min(max(0.0, (step - begin) / max(1, max_steps - begin)), 1.0)  # of the decay
    if schedule == "cosine":
        return min_scale + (1 - min_scale) * 0.5 * (1 + math.cos(math.pi * done))
    if schedule in ("linear", "wsd"):
        return min_scale + (1 - min_scale) * (1 - done)
    raise ValueError(f"lr_schedule={schedule!r} is unknown: cosine, linear, wsd or constant")


def micro_batch_seed(seed: int, step: int, micro: int) -> int:
    """Seed of torch's random numbers (dropout) for one micro-batch of the whole job, so that they
    depend neither on what ran before nor on how many ranks share the step."""
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + micro * 0x94D049BB133111EB)
    x ^= x >> 31
    return x * 0xD6E8FEB86659FD93 % 2**63


def micro_batches(total_batch_tokens: int | None, batch_size: int, block_size: int, world: int
                  ) -> int:
    """Micro-steps of each rank that make up one update; ValueError says which numbers would do."""
    one = batch_size * block_size * world
    if total_batch_tokens is None:
        return 1
    if total_batch_tokens < one or total_batch_tokens % one:
        n = max(1, round(total_batch_tokens / one))
        per_rank = total_batch_tokens // (block_size * world)
        fits = [b for b in range(1, min(batch_size, per_rank) + 1) if per_rank % b == 0]
        exact = total_batch_tokens % (block_size * world) == 0 and fits
        raise ValueError(
            f"total_batch_tokens={total_batch_tokens:,} is no multiple of batch_size={batch_size} x "
            f"block_size={block_size} x {world} rank{'s' * (world > 1)} = {one:,}; use "
            f"--total_batch_tokens={n * one}" + (f" or --batch_size={fits[-1]}" if exact else ""))
    return total_batch_tokens // one


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a flag that the loop asks at a step's end, until `over`. A second
    Ctrl-C interrupts at once; a second SIGTERM does not, as torchrun sends one after its own."""

    def __init__(self):
        self.received = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        self.received = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def over(self):
        """Nothing asks the flag any more."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Skips:
    """Counts the updates that `Device.update` left out, as their gradient was not finite."""

    def __init__(self, env: Device, most: int = 10, total: int = 0):
        self.total, self.in_a_row = total, 0
        self.quiet = env.scaler.is_enabled()  # float16 finds its scale by skipping some
        self.most = most + 20 * self.quiet

    def see(self, norms: list, step: int, say, where=lambda number: "", then="lower --learning_rate"):
        """The norms (tensors) of the latest updates, up to `step`: says which of them were skipped, and
        where in the data; ValueError after `most` in a row."""
        for number, norm in enumerate(torch.stack(norms).tolist(), step - len(norms) + 1):
            self.in_a_row = 0 if math.isfinite(norm) else self.in_a_row + 1
            self.total += self.in_a_row > 0
            if self.in_a_row and not self.quiet:
                say(f"step {number}: the gradient is not finite, its update is skipped{where(number)}")
            if self.in_a_row >= self.most:
                raise ValueError(f"the gradient was not finite in {self.in_a_row} steps in a row, up to "
                                 f"step {number}; {then}")


# ---- a run's folder ----

# What every checkpoint must hold, before anything in it is used.
CHECKPOINT = {"model": dict, "optimizer": dict, "scaler": dict, "config": dict, "settings": dict,
              "step": int, "tokens": int, "skipped": int, "elapsed_s": float, "best_loss": float,
              "tokenizer": str}


def checkpoints(out_dir: Path) -> list[Path]:
    """The checkpoints of a run's folder, the newest first: ckpt.pt, then ckpt-STEP.pt."""
    older = {int(match[1]): path for path in out_dir.glob("ckpt-*.pt")
             if (match := re.fullmatch(r"ckpt-(\d+)\.pt", path.name))}
    newest = out_dir / "ckpt.pt"
    return [newest] * newest.is_file() + [older[step] for step in sorted(older, reverse=True)]


def save_checkpoint(path: Path, checkpoint: dict, keep: int = 1, last_step: int | None = None):
    """torch.save of tensors and plain values, whole or not at all; OSError when it cannot. Of what
    was there before, saved at last_step, keep - 1 stay as ckpt-STEP.pt."""
    with replacing(path) as tmp:
        tmp.touch()  # so that a folder that cannot be written says so in the system's words
        try:
            torch.save(checkpoint, tmp)
        except RuntimeError as e:  # torch's word for a disk that is full
            raise OSError(str(e).splitlines()[0] + ": is the disk full?") from None
        if keep > 1 and last_step is not None and path.is_file():
            older = path.with_name(f"ckpt-{last_step}.pt")
            older.unlink(missing_ok=True)
            try:
                os.link(path, older)  # so that there is a ckpt.pt at every moment
            except OSError:  # a file system without links
                os.replace(path, older)
    for old in checkpoints(path.parent)[keep:]:
        old.unlink()


def read_checkpoint(path: Path, **more: type) -> dict:
    """A checkpoint whose every byte agrees with the CRC-32s in the file, which torch.load does not
    ask; ValueError in one line for one that is damaged, or has not the fields of every checkpoint
    and `more` of this script's."""
    try:
        with naming(path), zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except OSError:
        raise
    except Exception as e:  # noqa: BLE001 (a damaged archive can raise anything)
        what = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged: {what}") from None
    if damaged:
        raise ValueError(f"{path} is damaged: {damaged!r} in it has another checksum")
    checkpoint = {"skipped": 0, "loss_sum": 0.0, "counted": 0} | load_torch(path)  # older ones lack these
    for name, kind in (CHECKPOINT | more).items():
        value = checkpoint.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or kind is int and value < 0 or (
                name == "elapsed_s" and not math.isfinite(value)):
            raise ValueError(f"{path} was not written by this script (its {name} is "
                             f"{type(value).__name__}); convert.py reads nanoGPT's")
    return checkpoint


def same_settings(path: Path, checkpoint: dict, settings: dict, fixed):
    """ValueError where a checkpoint was made with another value of what a resumed run goes on with."""
    for name in fixed:
        was = checkpoint["settings"].get(name, settings[name])
        if settings[name] != was:
            raise ValueError(f"{path} was trained with {name}={was}, not {settings[name]}; give that, or "
                             "another --out_dir")


def newest_checkpoint(out_dir: Path):
    """(path, checkpoint, faults) of train.py's newest whole checkpoint in a folder; faults: one line
    for each newer one. (None, None, []) where there is none and never was. ValueError where none is
    left that is whole: to begin anew must be asked for."""
    found, faults = checkpoints(out_dir), []
    for path in found:
        try:
            return path, read_checkpoint(path, windows=int), faults
        except (ValueError, OSError) as e:
            faults.append(str(e))
    if found:
        more = f"; nor is any of the {len(found) - 1} older ones whole" if len(found) > 1 else ""
        raise ValueError(f"{faults[0]}{more}; bring one back, or begin anew with "
                         "--init_from=scratch")
    rows = Metrics.read(out_dir / "metrics.jsonl")
    if any("val_loss" in row for row in rows[:-1]):  # a checkpoint is written behind each of these
        raise ValueError(f"{out_dir} holds a run of {rows[-1]['step']} steps but no checkpoint; "
                         "bring its ckpt.pt back, or begin anew with --init_from=scratch")
    return None, None, []


@contextmanager
def fitting(path):
    """What torch raises for a checkpoint whose parts do not fit each other, as one line."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        what = (str(e).splitlines() or [""])[0][:200]
        raise ValueError(f"the parts of {path} do not fit each other ({what}): it is damaged, or "
                         "was written by another script") from None


def restore(checkpoint: dict, update, scaler):
    """Loads the state of an optimizer, but not its settings, which are today's, and that of float16's
    scaler; ValueError where it is not the state of these parameters."""
    saved = checkpoint["optimizer"]
    if checkpoint["scaler"]:  # empty where the dtype was not float16
        scaler.load_state_dict(checkpoint["scaler"])
    for old, new in zip(saved["param_groups"], update.param_groups):
        old |= {key: value for key, value in new.items() if key != "params"}
    update.load_state_dict(saved)
    if not update.state and any("parts" in group for group in update.param_groups):
        return  # Muon's, before its first update that was not skipped
    for group in update.param_groups:
        names = ["momentum_buffer"] if "parts" in group else ["exp_avg", "exp_avg_sq", "step"]
        for p in group["params"]:
            state = update.state[p]
            if {key: getattr(value, "shape", None) for key, value in state.items()} != {
                    name: () if name == "step" else p.shape for name in names}:
                raise ValueError("the state of its optimizer is of other parameters")
            for key in names:  # copies, else the file stays mapped, and on disk, for good
                like = state[key] if key == "step" else p  # fused AdamW goes through memory as it lies
                state[key] = torch.empty_like(like).copy_(state[key])


def save_best(out_dir: Path, model, tokenizer, **config):
    """Puts a model, its adapters merged, and its tokenizer into OUT/best as a Hugging Face folder,
    which is whole at every moment. config: further fields of its config.json."""
    best, new = out_dir / "best", out_dir / "best.part"
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
    folder = best if (best / "config.json").is_file() else new
    file = folder / "tokenizer.json"
    if not file.is_file() or file.read_text(encoding="utf-8") != tokenizer.to_json():
        tokenizer.save(folder)
    merge(model)
    model.save_pretrained(folder, tokenizer.eos_id, **config)
    unmerge(model)
    if folder == new:
        shutil.rmtree(best, ignore_errors=True)
        os.replace(new, best)


class Metrics:
    """OUT/metrics.jsonl, one JSON object a logged step, and OUT/loss.png drawn from it."""

    def __init__(self, out_dir: Path, resume_step: int = -1):
        """Starts an empty file or, given the step that a run resumes from, drops the later rows."""
        self.path, self.png = out_dir / "metrics.jsonl", out_dir / "loss.png"
        self.rows = [row for row in self.read(self.path) if row["step"] <= resume_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    @staticmethod
    def read(path: Path) -> list[dict]:
        """The rows of a metrics file, if there is one; what a crash cut short is left out."""
        rows, text = [], path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in text.splitlines():
            with suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict) and type(row.get("step")) is int]

    def log(self, **row):
        row = {key: float(f"{v:.7g}") if isinstance(v, float) else v for key, v in row.items()
               if v is not None and math.isfinite(v)}
        self.rows.append(row)
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def sync(self):
        """Flushes the rows to disk, where they must be before the checkpoint that follows them."""
        with naming(self.path), open(self.path, "rb+") as file:
            os.fsync(file.fileno())

    def sketch(self, width: int = 72, height: int = 9) -> str:
        """The training loss as a curve of characters, for the terminal."""
        points = [(row["tokens"], row["train_loss"]) for row in self.rows if "train_loss" in row]
        if len(points) < 2:
            return ""
        columns = [[] for _ in range(width)]
        for tokens, loss in points:
            columns[min(width - 1, tokens * width // (points[-1][0] + 1))].append(loss)
        means = [sum(c) / len(c) if c else None for c in columns]
        low, high = (pick(m for m in means if m is not None) for pick in (min, max))
        rows = [[" "] * width for _ in range(height)]
        for x, mean in enumerate(means):
            if mean is not None:
                rows[round((high - mean) / max(high - low, 1e-9) * (height - 1))][x] = "•"
        labels = [f"{high:7.3f} ", *[" " * 8] * (height - 2), f"{low:7.3f} "]
        lines = [f"{label}│{''.join(row).rstrip()}" for label, row in zip(labels, rows)]
        return "\n".join([*lines, f"{' ' * 8}└{'─' * width}",
                          f"{'training loss, 0':>24}{f'{points[-1][0]:,} tokens':>{width - 15}}"])

    def plot(self, unit: str = "token"):
        """Training and validation loss, in nats a unit, against tokens."""
        from matplotlib.ticker import EngFormatter
        with figure(self.png) as ax:
            for key, label, style in (("train_loss", "training", {"lw": 0.8, "alpha": 0.6}),
                                      ("val_loss", "validation", {"lw": 1.8, "marker": "o", "ms": 3})):
                points = [(row["tokens"], row[key]) for row in self.rows if key in row]
                if points:
                    ax.plot(*zip(*points), label=label, **style)
            last = next((row for row in reversed(self.rows) if "val_loss" in row), None)
            if last:
                ax.set_title(f"validation loss {last['val_loss']:.4f} after {last['step']:,} steps, "
                             f"{last['elapsed_s'] / 60:.1f} min of training", fontsize=10)
            ax.set(xlabel="training tokens", ylabel=f"loss (nats a {unit})")
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            ax.grid(alpha=0.25)
            if ax.lines:
                ax.legend(frameon=False)


@contextmanager
def figure(png, size=(7, 4.2)):
    """Axes to draw on, in inches; at the end they are written to a PNG file."""
    from matplotlib.figure import Figure
    fig = Figure(size, dpi=110, layout="constrained")
    yield fig.subplots()
    with replacing(png) as tmp:
        fig.savefig(tmp, format="png")


def set_aside(out_dir: Path):
    """Moves the run that a folder holds into OUT/previous, in place of what that held, unless that is
    a whole run and this one is not. Killed in between, it goes on where it was; the newest checkpoint
    moves in one step."""
    moving, previous = out_dir / "previous.part", out_dir / "previous"

    def whole(folder):
        return bool(checkpoints(folder)) or (folder / "results.json").exists()

    if not moving.is_dir() and not whole(out_dir):  # stopped before its first checkpoint or result
        if whole(previous):  # which is worth more
            for name in ("best", "adapter"):
                shutil.rmtree(out_dir / name, ignore_errors=True)
        if not (out_dir / "best").exists():
            return
    moving.mkdir(exist_ok=True)
    kinds = ("metrics.jsonl", "loss.png", "best", "adapter", "answers.jsonl", "confusion.png",
             "predictions", "predictions_*.csv", "generated_*.txt", "dev_*.txt", "results.json")
    for path in [*reversed(checkpoints(out_dir)), *(p for kind in kinds for p in out_dir.glob(kind))]:
        os.replace(path, moving / path.name)
    shutil.rmtree(previous, ignore_errors=True)
    os.replace(moving, previous)


def start_id(tokenizer) -> int:
    """The id that a text from nothing starts with: end-of-text, or (characters) a line break."""
    if tokenizer.eos_id is not None:
        return tokenizer.eos_id
    return int(tokenizer.encode("\n")[0]) if b"\n" in tokenizer.tokens else 0


def command_line(**changes) -> str:
    """The command that started this script, with settings changed."""
    words = sys.argv[1:]
    for i, word in reversed([*enumerate(words)]):
        key, equals, _ = word.partition("=")
        if key.startswith("--") and key[2:].replace("-", "_") in changes:
            del words[i:i + (1 if equals else 2)]  # its value may be the next word
    words += [f"--{key}={value}" for key, value in changes.items()]
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *words])


def newest_run() -> str:
    """The run folder under out/ that was written last; without one `weights`, which it says.
    ValueError if there is neither."""
    runs = [file.parent for file in Path("out").glob("*/ckpt.pt")]
    if not runs:
        local_folder("weights")
        print("no run under out/ yet: this is the model in weights/, which came with the code")
        return "weights"
    return str(max(runs, key=lambda run: (run / "ckpt.pt").stat().st_mtime))


def model_tokenizer(name, revision: str | None = None):
    """The Tokenizer that lies with a model (a run folder, a Hugging Face folder or a hub name), or
    None."""
    folder = local_folder(name)
    if (folder / "ckpt.pt").is_file():
        return from_json(load_torch(folder / "ckpt.pt").get("tokenizer", ""))
    if folder.is_dir():
        has = any((folder / f).is_file() for f in ("tokenizer.json", "vocab.json", "vocab.bpe"))
        return open_tokenizer(folder) if has else None
    file = hub_file(str(name), "tokenizer.json", revision)
    if file is None and hub_file(str(name), "vocab.json", revision):
        file = hub_file(str(name), "merges.txt", revision)  # its vocab.json lies beside it
    return open_tokenizer(file) if file else None


def load_model(name, tokenizer=None, **options):
    """(GPT, its Tokenizer) of a run folder, a Hugging Face folder or a hub name; of a folder with
    low-rank adapters in PEFT's format, their base with the adapters merged.

    options go to GPT.from_pretrained. A model without tokenizer files is taken for GPT-2's; another
    tokenizer, or its name, may be given. ValueError when its size is not the model's.
    """
    folder = local_folder(name)
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if not isinstance(base, str):
            raise ValueError(f"{folder / 'adapter_config.json'} names no base model: its "
                             f"base_model_name_or_path is {base!r}")
        model, tokenizer = load_model(base, tokenizer, **options)
        load_adapter(model, folder)
        merge(model)
        for module in model.modules():  # for good: a later `unmerge` is for adapters put on since
            vars(module).pop("unmerged", None)
        return model, tokenizer
    model = GPT.from_pretrained(name, **options)
    if tokenizer is None:
        tokenizer = model_tokenizer(name, options.get("revision")) or "gpt2"
    if isinstance(tokenizer, str):
        tokenizer = open_tokenizer(tokenizer)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(f"the tokenizer ({tokenizer.name}) has {tokenizer.vocab_size} ids, the model "
                         f"in {name} has {model.config.vocab_size}; put the tokenizer.json that it was "
                         "trained with into its folder")
    return model, tokenizer
