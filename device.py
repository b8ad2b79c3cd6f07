"""Where and how a process computes: chip, dtype, ranks, autocast, one update; a script's start."""

import atexit
import copy
import ctypes
import math
import os
import re
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from ops import accelerate

# Dense bfloat16 peak of chips in FLOP/s, from the makers' data sheets, by a part of the name that
# torch.cuda.get_device_name gives. A chip that is not here has no MFU rather than a wrong one.
PEAK_FLOPS = {
    "H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "A40": 149.7e12, "A10G": 70e12,
    "A10": 125e12, "A6000": 155e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
    "V100": 125e12, "T4": 65e12,  # these two in float16: they have no bfloat16
}
# Errors after which a GPU cannot be used, or would fail again without torch.compile.
STICKY = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


class Device:
    """Where and how this process computes: device, dtype, autocast, rank and world size.

    device: auto, cpu, cuda, cuda:N or mps. dtype: auto, float32, bfloat16 or float16; auto is
    bfloat16 on a GPU that has it, float16 on one that has not, float32 elsewhere. Started by
    torchrun, it joins the process group. ValueError for what this machine has not.
    """

    def __init__(self, device: str = "auto", dtype: str = "auto"):
        check_launch(os.environ)
        self.rank = int(os.environ.get("RANK") or "0")
        self.world = int(os.environ.get("WORLD_SIZE") or "1")
        self.held = None  # the lock of the run's folder
        if device == "auto":
            mps = torch.backends.mps.is_available() and self.world == 1  # gloo cannot reduce there
            device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        if device in ("cuda", "gpu"):
            if self.world > 1 and "LOCAL_RANK" not in os.environ:  # else all would take one GPU
                raise ValueError("LOCAL_RANK, which of a node's GPUs a rank takes, is not set; "
                                 "torchrun sets it, or give --device=cuda:N")
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        try:
            self.device = torch.device(device)
            torch.zeros(1, device=self.device).item()  # which "meta" cannot either
        except (RuntimeError, AssertionError) as e:
            raise ValueError(f"device={device} cannot be used here ({str(e).splitlines()[0]}); "
                             "try --device=cpu") from None
        self.type = self.device.type
        if self.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32
        dtypes = ["float32", "bfloat16", "float16"]
        if self.type == "cpu":
            dtypes.remove("float16")
        elif self.type == "cuda" and torch.cuda.get_device_capability(self.device) < (8, 0):
            dtypes.remove("bfloat16")
        if dtype == "auto":
            dtype = dtypes[1 if self.type == "cuda" else 0]  # the fastest there
        if dtype not in dtypes:
            raise ValueError(f"dtype={dtype!r}: {self.name()} has {' and '.join(dtypes)}; float16 "
                             "is for GPUs, bfloat16 for CPUs and newer GPUs")
        self.dtype = getattr(torch, dtype)
        self.scaler = torch.amp.GradScaler(self.type, enabled=dtype == "float16")
        if self.world > 1 and not dist.is_initialized():
            # After a restart torchrun's store still has the addresses of the processes that died
            # (pytorch issue 135712): each attempt needs keys of its own. Several nodes count
            # differently and must set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
            alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                store = dist.PrefixStore(f"attempt {attempt}", next(dist.rendezvous("env://"))[0])
                dist.init_process_group("nccl" if self.type == "cuda" else "gloo", store=store,
                                        rank=self.rank, world_size=self.world)

    def autocast(self):
        """The context of forward passes."""
        return torch.autocast(self.type, self.dtype, enabled=self.dtype != torch.float32)

    def place(self, model, checkpoint_activations: bool = False):
        """The model on this device, made to train fast there, or in less memory."""
        for block in model.transformer.h if checkpoint_activations else ():
            block.forward = partial(checkpointed, block.forward)
        return accelerate(model.to(self.device))

    def parallel(self, model, bfloat16: bool = False):
        """The model, in DDP where there are several ranks; bfloat16: the gradients are summed in
        it, at half the traffic. A compiled model must not have run before: only then its backward
        pass is cut into pieces between which gradients travel."""
        if self.world == 1:
            return model
        if bfloat16 and self.type != "cuda":
            raise ValueError("bfloat16_gradients is for ranks on GPUs; go on without: "
                             "--bfloat16_gradients=False")
        model = DDP(model, device_ids=[self.device] if self.type == "cuda" else None,
                    gradient_as_bucket_view=True)
        if bfloat16:
            model.register_comm_hook(None, bf16_compress_hook)
        return model

    def compiled(self, net, asked: bool | None, loss, dynamic: bool | None = None,
                 bfloat16: bool = False) -> tuple:
        """(net in DDP, where there are several ranks; net as a rank runs it alone), both compiled
        where that is asked for (None: on a GPU) and works on all ranks, which loss(model) of a
        batch tries. dynamic: one graph for batches of any length."""
        wanted = self.type == "cuda" if asked is None else asked
        if wanted:  # DDP cannot cut a graph that has a float among its inputs
            torch._dynamo.config.specialize_float = True
        fast = torch.compile(net, dynamic=dynamic) if wanted else net
        model = self.parallel(fast, bfloat16)
        if fast is not net and not self.runs_compiled(model, loss):
            fast, model = net, self.parallel(net, bfloat16)
        return model, fast

    def runs_compiled(self, model, loss) -> bool:
        """Tries a compiled model on one batch; where that fails on a rank, it says what it costs to
        do without."""
        fault = None
        try:
            with self.autocast(), model.no_sync() if self.world > 1 else nullcontext():
                loss(model).backward()
        except STICKY:
            raise
        except Exception as e:  # noqa: BLE001 (whatever the platform lacks)
            fault = e
        model.zero_grad(set_to_none=True)
        failed = int(self.sum(fault is not None)[0])
        if failed:
            what = "not on rank 0"
            if fault:
                what = f"{type(fault).__name__}: {(str(fault) or '-').splitlines()[0][:120]}"
            self.say(f"warning: torch.compile failed on {failed} of {self.world} ranks ({what}); "
                     "running eager, which is slower and takes up to twice the memory")
        return not failed

    def lock(self, folder: Path):
        """Holds a run's folder until `close` or the end of the process, by a lock of rank 0.
        ValueError, on every rank, where another process has it."""
        from filelock import FileLock, Timeout
        fault = None
        if self.rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.held = FileLock(folder / ".lock", blocking=False)
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
        if self.type == "cuda" and self.dtype != torch.float32:
            for chip, peak in PEAK_FLOPS.items():
                if re.search(rf"\b{chip}\b(?! Ti| D| Laptop)(?!.* MIG )", self.name()):
                    return peak
        return None

    def sum(self, *values: float) -> list[float]:
        """Sums of each value over all ranks."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any_rank(self, flag) -> bool:
        """Whether a rank has the flag, the same answer on all."""
        return self.sum(bool(flag))[0] > 0

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
        """One update from the gradients, which are then cleared; returns their norm, which is cut
        to grad_clip (0: not at all). It changes nothing where the norm is not finite."""
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
        if self.scaler.is_enabled():
            if self.type != "mps" or norm.isfinite():  # on MPS fused AdamW ignores found_inf
                self.scaler.step(optimizer)
            self.scaler.update()
        elif self.type != "mps" and getattr(optimizer, "_step_supports_amp_scaling", False):
            # as the scaler does it: a GPU need not be waited for
            optimizer.grad_scale, optimizer.found_inf = None, 1 - norm.isfinite().float()
            optimizer.step()
        elif norm.isfinite():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def close(self):
        """The end of the script. With several ranks it does not return: DDP leaves gloo's threads
        running, and one that frees a tensor while Python shuts down aborts the process (pytorch
        issue 190489), so the process ends here, after its exit handlers."""
        if self.held:
            self.held.release()
        if dist.is_initialized():
            dist.destroy_process_group()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def checkpointed(textbook, x, mask, layer, cache):
    """A block of which only the input is kept: its backward pass runs it again (Chen et al. 2016,
    "Training deep nets with sublinear memory cost")."""
    if cache is not None or not torch.is_grad_enabled():
        return textbook(x, mask, layer, cache)
    return checkpoint(textbook, x, mask, layer, cache, use_reentrant=False)


def to_device(tensor, device):
    """A tensor of the CPU on a device; a copy to a GPU goes on in the background."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def host_copy(value):
    """A copy in the CPU's memory of a model, or of all tensors in a dict, list or tuple."""
    if isinstance(value, torch.nn.Module):
        tensors = [*value.parameters(), *value.buffers()]
        return copy.deepcopy(value, {id(tensor): host_copy(tensor) for tensor in tensors})
    if isinstance(value, torch.Tensor):
        new = torch.empty_like(value, device="cpu").copy_(value.detach())
        is_parameter = isinstance(value, torch.nn.Parameter)
        return torch.nn.Parameter(new, value.requires_grad) if is_parameter else new
    if isinstance(value, dict):
        return {key: host_copy(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(host_copy, value))
    return value


def check_launch(environ):
    """ValueError where the environment names ranks by halves, or a scheduler started several
    processes that do not know of each other."""
    for key in ("RANK", "WORLD_SIZE"):
        if not (environ.get(key) or "0").isdecimal():
            raise ValueError(f"{key}={environ[key]!r} is in the environment, expected a number")
    start = "start all ranks by torchrun --standalone --nproc_per_node=N SCRIPT.py …"
    if environ.get("WORLD_SIZE", "1") not in ("", "1"):
        missing = [key for key in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(key)]
        if missing:
            raise ValueError(f"WORLD_SIZE={environ['WORLD_SIZE']} is in the environment, but not "
                             f"{' and '.join(missing)}; {start}, or unset WORLD_SIZE for one rank")
    elif environ.get("RANK", "0") not in ("", "0"):
        raise ValueError(f"RANK={environ['RANK']} is in the environment, but no WORLD_SIZE; {start}"
                         ", or unset RANK")
    elif "RANK" not in environ:
        for key in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if environ.get(key, "1") not in ("", "1"):
                raise ValueError(f"a scheduler started {environ[key]} tasks ({key}) of which each "
                                 f"would be a whole training; have it start one a node, and there "
                                 f"{start}; or unset {key}")


def read_settings(script: dict, from_one: tuple, choices: dict | None = None) -> dict:
    """The settings among a script's globals, by name; ValueError for a number that is not finite,
    below 0, or below 1 where its name is in from_one, and for one that is not of its choices."""
    settings = {name: value for name, value in script.items() if name.islower() and name[0] != "_"
                and isinstance(value, (int, float, str, list, type(None)))}
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
    """(settings, Device, run folder) with which a training script starts, from its globals; torch
    is seeded and, on a CPU, freed memory kept."""
    settings = read_settings(script, from_one, choices)
    env = Device(settings["device"], settings.get("dtype", "float32"))
    if env.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(settings["seed"])
    return settings, env, Path(settings["out_dir"])


def keep_freed_memory():
    """For training on a CPU. glibc returns large blocks at once, and waiting for new pages takes a
    quarter of a step of GPT-2 124M. oneDNN keeps 64 kernels instead of 1,024, which fine-tunings,
    whose every batch has another length, would fill."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for what is large
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
