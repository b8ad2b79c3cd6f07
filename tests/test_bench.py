"""The benchmark's parts that run in seconds; its figures are not tests."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_train import script

import bench
from common import save_best
from configurator import configure, find_settings
from model import GPT, GPTConfig
from tokenizer import open_tokenizer

HERE = Path(__file__).resolve().parent.parent
DEFAULTS = {name: default for name, (default, _, _) in find_settings(vars(bench)).items()}


def run_bench(*argv):
    vars(bench).update(DEFAULTS)
    bench.main(*configure(vars(bench), list(argv), bench.COMMANDS, True))


def test_a_measured_step():
    text = script(HERE / "bench.py", "step", "ours", "float32", "--batch_size=1", "--block_size=8",
                  "--steps=2", "--device=cpu")
    found = json.loads(text.splitlines()[0])
    assert [len(step) for step in found["parts"]] == [4, 4] and min(map(min, found["parts"])) > 0
    assert found["peak"] > 2  # GB: weights, gradients and two moments of 124 M parameters


def test_instructions_beside_peft(tmp_path):
    save_best(tmp_path, GPT(GPTConfig(512, 256, 1, 2, 16)), open_tokenizer("bytes"))
    (tmp_path / "data.json").write_text(json.dumps([
        {"instruction": f"Add {n} and 1.", "input": None, "output": str(n + 1)} for n in range(40)]))
    text = script(HERE / "bench.py", "instruct", "--data=data.json", "--init_from=.", "--repeats=1",
                  "--device=cpu", cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    ours, theirs = (line.replace(",", "").split() for line in text.splitlines()
                    if line[:4] in ("ours", "PEFT"))
    assert min(map(float, ours[1:] + theirs[1:])) > 0 and theirs[3] == "1.00"


def test_on_a_gpu(monkeypatch, capsys):
    """What its defaults and clock do where there is no CPU: int8 left out, the device waited for."""
    vars(bench).update(DEFAULTS)
    monkeypatch.setitem(bench.PRESETS, "gpt2", GPTConfig(16, 64, 1, 2, 16))
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = bench.decoders(SimpleNamespace(type="cuda", device="cpu"))
    assert list(found) == ["ours float32", "ours bfloat16", "ours, unprepared"]
    assert "int8 weights are for CPUs" in capsys.readouterr().out
    for kind in (torch.cuda, torch.mps):
        waited = []
        monkeypatch.setattr(kind, "is_available", lambda: True)
        monkeypatch.setattr(kind, "synchronize", lambda waited=waited: waited.append(1))
        bench.timed(lambda: None)
        assert len(waited) == 2
        monkeypatch.setattr(kind, "is_available", lambda: False)


@pytest.mark.parametrize(("argv", "word"), [
    (["race"], "--peer=FOLDER"), (["race", "--peer=.", "--dataset=no/data"], "is missing"),
    (["train", "--kinds", "int8"], "float32, bfloat16 or float16"),
    (["train", "--peer=no/where"], "no model.py"), (["train", "--steps=0"], "steps"),
    (["train", "--preset=gpt3"], "gpt2-xl"), (["train", "--block_size=2000"], "1024"),
    (["decode", "--new", "2000"], "1 … 1008"), (["decode", "--kinds", "int4"], "int4"),
    (["instruct"], "--data=FILE"), (["instruct", "--data=no/file"], "no/file is none"),
    (["step", "ours"], "bench.py train"), (["growth", "extra"], "unexpected")])
def test_mistakes_are_one_line(argv, word):
    with pytest.raises(ValueError, match=word) as e:
        run_bench(*argv, "--device=cpu")
    assert "\n" not in str(e.value)
