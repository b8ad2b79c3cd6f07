"""The prepare scripts, on files of their own."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

import prepare_text
import prepare_tinystories
from configurator import configure, find_settings
from data import Data
from text import normalize

HERE = Path(__file__).resolve().parent.parent
STORIES = [f"Once there was a cat number {i}. It said “hi”.\nThe end." for i in range(50)]
DEFAULTS = {module: {name: default for name, (default, _, _) in find_settings(vars(module)).items()}
            for module in (prepare_text, prepare_tinystories)}


def run_script(module, *argv):
    vars(module).update(DEFAULTS[module])
    configure(vars(module), list(argv))
    module.main()


def text_of(split, tokenizer):
    return tokenizer.decode(split.rows([0], split.tokens)[0])


def jsonl(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": row}) + "\n" for row in rows)
    return path


def test_one_plain_file_is_split_contiguously(tmp_path):
    text = "".join(f"line {i}\n" for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    run_script(prepare_text, f"--input={tmp_path}/a.txt", f"--name={tmp_path}/set")
    opened = Data(f"{tmp_path}/set")
    cut = int(len(text) * 0.9)
    assert text_of(opened.train, opened.tokenizer()) == text[:cut]
    assert text_of(opened.val, opened.tokenizer()) == text[cut:]
    assert opened.vocab_size == len(set(text)) and opened.eos_id is None


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_documents_are_held_out_evenly_and_closed(tmp_path, tokenizer):
    jsonl(tmp_path / "a.jsonl.gz", STORIES)
    run_script(prepare_text, "--input", f"{tmp_path}/*.gz", f"--name={tmp_path}/set",
               f"--tokenizer={tokenizer}", "--val_fraction=0.2")
    opened = Data(f"{tmp_path}/set", verify=True)
    end = "<|endoftext|>"
    train = text_of(opened.train, opened.tokenizer()).split(end)
    val = text_of(opened.val, opened.tokenizer()).split(end)
    assert train.pop() == val.pop() == "" and len(val) == 10
    assert val == STORIES[::5] and sorted(train + val) == sorted(STORIES)


@pytest.mark.parametrize(("sizes", "want"), [
    ([9000, 500], [900, 50]), ([50] * 9, [5] * 9), ([100] + [50] * 9, [100])])
def test_of_few_documents_the_end_of_each_is_held_out(tmp_path, sizes, want):
    texts = ["".join(chr(33 + (i * 7 + j) % 90) for j in range(n)) for i, n in enumerate(sizes)]
    path = jsonl(tmp_path / "a.jsonl", texts)
    run_script(prepare_text, f"--input={path}", f"--name={tmp_path}/set", "--tokenizer=bytes")
    opened = Data(f"{tmp_path}/set")
    train, val = (text_of(split, opened.tokenizer()).split("<|endoftext|>")[:-1]
                  for split in (opened.train, opened.val))
    assert [len(text) for text in val] == want
    assert sorted(texts) == sorted(map(str.__add__, train, val) if len(train) == len(val) else train + val)


def test_characters_with_a_separator(tmp_path):
    (tmp_path / "a.txt").write_text("ab|ba|abba|b|a|bb")
    run_script(prepare_text, f"--input={tmp_path}/a.txt", f"--name={tmp_path}/set",
               "--separator=|", "--val_fraction=0.34")
    opened = Data(f"{tmp_path}/set")
    assert text_of(opened.train, opened.tokenizer()) == "ba|b|a|"
    assert text_of(opened.val, opened.tokenizer()) == "ab|abba|bb|"


def test_lower_case_has_words_and_punctuation_apart(tmp_path):
    for text, want in (
            ("It's NOT good, don't\nsee it!<br /><br />(Really...)",
             "it 's not good , do n't see it ! ( really ... )"),
            ("`` Conan \'\' and\\\\/or -LRB- well-made -RRB- .", '" conan " and / or ( well - made ) .'),
            ('""""" He """" said', '" he " said'), ("rock 'n' roll", "rock 'n' roll")):
        assert normalize(text.replace("\\\\", "\\")) == want
        assert normalize(want) == want  # the tokenized sets stay as they are
    (tmp_path / "a.txt").write_text("What's THIS?|no|no|NO|no", encoding="utf-8")
    run_script(prepare_text, f"--input={tmp_path}/a.txt", f"--name={tmp_path}/set", "--lowercase",
               "--tokenizer=bytes", "--separator=|", "--val_fraction=0.2")
    opened = Data(f"{tmp_path}/set")
    assert text_of(opened.val, opened.tokenizer()) == "what 's this ?<|endoftext|>"


def test_validation_files_may_bring_characters(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 30)
    (tmp_path / "b.txt").write_text("cdé")
    run_script(prepare_text, f"--input={tmp_path}/a.txt", f"--val_input={tmp_path}/b.txt",
               f"--name={tmp_path}/set")
    opened = Data(f"{tmp_path}/set")
    assert text_of(opened.val, opened.tokenizer()) == "cdé" and opened.vocab_size == 5


def test_tinystories_from_the_hubs_text_files(tmp_path, capsys):
    stories = [*STORIES, "  ", "Tom said, \u00e2\u20ac\u0153Hi!\u00e2\u20ac\u009d"]
    (tmp_path / "train.txt").write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    jsonl(tmp_path / "valid.jsonl", STORIES[:7])
    run_script(prepare_tinystories, f"--train_input={tmp_path}/train.txt",
               f"--val_input={tmp_path}/valid.jsonl", f"--name={tmp_path}/set")
    opened = Data(f"{tmp_path}/set", verify=True)
    found = text_of(opened.train, opened.tokenizer()).split("<|endoftext|>")[:-1]
    assert found == [*STORIES, "Tom said, “Hi!”"]
    assert opened.meta["splits"]["val"]["documents"] == 7
    said = capsys.readouterr().out
    assert "1 empty stories dropped, 1 with broken quotation marks" in said
    run_script(prepare_tinystories, f"--train_input={tmp_path}/train.txt", "--limit=5",
               f"--val_input={tmp_path}/valid.jsonl", f"--name={tmp_path}/set")
    assert Data(f"{tmp_path}/set").meta["splits"]["train"]["documents"] == 5


def prepare(tmp_path, *argv, stdin=b""):
    done = subprocess.run([sys.executable, HERE / "prepare_text.py", f"--name={tmp_path}/set",
                           "--tokenizer=bytes", *map(str, argv)], input=stdin, capture_output=True, check=False)
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize(("name", "stdin"), [
    ("-", "".join(STORIES).encode()), ("-.jsonl", b'{"text": "a b c d e f g h"}\n'),
    ("-.jsonl.gz", gzip.compress(b'{"text": "a b c d e f g h"}\n'))])
def test_standard_input(tmp_path, name, stdin):
    assert prepare(tmp_path, "--input", name, stdin=stdin)[0] == 0
    opened = Data(f"{tmp_path}/set")
    want = "".join(STORIES) if name == "-" else "a b c d e f g h"
    parts = [text_of(split, opened.tokenizer()) for split in (opened.train, opened.val)]
    assert "".join(parts).replace("<|endoftext|>", "") == want


def test_json_on_standard_input_is_not_trained_on_with_its_braces(tmp_path):
    status, said = prepare(tmp_path, "--input=-", stdin=b'{"text": "a"}\n')
    assert status == 2 and "begins as JSON: let its name end in .json (standard input: -.json)" in said


def test_what_is_given_twice_is_said(tmp_path):
    for name, text in (("a", "one"), ("b", "two"), ("c", "one")):
        (tmp_path / f"{name}.txt").write_text(text * 30)
    files = [tmp_path / f"{name}.txt" for name in "abc"]
    status, said = prepare(tmp_path, "--input", *files[:2], files[1], "--val_input", files[2])
    assert status == 0 and Data(f"{tmp_path}/set").meta["splits"]["train"]["documents"] == 3
    assert f"{files[1]} (training) is {files[1]} (training) again: its text counts twice\n" in said
    assert f"{files[2]} (validation) is {files[0]} (training) again: its text makes validation" in said
    assert said.count("again") == 2


def test_a_column_of_any_table(tmp_path, capsys):
    rows = [{"story": story, "text": "no"} for story in STORIES]
    (tmp_path / "data00.json").write_text(json.dumps(rows))
    run_script(prepare_tinystories, f"--train_input={tmp_path}/data00.json", "--column=story",
               f"--val_input={tmp_path}/data00.json", f"--name={tmp_path}/set")
    opened = Data(f"{tmp_path}/set")
    assert text_of(opened.train, opened.tokenizer()).split("<|endoftext|>")[:-1] == STORIES
    assert "makes validation losses too low" in capsys.readouterr().err


def test_shakespeare_is_plain_text():
    text = prepare_text.shakespeare()
    assert text.startswith("THESEUS:\nNow, fair Hippolyta, our nuptial hour\n")
    assert 4_500_000 < len(text) < 5_000_000 and not set("*#_[]") & set(text)
    assert "HAMLET:\nTo be, or not to be: that is the question:\n" in text
    assert "\n\n\n" not in text and text.endswith("\n\n")


def test_mistakes(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("abc")
    hub = {"train": [{"story": "Once"}], "validation": []}
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: hub)
    for module, argv, word in (
            (prepare_text, ["--val_fraction=1.0"], "val_fraction"),
            (prepare_text, ["--input=nothing.txt"], "nothing.txt"),
            (prepare_text, [f"--input={tmp_path}/a.txt", "--tokenizer=none.json"], "none.json"),
            (prepare_text, [f"--input={tmp_path}"], "is a folder: give"),
            (prepare_tinystories, [f"--train_input={tmp_path}", f"--val_input={tmp_path}"], "is a folder"),
            (prepare_tinystories, [], "split train: expected text in .* found {'story': 'str'}"),
            (prepare_tinystories, ["--train_input=a.txt"], "--val_input")):
        with pytest.raises(ValueError, match=word):
            run_script(module, *argv, f"--name={tmp_path}/set")
    with pytest.raises(ValueError, match="--input needs a --name of its own"):
        run_script(prepare_text, f"--input={tmp_path}/a.txt")
    done = subprocess.run([sys.executable, HERE / "prepare_text.py", "--name=x", "--input", "no/*.txt"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == "error: no file matches 'no/*.txt'\n"
