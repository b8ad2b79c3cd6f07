"""Runs side by side: groups of seeds, settings that differ, the picture, mistakes."""

import json
from statistics import mean, stdev

import pytest
import torch
from conftest import python

from files import HERE
from tokenizer import open_tokenizer


@pytest.fixture
def write(tmp_path):
    """write(name, losses, **settings) makes a run's folder; returns its path."""
    def run(name, losses, **settings):
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"step": i, "tokens": 64 * i, "train_loss": loss + 0.1, "val_loss": loss,
                 "tokens_per_s": 1000.0, "elapsed_s": 6.0 * i} for i, loss in enumerate(losses, 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"out_dir": name, "init_from": "scratch", "lr": 1.0} | settings
        torch.save({"settings": settings}, folder / "ckpt.pt")
        return folder
    return run


def compare(*words) -> list[str]:
    return python(HERE / "compare.py", *words).splitlines()


def test_seeds_are_one_line(write, tmp_path):
    seeds = [write(f"seed{n}", [3.0, loss, loss + 0.5], seed=n, init_from=init) for n, loss, init in
             ((1, 2.0, "scratch"), (2, 2.1, "resume"), (3, 2.3, "auto"))]
    other = write("other", [4.0, 3.0], seed=1, lr=2.0)
    settings, lr, _, head, line, last, curves = compare(*seeds, other, f"--png={tmp_path / 'c.png'}")
    assert settings.split("  ")[-1].strip() == "other" and lr.split() == ["lr", "1.0", "2.0"]
    best = [2.0, 2.1, 2.3]
    assert f"{mean(best):.4f} ± {stdev(best):.4f}" in line and "2.6333" in line  # the final one
    assert line.split()[:4] == ["seed1", "…", "seed3", "3"] and "seed1 … seed3" in settings
    assert last.split() == ["other", "1", "2", "128", "0.2", "val", "3.0000", "3.0000", "1,000"]
    assert "bits per byte" not in head and "accuracy" not in head  # which none of them has
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG") and "c.png" in curves


def test_what_cannot_be_compared_is_said(write, tmp_path):
    """Runs of one setting that end at other steps, losses of other tokens; the same folder twice is one run."""
    short, long = write("a", [3.0, 2.0], seed=1), write("b", [3.0, 2.0, 1.0], seed=2)
    lines = compare(short, f"{short}/", long, f"--png={tmp_path / 'c.png'}")
    assert lines[1].split()[3] == "2" and lines[2] == "note: the runs of a … b end at 2 to 3 steps"
    for folder, name in ((short, "bytes"), (long, "weights")):
        checkpoint = torch.load(folder / "ckpt.pt") | {"tokenizer": open_tokenizer(name).to_json()}
        torch.save(checkpoint, folder / "ckpt.pt")
    lines = compare(short, long, f"--png={tmp_path / 'c.png'}")
    assert lines[1].split()[:2] == ["tokenizer", "bytes"] and "different text" in lines[-2]


def test_sizes_are_those_of_the_network_and_an_evaluation_alone_is_of_the_same_text(write, tmp_path):
    """A run from a pretrained model that was resumed knows its sizes, one that was not has defaults."""
    same = write("a", [2.0], seed=1, n_layer=2), write("b", [2.1], seed=2, n_layer=4)
    tokenizer = open_tokenizer("weights").to_json()
    for folder in same:
        settings = torch.load(folder / "ckpt.pt")["settings"]
        torch.save({"settings": settings, "config": {"n_layer": 2}, "tokenizer": tokenizer}, folder / "ckpt.pt")
    zero = write("zero", [3.0], lr=2.0)
    (zero / "ckpt.pt").unlink()
    (zero / "results.json").write_text('{"settings": {"lr": 2.0}}')
    said = "\n".join(compare(*same, zero, f"--png={tmp_path / 'c.png'}"))
    assert "a … b     2" in said and "different text" not in said


def test_runs_without_checkpoint_or_validation(write, tmp_path):
    going = write("going", [2.0])
    (going / "ckpt.pt").unlink()
    (going / ".new").mkdir()
    (going / "metrics.jsonl").rename(going / ".new" / "metrics.jsonl")
    done = write("done", [3.0])
    (done / "ckpt.pt").unlink()
    (done / "results.json").write_text('{"settings": {"dataset": "a"}}')
    (done / "metrics.jsonl").write_text('{"step": 1, "tokens": 8, "train_loss": 3, "elapsed_s": 1}')
    lines = compare(going, done, f"--png={tmp_path / 'c.png'}")
    assert " val " in lines[1] and " train " in lines[2]
    other = write("other", [3.0], dataset="b")
    lines = compare(done, other, f"--png={tmp_path / 'c.png'}")
    assert ["dataset", "a", "b"] in [line.split() for line in lines]
    assert "different text" in lines[-2]


def test_mistakes(write, tmp_path):
    for words, said in (([], "compare.py out/a out/b"), ([tmp_path], "metrics.jsonl")):
        assert said in python(HERE / "compare.py", *words, fails=True)
