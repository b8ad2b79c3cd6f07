"""Classification from tables to predictions, against scikit-learn and transformers."""

import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

import finetune_cls as script
from common import Device, save_best
from configurator import configure, find_settings
from lora import LoRALinear
from model import GPT, GPTConfig
from tokenizer import char_tokenizer, open_tokenizer, train_bpe

os.environ["HF_HUB_OFFLINE"] = "1"
HERE = Path(__file__).resolve().parent.parent
SHARED = HERE / "../shared/data"
DEFAULTS = {name: default for name, (default, _, _) in find_settings(vars(script)).items()}
SPLITS = ("train", "dev", "test")


def write(path, rows, delimiter=","):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(
            [list(rows[0]), *(row.values() for row in rows)])
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random body, and texts and pairs whose class is a function of a letter or two."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    words = ["no", "ja", "oui", "a", "b", "x", "yes"] * 9
    tokenizer = train_bpe([" ".join(words), "no. yes. maybe so" * 5], 270)
    model = GPT(GPTConfig(block_size=40, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2,
                          n_embd=32))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    save_best(folder, model, tokenizer)
    rng = np.random.default_rng(0)
    for split, n in zip(SPLITS, (96, 24, 24)):
        texts = [("x", "yx", "zyzzxy", "zyxzyxzyxzyx")[i // 3 % 4] for i in range(n)]
        names = rng.permutation(np.arange(n) % 3)
        write(folder / f"{split}.csv", [
            {"id": f"{split}{i}", "sentence": f"{text} {'abc'[k]}",
             "label": ["bad", "fair", "good"][k]}
            for i, (text, k) in enumerate(zip(texts, names))])
        write(folder / f"p{split}.csv", [
            {"id": f"{split}{i}", "one": text, "two": "ab"[k % 2] * 2, "label": f"{k % 2}.0"}
            for i, (text, k) in enumerate(zip(texts, names))], "\t")
    return folder


def run_script(base, out, *argv, pairs=False):
    vars(script).update(DEFAULTS)
    p = "p" * pairs
    configure(vars(script), [
        f"--init_from={base}", f"--data_dir={base}", f"--out_dir={out}", "--device=cpu",
        *(f"--{split}_file={p}{split}.csv" for split in SPLITS), "--batch_size=16",
        "--learning_rate=3e-3", "--dropout=0", "--weight_decay=0",
        *(("--text_column=one", "--text_pair_column=two") if pairs else ()), *argv])
    script.main()
    file = Path(out) / "results.json"
    return json.loads(file.read_text()) if file.is_file() else None


CLOZE = {False: ("--style=cloze", "--prompt={text} is", "--verbalizers", " no", " ja", " oui"),
         True: ("--style=cloze", '--prompt="{text}" or "{text_pair}"?', "--verbalizers", " no",
                " yes")}


# ---- whole runs ----

@pytest.mark.parametrize("style", ["head", "cloze"])
@pytest.mark.parametrize(("mode", "rate", "epochs"), [
    ("full", 3e-3, 10), ("last_layer", 1e-1, 40), ("last_blocks", 5e-3, 16), ("lora", 1e-2, 8)])
def test_every_mode_and_style_learns_a_separable_set(base, tmp_path, style, mode, rate, epochs):
    results = run_script(base, tmp_path, f"--mode={mode}", f"--learning_rate={rate}",
                         f"--epochs={epochs}", "--train_blocks=1",
                         *(CLOZE[False] if style == "cloze" else ()))
    assert results["dev_accuracy"] == results["test_accuracy"] == results["macro_f1"] == 1
    old = GPT.from_pretrained(base).state_dict()
    gpt, _, head, config = script.load(str(tmp_path))
    new = gpt.state_dict()
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == {
        "full": set(old), "last_layer": set(),
        "last_blocks": {name for name in old if ".h.1." in name or ".ln_f." in name},
        "lora": {name for name in old if name.endswith((
            "c_attn.weight", "c_proj.weight", "c_fc.weight"))}}[mode]
    assert not any(isinstance(module, LoRALinear) for module in gpt.modules())  # merged
    assert config["id2label"] == {"0": "bad", "1": "fair", "2": "good"}
    if style == "cloze":  # only the answers' rows of the head are other than the embeddings were
        answers = sorted(script.answer_ids(open_tokenizer(base / "best"), [*"012"]))
        rows = (new["lm_head.weight"] != old["transformer.wte.weight"]).any(1)
        assert head is None and rows.nonzero()[:, 0].tolist() == answers


@pytest.mark.parametrize("style", ["head", "cloze"])
@pytest.mark.parametrize("pairs", [False, True])
def test_best_loads_in_transformers_with_our_logits(base, tmp_path, pairs, style, capsys):
    transformers = pytest.importorskip("transformers")
    args = CLOZE[pairs] if style == "cloze" else ()
    results = run_script(base, tmp_path, "--epochs=2", "--max_tokens=18", *args, pairs=pairs)
    split = script.read_splits()["test"]
    gpt, tokenizer, head, _ = script.load(str(tmp_path))
    texts = split["text"] + [("",) * (1 + pairs), ("x" * 90, "y" * 90) if pairs else ("y" * 90,)]
    rows, _ = script.encode({"text": texts, "row": range(99), "where": "it"}, tokenizer, 18)
    ids, last = script.collate(rows, tokenizer.eos_id, "cpu")
    assert len({len(row) for row in rows}) > 3 and ids.size(1) == 18
    names = results["classes"]
    if style == "head":
        hf = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "best").eval()
        assert hf.config.id2label == dict(enumerate(names))
        assert hf.config.label2id[names[1]] == 1 and hf.config.pad_token_id == tokenizer.eos_id
        want = hf(ids).logits
    else:
        hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "best").eval()
        answers = script.answer_ids(tokenizer, names)
        want = hf(ids).logits[torch.arange(len(ids)), last][:, answers]
        head = gpt.lm_head.weight[answers].detach()
    net = script.Classifier(gpt, head).eval()
    ours = net(ids, last)
    assert (ours - want).abs().max() < 1e-5
    with open(tmp_path / "predictions_test.csv", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert [row["id"] for row in written] == split["id"]
    assert [row["label"] for row in written] == split["label"]
    n = len(written)
    assert [row["prediction"] for row in written] == [names[k] for k in want.argmax(-1)[:n]]
    p = want.softmax(-1).max(-1).values[:n].tolist()
    assert [float(row["probability"]) for row in written] == pytest.approx(p, abs=1e-4)
    # --predict_file and --predict, from a trained run alone
    file = "ptest.csv" if pairs else "test.csv"
    more = ("--text_column=one", "--text_pair_column=two") if pairs else ()
    for argv in ([f"--predict_file={base / file}", "--score_test", *more],
                 ["--predict", *split["text"][3]]):
        vars(script).update(DEFAULTS)
        configure(vars(script), [f"--init_from={tmp_path}", f"--out_dir={tmp_path}/elsewhere",
                                 "--device=cpu", *argv])
        capsys.readouterr()
        script.main()
    shown = capsys.readouterr().out
    assert shown.split()[0] == written[3]["prediction"] and shown.split()[1] == f"{p[3]:.3f}"
    assert (tmp_path / f"predictions_of_{file}").read_text() == (
        tmp_path / "predictions_test.csv").read_text()  # beside the run, and its own are untouched
    assert not (tmp_path / "elsewhere").exists()


def test_a_padded_batch_has_the_logits_of_each_row_alone(base):
    vars(script).update(DEFAULTS)
    gpt, tokenizer, _, _ = script.load(str(base))
    net = script.Classifier(gpt, torch.randn(3, 32)).double().eval()
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 250, n) for n in (1, 40, 7, 7, 23)]
    together = net(*script.collate(rows, tokenizer.eos_id, "cpu"))
    swept = script.over(net, rows, 3, tokenizer.eos_id, Device("cpu"))
    for row, logits, other in zip(rows, together, swept):
        alone = net.head(gpt.hidden(torch.from_numpy(row)[None])[0, -1])
        assert (alone - logits).abs().max() < 1e-10 and (alone - other).abs().max() < 1e-5


def weights(out):
    gpt, _, head, _ = script.load(str(out))
    return gpt.state_dict() | ({} if head is None else {"score": head})


@pytest.mark.parametrize("style", [(), CLOZE[False]])
def test_cached_features_equal_the_body_run_each_time(base, tmp_path, style):
    argv = ("--mode=last_layer", "--learning_rate=0.05", "--epochs=3", "--dropout=0.2", *style)
    results = [run_script(base, tmp_path / str(cache), f"--cache_features={cache}", *argv)
               for cache in (True, False)]
    one, two = weights(tmp_path / "True"), weights(tmp_path / "False")
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() < 1e-5, name
    for key in ("dev_loss", "test_loss", "test_confusion"):
        assert np.abs(np.subtract(results[0][key], results[1][key])).max() < 1e-5


def test_two_ranks_equal_one(base, tmp_path):
    argv = ["--epochs=1", "--dropout=0.1", "--batch_size=18"]
    one = run_script(base, tmp_path / "one", *argv, "--accumulation=2")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         HERE / "finetune_cls.py", f"--init_from={base}", f"--data_dir={base}", "--device=cpu",
         f"--out_dir={tmp_path}/two", *(f"--{split}_file={split}.csv" for split in SPLITS),
         "--learning_rate=3e-3", "--weight_decay=0", *argv],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    for key in ("dev_loss", "test_loss"):
        assert one[key] == pytest.approx(two[key], rel=1e-4)
    old, one, two = (weights(folder) for folder in (base, tmp_path / "one", tmp_path / "two"))
    for name, tensor in one.items():
        apart = (tensor - two[name]).abs()
        if name.endswith("c_attn.bias"):  # a key's bias changes nothing: Adam moves it by rounding
            apart = apart.view(3, -1)[::2]
        assert apart.max() < 1e-4, name
        assert name not in old or (tensor - old[name]).abs().max() > 1e-3


def test_zero_shot_is_the_language_models_own_judgement(base, tmp_path):
    results = run_script(base, tmp_path, "--epochs=0", *CLOZE[False])
    gpt, tokenizer, _, _ = script.load(str(base))
    splits = script.read_splits()
    answers = [int(tokenizer.encode(word)[0]) for word in (" no", " ja", " oui")]
    for split in ("dev", "test"):
        found = []
        for (text,) in splits[split]["text"]:
            ids = torch.tensor(tokenizer.encode(f"{text} is").astype(int))[None]
            found.append(["bad", "fair", "good"][gpt(ids)[0][0, -1, answers].argmax()])
        right = np.mean([a == b for a, b in zip(found, splits[split]["label"])])
        assert results[f"{split}_accuracy"] == pytest.approx(right)
    assert results["best_epoch"] == 0


def test_early_stop_stop_signal_and_a_rerun(base, tmp_path, monkeypatch, capsys):
    results = run_script(base, tmp_path, "--epochs=9", "--patience=2", "--learning_rate=0")
    shown = capsys.readouterr().out
    assert results["best_epoch"] == 1 and "no better for 2 epochs" in shown
    assert "epoch 3:" in shown and "epoch 4:" not in shown

    class Stop:  # asked once an update: 6 an epoch
        asked = 0

        @property
        def received(self):
            self.asked += 1
            return "SIGINT" if self.asked == 9 else None

        def over(self):
            pass

    monkeypatch.setattr(script, "StopSignal", Stop)
    results = run_script(base, tmp_path, "--epochs=2")  # judged by the epoch that is whole
    assert (results["stopped"], results["updates"], results["best_epoch"]) == (True, 9, 1)
    assert "stopped by" in capsys.readouterr().out
    assert (tmp_path / "predictions_test.csv").is_file() and (tmp_path / "confusion.png").is_file()
    vars(script).update(DEFAULTS)
    configure(vars(script), [f"--init_from={tmp_path}", "--device=cpu", "--predict", "x a", "y b"])
    script.main()
    assert len(capsys.readouterr().out.splitlines()) == 2
    Stop.received = "SIGTERM"  # in the first epoch there is nothing to judge
    assert run_script(base, tmp_path, "--epochs=2") is None
    assert "nothing saved yet" in capsys.readouterr().out


def test_a_trained_head_is_kept_where_the_classes_are_its_own(base, tmp_path, capsys):
    one = run_script(base, tmp_path / "one", "--epochs=2")
    again = run_script(tmp_path / "one", tmp_path / "two", f"--data_dir={base}", "--epochs=0")
    assert again["test_loss"] == pytest.approx(one["test_loss"]) and again["best_epoch"] == 0
    more = run_script(tmp_path / "one", tmp_path / "more", f"--data_dir={base}", "--epochs=1",
                      "--learning_rate=0")
    assert more["test_loss"] == pytest.approx(one["test_loss"])
    assert "a new one is made" not in capsys.readouterr().out
    order = [f"--data_dir={base}", "--classes", "good", "fair", "bad"]
    run_script(tmp_path / "one", tmp_path / "other", *order, "--epochs=1")
    assert "classes bad, fair, good: a new one is made for good" in capsys.readouterr().out
    for folder, argv, word in ((tmp_path / "one", order, "for the classes bad, fair, good"),
                               (base, [], "has no linear layer")):
        with pytest.raises(ValueError, match=f"{word}, and epochs=0"):
            run_script(folder, tmp_path / "none", f"--data_dir={base}", *argv, "--epochs=0")


def test_the_tensors_of_a_classifier_are_those_of_its_config(base, tmp_path):
    run_script(base, tmp_path, "--epochs=1")
    file = tmp_path / "best" / "config.json"
    config = json.loads(file.read_text())
    gpt = script.load(str(tmp_path))[0]
    file.write_text(json.dumps(config | {"tie_word_embeddings": False}))  # as transformers may have it
    same = script.load(str(tmp_path))[0].state_dict()
    assert all(torch.equal(same[name], tensor) for name, tensor in gpt.state_dict().items())
    file.write_text(json.dumps(config | {"n_layer": config["n_layer"] + 1}))
    with pytest.raises(ValueError, match="not those that its config.json describes"):
        script.load(str(tmp_path))


def test_a_killed_save_leaves_the_best_model_whole(base, tmp_path, monkeypatch):
    replace, seen = os.replace, []

    def watched(*paths):
        replace(*paths)
        if seen or (tmp_path / "best").is_dir():  # once there, there at every moment
            seen.append(all((tmp_path / "best" / file).is_file() for file in (
                "model.safetensors", "config.json", "tokenizer.json")))

    monkeypatch.setattr(os, "replace", watched)
    results = run_script(base, tmp_path, "--epochs=3")
    assert results["best_epoch"] > 1 and len(seen) > 5 and all(seen)  # saved more than once
    monkeypatch.undo()
    again = run_script(tmp_path, tmp_path / "again", f"--data_dir={base}", "--epochs=0")
    assert again["test_loss"] == pytest.approx(results["test_loss"])


def test_a_run_that_diverges_ends(base, tmp_path):
    with pytest.raises(ValueError, match="lower --learning_rate"):
        run_script(base, tmp_path, "--epochs=3", "--learning_rate=1e30")
    assert not (tmp_path / "best").exists() and not (tmp_path / "results.json").exists()


def test_one_row_a_step_and_what_a_kill_left_is_removed(base, tmp_path):
    (tmp_path / "best").mkdir()
    left = tmp_path / "ckpt.pt.123.tmp", tmp_path / "best" / "model.safetensors.9.tmp"
    for file in (*left, tmp_path / "notes.tmp"):
        file.touch()
    one = run_script(base, tmp_path, "--epochs=2", "--log_interval=1", "--head_learning_rate=0")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, one["updates"] + 1))
    assert {"train_loss", "lr", "val_accuracy", "elapsed_s"} <= rows[-1].keys()
    assert not any(file.exists() for file in left) and (tmp_path / "notes.tmp").exists()
    weights = load_file(tmp_path / "best" / "model.safetensors")["score.weight"]
    torch.manual_seed(script.seed)
    assert weights.std() < 0.03  # as it was drawn, N(0, 0.02)


def test_a_folder_in_use_is_refused(base, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="another run is using"):
        run_script(base, tmp_path, "--epochs=0", *CLOZE[False])


# ---- measures and output ----

def test_measures_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for K, n, top in ((2, 50, 2), (5, 300, 5), (5, 40, 3), (3, 1, 3)):
        labels, predicted = rng.integers(0, top, n), rng.integers(0, K, n)
        found = script.measures(labels, predicted, K)
        p, r, f, support = metrics.precision_recall_fscore_support(
            labels, predicted, labels=range(K), zero_division=0)
        assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
        assert found["macro_f1"] == pytest.approx(
            metrics.f1_score(labels, predicted, average="macro", zero_division=0))
        for key, want in (("precision", p), ("recall", r), ("f1", f), ("support", support)):
            assert found[key] == pytest.approx(want)
        assert found["confusion"] == metrics.confusion_matrix(
            labels, predicted, labels=range(K)).tolist()
        if K == 2:
            assert found["f1"][1] == pytest.approx(metrics.f1_score(labels, predicted))


def test_the_courses_form(base, tmp_path):
    results = run_script(base, tmp_path, "--epochs=1", "--cs224n", pairs=True)
    lines = (tmp_path / "predictions" / "para-dev-output.csv").read_text().split("\n")
    with open(tmp_path / "predictions_dev.csv") as file:
        rows = list(csv.DictReader(file))
    token = {"1": 8505, "0": 3919}
    assert lines[0] == "id \t Predicted_Is_Paraphrase " and lines[-1] == ""
    assert lines[1:-1] == [f"{row['id']}, {token[row['prediction']]} " for row in rows]
    assert results["positive_f1"] == results["test_positive_f1"] == results["test_f1"][1]
    assert (tmp_path / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    splits = {"id": ["a", "b"], "text": [("x", "y")] * 2}  # classes of other names: the second is yes
    script.write_cs224n(tmp_path, "test", splits, torch.eye(2), ["differ", "same"])
    assert (tmp_path / "predictions" / "para-test-output.csv").read_text().endswith(
        " \na, 3919 \nb, 8505 \n")
    run_script(base, tmp_path, "--epochs=1", "--cs224n", "--mode=last_layer")
    lines = (tmp_path / "predictions" / "last-linear-layer-sst-test-out.csv").read_text()
    assert lines.startswith("id \t Predicted_Sentiment \ntest0, ")


# ---- tables ----

def test_every_format_gives_the_same_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = [{"text": f'say "{i}", é\u2028x', "label": i % 2} for i in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write(tmp_path / "a.csv", rows)
    write(tmp_path / "b.tsv", rows, "\t")
    (tmp_path / "c.jsonl").write_text(lines, encoding="utf-8-sig")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "e.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (tmp_path / "f.json").write_text(json.dumps(rows))
    (tmp_path / "g.txt").write_text(
        "#1 ID\ttext\tlabel\r\n"
        + "".join(f"{i}\t{row['text']}\t{row['label']}\r\n" for i, row in enumerate(rows))
        + "-1\tno\t1\r\n", encoding="utf-8-sig", newline="")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "h.parquet")
    vars(script).update(DEFAULTS)
    for file in sorted(tmp_path.iterdir()):
        split = script.as_split(script.read_table(file), "it", True)
        assert split["text"] == [(row["text"],) for row in rows], file
        assert split["label"] == ["0", "1", "0", "1"], file


def test_labels_that_are_not_there_and_texts_that_are_null():
    vars(script).update(DEFAULTS)
    for values, labels, want in ((["", None], None, None), (["", "?.5"], False, None),
                                 ([-1, "-1"], None, None), (["1", 0], None, ["1", "0"])):
        rows = [{"text": text, "label": value} for text, value in zip((None, "x"), values)]
        split = script.as_split(rows, "it", labels)
        assert split["label"] == want and split["text"] == [("",), ("x",)]
    assert script.encode(split, open_tokenizer("bytes"), 9)[1] == "0 cut, 1 empty"
    with pytest.raises(ValueError, match="row 1 of it has the label ''"):
        script.as_split([{"text": "x", "label": ""}], "it", True)
    split = {"text": [("a",), ("é",)], "row": [3, 7], "where": "dev.csv"}
    with pytest.raises(ValueError, match=r"row 7 of dev\.csv: character"):
        script.encode(split, char_tokenizer("ab", "|"), 9)


def test_labels():
    for value, name in ((1, "1"), (1.0, "1"), ("1.0", "1"), (" good ", "good"), (0, "0"),
                        (-1, "-1"), ("007", "7"), ("infer", "infer"), (True, "True"),
                        ("12345678901234567891", "12345678901234567891"), ("inf", "inf"),
                        ("a\ud800", "a\\ud800")):
        assert script.label_name(value, "row 1") == name
    for value in (None, "", "  ", 0.5, "2.5", float("nan"), "nan"):
        with pytest.raises(ValueError, match="row 3 of it has the label"):
            script.label_name(value, "row 3 of it")


def hub(monkeypatch, splits):
    import datasets
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: asked.append(name) or splits)
    return asked


def test_from_the_hub(base, tmp_path, monkeypatch):
    train = [{"text": f"x {'ab'[i % 2]}", "label": i % 2} for i in range(40)]
    asked = hub(monkeypatch, {"train": train, "test": [{"text": "y", "label": -1}] * 3,
                              "unsupervised": []})
    vars(script).update(DEFAULTS)
    configure(vars(script), ["--dataset=some/set:part", "--train_file=not-here.csv"])
    splits = script.read_splits()
    assert asked == [("some/set", "part")] and splits["test"]["label"] is None
    assert len(splits["dev"]["id"]) == 4 and len(splits["train"]["id"]) == 36
    assert not set(splits["dev"]["id"]) & set(splits["train"]["id"])
    configure(vars(script), ["--dataset=some/set:part", "--seed=2"])
    assert script.read_splits()["dev"]["id"] != splits["dev"]["id"]
    hub(monkeypatch, {"train": train, "test": [{"text": "y", "label": "1"}, {"text": "y"}]})
    configure(vars(script), ["--score_test=False"])
    assert script.read_splits()["test"]["label"] is None


@pytest.mark.parametrize(("config", "folder", "counts"), [
    ("sst", "cs224n", {"train": 8544, "dev": 1101, "test": 2210}),
    ("cfimdb", "cs224n", {"train": 1707, "dev": 245, "test": 488}),
    ("quora", "cs224n", {"train": 14000, "dev": 3000}),
    ("mrpc", "mrpc", {"train": 3668, "dev": 408, "test": 1725}),
    ("imdb", "imdb", {"train": 22500, "dev": 2500, "test": 10000})])
def test_the_real_sets(config, folder, counts):
    if not (SHARED / folder).is_dir():
        pytest.skip(f"../shared/data/{folder} is not here")
    vars(script).update(DEFAULTS)
    configure(vars(script), [f"config/finetune_{config}.py", f"--data_dir={SHARED / folder}"])
    splits = script.read_splits()
    assert {name: len(split["text"]) for name, split in splits.items()} == counts
    assert {name for name, split in splits.items() if split["label"] is None} == (
        {"test"} if folder == "cs224n" and "test" in counts else set())
    assert {len(text) for split in splits.values() for text in split["text"]} == {
        2 if config in ("quora", "mrpc") else 1}
    assert set(splits["train"]["label"]) == set(script.classes)
    for split in splits.values():
        if split["label"]:
            assert len(script.class_numbers(split, script.classes)) == len(split["text"])


# ---- tokens and batches ----

def test_long_and_empty_texts_and_prompts(base):
    vars(script).update(DEFAULTS)
    tok = open_tokenizer("bytes")

    def texts(rows, T, **options):
        vars(script).update(DEFAULTS | options)
        found, note = script.encode({"text": rows, "row": range(99), "where": "it"}, tok, T)
        return [bytes(row.tolist()) for row in found], note

    rows = [("abcdef",), ("",), ("xy",)]
    assert texts(rows, 4) == ([b"abcd", b"\xff", b"xy"], "1 cut, 1 empty")
    assert texts(rows, 4, keep="tail")[0] == [b"cdef", b"\xff", b"xy"]
    assert texts([("AB,c",)], 9, lowercase=True)[0] == [b"ab , c"]
    pairs = [("abcdef", "uvwxyz"), ("a", "uvwxyz"), ("abcdef", "z"), ("a", ""), ("", "u")]
    assert texts(pairs, 6) == ([b"ab\xffuvw", b"a\xffuvwx", b"abcd\xffz", b"a", b"\xffu"],
                               "3 cut, 2 empty")
    assert texts(pairs, 6, keep="tail")[0][0] == b"ef\xffxyz"
    cloze = {"style": "cloze", "prompt": "<{text}|{text_pair}>"}
    assert texts(pairs, 9, **cloze)[0] == [b"<abc|uvw>", b"<a|uvwxy>", b"<abcde|z>", b"<a|>",
                                           b"<|u>"]
    for options, word in (({"prompt": "{text}"}, "the slots"), ({"prompt": "{text_pair}{text}"},
                          "slots"), ({"prompt": "x" * 9 + "{text}{text_pair}"}, "no room")):
        with pytest.raises(ValueError, match=word):
            texts(pairs, 9, style="cloze", **options)


def test_batches_hold_every_text_once_and_little_padding(monkeypatch):
    monkeypatch.setattr(script, "batch_size", 8)
    lengths = np.random.default_rng(0).integers(1, 90, 1003)
    epochs = [script.epoch_batches(lengths, epoch) for epoch in (1, 1, 2)]
    for batches in epochs:
        assert sorted(np.concatenate(batches)) == list(range(1003))
        assert max(map(len, batches)) == 8 and len(batches) == 126
        assert sum(lengths[b].max() * len(b) for b in batches) < 1.06 * lengths.sum()
    lists = [[b.tolist() for b in batches] for batches in epochs]
    assert lists[0] == lists[1] != lists[2]


# ---- what bad input gets ----

def put(folder, name, rows):
    return f"--{name}_file={write(folder / f'{name}.csv', rows)}"


GOOD = [{"text": f"x {'ab'[i % 2]}", "label": i % 2} for i in range(8)]


@pytest.mark.parametrize(("changes", "argv", "word"), [
    ({}, ["--text_column=review"], r"no column 'review'; it has 'text', 'label'"),
    ({"dev": [{"text": "x", "label": "0"}, {"text": "x", "label": "7"}]}, [],
     r"row 2 of \S+dev.csv has the label '7'.*0, 1"),
    ({}, ["--classes", "0", "1", "2"], "no row of training has the class '2'"),
    ({"train": GOOD[::2]}, [], "one class, '0'"),
    ({"train": [*GOOD, {"text": "x", "label": "0.5"}]}, [], r"row 9 of \S+ has the label '0.5'"),
    ({"train": [*GOOD, {"text": "x", "label": ""}]}, [], "row 9 .* has the label ''"),
    ({"test": [{"text": "x"}]}, ["--score_test"], "test.csv has no column 'label' or 'sentiment'"),
    ({"test": [{"text": "x", "label": "1"}, {"text": "x", "label": ""}]}, [], "row 2 .*label ''"),
    ({}, ["--score_test"], "no test split to score"),
    ({}, ["--mode=head"], "full, last_layer"), ({}, ["--style=tail"], "style must be head or"),
    ({}, ["--batch_size=0"], "batch_size must"), ({}, ["--keep=all"], "keep must"),
    ({}, ["--init_from=./nothing"], "no folder"), ({}, ["--max_tokens=0"], "max_tokens must"),
    ({}, ["--style=cloze", "--prompt={text}", "--verbalizers", " no"], "has 1 words, .*2 classes"),
    ({}, ["--style=cloze", "--prompt={text}", "--verbalizers", " no", " qqq"], "' qqq' is . tok"),
    ({}, ["--classes", "0", "1", "1"], "names one twice"), ({}, ["--predict=x"], "no run of finetune_cls"),
    ({}, ["--train_file=missing.csv"], "cannot read missing.csv")])
def test_mistakes_are_one_line(base, tmp_path, changes, argv, word):
    vars(script).update(DEFAULTS)
    tables = {"train": GOOD, "dev": GOOD} | changes
    files = [put(tmp_path, name, rows) for name, rows in tables.items()]
    configure(vars(script), [f"--init_from={base}", f"--out_dir={tmp_path}", "--device=cpu", *files,
                             *argv])
    with pytest.raises((ValueError, OSError), match=word) as e:
        script.main()
    assert "\n" not in str(e.value)


def test_files_that_cannot_be_read(tmp_path):
    for name, content, word in (
            ("a.csv", "text,label\nx,1\né,0\n".encode("latin-1"), "not UTF-8.* 0xe9 in line 3"),
            ("b.jsonl", b'{"text": 1', "cannot be read as .jsonl"),
            ("c.jsonl.gz", b"no gzip", "cannot"), ("d.parquet", b"none", "cannot be read"),
            ("e.jsonl.xz", b"none", "cannot"),
            ("f.csv", b"text,label\nwell, good,1\n", "line 2 has more fields than the header"),
            ("g.csv", b"text,label,text\nx,1,y\n", "header has 'text' twice"),
            ("h.tsv", b'text\tlabel\n"hm,\t1\nx\t0\n', "cannot be read")):  # an open quote
        (tmp_path / name).write_bytes(content)
        with pytest.raises((ValueError, OSError), match=word) as e:
            script.read_table(tmp_path / name)
        assert name in str(e.value) and "\n" not in str(e.value)
    vars(script).update(DEFAULTS)
    for row in ({"label": 1}, {"text": 3, "label": 1}, "text"):
        with pytest.raises(ValueError, match="row 2 of it has no text"):
            script.as_split([GOOD[0], row], "it", True)
    with pytest.raises(ValueError, match="it has no rows"):
        script.as_split([], "it", True)
