"""Training and sampling as a person runs them: resume, ranks, schedules, mistakes."""

import ast
import glob
import importlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    HERE,
    check_equal,
    defaults,
    python,
    rows,
    start,
    two_ranks,
    untimed,
)
from filelock import FileLock

import device
import sample
import train
from checkpoint import restore, save_checkpoint
from configurator import command_line, configure
from data import Data, write_data
from device import Device
from hf import load_torch
from model import GPT, GPTConfig
from optim import AdamW, build_optimizer
from run import Metrics, Run, lr_scale, micro_batch_seed, micro_batches
from tokenizer import char_tokenizer, open_tokenizer, train_bpe

TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
        "--device=cpu", "--sample_tokens=8", "--warmup_steps=2", "--log_interval=1"]
for script in (train, sample):
    defaults(script)  # now, before a test changes them


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A small data set of characters, and one of GPT-2 tokens."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "far"]
    text = "\n".join(" ".join(rng.choice(words, 8)) for _ in range(200))
    write_data(f"{folder}/c", char_tokenizer(set(text)), {"train": [text], "val": [text[:1000]]})
    stories = text.split("\n")
    write_data(f"{folder}/g", open_tokenizer("gpt2"), {"train": stories, "val": stories[:30]})
    return folder


run_train = partial(start, train)


def run_sample(*argv):
    start(sample, *argv, "--device=cpu")


def weights(folder):
    return load_torch(Path(folder) / "ckpt.pt")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_three_and_three_steps_equal_six(shared, tmp_path, optimizer):
    common = [*TINY, f"--dataset={shared}/c", "--dropout=0.2", "--eval_interval=3",
              f"--optimizer={optimizer}",
              "--total_batch_tokens=128", "--lr_schedule=constant"]  # 2 micro-steps
    run_train(*common, "--max_steps=6", f"--out_dir={tmp_path}/six")
    run_train(*common, "--max_steps=3", f"--out_dir={tmp_path}/cut")
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as f:  # logged, but not in the checkpoint
        f.write('{"step": 4, "tokens": 512, "train_loss": 0.0}\n')
    run_train(*common, "--max_steps=6", f"--out_dir={tmp_path}/cut", "--init_from=resume")
    six, cut = weights(tmp_path / "six"), weights(tmp_path / "cut")
    assert cut["step"] == 6 and cut["windows"] == six["windows"] == 6 * 8
    assert cut["best_loss"] == six["best_loss"]
    check_equal(six["model"], cut["model"])
    for i, state in six["optimizer"]["state"].items():
        check_equal(state, cut["optimizer"]["state"][i])
    assert untimed(tmp_path / "six") == untimed(tmp_path / "cut")
    assert [row["step"] for row in rows(tmp_path / "cut")] == list(range(1, 7))


def test_a_resumed_run_from_a_pretrained_model_equals_an_uninterrupted_one(shared, tmp_path):
    """Linear layers of a Hugging Face file lie transposed in memory; the moments of old runs, too."""
    GPT(GPTConfig(16, Data(f"{shared}/c").vocab_size, 2, 2, 16)).save_pretrained(tmp_path / "base")
    model = GPT.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert all(p.is_contiguous() for p in model.parameters())
    common = [*TINY, f"--dataset={shared}/c", "--eval_interval=9", "--lr_schedule=constant",
              "--learning_rate=1e-2", "--sample_tokens=0"]
    for run, steps in (("four", 4), ("cut", 2)):
        run_train(*common, f"--max_steps={steps}", f"--out_dir={tmp_path}/{run}",
                  f"--init_from={tmp_path}/base")
    saved = torch.load(tmp_path / "cut" / "ckpt.pt")
    for state in saved["optimizer"]["state"].values():
        for key, value in state.items():
            state[key] = value.t().contiguous().t() if value.dim() == 2 else value
    torch.save(saved, tmp_path / "cut" / "ckpt.pt")
    run_train(*common, "--max_steps=4", f"--out_dir={tmp_path}/cut", "--init_from=resume")
    check_equal(weights(tmp_path / "four")["model"], weights(tmp_path / "cut")["model"])


def test_the_newest_whole_checkpoint_is_found(shared, tmp_path, capsys):
    common = [*TINY, f"--dataset={shared}/c", "--eval_interval=2", "--lr_schedule=constant"]
    run_train(*common, "--max_steps=8", f"--out_dir={tmp_path}/whole")
    common += [f"--out_dir={tmp_path}/run", "--keep_checkpoints=3"]
    run_train(*common, "--max_steps=8")
    out, newest = tmp_path / "run", tmp_path / "run" / "ckpt.pt"
    assert sorted(p.name for p in out.glob("*.pt")) == ["ckpt-4.pt", "ckpt-6.pt", "ckpt.pt"]
    assert [load_torch(out / name)["step"] for name in ("ckpt-4.pt", "ckpt-6.pt")] == [4, 6]
    raw = bytearray(newest.read_bytes())
    raw[raw.index(weights(out)["model"]["transformer.wte.weight"].numpy().tobytes()) + 9] ^= 4
    newest.write_bytes(raw)
    load_torch(newest)  # which does not notice
    (out / "ckpt.pt.1.tmp").write_text("of a killed run")
    run_train(*common, "--max_steps=8", "--init_from=auto")
    said = capsys.readouterr().out
    assert re.search(r"/ckpt\.pt is damaged: .*; going on from \S+-6\.pt\n", said) and "resuming" in said
    check_equal(weights(tmp_path / "whole")["model"], weights(out)["model"])
    assert [row["step"] for row in rows(out)] == list(range(1, 9))
    assert sorted(p.name for p in out.glob("ckpt*")) == ["ckpt-4.pt", "ckpt-6.pt", "ckpt.pt"]
    for path in out.glob("ckpt*.pt"):
        path.write_bytes(path.read_bytes()[:-9])
    for init_from in ("auto", "resume"):
        with pytest.raises(ValueError, match="is damaged.*nor can the older one be read.*--overwrite"):
            run_train(*common, "--max_steps=8", f"--init_from={init_from}")
        assert len(rows(out)) == 8
    for path in out.glob("ckpt*.pt"):
        path.unlink()
    with pytest.raises(ValueError, match=r"holds a run already \(best\)"):
        run_train(*common, "--max_steps=8", "--init_from=auto")
    shutil.rmtree(out / "best")
    (out / "metrics.jsonl").write_text('{"step": 1}\nnull\n[' + "[" * 9999)  # killed before the first
    run_train(*common, "--max_steps=2", "--init_from=auto")
    assert [row["step"] for row in rows(out)] == [1, 2]


def test_a_second_run_in_the_same_folder_is_refused(shared, tmp_path):
    common = [*TINY, f"--dataset={shared}/c", f"--out_dir={tmp_path}", "--max_steps=1"]
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match=f"using {tmp_path}; wait"):
        run_train(*common)
    with pytest.raises(ValueError, match="n_head"):  # an error frees it, too
        run_train(*common, "--n_head=3")
    run_train(*common)


@pytest.mark.parametrize(("where", "value"), [
    (["step"], -1), (["step"], "5"), (["windows"], None), (["model"], {}), (["model"], []),
    (["model", "transformer.wte.weight"], torch.zeros(1)), (["tokenizer"], 7), (["config"], {}),
    (["config", "n_layer"], 9999), (["config", "n_embd"], -4), (["config", "vocab_size"], 2**24),
    (["config", "more"], 1), (["optimizer"], {}), (["optimizer", "state"], {}),
    (["optimizer", "state", 0, "exp_avg"], torch.zeros(3)), (["optimizer", "param_groups"], [3]),
    (["settings"], "x"), (["data"], "another"), (["scaler"], 0), (["best_loss"], None)])
def test_hostile_checkpoints_are_refused_in_one_line(shared, tmp_path, where, value):
    common = [*TINY, f"--dataset={shared}/c", f"--out_dir={tmp_path}"]
    run_train(*common, "--max_steps=1")
    part = checkpoint = torch.load(tmp_path / "ckpt.pt")
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"ckpt\.pt") as e:
        run_train(*common, "--max_steps=2", "--init_from=auto")
    assert "\n" not in str(e.value)


def test_metrics_after_a_crash_have_no_row_twice(tmp_path):
    metrics = Metrics(tmp_path)
    for step in range(1, 6):
        metrics.log(step=step, tokens=step, train_loss=1 / step, mfu=None)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "tok')
    metrics = Metrics(tmp_path, resume_step=3)
    metrics.log(step=4, tokens=4, train_loss=0.5)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert "mfu" not in rows(tmp_path)[0] and rows(tmp_path)[2]["train_loss"] == 0.3333333


def test_two_ranks_equal_one(shared, tmp_path):
    """The same gradient norms, losses and weights over four updates."""
    common = [HERE / "train.py", *TINY, f"--dataset={shared}/c", "--dropout=0.1", "--max_steps=4",
              "--eval_interval=2", "--total_batch_tokens=256", "--batch_size=4"]
    run_train(*common[1:], f"--out_dir={tmp_path}/one")
    text = two_ranks(*common, f"--out_dir={tmp_path}/two")
    assert text.count("parameters") == 1, text  # one rank prints
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [r["step"] for r in one] == [r["step"] for r in two] == [1, 2, 3, 4]
    for a, b in zip(one, two):
        for key in ("train_loss", "grad_norm", "val_loss"):
            if key in a:
                assert math.isclose(a[key], b[key], rel_tol=1e-5), (key, a, b)
    check_equal(weights(tmp_path / "one")["model"], weights(tmp_path / "two")["model"], 2e-5)
    for run in ("one", "two"):  # one rank goes on where two were
        run_train(*common[1:], f"--out_dir={tmp_path}/{run}", "--max_steps=6", "--init_from=resume")
    assert weights(tmp_path / "two")["windows"] == weights(tmp_path / "one")["windows"] == 6 * 16
    check_equal(weights(tmp_path / "one")["model"], weights(tmp_path / "two")["model"], 2e-5)


def test_ranks_end_well_with_work_in_flight(tmp_path):
    """gloo's threads free tensors while Python shuts down, which aborted every such process."""
    (tmp_path / "job.py").write_text(f"""if True:
        import atexit, sys, torch, torch.distributed as dist
        sys.path.insert(0, {str(HERE)!r})
        from device import Device
        device = Device("cpu")
        atexit.register(print, "at the exit")
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
        for i in range(2000):
            dist.all_reduce(torch.ones(1), async_op=True)
        device.close()
    """)
    text = two_ranks(tmp_path / "job.py")
    assert text.count("at the exit") == 2, text


def test_updates_that_are_not_finite_are_skipped(shared, tmp_path, capsys, monkeypatch):
    common = [*TINY, f"--dataset={shared}/c", f"--out_dir={tmp_path}", "--max_steps=12",
              "--eval_interval=4", "--warmup_steps=0", "--seed=3"]
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def faulty(parameters, limit):
        calls.append(len(calls) + 1)
        norm = clip(parameters, limit)
        return norm * math.nan if calls[-1] in bad else norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", faulty)
    bad = {6, 7}
    run_train(*common, "--log_interval=4")
    text = capsys.readouterr().out
    assert "step 6: the gradient is not finite" in text and "windows 20 to 23" in text
    assert text.count("not finite") == 2 and "done: 12 steps" in text
    assert [row.get("skipped") for row in rows(tmp_path)] == [None, 2, 2]
    assert weights(tmp_path)["skipped"] == 2
    calls.clear()
    bad = set(range(5, 100))
    with pytest.raises(ValueError, match="in 3 steps in a row, up to step 7.*--init_from=resume"):
        run_train(*common, "--log_interval=1", "--max_skipped=3", "--overwrite")
    assert weights(tmp_path)["step"] == 4  # whole, and finite
    assert all(p.isfinite().all() for p in weights(tmp_path)["model"].values())
    monkeypatch.undo()
    run_train(*TINY, f"--dataset={shared}/c", f"--out_dir={tmp_path}", "--max_steps=2", "--eval_interval=1", "--overwrite")
    with pytest.raises(ValueError, match="not finite in 10 steps"):  # for real
        run_train("--init_from=resume", f"--out_dir={tmp_path}", "--max_steps=100", "--learning_rate=1e30", "--device=cpu")
    assert weights(tmp_path)["step"] <= 4  # none from after the weights diverged


def test_several_ranks_are_asked_for_a_stop_every_few_seconds(tmp_path):
    """In every step until its time is known, which is far below five seconds, then with each line."""
    env, asked, model = Device("cpu"), [], torch.nn.Linear(2, 1)
    env.world, env.sum = 2, lambda *values: [2 * value for value in values]
    env.any_rank = lambda flag: asked.append(flag)
    settings = {"seed": 1, "learning_rate": 0.1, "log_interval": 10}
    run = Run(env, tmp_path, model, torch.optim.SGD([{"params": model.parameters(), "peak": 0.1}], 0.1),
              settings, 40, 100)
    for _ in run.steps():
        for _ in run.micro_batches(model, 1):
            run.backward(model(torch.ones(3, 2)).sum(), 6)
        run.update(6)
        run.log()
    assert len(asked) == 10 + 3


def test_an_update_whose_gradient_is_not_finite_changes_nothing():
    """Also by an optimizer that knows nothing of it; and Muon's state is then still empty."""
    env = Device("cpu")
    for make in (lambda model: build_optimizer(model, "adamw", 0.1, 0.1, (0.9, 0.95)),
                 lambda model: build_optimizer(model, "muon", 0.1, 0.1, (0.9, 0.95)),
                 lambda model: AdamW(model.parameters()), lambda model: torch.optim.SGD(model.parameters())):
        model = GPT(GPTConfig(4, 8, 1, 1, 4))
        update, before = make(model), {k: v.clone() for k, v in model.state_dict().items()}
        for bad in (True, False):
            for p in model.parameters():
                p.grad = torch.full_like(p, math.nan if bad else 1.0)
            assert bool(env.update(update, model.parameters(), 1.0).isfinite()) != bad
            assert all(torch.equal(v, before[k]) == bad for k, v in model.state_dict().items())
            assert all(p.grad is None for p in model.parameters())
            if bad and hasattr(update, "adamw"):
                other = make(model)
                restore({"optimizer": update.state_dict(), "scaler": {}, "step": 1, "skipped": 1}, other, env.scaler)
                assert not other.state


def test_an_optimizer_that_ignores_what_the_scaler_found():
    """As fused AdamW on a Mac's GPU does; the scale falls all the same."""
    class Ignorant(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.data -= 0.1 * p.grad

    env, model = Device("cpu"), torch.nn.Linear(2, 2)
    env.type, env.scaler = "mps", torch.amp.GradScaler("cpu", init_scale=8.0)
    update, before = Ignorant(model.parameters(), 0.1), model.weight.detach().clone()
    for bad in (True, False):
        env.scaler.scale(model(torch.full((1, 2), math.inf if bad else 1.0)).sum()).backward()
        env.update(update, model.parameters(), 1.0)
        assert torch.equal(model.weight, before) == bad and env.scaler.get_scale() == 4.0


def test_run_folder_and_sample(shared, tmp_path, capsys):
    out, common = tmp_path / "run", [*TINY, f"--dataset={shared}/g"]
    text = python(HERE / "train.py", *common, "--max_steps=2", "--eval_interval=2",
                  f"--out_dir={out}", cwd=tmp_path)
    assert "validation loss" in text and "a sample" in text and "done: 2 steps" in text
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    row = rows(out)[-1]
    assert {"step", "tokens", "train_loss", "val_loss", "val_ppl", "val_bpb", "lr", "grad_norm",
            "tokens_per_s", "elapsed_s"} <= row.keys()
    assert math.isclose(row["val_ppl"], math.exp(row["val_loss"]), rel_tol=1e-5)
    checkpoint = weights(out)
    assert checkpoint["step"] == 2 and checkpoint["model"].keys() == GPT.from_pretrained(
        out).state_dict().keys()
    transformers = pytest.importorskip("transformers")
    hf = transformers.GPT2LMHeadModel.from_pretrained(out / "best").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "best")
    ids = tokenizer("the cat sat", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == open_tokenizer("gpt2").encode("the cat sat").tolist()
    assert (hf(ids).logits - GPT.from_pretrained(out)(ids)[0]).abs().max() < 1e-4
    text = python(HERE / "sample.py", f"--init_from={out}", "--start", "the cat",
                  "--max_new_tokens=5", "--device=cpu", cwd=tmp_path)
    assert "the cat" in text and "tokens/s" in text
    capsys.readouterr()
    run_sample(f"--init_from={out}/best", "--start", "the cat", "--max_new_tokens=5")
    text = capsys.readouterr().out
    assert "the cat" in text and "tokens/s" in text
    run_sample(f"--init_from={out}", "--num_samples=3", "--temperature=0", "--max_new_tokens=3")
    assert capsys.readouterr().out.count("--- ") == 3
    (tmp_path / "prompt.txt").write_text("a mat " * 60)
    run_sample(f"--init_from={out}", f"--start=FILE:{tmp_path}/prompt.txt", "--max_new_tokens=3")
    assert "the context 16" in capsys.readouterr().out
    run_train(*common, "--max_steps=2", f"--out_dir={out}", "--init_from=auto")
    assert "is finished: 2 of 2" in capsys.readouterr().out
    run_train(*common, "--eval_only", f"--init_from={out}/best")
    assert f"loss {row['val_loss']:.4f}" in capsys.readouterr().out


def test_evaluation_is_the_mean_over_the_whole_split(shared, tmp_path, capsys):
    common = [*TINY, f"--dataset={shared}/c", f"--out_dir={tmp_path}", "--max_steps=1"]
    run_train(*common)
    model = GPT.from_pretrained(tmp_path)
    ids = torch.from_numpy(np.fromfile(shared / "c" / "val_00000.bin", np.uint8).astype(np.int64))

    def mean(T):
        total = 0.0
        for x, y in zip(ids[:-1].split(T), ids[1:].split(T)):
            total += F.cross_entropy(model(x[None])[0][0], y, reduction="sum").item()
        return total / (len(ids) - 1)
    row = rows(tmp_path)[-1]
    assert math.isclose(row["val_loss"], mean(16), rel_tol=1e-5)
    assert math.isclose(row["val_bpb"], mean(16) / math.log(2), rel_tol=1e-4)  # ASCII, no end-of-text
    run_train(*common, "--eval_only", f"--init_from={tmp_path}", "--block_size=8")
    assert f"loss {mean(8):.4f}" in capsys.readouterr().out
    run_train(*common, "--eval_only", "--init_from=resume")  # what ckpt.pt holds
    assert f"loss {row['val_loss']:.4f}" in capsys.readouterr().out


def test_evaluation_holds_no_more_logits_than_its_limit(monkeypatch):
    class Ids:
        tokens, bytes = 5001, None

        def rows(self, starts, length):
            return np.add.outer(np.asarray(starts), np.arange(length)) * 7 % 11

    model, seen = GPT(GPTConfig(64, 11, 1, 1, 8)), []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    losses = set()
    monkeypatch.setattr(train, "block_size", 64)
    for size in (1, 70):
        monkeypatch.setattr(train, "batch_size", size)
        losses.add(train.evaluate(model, Ids(), Device("cpu"))["val_loss"])
    assert len(losses) == 1 and set(seen) == {40}  # 79 windows in two batches of at most 4096 // 64


@pytest.mark.parametrize("fault, told", [
    (RuntimeError("no compiler\nat all"), "failed on 1 of 1 ranks (RuntimeError: no compiler); running eager"),
    (torch.OutOfMemoryError("CUDA out of memory"), None)])
def test_what_cannot_be_compiled_runs_eager_but_for_a_gpu_that_is_full(fault, told, monkeypatch,
                                                                       capsys):
    class Broken(torch.nn.Module):
        def forward(self, x):
            raise fault

    plain, loss = torch.nn.Identity(), lambda model: model(1)
    monkeypatch.setattr(torch, "compile", lambda net, dynamic: Broken())
    if told is None:
        with pytest.raises(torch.OutOfMemoryError):
            Device("cpu").compiled(plain, True, loss)
    else:
        assert Device("cpu").compiled(plain, True, loss) == (plain, plain)
        assert told in capsys.readouterr().out


def test_several_ranks_take_no_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)  # it need not be, here
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "x"),
                        ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert Device().type == "cpu"


def test_interrupted_training_saves_and_goes_on(shared, tmp_path):
    command = [sys.executable, HERE / "train.py", *TINY, f"--dataset={shared}/c",
               f"--out_dir={tmp_path}/run", "--max_steps=100000", "--eval_interval=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step     3/"):
            process.send_signal(signal.SIGINT)
            break
    text = process.stdout.read()
    assert process.wait(60) == 0
    stopped = int(re.search(r"stopped by SIGINT at step (\d+)", text)[1])
    assert "--init_from=resume" in text and weights(tmp_path / "run")["step"] == stopped
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, stopped + 1))
    run_train(*TINY, f"--dataset={shared}/c", f"--out_dir={tmp_path}/run", "--init_from=resume",
              f"--max_steps={stopped + 1}")
    assert weights(tmp_path / "run")["step"] == stopped + 1


@pytest.mark.parametrize(("argv", "word"), [
    (["--dataset=nothing/here"], "prepare_text.py"), (["--dataset=tinystories_missing"], "prepare"),
    (["--n_head=3"], "n_head=2|n_head=4"), (["--max_steps=0"], "max_steps"),
    (["--total_batch_tokens=100"], "--total_batch_tokens=128"),
    (["--total_batch_tokens=96"], "--batch_size=3"), (["--optimizer=sgd"], "adamw"),
    (["--lr_schedule=cos"], "cosine, linear, wsd"), (["--init_from=resume"], "resume from"),
    (["--init_from=./no/folder"], "no folder"), (["--block_size=100000"], "100001"),
    (["--device=tpu"], "--device=cpu"), (["--dtype=float8"], "float8"),
    (["--dtype=float16"], "float16 is for GPUs"), (["--batch_size=0"], "batch_size"),
    (["--seed=-1"], "seed"), (["--learning_rate=-1"], "learning_rate"), (["--beta1=1"], "beta1"),
    (["--block_size=0"], "block_size"), (["--sample_tokens=-1"], "sample_tokens"),
    (["--out_dir= "], "out_dir=' '"), (["--init_from="], "init_from=''"),
    (["--dataset=a\0b"], "dataset="), (["--eval_tokens=0"], "eval_tokens"),
    (["--adamw_learning_rate=-1"], "adamw_learning_rate"), (["--min_lr_scale=-0.1"], "min_lr_scale"),
    (["--min_lr_scale=1.1"], "min_lr_scale"), (["--decay_fraction=-1"], "decay_fraction"),
    (["--decay_fraction=2"], "decay_fraction"), (["--quantize=int8"], "--eval_only"),
    (["--seed=99999999999999999999"], "seed must"), (["--learning_rate=inf"], "learning_rate must"),
    (["--eval_only", "--init_from=auto"], "no checkpoint")])
def test_mistakes_are_one_line(shared, tmp_path, argv, word):
    common = [*TINY, f"--dataset={shared}/c", f"--out_dir={tmp_path}/run", "--max_steps=1"]
    with pytest.raises(ValueError, match=word) as e:
        run_train(*common, *argv)
    assert "\n" not in str(e.value)


def test_mistakes_on_the_command_line(shared, tmp_path):
    text = python(HERE / "train.py", "--dataset=missing/data", fails=True)
    assert "error: no prepared data" in text
    text = python(HERE / "sample.py", f"--init_from={tmp_path}", fails=True)
    assert "not a model folder" in text


def test_resuming_something_else_is_refused(shared, tmp_path):
    common = [*TINY, f"--dataset={shared}/c", f"--out_dir={tmp_path}"]
    run_train(*common, "--max_steps=1")
    with pytest.raises(ValueError, match="n_embd=16, not 32"):
        run_train(*common, "--max_steps=2", "--init_from=resume", "--n_embd=32")
    with pytest.raises(ValueError, match="was trained with another tokenizer than .*/g has now"):
        run_train(*common, "--max_steps=2", "--init_from=auto", f"--dataset={shared}/g")
    with pytest.raises(ValueError, match="its tokenizer .*another than that of data set"):
        run_train(*common, "--eval_only", f"--init_from={tmp_path}", f"--dataset={shared}/g")
    run_train(*common, "--max_steps=2", f"--init_from={tmp_path}/best", "--overwrite")
    (tmp_path / "ckpt.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"ckpt\.pt"):
        run_train(*common, "--max_steps=2", "--init_from=resume")


def test_resuming_on_changed_data_is_refused_and_other_changes_are_said(tmp_path, capsys):
    def prepare(alphabet, text):
        write_data(f"{tmp_path}/d", char_tokenizer(alphabet), {"train": [text], "val": [text]})

    common = [*TINY, f"--dataset={tmp_path}/d", f"--out_dir={tmp_path}/run"]
    prepare("abc", "abc" * 99)
    run_train(*common, "--max_steps=1")
    for alphabet, text, word in (("abc", "cba" * 99, "other data"), ("abcd", "abc" * 99, "tokenizer")):
        prepare(alphabet, text)
        with pytest.raises(ValueError, match=word):
            run_train(*common, "--max_steps=2", "--init_from=resume")
    prepare("abc", "abc" * 99)
    run_train(*common, "--max_steps=2", "--init_from=resume", "--batch_size=8")
    assert "changed since then: max_steps 1 -> 2, batch_size 4 -> 8\n" in capsys.readouterr().out


def test_a_used_folder_is_not_written_over_unasked(shared, tmp_path, monkeypatch):
    common = [*TINY, f"--dataset={shared}/c", f"--out_dir={tmp_path}/run", "--eval_interval=2"]
    out, files = tmp_path / "run", {}

    def content():
        return {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.suffix in (
            ".pt", ".jsonl", ".safetensors")}

    (out / "best").mkdir(parents=True)
    for kept in ("results.json", "best/config.json"):
        (out / kept).write_text("{}")
        with pytest.raises(ValueError, match=rf"holds a run already \(.*{kept[:4]}.*--overwrite"):
            run_train(*common)
        (out / kept).unlink()
    (out / "adapter").mkdir()
    (out / "adapter" / "mine.bin").touch()  # what the run would remove
    with pytest.raises(ValueError, match=r"holds a run already \(adapter\); give another"):
        run_train(*common)
    shutil.rmtree(out / "adapter")
    (out / "metrics.jsonl").write_text('{"step": 9}\n')  # a run that never saved is no run
    (out / "new").mkdir()  # what is nobody's run stays
    (out / "new" / "notes.txt").write_text("mine")
    run_train(*common, "--max_steps=4")
    assert (out / "new" / "notes.txt").read_text() == "mine"
    shutil.rmtree(out / "new")
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4]
    files = content()
    with pytest.raises(ValueError, match=r"\(best, ckpt-2.pt, ckpt.pt\); .*--init_from=resume.*--overwrite"):
        run_train(*common, "--max_steps=4")
    for init_from in ("resume", "auto"):
        with pytest.raises(ValueError, match=f"--init_from={init_from} goes on"):
            run_train(*common, "--overwrite", f"--init_from={init_from}")
    saved = torch.save
    monkeypatch.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(RuntimeError("disk")))
    with pytest.raises(OSError, match="disk"):  # the new run's first save does not succeed
        run_train(*common, "--max_steps=2", "--overwrite", "--seed=3")
    assert {name: data for name, data in content().items() if name.parts[0] != ".new"} == files
    monkeypatch.setattr(torch, "save", saved)
    run_train(*common, "--max_steps=2", "--overwrite", "--seed=3")
    assert weights(out)["settings"]["seed"] == 3 and len(rows(out)) == 2
    assert sorted(p.name for p in out.iterdir()) == [
        ".lock", "best", "ckpt.pt", "loss.png", "metrics.jsonl"]
    run_train(*common, "--eval_only", f"--init_from={out}")  # asks nothing


def test_a_replacement_that_was_killed_is_finished(shared, tmp_path):
    """Before each change that replacing an old run makes to the folder."""
    import checkpoint
    for number in range(1, 20):
        out = tmp_path / str(number)
        for folder, text in ((out, "old"), (out / ".new", "new")):
            (folder / "best").mkdir(parents=True)
            for name in ("ckpt.pt", "best/config.json", "metrics.jsonl", f"{text}.txt"):
                (folder / name).write_text(text)
        (out / "ckpt-2.pt").write_text("old")
        left = number

        def kill(event, args):
            nonlocal left
            if event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patched:
            for name in ("replace", "unlink", "rmdir"):
                real = getattr(os, name)
                patched.setattr(os, name, lambda *a, real=real, **k: (kill("os.remove", a), real(*a, **k))[1])
            with suppress(KeyboardInterrupt):
                checkpoint.replace_run(out)
        checkpoint.replace_run(out)
        assert (out / "ckpt.pt").read_text() == (out / "best" / "config.json").read_text() == "new"
        assert sorted(p.name for p in out.iterdir()) == [
            "best", "ckpt.pt", "metrics.jsonl", "new.txt", "old.txt"]
        if left > 0:
            break
    assert number > 5


def test_a_model_with_another_tokenizer_of_the_same_size_is_refused(tmp_path, capsys):
    text = "the cat sat on the mat and ran far " * 20
    for name, own in (("a", train_bpe([text], 262)), ("b", train_bpe([text[::-1]], 262))):
        write_data(f"{tmp_path}/{name}", own, {"train": [text], "val": [text]})
    common = [*TINY, "--max_steps=1", f"--out_dir={tmp_path}/run"]
    run_train(*common, f"--dataset={tmp_path}/a")
    model = f"{tmp_path}/run/best"
    for argv in (["--eval_only", f"--init_from={tmp_path}/run"], [f"--init_from={model}"],
                 [f"--wte_from={model}"]):
        with pytest.raises(ValueError, match=r"run\S*: its tokenizer .* of data set \S+/b .*--tokenizer="):
            run_train(*common, f"--dataset={tmp_path}/b", f"--out_dir={tmp_path}/other", *argv)
    for argv, word in ((["--eval_only", "--block_size=4096"], "block_size=4096 is more than the"),
                       ([f"--wte_from={model}"], "wte_from is for a new network")):
        with pytest.raises(ValueError, match=word):
            run_train(*common, f"--dataset={tmp_path}/a", f"--out_dir={tmp_path}/other", f"--init_from={model}", *argv)
    for file in ("tokenizer.json", "tokenizer_config.json"):  # the same in other files
        os.unlink(f"{model}/{file}")
    capsys.readouterr()
    run_train(*common, f"--dataset={tmp_path}/a", "--eval_only", f"--init_from={model}")
    with open(tmp_path / "a" / "val_00000.bin", "rb") as f:
        assert f"on {tmp_path}/a, {len(f.read()) // 2 - 1} tokens: loss" in capsys.readouterr().out


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "ckpt.pt", {"step": 1})

    def full(*args):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path / "ckpt.pt", {"step": 2})
    assert load_torch(tmp_path / "ckpt.pt") == {"step": 1}


def test_resume_takes_the_settings_of_today(shared, tmp_path):
    common = [*TINY, f"--dataset={shared}/c", f"--out_dir={tmp_path}"]
    run_train(*common, "--max_steps=1")
    run_train(*common, "--max_steps=2", "--init_from=resume", "--weight_decay=0.3", "--beta2=0.9")
    groups = weights(tmp_path)["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    assert all(tuple(g["betas"]) == (0.9, 0.9) for g in groups)


def test_a_resumed_run_keeps_its_arithmetic_and_its_checkpoints(shared, tmp_path):
    common = [*TINY, f"--dataset={shared}/c", f"--out_dir={tmp_path}", "--eval_interval=1"]
    run_train(*common, "--max_steps=4", "--keep_checkpoints=4", "--dtype=bfloat16")
    run_train("--init_from=resume", f"--out_dir={tmp_path}", "--max_steps=5", "--device=cpu")
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["ckpt-2.pt", "ckpt-3.pt", "ckpt-4.pt", "ckpt.pt"]
    checkpoint = weights(tmp_path)
    assert checkpoint["settings"]["dtype"] == "bfloat16"
    checkpoint["settings"] |= {"dtype": "float16", "revision": "v2"}  # of a GPU, from a hub name
    torch.save(checkpoint, tmp_path / "changed")  # not over the file that it is mapped to
    os.replace(tmp_path / "changed", tmp_path / "ckpt.pt")
    run_train("--eval_only", f"--out_dir={tmp_path}", "--device=cpu")


def test_an_empty_state_of_muon_is_refused(shared, tmp_path):
    common = [*TINY, f"--dataset={shared}/c", f"--out_dir={tmp_path}", "--optimizer=muon"]
    run_train(*common, "--max_steps=1")
    checkpoint = torch.load(tmp_path / "ckpt.pt")
    checkpoint["optimizer"]["state"] = {}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="state of its optimizer is empty"):
        run_train(*common, "--max_steps=2", "--init_from=resume")


def test_the_command_that_goes_on_begins_nothing_anew(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed=2", "--overwrite", "--init_from", "auto"])
    assert command_line(init_from="resume") == "python train.py --seed=2 --init_from=resume"
    run_train(*TINY, f"--dataset={shared}/c", f"--out_dir={tmp_path}/new", "--max_steps=1",
              "--init_from=auto")
    assert f"there is no run in {tmp_path}/new yet: a new one begins" in capsys.readouterr().out


def test_a_diverged_run_still_logs(tmp_path, monkeypatch):
    metrics, drawn = Metrics(tmp_path), []
    for step, loss in enumerate([3.0, 2.5, math.nan, math.inf, 2.0], 1):
        metrics.log(step=step, tokens=step * 10, train_loss=loss, elapsed_s=1.0)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text() and len(rows(tmp_path)) == 5
    curve = metrics.sketch().splitlines()
    assert "3.000 │" in curve[1] and "•" in curve[1] and "2.000 │" in curve[9]
    monkeypatch.setattr("matplotlib.figure.Figure.savefig",
                        lambda figure, file, **_: drawn.append(figure) or file.touch())
    metrics.plot()
    assert drawn[0].axes[0].get_legend_handles_labels()[1] == ["training"]


def test_mfu_only_of_chips_that_are_known(monkeypatch):
    device = Device("cpu")
    device.type, device.dtype = "cuda", torch.bfloat16
    for name, peak in (("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12),
                       ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GeForce RTX 4090", 165.2e12),
                       ("NVIDIA L4", 121e12), ("NVIDIA RTX A1000", None), ("NVIDIA L400", None),
                       ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("AMD Instinct", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert device.peak_flops() == peak, name


def test_schedules():
    def scales(schedule, **options):
        return [lr_scale(schedule, s, 100, 10, 0.1, **options) for s in range(100)]

    for schedule in ("cosine", "linear", "wsd", "constant"):
        s = scales(schedule)
        assert s[0] == 0.1 and s[9] == 1.0 and s[10] == pytest.approx(1.0)
        assert sorted(s[10:], reverse=True) == s[10:]
    assert scales("cosine")[55] == pytest.approx(0.55)
    assert scales("linear")[55] == pytest.approx(0.55)
    assert scales("wsd")[80] == pytest.approx(1) and scales("wsd")[90] == pytest.approx(0.55)
    assert lr_scale("linear", 100, 100, 10, 0.1) == pytest.approx(0.1)
    assert lr_scale("cosine", 100, 100, 10, 0.1) == pytest.approx(0.1)
    assert scales("constant")[99] == 1.0
    with pytest.raises(ValueError, match="cosine, linear"):
        lr_scale("exponential", 50, 100, 10)


def test_micro_batches():
    assert micro_batches(None, 12, 64, 1) == 1
    assert micro_batches(524_288, 16, 1024, 8) == 4
    with pytest.raises(ValueError, match="--total_batch_tokens=1344 or --batch_size=4"):
        micro_batches(1536, 7, 64, 3)


def test_micro_batch_seeds_differ():
    seeds = {micro_batch_seed(s, step, micro) for s in range(4) for step in range(50)
             for micro in range(16)}
    assert len(seeds) == 4 * 50 * 16 and all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize("config", sorted(glob.glob("config/*.py", root_dir=HERE)))
def test_every_config_parses(config):
    text = ast.get_docstring(ast.parse((HERE / config).read_text(encoding="utf-8")))
    name, = set(re.findall(rf"(\w+)\.py {config}", text)) or {"train"}  # the script it is for
    configure(dict(vars(importlib.import_module(name))), [config])


def test_scripts_do_nothing_on_import():
    names = [p.stem for p in HERE.glob("*.py") if not p.stem.startswith("test_")]
    text = python("-c", f"import sys; sys.argv = ['x', '--junk']; import {', '.join(names)}")
    assert text == ""


# ---- what is not given again ----

def test_a_run_goes_on_without_its_config_and_can_move(shared, tmp_path, capsys, monkeypatch):
    """The same as a run that was never stopped, from the checkpoint's settings and another path of the data."""
    common = [*TINY, "--n_layer=1", "--max_steps=4", "--eval_interval=2", "--sample_tokens=0"]
    shutil.copytree(shared / "c", tmp_path / "moved")
    run_train(*common, f"--dataset={shared}/c", f"--out_dir={tmp_path}/whole")
    monkeypatch.setattr(sys, "argv", ["train.py", "config/x.py"])
    run_train(*common, f"--dataset={shared}/c", f"--out_dir={tmp_path}/half", "--max_steps=2")
    monkeypatch.setattr(sys, "argv", ["train.py", "--init_from=resume"])
    run_train("--init_from=resume", f"--out_dir={tmp_path}/half", "--max_steps=4", "--device=cpu",
              f"--dataset={tmp_path}/moved")
    assert "changed since then: " in (said := capsys.readouterr().out) and "/moved'" in said
    states = [load_torch(tmp_path / name / "ckpt.pt") for name in ("whole", "half")]
    assert all(torch.equal(v, states[1]["model"][k]) for k, v in states[0]["model"].items())
    assert states[1]["command"] == "python train.py config/x.py"
    with pytest.raises(ValueError, match=r"n_head=2, not 1; n_layer=1, not 3; .*it was begun by: python train.py config/x.py"):
        run_train("--init_from=resume", f"--out_dir={tmp_path}/half", "--n_layer=3", "--n_head=1")


def test_evaluation_without_a_model_is_of_the_run(shared, tmp_path, capsys):
    with pytest.raises(ValueError, match="there is no checkpoint in .*; name a model with --init_from"):
        run_train("--eval_only", f"--out_dir={tmp_path}/run", f"--dataset={shared}/c")
    run_train(*TINY, f"--dataset={shared}/c", f"--out_dir={tmp_path}/run", "--max_steps=2", "--sample_tokens=0")
    best = rows(tmp_path / "run")[-1]["val_loss"]
    capsys.readouterr()
    run_train("--eval_only", f"--out_dir={tmp_path}/run", "--device=cpu")
    assert f"loss {best:.4f}" in capsys.readouterr().out


def test_a_best_loss_is_of_its_measure(shared, tmp_path, capsys):
    """With other evaluation tokens the best model is sought anew, and best/ follows."""
    common = [*TINY, f"--dataset={shared}/c", f"--out_dir={tmp_path}", "--eval_interval=1", "--sample_tokens=0"]
    run_train(*common, "--max_steps=2", "--eval_tokens=3")
    state = load_torch(tmp_path / "ckpt.pt")
    save_checkpoint(tmp_path / "ckpt.pt", state | {"best_loss": 0.001})  # not into the file that is mapped
    run_train(*common, "--max_steps=3", "--init_from=resume", "--eval_tokens=None")
    assert "the best is sought anew" in capsys.readouterr().out
    assert load_torch(tmp_path / "ckpt.pt")["best_loss"] > 0.1
    model = GPT.from_pretrained(tmp_path / "best").state_dict()
    assert all(torch.equal(v, model[k]) for k, v in load_torch(tmp_path / "ckpt.pt")["model"].items())


def test_sizes_that_a_pretrained_model_decides(shared, tmp_path, capsys):
    run_train(*TINY, f"--dataset={shared}/c", f"--out_dir={tmp_path}/a", "--max_steps=1")
    start = [f"--init_from={tmp_path}/a", f"--dataset={shared}/c", f"--out_dir={tmp_path}/b", "--batch_size=2",
             "--max_steps=1", "--device=cpu", "--sample_tokens=0"]
    with pytest.raises(ValueError, match="n_layer=2, not 5"):
        run_train(*start, "--n_layer=5")
    with pytest.raises(ValueError, match=r"block_size=99 .*--block_size=16 would do"):
        run_train(*start, "--block_size=99")
    run_train(*start)  # its own context
    assert load_torch(tmp_path / "b" / "ckpt.pt")["config"]["block_size"] == 16
    run_train("--init_from=resume", f"--out_dir={tmp_path}/b", "--max_steps=2", "--device=cpu")
    assert load_torch(tmp_path / "b" / "ckpt.pt")["step"] == 2


def test_the_newest_run_is_found_wherever_it_lies(shared, tmp_path, monkeypatch, capsys):
    import checkpoint
    monkeypatch.chdir(tmp_path)
    for out in ("out", "out/exp/one", "elsewhere"):
        run_train(*TINY, f"--dataset={shared}/c", f"--out_dir={tmp_path}/{out}", "--max_steps=1", "--overwrite")
        assert checkpoint.newest_run() == out
    config = tmp_path / "elsewhere" / "best" / "config.json"
    config.write_text(config.read_text().replace("GPT2LMHeadModel", "GPT2ForSequenceClassification"))
    assert checkpoint.newest_run() == "out/exp/one"
    assert "elsewhere, is a classifier, see what it makes of a text by: python finetune_cls.py" in capsys.readouterr().out


def test_a_model_that_is_nearly_named_is_not_sought_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mymodel").mkdir()
    for name, near in (("weight", "weights"), ("mymodle", "mymodel")):
        with pytest.raises(ValueError, match=f"no folder {name}; did you mean {near}"):
            GPT.from_pretrained(name)


@pytest.mark.parametrize("environ, told", [
    ({"WORLD_SIZE": "2"}, "not RANK and MASTER_ADDR and MASTER_PORT; start all ranks by torchrun"),
    ({"WORLD_SIZE": "2", "RANK": "1"}, "not MASTER_ADDR and MASTER_PORT"),
    ({"RANK": "1"}, "RANK=1 is in the environment, but no WORLD_SIZE"),
    ({"SLURM_NTASKS": "2"}, r"a scheduler started 2 tasks \(SLURM_NTASKS\)"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE")])
def test_half_a_launch_is_refused(environ, told):
    with pytest.raises(ValueError, match=told):
        device.check_launch(environ)
    device.check_launch({"SLURM_NTASKS": "1"})


class FakeWandb(types.ModuleType):
    """Notes how it was called; its runs have the id w7."""

    def __init__(self, fault=None):
        super().__init__("wandb")
        self.begun, self.rows, self.fault = [], [], fault

    def init(self, **options):
        if self.fault:
            raise self.fault
        self.begun.append(options)
        return types.SimpleNamespace(id="w7", log=lambda row, step: self.rows.append(step))


def test_wandb_goes_on_with_its_run_and_begins_first(shared, tmp_path, monkeypatch):
    common = [*TINY, f"--dataset={shared}/c", "--wandb_project=p", "--sample_tokens=0"]
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(ValueError, match="pip install wandb"):
        run_train(*common, "--max_steps=1", f"--out_dir={tmp_path}/a")
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(RuntimeError("api_key not configured")))
    with pytest.raises(ValueError, match="api_key not configured.*wandb login"):
        run_train(*common, "--max_steps=1", f"--out_dir={tmp_path}/b")
    assert [path.name for path in tmp_path.glob("?/*")] == [".lock", ".lock"]  # nothing was begun
    common.append(f"--out_dir={tmp_path}/c")
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_train(*common, "--max_steps=1")
    run_train(*common, "--max_steps=2", "--init_from=resume")
    assert [(one["id"], one["resume"]) for one in fake.begun] == [(None, "allow"), ("w7", "allow")]
    assert fake.rows == [1, 2]
