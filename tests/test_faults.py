"""What faults do to a run: kills, full disks, damaged files, hostile files, lost ranks.

    python tests/test_faults.py                       # all of it, some minutes on one core; or make faults
    python tests/test_faults.py kill disk --kills=200

Not part of the fast suite: pytest finds no test in here. Trainings are forked from this process, which
has torch loaded, so that one is killed and resumed in half a second. What is lost is named as it
happens; the closing table counts it, and the exit status is 1 if anything was.
"""

import gc
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import contextmanager, redirect_stdout, suppress
from itertools import count
from pathlib import Path
from unittest import mock

import conftest  # noqa: F401 (it finds the scripts)
import numpy as np
import torch

import checkpoint as saved
import run as loop
import train
from configurator import configure, find_settings, run
from data import Data, write_data
from hf import load_torch
from model import GPT
from text import read_documents
from tokenizer import char_tokenizer, open_tokenizer

kills = 60  # SIGKILLs at random moments, half of them aimed at a save
flips = 220  # checkpoints, shards and their files cut or with bytes changed
arguments = 2200  # argument lists for the configurator
hostile = 200  # meta.json, config.json, tokenizer.json, documents; a tenth of it checkpoints
seed = 0
folder: str | None = None  # where the runs lie; None: a temporary one

HERE = Path(__file__).resolve().parent.parent
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--batch_size=4",
        "--device=cpu", "--sample_tokens=4", "--warmup_steps=2", "--log_interval=1",
        "--dropout=0.1", "--eval_interval=2", "--eval_tokens=200", "--max_steps=40",
        "--learning_rate=1e-2", "--lr_schedule=constant"]
TIMES = ("elapsed_s", "tokens_per_s", "mfu")  # of a row, which no two runs share
TABLE: dict[str, list] = {}  # fault: [tried, lost]
draw = random.Random()


def note(fault: str, problem: str | None, file=None):
    """Counts one case; problem says what was lost by it, if anything was."""
    count = TABLE.setdefault(fault, [0, 0])
    count[0] += 1
    if problem:
        count[1] += 1
        print(f"LOST, {fault}: {problem}", file=file, flush=True)


# ---- trainings, forked ----

def fork(function, log) -> int:
    """Runs a function in a child process as a script is run, its words into a file; the child's id."""
    sys.stdout.flush()
    Path(log).unlink(missing_ok=True)
    if pid := os.fork():
        return pid
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        function()
        status = 0
    except SystemExit as e:
        status = e.code or 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def start(out, *argv, plot=False, first=None, log=None) -> int:
    """Forks `train.py argv --out_dir=out`; first is called in the child before."""
    argv = [*TINY, *argv, f"--out_dir={out}"]
    background = draw.choice([(), ("cpu",)])  # half of them save in a thread, as a GPU does

    def child():
        loop.Run.IN_BACKGROUND = background
        if not plot:  # most of the time of a save, and written as all files are
            loop.Metrics.plot = lambda self: None
        sys.argv = ["train.py", *argv]
        if first:
            first()
        run(train.main, vars(train))

    return fork(child, log or f"{out}.log")


def said(out) -> str:
    with suppress(OSError):
        return Path(f"{out}.log").read_text(errors="replace")
    return ""


def end(pid, limit=120) -> int:
    """Waits for a child; its exit status, negative for a signal. One that hangs is killed."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 1000


def finish(out, *argv, **options) -> str | None:
    """Trains to the end; what went wrong."""
    status = end(start(out, *argv, **options))
    return None if status == 0 else f"exit status {status}: {said(out)[-300:]}"


def refused(out, *argv, word="", plot=False) -> str | None:
    """Starts a training that must end in one line with `word` and exit status 2; else what it did."""
    return one_line(end(start(out, *argv, plot=plot)), said(out), word)


def one_line(status, text, word=""):
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if status != 2 or "Traceback" in text or len(errors) != 1 or word not in errors[0]:
        return f"exit status {status}, expected one line with {word!r}: {text[-400:]}"
    return None


def wait_for(out, pattern, limit=60):
    """Until a training has said something; False if it took too long."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        if re.search(pattern, said(out), re.MULTILINE):
            return True
        time.sleep(0.005)
    return False


def read_rows(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def different(out, reference, atol=0.0) -> str | None:
    """Where a run is not the uninterrupted one: weights, optimizer, counts, metrics, best model."""
    try:
        a, b = (saved.read_checkpoint(Path(run) / "ckpt.pt") for run in (out, reference))
        for key in ("step", "tokens", "windows", "best_loss", "skipped"):
            if a[key] != b[key] and not (atol and key == "best_loss"):
                return f"{key} is {a[key]}, expected {b[key]}"
        for name, tensor in b["model"].items():
            if not torch.allclose(a["model"][name], tensor, rtol=0, atol=atol):
                return f"weights differ: {name}"
        for i, state in b["optimizer"]["state"].items() if not atol else ():
            for key, tensor in state.items():
                if not torch.equal(a["optimizer"]["state"][i][key], tensor):
                    return f"optimizer state differs: {i} {key}"
        rows = [[{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(run)]
                for run in (out, reference)]
        if [row["step"] for row in rows[0]] != [row["step"] for row in rows[1]]:
            return f"metrics.jsonl has the steps {[row['step'] for row in rows[0]]}"
        for a, b in zip(*rows):
            if any(not math.isclose(a[k], b[k], rel_tol=10 * atol) for k in b) or a.keys() != b.keys():
                return f"metrics differ: {a}, expected {b}"
        best = [(Path(run) / "best" / "model.safetensors").read_bytes() for run in (out, reference)]
        if best[0] != best[1] and not atol:
            return "the best model differs"
        left = [p.name for p in Path(out).rglob("*.tmp")]
        return f"left behind: {left}" if left else None
    except (OSError, ValueError, KeyError) as e:
        return f"{type(e).__name__}: {e}"


# ---- the sections ----

def kill(at: Path, data: str, whole: Path):
    """SIGKILL at random moments, saves included, and before every change that a run makes to its
    folder; each time resumed."""
    out, inside, runs, steps = at / "killed", 0, 0, set()
    for number in range(kills):
        clock = time.time()
        pid = start(out, data, "--init_from=auto")
        if number % 4:  # with some progress, however slow the machine is
            wait_for(out, r"^step|is finished")
        time.sleep(draw.uniform(0, 0.3))
        if number % 2:  # at a save: somewhere behind the first sight of a file half written
            until = time.monotonic() + 1
            while time.monotonic() < until and not [*out.glob("*.tmp"), *out.glob("best/*.tmp")]:
                pass
            time.sleep(draw.choice([0, 0, 0.0005, 0.002]))
        os.kill(pid, signal.SIGKILL)
        ended = end(pid)
        inside += any(p.stat().st_mtime > clock for p in out.rglob("*.tmp"))
        steps.update(re.findall(r"^resuming .* at step (\d+)", said(out), re.MULTILINE))
        problem = None
        try:
            saved.newest_checkpoint(out)
            if (out / "ckpt.pt").exists():
                saved.read_checkpoint(out / "ckpt.pt")
        except ValueError as e:
            problem = str(e)
        if ended == 0 or number == kills - 1:  # it was through, or it is the last
            problem = problem or finish(out, data, "--init_from=auto") or different(out, whole)
            shutil.rmtree(out, ignore_errors=True)
            runs += 1
        note("SIGKILL at random moments", problem)
    print(f"{kills} kills, {inside} of them with a file half written; resumed at {len(steps)} different "
          f"steps, {runs} times to the end")

    short, out = ["--max_steps=6", data, "--init_from=auto"], at / "struck"
    reference, old = at / "short", at / "old"
    finish(reference, *short)
    for number in count(1):
        status = end(start(out, *short, first=lambda: strike(out, number)))  # noqa: B023
        problem = finish(out, *short) if status in (0, -9) else f"exit status {status}"
        note("SIGKILL before each file operation", problem or different(out, reference))
        shutil.rmtree(out)
        if status != -9:  # it has no more of them
            break

    again = ["--max_steps=6", data, "--seed=7"]  # a new run over an old one
    finish(old, *again)
    for number in count(1):
        shutil.copytree(reference, out)
        status = end(start(out, *again, "--overwrite", first=lambda: strike(out, number)))  # noqa: B023
        if status == -9:
            finish(out, *again, "--init_from=auto")  # which also finishes a replacement
        problem = None if status in (0, -9) else f"exit status {status}"
        kept = problem or different(out, reference) and different(out, old)
        note("SIGKILL while an old run is replaced", kept)
        shutil.rmtree(out)
        if status != -9:
            break


def strike(out, number: int):
    """Kills this process before its number-th change to a folder."""
    left = number

    def hook(event, args):
        nonlocal left
        change = event in ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir") or (
            event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR))
        if change and str(args[0]).startswith(str(out)) and str(args[0]) != f"{out}.log":
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def stop(at: Path, data: str, whole: Path):
    """SIGTERM and Ctrl-C save, exit 0 and print the command that goes on."""
    for number, plot in enumerate([True, False, False, False]):
        out, stops = at / f"stopped{number}", 0
        while stops < 9:
            pid = start(out, data, "--init_from=auto", plot=plot)
            if not wait_for(out, r"^step|is finished"):
                break
            time.sleep(draw.uniform(0, 0.1))
            sent = draw.choice([signal.SIGTERM, signal.SIGINT])
            with suppress(ProcessLookupError):
                os.kill(pid, sent)
            status, text = end(pid), said(out)
            if "done: " in text or "is finished" in text:
                break
            stops += 1
            good = status == 0 and f"stopped by {sent.name} at step" in text and (
                "go on with: python" in text and "--init_from=resume" in text)
            note("SIGTERM, Ctrl-C", None if good else f"exit status {status}: {text[-300:]}")
        note("SIGTERM, Ctrl-C", finish(out, data, "--init_from=auto") or different(out, whole))


@contextmanager
def mounted(place: Path, *options):
    """A small tmpfs at a place; yields whether that is allowed here."""
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)],
                          capture_output=True, check=False)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "--lazy", str(place)], check=False)


def disk(at: Path, data: str, whole: Path):
    """A disk that is full during a save, and a folder on a read-only mount."""
    out, filler, failed = at / "full", at / "full" / "filler", set()
    auto = [data, "--init_from=auto"]
    with mounted(out, "size=2m") as allowed:
        fault = "full disk" if allowed else "files that may not grow"
        for free in (0, 4, 30, 60, *range(100, 1000, 50)):  # KB
            def limit(free=free):
                if not allowed:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (free << 10, free << 10))

            if allowed:
                with open(filler, "wb", buffering=0) as file, suppress(OSError):
                    while file.write(bytes(4096)):
                        pass
                os.truncate(filler, max(0, filler.stat().st_size - (free << 10)))
            status = end(start(out, *auto, first=limit))
            problem = None
            if status:
                problem = one_line(status, said(out))
                failed.update(re.findall(r"error: .*?/full/?([\w./]*)", said(out)))
            try:
                if (out / "ckpt.pt").exists():
                    saved.read_checkpoint(out / "ckpt.pt")
            except ValueError as e:
                problem = str(e)
            filler.unlink(missing_ok=True)
            if free % 100 == 0 and not problem:
                problem = finish(out, *auto) or different(out, whole)
                shutil.rmtree(out, ignore_errors=True)
            note(fault, problem)
        print(f"writes that failed on a full disk: {sorted(failed)}")

    with mounted(out, "size=2m") as allowed:
        if not allowed:
            return print("a read-only mount was not tried: mounting is not allowed here")
        end(start(out, data, "--max_steps=4"))
        subprocess.run(["mount", "-o", "remount,ro", str(out)], check=True)
        before = (out / "ckpt.pt").read_bytes()
        for init_from in ("resume", "auto", "scratch"):
            note("read-only mount", refused(out, data, f"--init_from={init_from}", word=str(out)))
        note("read-only mount", "changed" * ((out / "ckpt.pt").read_bytes() != before) or None)
    out = at / "mounted_over"  # read-only in the middle of a run
    for _ in range(3):
        pid = start(out, *auto, "--max_steps=10000", "--eval_interval=20")
        wait_for(out, r"^step +\d*[2468]5/")
        with mounted(out, "ro"):
            note("read-only mount", one_line(end(pid), said(out), "ead-only"))
    steps = saved.newest_checkpoint(out)["step"] + 3
    note("read-only mount", finish(out, *auto, f"--max_steps={steps}"))
    name = at / "unprepared"
    with mounted(name, "ro"):
        note("read-only mount", one_line(*prepared(f"{name}/", ["text"] * 5), word="ead-only"))
    with mounted(name, "size=64k"):
        note("full disk", one_line(*prepared(f"{name}/", ["some text " * 1000] * 50), word="No space"))


def prepared(name, texts, first=lambda: None):
    """(exit status, words) of a prepare in a process of its own."""
    def main():
        write_data(name, char_tokenizer(set("".join(texts))), {"train": texts, "val": texts[:1]})

    def child():
        first()
        run(main, vars(train), [])

    log = str(name).rstrip("/")
    return end(fork(child, f"{log}.log")), said(log)


def change(path: Path):
    """Cuts a file, or changes 1 to 8 bytes, or a block, of it."""
    raw = bytearray(path.read_bytes())
    way = draw.randrange(4)
    if way == 0:
        del raw[draw.randrange(len(raw)):]
    elif way == 1:
        start = draw.randrange(len(raw))
        raw[start:start + 512] = bytes(len(raw[start:start + 512]))
    else:
        for _ in range(1 if way == 2 else draw.randint(2, 8)):
            raw[draw.randrange(len(raw))] ^= draw.randint(1, 255)
    path.write_bytes(raw)


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b and type(a) is type(b)


def damage(at: Path, data: str, whole: Path):
    """Checkpoints and shards cut, or with bytes changed: detected, or the same content as before."""
    out = at / "damaged"
    shutil.copytree(whole, out)
    older = saved.checkpoints(out)[1]
    right = [saved.read_checkpoint(path) for path in (out / "ckpt.pt", older)]
    harmless = 0
    for _ in range(flips // 2):
        shutil.copy(whole / "ckpt.pt", out / "ckpt.pt")
        change(out / "ckpt.pt")
        faults = []
        found = saved.newest_checkpoint(out, faults.append)
        path = found["path"]
        good = path == older and len(faults) == 1 and "ckpt.pt" in faults[0] and "\n" not in faults[0]
        harmless += path != older
        note("damaged checkpoint", None if good and equal(found, right[1]) or path.name == "ckpt.pt"
             and equal(found, right[0]) else "the damage was not seen")
    print(f"{harmless} of {flips // 2} damages to a checkpoint changed nothing of its content")
    for number in range(4):  # the whole way
        shutil.rmtree(out)
        shutil.copytree(whole, out)
        newest = out / "ckpt.pt"
        if number:
            os.truncate(newest, draw.randrange(newest.stat().st_size))
        else:
            newest.unlink()
        note("damaged checkpoint, resumed", finish(out, data, "--init_from=auto")
             or different(out, whole) or ("nothing was said" if number and "going on from"
                                          not in said(out) else None))
    for argv in (["--init_from=auto"], ["--init_from=resume"]):
        for path in saved.checkpoints(out):
            os.truncate(path, 1000)
        note("all checkpoints damaged", refused(out, data, *argv, word="--overwrite"))
    for path in saved.checkpoints(out):
        path.unlink()
    note("all checkpoints lost", refused(out, data, "--init_from=auto", word="holds a run already"))
    note("all checkpoints lost", refused(out, data, "--init_from=resume", word="to resume from"))

    source, name = Path(data.partition("=")[2]), at / "shards"
    opened = Data(f"{source}/")
    ids = [split.rows([0], split.tokens)[0] for split in (opened.train, opened.val)]
    files = ["train_00000.bin"] * 3 + ["val_00000.bin"] * 2 + ["meta.json", "tokenizer.json"]
    for number in range(flips // 2):
        shutil.rmtree(name, ignore_errors=True)
        shutil.copytree(source, name)
        change(name / files[number % len(files)])
        problem = None
        try:
            found = Data(f"{name}/", verify=True)
            read = [split.rows([0], split.tokens)[0] for split in (found.train, found.val)]
            if found.tokenizer().to_json() != opened.tokenizer().to_json() or (
                    found.meta != opened.meta or any((a != b).any() for a, b in zip(ids, read))):
                problem = f"{files[number % len(files)]}: the damage was not seen"
        except ValueError as e:
            problem = "two lines" if "\n" in str(e) else None
        note("damaged shards and their files", problem)


def second(at: Path, data: str, whole: Path):
    """A second run in the folder of a first is refused; a killed one leaves no lock behind. What a
    resumed run may not change is refused by name, what it may change is logged."""
    out = at / "shared"
    for _ in range(5):
        pid = start(out, data, "--init_from=auto", "--max_steps=10000")
        note("lock after a kill", None if wait_for(out, r"^step") else said(out))
        for argv in ("auto", "scratch", "resume"):
            problem = refused(out, data, f"--init_from={argv}", word=f"another run is using {out}")
            note("second run in the same folder", problem)
        os.kill(pid, signal.SIGKILL)
        end(pid)
    shutil.rmtree(out)
    shutil.copytree(whole, out)

    goes_on = ["--init_from=auto", "--max_steps=42"]
    for argv, word in ((["--n_layer=3"], "n_layer=2, not 3"), (["--n_embd=16"], "n_embd=32"),
                       (["--block_size=8"], "block_size=16"), (["--bias=False"], "bias=True"),
                       (["--activation=gelu"], "activation"), (["--optimizer=muon"], "optimizer"),
                       (["--tie_word_embeddings=False"], "tie_word_embeddings")):
        note("resumed with another architecture", refused(out, data, *goes_on, *argv, word=word))
    source = Path(data.partition("=")[2])
    text = Data(f"{source}/").tokenizer().decode(
        Data(f"{source}/").train.rows([0], Data(f"{source}/").train.tokens)[0])
    for alphabet, words, splits in (
            (set(text), "other data", {"train": [text[:-1] + "\n"], "val": [text[:900]]}),
            (set(text) | {"~"}, "another tokenizer", {"train": [text], "val": [text[:1000]]})):
        shutil.move(source, at / "moved")
        write_data(str(source), char_tokenizer(alphabet), splits)
        note("resumed with other data", refused(out, data, *goes_on, word=words))
        shutil.rmtree(source)
        shutil.move(at / "moved", source)
    problem = finish(out, data, *goes_on, "--batch_size=8", "--learning_rate=1e-3", "--max_steps=44",
                     "--lr_schedule=cosine")
    logged = "batch_size 4 -> 8" in said(out) and "max_steps 40 -> 44" in said(out)
    note("resumed with another batch and budget", problem or (None if logged else said(out)[:300]))


def two_ranks(out, *argv) -> str | None:
    """Trains to the end on two ranks; what went wrong."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [start(out, *argv, log=rank and f"{out}.1.log",
                      first=lambda rank=rank: os.environ.update(where | {"RANK": str(rank)}))
                for rank in (0, 1)]
    status = [end(child) for child in children]
    return f"exit status {status}: {said(out)[-500:]}" if any(status) else None


def process_of_rank(parent: int, rank: int) -> int | None:
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            its_parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if its_parent == parent and f"RANK={rank}".encode() in (
                    entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
    return None


def ranks(at: Path, data: str, whole: Path):
    """Two ranks under torchrun: one killed, both restarted by themselves; one rank where there were
    two, and two where there was one."""
    steps = ["--total_batch_tokens=128", "--max_steps=120", "--eval_interval=8", data,
             "--keep_checkpoints=99", "--log_interval=2"]
    one, two, out = at / "one", at / "two", at / "restarted"
    note("another number of ranks", finish(one, *steps) or two_ranks(two, *steps)
         or different(two, one, atol=1e-4))
    with open(f"{out}.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             "--max-restarts=3", HERE / "train.py", *TINY, *steps, "--init_from=auto",
             f"--out_dir={out}"], stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"})
    for rank, after in ((1, 20), (0, 40)):  # either
        wait_for(out, rf"^step +{after}/", 120)
        victim = process_of_rank(process.pid, rank)
        if victim is None:
            note("rank killed under torchrun", f"it was through before rank {rank} could be killed")
            continue
        os.kill(victim, signal.SIGKILL)
        note("rank killed under torchrun", None)
    status = process.wait(180)
    resumed = re.findall(r"^resuming .* at step (\d+)", said(out), re.MULTILINE)
    note("rank killed under torchrun", f"exit status {status}: {said(out)[-500:]}" if status else
         different(out, two) or (None if len(resumed) == 2 and "refused" not in said(out)
                                else f"resumed {len(resumed)} times: {said(out)}"))
    print(f"killed ranks 1 and 0; torchrun went on at steps {resumed}")
    for source, goal in ((two, one), (one, two)):  # from the middle on
        out = at / f"from_{source.name}"
        shutil.copytree(source, out)
        os.replace(out / "ckpt-56.pt", out / "ckpt.pt")
        for path in saved.checkpoints(out)[1:]:
            path.unlink()
        problem = (finish if goal is one else two_ranks)(out, *steps, "--init_from=resume")
        note("another number of ranks", problem or different(out, goal, atol=1e-4) or (
            None if "changed since then: ranks" in said(out) else said(out)[:400]))


def broken(at: Path, data: str, whole: Path):
    """Faults in the data under a running training: named, and after mending the run goes on. Killed
    prepares."""
    source = Path(data.partition("=")[2])
    for fault in ("an id past the vocabulary", "cut"):
        for _ in range(3):
            out = at / "faulty"
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(source, at / "kept")
            pid = start(out, data, "--max_steps=100000")
            wait_for(out, r"^step +9/")
            file = source / "train_00000.bin"
            if fault == "cut":
                os.truncate(file, 700)
            else:
                with open(file, "rb+") as f:
                    f.write(b"\xfa" * file.stat().st_size)
            note("data fault in a run", one_line(end(pid), said(out), "train_00000.bin"))
            for path in (at / "kept").iterdir():
                shutil.copy(path, source)
            shutil.rmtree(at / "kept")
            steps = read_rows(out)[-1]["step"] + 2
            note("data fault in a run", finish(out, data, "--init_from=resume", f"--max_steps={steps}"))

    texts = ["".join(draw.choices("abcdefgh \n", k=200)) for _ in range(3000)]
    name = f"{at}/again"
    write_data(name, char_tokenizer("abc"), {"train": ["abc" * 50], "val": ["cba"]})
    shutil.copytree(name, f"{name}_old")
    prepared(name, texts)
    old, new, random_ones = digest(f"{name}_old"), digest(name), 20
    for number in count(1):
        shutil.rmtree(name)
        shutil.copytree(f"{name}_old", name)
        status = prepared(name, texts, lambda: strike(name, number))[0]  # noqa: B023
        if status == 0:  # each of its changes had its turn
            pause = draw.uniform(0, 0.1)
            prepared(name, texts, lambda: signal.setitimer(signal.ITIMER_REAL, pause))  # noqa: B023
            random_ones -= 1
        problem = None if status in (0, -9) else f"exit status {status}"
        if digest(name) not in (old, new, None):
            problem = "what was left is neither the old data nor the new"
        status, text = prepared(name, texts)
        if status or digest(name) != new:
            problem = problem or f"prepared again: {text[-300:]}"
        note("killed prepare", problem)
        if not random_ones:
            break


def digest(name):
    """The checksums of a data folder that is whole; None of one without meta.json."""
    if not (Path(name) / "meta.json").exists():
        return None
    opened = Data(f"{name}/", verify=True)
    opened.tokenizer()
    return opened.fingerprint()


def memory(at: Path, data: str, whole: Path):
    """2,000 steps on 256 MB of tokens: the process must not grow by more than 16 MB."""
    name, out = at / "large", at / "flat"
    write_data(str(name), char_tokenizer([chr(97 + i) for i in range(26)]),
               {"train": ["abcdefgh" * 128], "val": ["abcdefgh" * 128]})
    block = np.random.default_rng(0).integers(0, 26, 1 << 24, dtype=np.uint8)
    with open(name / "train_00000.bin", "wb") as f:
        for _ in range(16):
            block.tofile(f)
    meta = json.loads((name / "meta.json").read_text())
    del meta["sha256"]
    meta["splits"]["train"]["shards"][0]["tokens"] = 1 << 28
    (name / "meta.json").write_text(json.dumps(meta))
    pid = start(out, f"--dataset={name}", "--max_steps=2000", "--eval_interval=1000", "--n_layer=1",
                "--n_embd=8", "--block_size=128", "--log_interval=50")
    sizes = []
    for step in range(200, 2000, 200):
        if not wait_for(out, rf"^step +{step}/"):
            break
        status = Path(f"/proc/{pid}/status").read_text()
        sizes.append([int(re.search(rf"{key}:\s+(\d+)", status)[1]) / 1024
                      for key in ("VmRSS", "RssAnon", "RssFile")])
    status = end(pid)
    grown = [b - a for a, b in zip(sizes[0], sizes[-1])]
    print("memory at step 200 and 1,800 of 2,000 (MB: all, anonymous, file):",
          *([round(value, 1) for value in size] for size in (sizes[0], sizes[-1])))
    shutil.rmtree(name)
    note("memory over 2,000 steps", f"grew by {grown} MB" if max(grown) > 16 or len(sizes) < 9
         else f"exit status {status}" if status else None)



WEIRD = [-1, 0, 1, 3, 10**30, -10**30, 1.5, float("inf"), float("nan"), True, None, "", "x", "65",
         "../../etc/passwd", "a\nb", "\0", "x" * 5000, [], [[]], {}, {"a": {"b": []}}, [1] * 1000]


def twist(value, depth=0):
    """A value with one part of it, somewhere, replaced or removed."""
    if depth and draw.random() < 0.3 or not isinstance(value, (dict, list)) or not value:
        nested = []
        for _ in range(draw.choice([0, 0, 0, 900]) if draw.random() < 0.05 else 0):
            nested = [nested]
        return nested or draw.choice(WEIRD)
    value = value.copy()
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if draw.random() < 0.15:
        del value[key]
    else:
        value[key] = twist(value[key], depth + 1)
    return value


def survives(fault, function, *allowed):
    """Counts a reader of a hostile file: it reads, or it says why not in one line."""
    try:
        function()
        problem = None
    except (ValueError, OSError) as e:
        frame = list(traceback.walk_tb(e.__traceback__))[-1][0]
        ours = os.path.dirname(os.path.realpath(frame.f_code.co_filename)) == str(HERE)
        problem = None if ours or isinstance(e, OSError) else (
            f"{type(e).__name__} of {frame.f_code.co_filename}: {str(e)[:200]}")
    except Exception as e:  # noqa: BLE001
        problem = f"{type(e).__name__}: {str(e)[:200]} in {traceback.format_exc()[-300:]}"
    note(fault, problem)


def words(at: Path, data: str, whole: Path):
    """Argument lists: no traceback, nothing taken silently for something else."""
    from hypothesis import HealthCheck, given
    from hypothesis import seed as hypothesis_seed
    from hypothesis import settings as hypothesis_settings
    from hypothesis import strategies as st
    from test_configurator import junk
    known = find_settings(vars(train))
    defaults = {name: default for name, (default, _, _) in known.items()}
    keys = st.sampled_from(list(known)) | st.text(max_size=5)
    sane = st.sampled_from(["1", "2", "0.5", "True", "False", "None", "auto", "-7", "1e3", "1_0"])
    pair = st.tuples(keys, junk | sane).map("--{0[0]}={0[1]}".format)
    word = st.one_of(junk, keys.map("--{}".format), sane, pair)
    likely = st.tuples(st.sampled_from(list(known)), sane).map("--{0[0]}={0[1]}".format)
    accepted = 0

    @hypothesis_seed(seed)
    @hypothesis_settings(max_examples=arguments, deadline=None, database=None,
                         suppress_health_check=list(HealthCheck))
    @given(argv=st.lists(word, max_size=4) | st.lists(pair | likely, max_size=2))
    def lists(argv):
        nonlocal accepted
        space = vars(train) | defaults
        try:
            configure(space, argv)
        except ValueError as e:
            problem = "two lines" if len(str(e).splitlines()) != 1 else None
        except SystemExit as e:
            problem = None if e.code == 0 and {"-h", "--help"} & set(argv) else f"exit {e.code}"
        except Exception as e:  # noqa: BLE001
            problem = repr(e)
        else:
            accepted += 1
            problem = mistaken(space, argv, known)
        note("argument lists", problem and f"{argv}: {problem}", file=stdout)

    stdout = sys.stdout
    with (open(os.devnull, "w") as null, redirect_stdout(null),  # of --help
          mock.patch("configurator.find_settings", lambda space: known)):  # else train.py is parsed
        lists()  # for each of them
    print(f"{accepted} of {TABLE['argument lists'][0]} argument lists were accepted")


def mistaken(space, argv, known) -> str | None:
    """What is wrong with values that were accepted, by a second reading of the words."""
    read = {"int": int, "float": float, "str": str, "bool": {
        "True": True, "true": True, "1": True, "False": False, "false": False, "0": False}.get}
    given, words = {}, list(argv)
    try:
        while words:
            option, equals, text = words.pop(0).partition("=")
            name = option[2:].replace("-", "_")
            _, kind, _ = known[name if option.startswith("--") else option]
            given[name] = text if equals else "True" if kind.startswith("bool") else words.pop(0)
        for name, (default, kind, _) in known.items():
            kind, none, _ = kind.partition(" | None")
            text, right = given.get(name), default
            if text is not None:
                right = None if none and text == "None" else read[kind](text)
            if type(space[name]) is not type(right) or space[name] != right:
                return f"{name} became {space[name]!r}"
    except (LookupError, ValueError) as e:
        return f"was taken, in spite of {e!r}"
    return None


def files(at: Path, data: str, whole: Path):
    """Files from others: no traceback, no code run, nothing read outside their folder."""
    copy, source = at / "hostile", Path(data.partition("=")[2])
    shutil.copytree(source, copy)
    shutil.copytree(whole / "best", at / "model")
    meta = json.loads((copy / "meta.json").read_text())
    del meta["sha256"]

    def read_all():
        opened = Data(f"{copy}/")
        opened.tokenizer()
        for split in (opened.train, opened.val):
            split.rows([0], min(split.tokens, 100))

    for _ in range(hostile):
        (copy / "meta.json").write_text(json.dumps(twist(meta)))
        survives("hostile meta.json", read_all)
    (copy / "meta.json").write_text("[" * 100_000)
    survives("hostile meta.json", read_all)
    for file, read in (("config.json", lambda: GPT.from_pretrained(at / "model")),
                       ("tokenizer.json", lambda: open_tokenizer(at / "model"))):
        good = json.loads((at / "model" / file).read_text())
        for _ in range(hostile):
            (at / "model" / file).write_text(json.dumps(twist(good)))
            survives(f"hostile {file}", read)
        (at / "model" / file).write_text("[" * 100_000)
        survives(f"hostile {file}", read)
        (at / "model" / file).write_text(json.dumps(good))
    weights = at / "model" / "model.safetensors"
    kept = weights.read_bytes()
    for _ in range(hostile // 4):
        weights.write_bytes(kept)
        with open(weights, "rb+") as f:  # in its header
            f.seek(draw.randrange(800))
            f.write(draw.randbytes(draw.randint(1, 4)))
        survives("hostile model.safetensors", lambda: GPT.from_pretrained(at / "model"))

    outside = at / "outside"  # names that would lead to whole files, if they were followed
    outside.mkdir()
    shutil.copy(source / "train_00000.bin", outside)
    (outside / weights.name).write_bytes(kept)
    weights.unlink()
    for way in ("../outside/", f"{outside}/", "x/../../outside/"):
        meta["splits"]["train"]["shards"][0]["file"] = f"{way}train_00000.bin"
        (copy / "meta.json").write_text(json.dumps(meta))
        index = {"weight_map": dict.fromkeys(good, f"{way}{weights.name}")}
        (at / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
        for read in (read_all, lambda: GPT.from_pretrained(at / "model")):
            try:
                problem = f"{way} was followed: {read()}"
            except ValueError as e:
                problem = None if "outside" in str(e) else str(e)
            note("names outside their folder", problem)
    (at / "model" / "model.safetensors.index.json").unlink()
    weights.write_bytes(kept)

    import gzip
    import lzma

    import pyarrow as pa
    import pyarrow.parquet as pq
    row = b'{"text": "some words of a story"}\n' * 20
    pq.write_table(pa.table({"text": ["some words"] * 20}), at / "whole.parquet")
    whole_files = [(".txt", row), (".jsonl", row), (".jsonl.gz", gzip.compress(row)),
                   (".jsonl.xz", lzma.compress(row)), (".parquet", (at / "whole.parquet").read_bytes())]
    for number in range(hostile):
        suffix, raw = whole_files[number % 5]
        file, raw = at / f"document{suffix}", bytearray(raw)
        for _ in range(draw.randint(1, 9)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        file.write_bytes(raw[:draw.choice([len(raw), draw.randrange(len(raw))])])
        survives("hostile documents", lambda: list(read_documents(file)))  # noqa: B023

    good = load_torch(whole / "ckpt.pt")
    out = at / "hostile_run"
    for number in range(hostile // 10):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        with suppress(RecursionError):  # lists too deep to be saved: a file cut short
            torch.save(twist(good), out / "ckpt.pt")
        status = end(start(out, data, "--init_from=auto", "--max_steps=41"))
        good_end = status == 0 and "Traceback" not in said(out)
        note("hostile checkpoint", None if good_end else one_line(status, said(out)))
        survives("hostile checkpoint", lambda: saved.load_model(out))
    canary = at / "canary"
    for path in saved.checkpoints(out)[1:]:
        path.unlink()

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    for number, value in enumerate((Bomb(), {"model": Bomb()}, {"step": 1, "model": {"a": [Bomb()]}})):
        if number % 2:
            (out / "ckpt.pt").write_bytes(pickle.dumps(value))
        else:
            torch.save(value, out / "ckpt.pt")
        note("code in a checkpoint", refused(out, data, "--init_from=auto"))
        survives("code in a checkpoint", lambda: saved.load_model(out))
        survives("code in a checkpoint", lambda: GPT.from_pretrained(out))
        shutil.copy(out / "ckpt.pt", at / "model" / "pytorch_model.bin")
        weights.unlink(missing_ok=True)
        survives("code in a checkpoint", lambda: GPT.from_pretrained(at / "model"))
        note("code in a checkpoint", "it ran" if canary.exists() else None)
    mistakes = ["--out_dir=", "--out_dir=\0", f"--out_dir={whole}/ckpt.pt", "--out_dir=/proc/x/y",
                "--dataset=", "--dataset=\0", "--dataset=/", "--dataset=" + "x" * 5000,
                "--init_from=", "--init_from=/", "--init_from=a\0b", "--init_from=../..",
                "--n_layer=0", "--n_layer=-1", "--n_head=3", "--n_embd=99999999", "--block_size=0",
                "--block_size=9999999999", "--dropout=1.5", "--dropout=-1", "--max_steps=-5",
                "--batch_size=0", "--total_batch_tokens=7", "--total_batch_tokens=0", "--seed=-3",
                "--log_interval=0", "--eval_interval=0", "--warmup_steps=-1", "--grad_clip=-1",
                "--max_skipped=0", "--keep_checkpoints=0", "--lr_schedule=x", "--optimizer=x",
                "--activation=relu", "--device=nothing", "--dtype=int8", "--beta1=1.0",
                "--learning_rate=-1", "--wte_from=nowhere/at all", "--quantize=int3 --eval_only"]
    for argv in mistakes:
        def first(named="out_dir" in argv):
            os.chdir(at)
            if named:
                sys.argv.pop()  # which names another folder

        pid = start(at / "mistaken", data, *argv.split(" --"), first=first)
        note("mistaken settings", one_line(end(pid), said(at / "mistaken")) and
             f"{argv[:60]}: {said(at / 'mistaken')[-300:]}")


SECTIONS = {f.__name__: f for f in (kill, stop, disk, damage, second, ranks, broken, memory,
                                    words, files)}


def main(*names):
    if odd := set(names) - set(SECTIONS):
        raise ValueError(f"no section {min(odd)!r}; there are: {', '.join(SECTIONS)}")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot  # what the children would load, each for itself
    import safetensors.torch  # noqa: F401
    import torch._dynamo
    from tqdm import tqdm
    tqdm.set_lock(threading.RLock())  # its own is shared with the children, which die with it
    tqdm.monitor_interval = 0  # a thread that holds it while this process forks
    gc.collect()
    gc.freeze()
    torch.set_num_threads(1)
    draw.seed(seed)
    at = Path(folder or tempfile.mkdtemp(prefix="faults"))
    at.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    try:
        words = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "far"]
        text = "\n".join(" ".join(draw.choices(words, k=8)) for _ in range(200))
        write_data(f"{at}/data", char_tokenizer(set(text)), {"train": [text], "val": [text[:1000]]})
        data, whole = f"--dataset={at}/data", at / "whole"
        if problem := finish(whole, data, plot=True):
            raise ValueError(f"an undisturbed training fails: {problem}")
        for name in names or SECTIONS:
            clock = time.monotonic()
            (at / name).mkdir()
            SECTIONS[name](at / name, data, whole)
            print(f"--- {name}: {time.monotonic() - clock:.0f} s", flush=True)
    finally:
        if folder is None:
            shutil.rmtree(at, ignore_errors=True)
    print(f"\n{'fault':42}{'tried':>8}{'survived':>10}{'lost':>6}")
    for fault, (tried, lost) in TABLE.items():
        print(f"{fault:42}{tried:8,}{tried - lost:10,}{lost:6,}")
    lost = sum(lost for _, lost in TABLE.values())
    print(f"{'all':42}{sum(tried for tried, _ in TABLE.values()):8,}"
          f"{sum(tried for tried, _ in TABLE.values()) - lost:10,}{lost:6,}   "
          f"({time.monotonic() - begun:.0f} s)")
    sys.exit(lost > 0)


if __name__ == "__main__":
    run(main, globals(), positionals=True)
