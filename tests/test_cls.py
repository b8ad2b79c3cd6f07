"""Classification from tables to predictions, against scikit-learn and transformers."""

import csv
import gzip
import json
import lzma
import os
import shutil
import signal
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HERE, check_equal, defaults, give, two_ranks
from conftest import rows as rows_of
from conftest import start as run
from safetensors.torch import load_file

import finetune_cls as script
from checkpoint import load_model, save_best
from device import Device
from model import GPT, GPTConfig
from tokenizer import open_tokenizer, train_bpe

os.environ["HF_HUB_OFFLINE"] = "1"
SHARED = HERE / "../shared/data"
DEFAULTS = defaults(script)
SPLITS = ("train", "dev", "test")


def write(path, rows, delimiter=","):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(
            [list(rows[0]), *(row.values() for row in rows)])
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random model, and texts and pairs whose class is a function of a letter or two."""
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


settings, start = partial(give, script), partial(run, script, "--device=cpu")


def weights(out):
    return load_file(out / "best" / "model.safetensors")


def examples(texts):
    return [script.Example("it", "", text, None) for text in texts]


def run_script(base, out, *argv, pairs=False):
    p = "p" * pairs
    start(f"--init_from={base}", f"--data_dir={base}", f"--out_dir={out}",
          *(f"--{split}_file={p}{split}.csv" for split in SPLITS), "--batch_size=16",
          "--learning_rate=3e-3", "--dropout=0", "--weight_decay=0",
          *(("--text_column=one", "--text_pair_column=two") if pairs else ()), *argv)
    file = Path(out) / "results.json"
    return json.loads(file.read_text()) if file.is_file() else None


CLOZE = {False: ("--style=cloze", "--prompt={text} is", "--verbalizers", " no", " ja", " oui"),
         True: ("--style=cloze", '--prompt="{text}" or "{text_pair}"?', "--verbalizers", " no",
                " yes")}


# ---- whole runs ----

@pytest.mark.parametrize("style", ["head", "cloze"])
@pytest.mark.parametrize(("mode", "rate", "epochs"), [
    ("full", 3e-3, 10), ("last_layer", 3e-1, 16), ("last_blocks", 5e-3, 16), ("lora", 5e-3, 14)])
def test_every_mode_and_style_learns_a_separable_set(base, tmp_path, style, mode, rate, epochs):
    results = run_script(base, tmp_path, f"--mode={mode}", f"--learning_rate={rate}",
                         f"--epochs={epochs}", "--train_blocks=1",
                         *(CLOZE[False] if style == "cloze" else ()))
    assert results["dev_accuracy"] == results["test_accuracy"] == results["macro_f1"] == 1
    old, new = weights(base), weights(tmp_path)
    layer = "score.weight" if style == "head" else "lm_head.weight"
    assert new.keys() == old.keys() | {layer}  # adapters are merged
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    if style == "cloze":  # only the answers' rows of the head are other than the embeddings were
        moved = (new[layer] != old["transformer.wte.weight"]).any(1).nonzero()[:, 0]
        _, tokenizer = load_model(base)
        assert moved.tolist() == sorted(script.answer_ids(tokenizer, [*"012"]))
    assert {name for name in old if not torch.equal(old[name], new[name])} == {
        "full": set(old), "last_layer": set(),
        "last_blocks": {name for name in old if ".h.1." in name or ".ln_f." in name},
        "lora": {name for name in old if name.endswith((
            "c_attn.weight", "c_proj.weight", "c_fc.weight"))}}[mode]
    best = [row["val_loss"] for row in rows_of(tmp_path) if row.get("val_accuracy") == 1]
    assert results["dev_loss"] == pytest.approx(min(best), rel=1e-4)  # last_layer: of features


@pytest.mark.parametrize("style", ["head", "cloze"])
@pytest.mark.parametrize("pairs", [False, True])
def test_best_loads_in_transformers_with_our_logits(base, tmp_path, pairs, style, capsys):
    transformers = pytest.importorskip("transformers")
    args = CLOZE[pairs] if style == "cloze" else ()
    results = run_script(base, tmp_path, "--epochs=2", "--max_tokens=18", *args, pairs=pairs)
    names, test = results["classes"], script.read_splits()["test"]
    net, tokenizer = script.load(str(tmp_path), names, Device("cpu"))
    texts = [("",) * (1 + pairs), ("x" * 90, "y" * 90) if pairs else ("y" * 90,)]
    rows, _ = script.encode(test + examples(texts), tokenizer, 18)
    ids, last = script.collate(rows, "cpu")
    assert len({len(row) for row in rows}) > 3 and ids.size(1) == 18
    padded = ids.clone()
    for row, end in zip(padded, last):
        row[end + 1:] = tokenizer.eos_id
    kind = "GPT2ForSequenceClassification" if style == "head" else "GPT2LMHeadModel"
    hf = getattr(transformers, kind).from_pretrained(tmp_path / "best").eval()
    assert hf.config.id2label == dict(enumerate(names))
    assert hf.config.label2id[names[1]] == 1 and hf.config.pad_token_id == tokenizer.eos_id
    want = hf(padded).logits
    if style == "cloze":
        want = want[torch.arange(len(ids)), last][:, script.answer_ids(tokenizer, names)]
    assert (net.eval()(ids, last) - want).abs().max() < 1e-5
    if style == "head":  # raw texts, in one padded batch, by the tokenizer that lies with it
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "best")
        fits = [i for i, row in enumerate(rows) if len(row) < 18 and i < len(test)]
        raw = [[*parts] for parts in zip(*((test + examples(texts))[i].text for i in fits))]
        assert (hf(**theirs(*raw, padding=True, return_tensors="pt")).logits - want[fits]).abs().max() < 1e-5
        classify = transformers.pipeline("text-classification", str(tmp_path / "best"), truncation=True)
        said = classify([dict(zip(("text", "text_pair"), test[i].text)) for i in fits[:3]])
        assert [one["label"] for one in said] == [names[want[i].argmax()] for i in fits[:3]]
    with open(tmp_path / "predictions_test.csv", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert [(row["id"], row["label"]) for row in written] == [(e.id, e.label) for e in test]
    n = len(written)
    assert [row["prediction"] for row in written] == [names[k] for k in want.argmax(-1)[:n]]
    p = want.softmax(-1).max(-1).values[:n].tolist()
    assert [float(row["probability"]) for row in written] == pytest.approx(p, abs=1e-4)
    # --predict_file and --predict, from a trained run alone
    file = "ptest.csv" if pairs else "test.csv"
    for argv in ([f"--predict_file={base / file}"], ["--predict", *test[3].text]):
        capsys.readouterr()
        start(f"--init_from={tmp_path}", f"--out_dir={tmp_path}/elsewhere", *argv)
    shown = capsys.readouterr().out
    assert shown.split()[0] == written[3]["prediction"] and shown.split()[1] == f"{p[3]:.3f}"
    assert (tmp_path / f"predictions_of_{file}").read_text() == (
        tmp_path / "predictions_test.csv").read_text()  # beside the run, and its own are untouched
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(ValueError, match="no column else"):  # not the run's where they are given
        start(f"--init_from={tmp_path}", f"--predict_file={base / file}", "--text_column=else")


def test_mean_pooling_reads_the_mean_of_transformers_hidden_states(base, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    results = run_script(base, tmp_path, "--epochs=2", "--pooling=mean", "--mode=last_layer")
    net, tokenizer = script.load(str(tmp_path), results["classes"], Device("cpu"))
    rows, _ = script.encode(script.read_splits()["test"], tokenizer, 40)
    hf = transformers.GPT2Model.from_pretrained(tmp_path / "best").eval()
    layer = weights(tmp_path)["score.weight"]
    with torch.no_grad():
        want = [hf(torch.from_numpy(row)[None])[0].mean(1) @ layer.T for row in rows]
    assert len({len(row) for row in rows}) > 3
    got = script.batched_forward(net, rows, Device("cpu"))
    torch.testing.assert_close(got, torch.cat(want), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="talegpt"):  # it would read the last token
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "best")
    capsys.readouterr()
    start(f"--init_from={tmp_path}", f"--predict_file={base / 'test.csv'}")
    written = (tmp_path / "predictions_of_test.csv").read_text()
    assert written == (tmp_path / "predictions_test.csv").read_text()
    run_script(base, tmp_path / "last", "--epochs=1", f"--init_from={tmp_path}")
    assert "a new linear layer" in capsys.readouterr().out  # the other was for the mean


@pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1"], ["bad", "so so", "good"]])
def test_a_classifier_from_elsewhere_predicts_and_keeps_its_names(base, tmp_path, names, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    labels = {} if len(names) == 2 else {"id2label": dict(enumerate(names)),
                                         "label2id": {name: i for i, name in enumerate(names)}}
    config = transformers.GPT2Config(vocab_size=256, n_positions=40, n_embd=16, n_layer=1, n_head=2,
                                     pad_token_id=255, eos_token_id=255, bos_token_id=255, **labels)
    model = transformers.GPT2ForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.score.weight, std=9.0)
    model.save_pretrained(tmp_path / "theirs")
    open_tokenizer("bytes").save(tmp_path / "theirs")
    said = transformers.pipeline("text-classification", str(tmp_path / "theirs"))(["one text", "another"])
    start(f"--init_from={tmp_path}/theirs", "--predict", "one text", "another")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{s['label']}  {s['score']:.3f}  {t}" for s, t in zip(said, ["one text", "another"])]
    start(f"--init_from={tmp_path}/theirs", "--lowercase", "--predict", "One TEXT")
    assert capsys.readouterr().out.startswith(lines[0].removesuffix("one text"))
    repo = tmp_path / "hub" / "models--some--classifier"  # as a download leaves it
    shutil.copytree(tmp_path / "theirs", repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    start("--init_from=some/classifier", "--predict", "one text", "another")
    assert capsys.readouterr().out.splitlines() == lines
    if len(names) == 3:  # the numbers of a table are its classes
        for split in SPLITS:
            rows = [{"text": f"text {i} {'abc'[i % 3]}", "label": i % 3} for i in range(30)]
            write(tmp_path / f"{split}.csv", rows)
        results = run_script(base, tmp_path / "run", f"--init_from={tmp_path}/theirs", "--epochs=1",
                             f"--data_dir={tmp_path}")
        assert results["classes"] == names and names[2] in (tmp_path / "run" / "predictions_dev.csv").read_text()


def test_a_language_model_has_no_classes(tmp_path):
    """Whatever stands in its config.json, as transformers 4 wrote it into each."""
    GPT(GPTConfig(8, 256, 1, 1, 8)).save_pretrained(tmp_path, id2label={"0": "LABEL_0", "1": "LABEL_1"})
    assert script.read_config(str(tmp_path))[1] == []


@pytest.mark.parametrize("options, told", [
    ({"num_labels": 1}, "is for regression"),
    ({"num_labels": 3, "problem_type": "multi_label_classification"}, "is for multi_label_classification")])
def test_classifiers_of_other_kinds_are_refused(tmp_path, options, told):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=256, n_positions=8, n_embd=8, n_layer=1, n_head=1, **options)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    open_tokenizer("bytes").save(tmp_path)
    with pytest.raises(ValueError, match=told):
        start(f"--init_from={tmp_path}", "--predict", "x")


def test_a_padded_batch_has_the_logits_of_each_row_alone(base):
    settings()
    gpt, _ = load_model(base)
    net = script.Classifier(gpt, torch.randn(3, 32)).double().eval()
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 250, n) for n in (1, 40, 7, 7, 23)]
    together = net(*script.collate(rows, "cpu"))
    batched = script.batched_forward(net, rows, Device("cpu"))
    for row, logits, other in zip(rows, together, batched):
        alone = net.head(gpt.hidden(torch.from_numpy(row)[None])[0, -1])
        assert (alone - logits).abs().max() < 1e-10 and (alone - other).abs().max() < 1e-5


@pytest.mark.parametrize("argv", [["--dropout=0.1", "--word_dropout=0.2"],
                                  ["--mode=last_layer", "--dropout=0.1"],
                                  ["--mode=lora", "--optimizer=muon", *CLOZE[False]]])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(base, tmp_path, argv, monkeypatch, capsys):
    argv = [*argv, "--epochs=2", "--log_interval=1", f"--data_dir={base}"]
    base = Path(shutil.copytree(base, tmp_path / "base"))
    whole = run_script(base, tmp_path / "whole", *argv)
    update, updates = Device.update, []

    def stop_in_the_second_epoch(*args):
        updates.append(1)
        if len(updates) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args)

    monkeypatch.setattr(Device, "update", stop_in_the_second_epoch)
    assert run_script(base, tmp_path / "parts", *argv) is None
    assert "stopped by SIGTERM at step 9; go on with: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="with batch_size=16, not 8"):
        run_script("resume", tmp_path / "parts", *argv, "--batch_size=8")
    with pytest.raises(ValueError, match="was trained on other data than"):
        run_script("resume", tmp_path / "parts", *argv, "--dev_file=test.csv")
    for name, change in (("config.json", ('"n_head": 2', '"n_head": 4')),
                         ("tokenizer.json", ('"a": 64, "b": 65', '"b": 64, "a": 65'))):
        text = (base / "best" / name).read_text()
        assert change[0] in text
        (base / "best" / name).write_text(text.replace(*change))
        with pytest.raises(ValueError, match="was begun from another model than .*base is now"):
            run_script("resume", tmp_path / "parts", *argv)
        (base / "best" / name).write_text(text)
    parts = run_script("resume", tmp_path / "parts", *argv)
    check_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    timed = ("seconds", "texts_per_s", "settings")
    assert {key: parts[key] for key in parts if key not in timed} == {
        key: whole[key] for key in whole if key not in timed}
    one, two = rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts")
    for key in ("step", "tokens", "train_loss", "val_loss"):
        assert [row.get(key) for row in one] == [row.get(key) for row in two]
    with pytest.raises(ValueError, match="holds a run already.*--overwrite"):
        run_script(base, tmp_path / "parts", *argv)


def test_labels_of_another_naming_do_not_keep_from_predicting(base, tmp_path):
    run_script(base, tmp_path / "run", "--epochs=1")
    for label, word in (("7", "not among"), ("4.5", "expected a word")):
        table = write(tmp_path / "stars.csv", [{"text": "x", "label": label}])
        argv = f"--init_from={tmp_path}/run", f"--predict_file={table}"
        with pytest.raises(ValueError, match=f"{word}.*--label_column=none predicts without labels"):
            start(*argv)
        assert not (tmp_path / "run" / "predictions_of_stars.csv").exists()
        start(*argv, "--label_column=none")
        (tmp_path / "run" / "predictions_of_stars.csv").unlink()


def test_what_is_compiled_is_tried_as_it_is_trained(base, tmp_path, monkeypatch):
    """On as many texts as of a micro-batch, in training mode: else memory that suffices seems not to,
    and another graph is compiled."""
    seen = []

    class Compiled(torch.nn.Module):
        def __init__(self, net, **_):
            super().__init__()
            self.net = net

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "net" else getattr(self.net, name)

        def forward(self, ids, last):
            seen.append((len(ids), self.net.training, self.net.gpt.training))
            return self.net(ids, last)

    monkeypatch.setattr(torch, "compile", Compiled)
    run_script(base, tmp_path, "--epochs=1", "--compile", "--accumulation=4")
    assert seen[0] == (4, True, True) == seen[1]


def test_word_dropout(base, tmp_path, monkeypatch):
    """A share of the tokens that training reads is end-of-text, of dev and test none."""
    forward, ends = script.Classifier.forward, {True: [], False: []}
    eos_id = load_model(base)[1].eos_id

    def record(net, ids, last):
        real = torch.arange(ids.size(1)) <= last[:, None]
        ends[net.training].append((ids[real] == eos_id).float())
        return forward(net, ids, last)

    monkeypatch.setattr(script.Classifier, "forward", record)
    run_script(base, tmp_path, "--epochs=2", "--word_dropout=0.25")
    assert torch.cat(ends[True]).mean().item() == pytest.approx(0.25, abs=0.04)
    assert not torch.cat(ends[False]).any()


def test_embeddings_have_a_learning_rate_of_their_own_under_muon(base, tmp_path):
    run_script(base, tmp_path, "--epochs=1", "--optimizer=muon", "--adamw_learning_rate=0")
    old, new = weights(base), weights(tmp_path)
    kept = {name for name in old if torch.equal(old[name], new[name])}
    assert kept == {name for name in old if old[name].dim() < 2 or ".h." not in name}


def test_a_learning_rate_that_another_optimizer_does_not_heed_is_named(base, tmp_path, capsys):
    for name, notes in (("muon", 0), ("adamw", 1)):
        run_script(base, tmp_path / name, "--epochs=1", f"--optimizer={name}",
                   "--adamw_learning_rate=1e-4")
        assert capsys.readouterr().out.count("adamw_learning_rate=0.0001 is heeded with") == notes


def test_two_ranks_equal_one(base, tmp_path):
    argv = ["--epochs=1", "--dropout=0.1", "--batch_size=18"]
    one = run_script(base, tmp_path / "one", *argv, "--accumulation=2")
    two_ranks(HERE / "finetune_cls.py", f"--init_from={base}", f"--data_dir={base}", "--device=cpu",
              f"--out_dir={tmp_path}/two", *(f"--{split}_file={split}.csv" for split in SPLITS),
              "--learning_rate=3e-3", "--weight_decay=0", *argv)
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
    gpt, tokenizer = load_model(base)
    splits = script.read_splits()
    answers = [int(tokenizer.encode(word)[0]) for word in (" no", " ja", " oui")]
    for split in ("dev", "test"):
        right = 0
        for example in splits[split]:
            ids = torch.tensor(tokenizer.encode(f"{example.text[0]} is").astype(int))[None]
            found = ["bad", "fair", "good"][gpt(ids)[0][0, -1, answers].argmax()]
            right += found == example.label
        assert results[f"{split}_accuracy"] == pytest.approx(right / 24)
    assert results["best_epoch"] == 0
    before = (tmp_path / "results.json").read_text()
    results = run_script(base, tmp_path, "--epochs=0", "--overwrite", *CLOZE[False], "--seed=2")
    after = json.loads(before) | {"seed": 2, "settings": results["settings"]}
    assert results["settings"]["seed"] == 2 and results == after | {"seconds": results["seconds"]}


def test_a_trained_head_is_kept_where_the_classes_are_its_own(base, tmp_path, capsys):
    one = run_script(base, tmp_path / "one", "--epochs=2")
    assert "a new linear layer" in capsys.readouterr().out
    again = run_script(tmp_path / "one", tmp_path / "two", f"--data_dir={base}", "--epochs=0")
    assert again["test_loss"] == pytest.approx(one["test_loss"]) and again["best_epoch"] == 0
    more = run_script(tmp_path / "one", tmp_path / "more", f"--data_dir={base}", "--epochs=1",
                      "--learning_rate=0")
    assert more["test_loss"] == pytest.approx(one["test_loss"])
    assert "a new linear layer" not in capsys.readouterr().out
    order = [f"--data_dir={base}", "--classes", "good", "fair", "bad"]
    run_script(tmp_path / "one", tmp_path / "other", *order, "--epochs=1")
    assert "has the classes ['bad', 'fair', 'good']: a new linear layer is made for 3" in capsys.readouterr().out
    for folder, argv, word in ((tmp_path / "one", order, "'good'"), (base, [], "'bad'")):
        with pytest.raises(ValueError, match=rf"no linear layer .* \[{word}, .* and epochs=0"):
            run_script(folder, tmp_path / "none", f"--data_dir={base}", *argv, "--epochs=0")


def test_classes_whose_names_are_numbers_are_not_counted(base, tmp_path):
    """A table's 0 and 1 are the first and second class only where the classes have other names."""
    for name, labels in (("stars", "123"), ("other", "012")):
        (tmp_path / name).mkdir()
        for split in SPLITS:
            write(tmp_path / name / f"{split}.csv", [
                {"text": f"x {'abc'[i % 3]}", "label": labels[i % 3]} for i in range(24)])
    run_script(base, tmp_path / "run", f"--data_dir={tmp_path}/stars", "--epochs=2")
    with pytest.raises(ValueError, match=r"no linear layer for the classes \['0', '1', '2'\]"):
        run_script(tmp_path / "run", tmp_path / "none", f"--data_dir={tmp_path}/other", "--epochs=0")


def test_a_trained_run_reads_its_own_columns_its_own_way(base, tmp_path, capsys):
    rows = [{"review": f"x {'ab'[i % 2]}", "stars": i % 2, "label": "none"} for i in range(24)]
    write(tmp_path / "t.csv", rows)
    argv = ["--text_column=review", "--label_column=stars", "--test_file="]
    run_script(base, tmp_path / "run", f"--data_dir={tmp_path}", *argv, "--train_file=t.csv", "--dev_file=t.csv",
               "--epochs=1", "--max_tokens=9")
    capsys.readouterr()
    start(f"--init_from={tmp_path}/run", f"--predict_file={tmp_path}/t.csv")
    assert "predictions_of_t.csv: accuracy" in capsys.readouterr().out
    write(tmp_path / "u.csv", [{"words": "x a"}])
    start(f"--init_from={tmp_path}/run", f"--predict_file={tmp_path}/u.csv", "--text_column=words", "--max_tokens=9")
    with pytest.raises(ValueError, match="was trained with max_tokens=9: leave such settings out"):
        start(f"--init_from={tmp_path}/run", "--predict", "x", "--max_tokens=5")


def test_the_tensors_of_a_classifier_are_those_of_its_config(base, tmp_path, capsys):
    run_script(base, tmp_path, "--epochs=1")
    file = tmp_path / "best" / "config.json"
    config = json.loads(file.read_text())
    shown = []
    for tied in (True, False):  # as transformers may have it
        file.write_text(json.dumps(config | {"tie_word_embeddings": tied}))
        capsys.readouterr()
        start(f"--init_from={tmp_path}", "--predict", "x a", "yx b")
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and len(shown[0].splitlines()) == 2
    file.write_text(json.dumps(config | {"n_layer": config["n_layer"] + 1}))
    with pytest.raises(ValueError, match="its tensors are not those"):
        start(f"--init_from={tmp_path}", "--predict", "x a")


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


def test_it_stops_early_and_features_need_not_be_kept(base, tmp_path, capsys):
    argv = ["--mode=last_layer", "--learning_rate=0", "--epochs=9", "--patience=2"]
    found = [run_script(base, tmp_path / str(cached), *argv, f"--cache_features={cached}")
             for cached in (True, False)]
    assert "no better for 2 epochs: stopped" in capsys.readouterr().out
    evaluated = ["val_loss" in row for row in rows_of(tmp_path / "True")]
    assert [one["best_epoch"] for one in found] == [1, 1] and sum(evaluated) == 3
    assert found[0]["dev_loss"] == pytest.approx(found[1]["dev_loss"], rel=1e-5)


def test_a_run_that_diverges_ends(base, tmp_path):
    with pytest.raises(ValueError, match="lower --learning_rate"):
        run_script(base, tmp_path, "--epochs=3", "--learning_rate=1e30")
    assert not (tmp_path / "best").exists() and not (tmp_path / "results.json").exists()


def test_one_row_a_step_and_what_a_kill_left_is_removed(base, tmp_path):
    left = tmp_path / "ckpt.pt.123.tmp", tmp_path / "ckpt.pt.9.tmp"
    for file in (*left, tmp_path / "notes.tmp"):
        file.touch()
    one = run_script(base, tmp_path, "--epochs=2", "--log_interval=1", "--head_learning_rate=0")
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, one["updates"] + 1))
    assert {"train_loss", "lr", "val_accuracy", "tokens_per_s", "elapsed_s"} <= rows[-1].keys()
    assert not any(file.exists() for file in left) and (tmp_path / "notes.tmp").exists()
    assert weights(tmp_path)["score.weight"].std() < 0.03  # as it was drawn, N(0, 0.02)


# ---- measures and output ----

def test_measures_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for K, n, top in ((2, 50, 2), (5, 300, 5), (5, 40, 3), (3, 1, 3)):
        labels, predicted = rng.integers(0, top, n), rng.integers(0, K, n)
        logits = torch.nn.functional.one_hot(torch.tensor(predicted), K).float()
        found = script.measures(logits, torch.tensor(labels))
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
    run_script(base, tmp_path, "--epochs=1", "--cs224n", "--mode=last_layer", "--overwrite")
    assert not (tmp_path / "predictions" / "para-dev-output.csv").exists()  # of the old run
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
    settings()
    for file in sorted(tmp_path.iterdir()):
        found = script.make_examples(script.read_table(file), "it", True)
        assert [example.text for example in found] == [(row["text"],) for row in rows], file
        assert [example.label for example in found] == ["0", "1", "0", "1"], file


@pytest.mark.parametrize("content", [
    "text;label\na, b;1\nc;0\n", "text|label\na, b|1\nc|0\n", " Text ,LABEL\n\"a, b\",1\nc,0\n",
    "sep=,\r\ntext,label\r\n\"a, b\",1\r\nc,0\r\n", "SEP=;\ntext;label\na, b;1\nc;0\n",
    "\ufefftext;label;;\r\na, b;1;;\r\nc;0;;\r\n;;;\r\n;;;\r\n", "text\tlabel\ra, b\t1\rc\t0\r",
    "text,label\r\"a, b\",1\rc,0\r", "text;label\n\na, b;1\nc;0\n\n"])
def test_tables_as_spreadsheets_write_them(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content.encode())
    settings()
    found = script.make_examples(script.read_table(tmp_path / "a.csv"), "it", True)
    assert [(e.text, e.label) for e in found] == [(("a, b",), "1"), (("c",), "0")]


@pytest.mark.parametrize(("content", "line"), [
    ('text,label\n"a\nb",1\n\n"c\nd" e,0\nf,1\n', 5), ('text,label\na,1\n"open,0\nb,1\nc,0\n', 3),
    ('sep=,\ntext,label\n"a\nb",1\nc,d,e\n', 5), ('text,label\r"a\rb",1\r"c" d,0\r', 4)])
def test_a_bad_row_is_named_by_the_line_where_it_begins(tmp_path, content, line):
    (tmp_path / "a.csv").write_bytes(content.encode())
    with pytest.raises(ValueError, match=rf"a\.csv cannot be read as \.csv: .*line {line}\b"):
        script.read_table(tmp_path / "a.csv")


def test_labels_that_are_not_there_and_texts_that_are_null():
    settings()
    none = [None, None]
    for values, want in ((["", None], none), ([-1, "-1"], none), (["1", 0], ["1", "0"])):
        rows = [{"text": text, "label": value} for text, value in zip((None, "x"), values)]
        found = script.make_examples(rows, "it", False)
        assert [example.label for example in found] == want
        assert [example.text for example in found] == [("",), ("x",)]
    assert script.encode(found, open_tokenizer("bytes"), 9)[1] == "0 cut, 1 empty"


def test_labels():
    settings()
    values = {1: "1", 3.0: "3", "1.0": "1", " good ": "good", 0: "0", -1: "-1", "etc.": "etc.",
              "infer": "infer"}
    rows = [{"text": "x", "label": value} for value in values]
    assert [e.label for e in script.make_examples(rows, "it", True)] == [*values.values()]
    for value in (None, "", "  ", float("nan"), "nan", 2.5, ".5"):
        with pytest.raises(ValueError, match="row 2 of it has the label .* whole number"):
            script.make_examples([rows[0], {"text": "x", "label": value}], "it", True)


def hub(monkeypatch, splits):
    import datasets
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, **_: asked.append(name) or splits)
    return asked


def test_from_the_hub(base, tmp_path, monkeypatch, capsys):
    train = [{"text": f"x {'ab'[i % 2]}", "label": i % 2} for i in range(40)]
    asked = hub(monkeypatch, {"train": train, "test": [{"text": "y", "label": -1}] * 3,
                              "unsupervised": []})
    settings("--dataset=some/set:part", "--train_file=not-here.csv")
    splits = script.read_splits()
    assert asked == [("some/set", "part")] and splits["test"][0].label is None
    dev, train = ({example.id for example in splits[name]} for name in ("dev", "train"))
    assert len(dev) == 4 and len(train) == 36 and not dev & train
    assert "not-here.csv: not here; some/set:part is read from the hub" in capsys.readouterr().err
    settings("--dataset=some/set:part", "--seed=2")
    assert {example.id for example in script.read_splits()["dev"]} != dev
    settings("--dataset=some/set:part", "--train_file=not-here.csv", f"--test_file={base}/test.csv")
    with pytest.raises(OSError, match="not-here"):  # a file that is here is read, never the hub's instead
        script.read_splits()


@pytest.mark.parametrize(("config", "folder", "counts"), [
    ("sst", "cs224n", {"train": 8544, "dev": 1101, "test": 2210}),
    ("cfimdb", "cs224n", {"train": 1707, "dev": 245, "test": 488}),
    ("quora", "cs224n", {"train": 14000, "dev": 3000}),
    ("mrpc", "mrpc", {"train": 3668, "dev": 408, "test": 1725}),
    ("imdb", "imdb", {"train": 22500, "dev": 2500, "test": 10000})])
def test_the_real_sets(config, folder, counts):
    if not (SHARED / folder).is_dir():
        pytest.skip(f"../shared/data/{folder} is not here")
    settings(f"config/finetune_{config}.py", f"--data_dir={SHARED / folder}")
    splits = script.read_splits()
    assert {name: len(split) for name, split in splits.items()} == counts
    assert {name for name, split in splits.items() if split[0].label is None} == (
        {"test"} if folder == "cs224n" and "test" in counts else set())
    assert {len(example.text) for split in splits.values() for example in split} == {
        2 if config in ("quora", "mrpc") else 1}
    assert script.class_names(splits["train"]) == script.classes
    assert len(script.class_numbers(splits["dev"], script.classes)) == counts["dev"]


@pytest.mark.parametrize("config", ["sst", "cfimdb", "paraphrase"])
def test_gpt2_has_nothing_of_the_small_models_recipe(config):
    """Its configs read those of the small model for files and columns."""
    small, gpt2 = (vars(import_module(f"config.{name}_cls")) for name in ("muon", "gpt2"))
    settings(f"config/{config}_gpt2.py")
    for name in small.keys() & DEFAULTS:
        assert getattr(script, name) == gpt2[name], name
    assert (script.optimizer, script.adamw_learning_rate, script.pooling, script.dropout,
            script.word_dropout) == ("adamw", None, "last", 0.1, 0.0)


# ---- tokens and batches ----

def test_long_and_empty_texts_and_prompts(base):
    vars(script).update(DEFAULTS)
    tok = open_tokenizer("bytes")

    def texts(rows, T, **options):
        vars(script).update(DEFAULTS | options)
        found, note = script.encode(examples(rows), tok, T)
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
                          "slots"), ({"prompt": "x" * 9 + "{text}{text_pair}"}, "leaves nothing")):
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
    ({}, ["--text_column=review"], r"has no column review; its columns are text, label: .* --text_column"),
    ({"dev": [{"text": "x", "label": "0"}, {"text": "x", "label": "7"}]}, [],
     r"row 2 of \S+dev.csv has the label '7'.*: 0, 1"),
    ({}, ["--classes", "0", "1", "2"], r"classes: .*'2'\], in its rows: \['0', '1'\]"),
    ({"train": GOOD[::2]}, [], "two classes or more"),
    ({"train": [*GOOD, {"text": "x", "label": ""}]}, [], "row 9 of .* has the label '' in the columns"),
    ({"train": [{"text": "x"}]}, [], "no column label or sentiment; its columns are text: .* --label_column"),
    ({"test": [{"text": "x", "label": "1"}, {"text": "x", "label": ""}]}, [], "row 2 .*the label ''"),
    ({"test": [{"text": "x", "label": "7"}]}, [], r"row 1 of \S+test.csv has the label '7'"),
    ({}, ["--init_from=auto"], r"no run in .* to go on with: name the model"),
    ({}, ["--mode=head"], "full, last_layer"), ({}, ["--style=tail"], "style must be head or"),
    ({}, ["--batch_size=0"], "batch_size must"), ({}, ["--keep=all"], "keep must"),
    ({}, ["--word_dropout=1"], r"word_dropout must be in \[0, 1\)"),
    ({}, ["--init_from=./nothing"], "no folder"), ({}, ["--max_tokens=0"], "max_tokens must"),
    ({}, ["--style=cloze", "--prompt={text}", "--verbalizers", " no"], r"'1'\], none .*\[' no'\]\]"),
    ({}, ["--style=cloze", "--prompt={text}", "--verbalizers", " no", " qqq"], "none .* 'q'"),
    ({}, ["--predict=x", "--predict_file=x"], "not both"), ({}, ["--dev_file=", "--dev_fraction=5"], "dev_fraction must"),
    ({"train": [{"text": "x", "label": 7}, *GOOD]}, ["--dev_file=", "--seed=3", "--dev_fraction=0.9"], "all rows of class"),
    ({}, ["--classes", "0", "1", "1"], "each named once"), ({}, ["--predict=x"], "is no classifier"),
    ({}, ["--train_file=missing.csv"], "cannot read missing.csv")])
def test_mistakes_are_one_line(base, tmp_path, changes, argv, word):
    tables = {"train": GOOD, "dev": GOOD} | changes
    files = [put(tmp_path, name, rows) for name, rows in tables.items()]
    with pytest.raises((ValueError, OSError), match=word) as e:
        start(f"--init_from={base}", f"--out_dir={tmp_path}", *files, *argv)
    assert "\n" not in str(e.value) and not (tmp_path / "best").exists()  # nothing was trained


@pytest.mark.parametrize("content", ['text\tlabel\n"hm,\t1\nx\t0\nso "\t0\n', 'id\ttext\n1\t"hm\n2\tx\n3\tso "\n'])
def test_rows_that_a_quotation_mark_may_have_joined_are_noted(tmp_path, capsys, content):
    script.say_once.cache_clear()
    (tmp_path / "a.tsv").write_text(content)
    assert len(script.read_table(tmp_path / "a.tsv")) == 1
    assert "note: lines 2 to 4 of a table are one row" in capsys.readouterr().err
    (tmp_path / "a.tsv").write_text('text\tlabel\n"hm,\nso "\t0\n')
    assert len(script.read_table(tmp_path / "a.tsv")) == 1 and not capsys.readouterr().err


def test_files_that_cannot_be_read(tmp_path):
    for name, content, word in (
            ("a.csv", "text,label\nx,1\né,0\n".encode("latin-1"), "not UTF-8.* 0xe9 in line 3"),
            ("b.jsonl", b'{"text": 1', "cannot be read as .jsonl"),
            ("c.jsonl.gz", b"no gzip", "cannot"), ("d.parquet", b"none", "cannot be read"),
            ("e.jsonl.xz", b"none", "cannot"), ("i.xlsx", b"PK", "a spreadsheet: save it as .csv"),
            ("f.csv", b"text,label\nwell, good,1\n", "line 2 has more fields than the header"),
            ("g.csv", b"text,label,text\nx,1,y\n", "header has 'text' twice"),
            ("h.tsv", b'text\tlabel\n"hm,\t1\nx\t0\n', "cannot be read")):  # an open quote
        (tmp_path / name).write_bytes(content)
        with pytest.raises((ValueError, OSError), match=word) as e:
            script.read_table(tmp_path / name)
        assert name in str(e.value) and "\n" not in str(e.value)
    settings()
    for row, word in (({"label": 1}, "row 2 of it has no text"), ("text", "it has no rows, or"),
                      ({"text": "x", "label": [0, 1]}, r"has the label \[0, 1\], expected one class"),
                      ({"text": 3, "label": 1}, "row 2 of it has no text")):
        with pytest.raises(ValueError, match=word):
            script.make_examples([GOOD[0], row], "it", True)
    with pytest.raises(ValueError, match="it has no rows"):
        script.make_examples([], "it", True)
