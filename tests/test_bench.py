"""The benchmark's parts that run in seconds; its figures are not tests."""

import json

import pytest
import torch
from conftest import HERE, defaults, python

import bench
from checkpoint import save_best
from configurator import configure
from model import GPT, GPTConfig
from tokenizer import open_tokenizer

DEFAULTS = defaults(bench)


def run_bench(*argv):
    vars(bench).update(DEFAULTS)
    bench.main(*configure(vars(bench), list(argv), (*bench.COMMANDS, *bench.PARTS), True))


@pytest.mark.parametrize("who", ["ours", "transformers"])
def test_measured_steps(who, monkeypatch, capfd):
    monkeypatch.setitem(bench.PRESETS, "gpt2", GPTConfig(16, 50257, 1, 2, 16))
    run_bench("step", who, "float32", "--batch_size=1", "--block_size=8", "--steps=2",
              "--device=cpu")
    steps = json.loads(capfd.readouterr().out)
    assert [len(step) for step in steps] == [4, 4] and min(map(min, steps)) > 0


def test_instructions_beside_peft(tmp_path):
    save_best(tmp_path, GPT(GPTConfig(512, 256, 1, 2, 16)), open_tokenizer("bytes"))
    (tmp_path / "data.json").write_text(json.dumps([
        {"instruction": f"Add {n} and 1.", "input": None, "output": str(n + 1)} for n in range(40)]))
    text = python(HERE / "bench.py", "instruct", "--data=data.json", "--init_from=.", "--repeats=1",
                  "--device=cpu", cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    ours, theirs = (line.replace(",", "").split() for line in text.splitlines()
                    if line[:4] in ("ours", "PEFT"))
    assert min(map(float, ours[1:] + theirs[1:])) > 0 and theirs[3] == "1.00"


def test_decoding(monkeypatch, capsys):
    monkeypatch.setitem(bench.PRESETS, "gpt2", GPTConfig(1024, 50257, 1, 2, 16))
    run_bench("decode", "--device=cpu", "--new=3", "--batch", "1", "2", "--repeats=1", "--prompt=4")
    rows = [line.split("4+3")[1] for line in capsys.readouterr().out.splitlines() if "4+3" in line]
    names = ["ours float32", "ours bfloat16", "ours int8", "ours, unprepared", "transformers"]
    assert [row[:19].strip() for row in rows] == names * 2
    assert rows[4].split()[-1] == "1.00" and all(float(row.split()[-3]) > 0 for row in rows)


def test_the_clock_waits_for_a_gpu(monkeypatch):
    for kind in (torch.cuda, torch.mps):
        waited = []
        monkeypatch.setattr(kind, "is_available", lambda: True)
        monkeypatch.setattr(kind, "synchronize", lambda waited=waited: waited.append(1))
        bench.timed(lambda: None)
        assert len(waited) == 2
        monkeypatch.setattr(kind, "is_available", lambda: False)


@pytest.mark.parametrize(("argv", "word"), [
    (["race"], "--peer=FOLDER"), (["race", f"--peer={HERE}", "--dataset=no/data"], "no prepared"),
    (["train", "--kinds", "int8"], "float32, bfloat16 or float16"),
    (["train", "--peer=no/where"], "no model.py"), (["train", "--steps=0"], "steps"),
    (["train", "--preset=gpt3"], "gpt2-xl"), (["decode", "--new", "2000"], "1 … 1008"),
    (["decode", "--kinds", "int4"], "int4"), (["instruct"], "--data=FILE"),
    (["decode", "extra"], "unexpected")])
def test_mistakes_are_one_line(argv, word):
    with pytest.raises(ValueError, match=word) as e:
        run_bench(*argv, "--device=cpu")
    assert "\n" not in str(e.value)
