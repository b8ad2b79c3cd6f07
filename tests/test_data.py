"""Shards, documents and the order of windows."""

import bz2
import csv
import gzip
import hashlib
import json
import lzma
import os
import resource
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import HERE

import bpe
from data import Data, Split, WindowOrder, write_data
from files import replacing
from text import find_files, read_documents, read_table
from tokenizer import char_tokenizer, open_tokenizer

STORIES = [f"Story {i} of a cat that sat{' on the mat' * (i % 7)}.\nThe end … é 😀" for i in range(90)]


def write(tmp_path, tokenizer="bytes", shard_tokens=1000, **splits):
    splits = splits or {"train": STORIES[:70], "val": STORIES[70:]}
    name = f"{tmp_path}/set"
    write_data(name, open_tokenizer(tokenizer), splits, shard_tokens)
    return name


def test_shards_round_trip(tmp_path):
    name = write(tmp_path)
    opened = Data(name, verify=True)
    meta = json.loads((opened.folder / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["eos_id"], meta["dtype"]) == (
        "bytes", 256, 255, "uint8")
    info = meta["splits"]["train"]
    assert info["documents"] == 70 and info["bytes"] == sum(len(s.encode()) for s in STORIES[:70])
    assert info["tokens"] == info["bytes"] + 70 and len(info["shards"]) > 2
    for shard in info["shards"]:
        raw = (opened.folder / shard["file"]).read_bytes()
        assert len(raw) == shard["tokens"] <= 1000
        assert hashlib.sha256(raw).hexdigest() == shard["sha256"]
    ids = opened.train.rows([0], opened.train.tokens)[0]
    stream = b"\xff".join(s.encode() for s in STORIES[:70]) + b"\xff"
    assert bytes(ids.astype(np.uint8)) == stream  # across all the shards
    windows = opened.train.rows([5, 990, 1995], 20)
    assert [bytes(w.astype(np.uint8)) for w in windows] == [stream[a:a + 20] for a in (5, 990, 1995)]
    assert opened.tokenizer().name == "bytes"
    assert not list(opened.folder.glob("*.part"))


def test_gpt2_shards_are_uint16(tmp_path):
    opened = Data(write(tmp_path, "gpt2"))
    tokenizer = open_tokenizer("gpt2")
    raw = np.fromfile(opened.folder / "train_00000.bin", "<u2")
    assert raw[:50256].tolist().count(50256) >= 1
    first = raw[:raw.tolist().index(50256)].tolist()
    assert first == tokenizer.encode(STORIES[0]).tolist()
    assert tokenizer.decode(first) == STORIES[0]


def test_characters(tmp_path):
    name = f"{tmp_path}/c"
    text = "to be, or not to be\n" * 20
    write_data(name, char_tokenizer(set(text)), {"train": [text], "val": [text]})
    opened = Data(name)
    assert opened.eos_id is None and opened.train.tokens == len(text)
    assert opened.tokenizer().decode(opened.train.rows([0], len(text))[0]) == text


def test_nanogpt_folder(tmp_path):
    ids = np.arange(3000, dtype=np.uint16)
    for split in ("train", "val"):
        ids.tofile(tmp_path / f"{split}.bin")
    opened = Data(f"{tmp_path}/")
    assert opened.vocab_size == 50257 and opened.train.bytes is None
    assert opened.train.rows([7], 5).tolist() == [[7, 8, 9, 10, 11]]
    (tmp_path / "val.bin").write_bytes(b"odd")
    with pytest.raises(ValueError, match=r"val\.bin has 3 bytes"):
        Data(f"{tmp_path}/")


def test_preparing_again_replaces_everything(tmp_path):
    name = write(tmp_path)
    before = len(list(Data(name).folder.glob("train_*.bin")))
    write(tmp_path, train=STORIES[:3], val=STORIES[3:5])
    opened = Data(name, verify=True)
    assert len(list(opened.folder.glob("train_*.bin"))) == 1 < before


def test_an_interrupted_prepare_leaves_the_old_data(tmp_path):
    name = write(tmp_path)
    tokens = Data(name).train.tokens

    def broken():
        yield from STORIES
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, train=broken(), val=STORIES)
    assert Data(name, verify=True).train.tokens == tokens
    assert not list(Data(name).folder.glob("*.part"))


def test_a_full_disk_leaves_the_old_data_and_what_is_not_its_own(tmp_path):
    name = write(tmp_path)
    tokens, folder = Data(name).train.tokens, Data(name).folder
    for own in ("notes.tmp", "x.part"):
        (folder / own).write_text("mine")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for shard_tokens, file in ((1000, "tokenizer.json"), (10**6, "val_00000.bin")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        try:
            with pytest.raises(OSError, match=f"too large.*{file}|{file}.*too large"):
                write(tmp_path, "bytes", shard_tokens, train=STORIES[:1], val=STORIES)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert Data(name, verify=True).train.tokens == tokens
        assert [f.name for f in folder.glob("*.part")] == ["x.part"]
    write(tmp_path, train=STORIES[:1], val=STORIES)
    assert (folder / "notes.tmp").read_text() == (folder / "x.part").read_text() == "mine"


def test_a_models_tokenizer_is_not_replaced(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="give another --name"):
        write(tmp_path)
    assert [f.name for f in (tmp_path / "set").iterdir()] == ["tokenizer.json"]
    for name in ("", ".", ".."):
        with pytest.raises(ValueError, match="does not name a data set"):
            Data(name)


def test_shards_of_others_are_not_replaced(tmp_path):
    foreign_file(tmp_path / "train_000001.bin", "llm.c")
    before = (tmp_path / "train_000001.bin").read_bytes()
    with pytest.raises(ValueError, match=r"train_000001\.bin is of no data set that was prepared here"):
        write_data(f"{tmp_path}/", open_tokenizer("bytes"), {"train": STORIES, "val": STORIES})
    assert (tmp_path / "train_000001.bin").read_bytes() == before
    for split in ("train", "val"):  # and a call that failed leaves a lock, which is no data
        foreign_file(tmp_path / f"{split}.bin", "nanogpt")
    (tmp_path / "train_000001.bin").unlink()
    (tmp_path / ".lock").touch()
    assert Data(f"{tmp_path}/").train.tokens == 3000


def test_parsed_special_tokens_are_no_bytes_of_the_text(tmp_path):
    texts = [f"<|endoftext|>{story}<|endoftext|>" for story in STORIES]
    meta = write_data(f"{tmp_path}/set", open_tokenizer("bytes"), {"train": texts, "val": texts}, special=True)
    assert meta["splits"]["val"]["bytes"] == sum(len(story.encode()) for story in STORIES)


def test_two_prepares_at_once(tmp_path):
    started, go_on = threading.Event(), threading.Event()

    def slow():
        yield STORIES[0]
        started.set()
        go_on.wait(10)

    thread = threading.Thread(target=lambda: write(tmp_path, train=slow(), val=STORIES))
    thread.start()
    started.wait(10)
    with pytest.raises(ValueError, match="another process"):
        write(tmp_path)
    go_on.set()
    thread.join()
    assert Data(f"{tmp_path}/set").train.tokens == len(STORIES[0].encode()) + 1


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="val split is empty"):
        write(tmp_path, train=STORIES, val=[])
    with pytest.raises(ValueError, match="no prepared data"):
        Data(f"{tmp_path}/set")


def damage(tmp_path, change):
    name = write(tmp_path)
    folder = Data(name).folder
    change(folder)
    return name


def test_damaged_shards_are_named(tmp_path):
    def cut(folder):
        file = folder / "train_00001.bin"
        file.write_bytes(file.read_bytes()[:-1])

    with pytest.raises(ValueError, match=r"train_00001\.bin has 999 bytes, meta\.json says 1,000.*run again: "):
        Data(damage(tmp_path, cut))

    def flip(folder):
        raw = bytearray((folder / "train_00001.bin").read_bytes())
        raw[500] ^= 1
        (folder / "train_00001.bin").write_bytes(raw)

    name = damage(tmp_path, flip)
    Data(name)  # the size alone does not tell
    with pytest.raises(ValueError, match=r"train_00001\.bin has sha256"):
        Data(name, verify=True)
    with pytest.raises(ValueError, match=r"No such file .*train_00000\.bin'\); run again"):
        Data(damage(tmp_path, lambda folder: (folder / "train_00000.bin").unlink()))


GPT2 = (np.arange(3000) * 7 % 50257).astype("<u2")


def foreign_file(path, kind, dtype="<u2", magic=20240520, version=1, count=3000):
    ids = GPT2.astype(dtype)
    if kind == "npy":
        with open(path, "wb") as file:
            np.save(file, ids)
        return
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, count
    path.write_bytes((header.tobytes() if kind == "llm.c" else b"") + ids.tobytes())


@pytest.mark.parametrize("kind", ["nanogpt", "llm.c", "npy"])
@pytest.mark.parametrize("names", ["train.bin val.bin", "tiny_train.bin tiny_val.bin",
    "few_train_000001.bin few_train_000002.bin few_val_000000.bin", "edu_train_000001.npy edu_val_000000.npy"])
def test_shards_of_others_are_read_or_refused(tmp_path, kind, names):
    for name in names.split():
        foreign_file(tmp_path / name, kind)
    if kind == "nanogpt" and names != "train.bin val.bin":
        with pytest.raises(ValueError, match="no header of llm.c's or NumPy's; .* name it train.bin"):
            Data(f"{tmp_path}/")
        return
    data, shards = Data(f"{tmp_path}/"), names.count("train")
    assert (data.train.tokens, data.val.tokens) == (3000 * shards, 3000)
    assert (data.train.rows([0], 3000 * shards)[0] == np.tile(GPT2, shards)).all()
    assert data.vocab_size == 50257 and data.eos_id == 50256


def test_nanogpts_tokens_are_no_header(tmp_path):
    """Whatever the first two are: as an int32 they may be near llm.c's magic numbers."""
    for first in ((0, 309), (50256, 309), (50256, 308)):
        for split in ("train", "val"):
            np.array([*first, *GPT2], "<u2").tofile(tmp_path / f"{split}.bin")
        assert Data(f"{tmp_path}/").train.rows([0], 2)[0].tolist() == [*first]
    for few in range(1, 8):
        GPT2[:few].astype("<u2").tofile(tmp_path / "val.bin")
        assert Data(f"{tmp_path}/").val.tokens == few


@pytest.mark.parametrize(("kind", "options", "word"), [
    ("nanogpt", {"dtype": "<u4"}, r"train.bin has uint32 tokens, every second uint16 .*astype"),
    ("npy", {"dtype": "<u4"}, r"an array of uint32 \(3000,\), expected"),
    ("llm.c", {"magic": 20240801, "version": 7, "dtype": "<u4"}, "magic number 20240801, version 7 .*expected llm.c's"),
    ("llm.c", {"count": 2999}, "has 7,024 bytes, .* and 2,999 tokens by its header")])
def test_other_tokens_are_refused_by_name(tmp_path, kind, options, word):
    for split in ("train", "val"):
        foreign_file(tmp_path / f"{split}.bin", kind, **options)
    with pytest.raises(ValueError, match=word) as e:
        Data(f"{tmp_path}/")
    assert "\n" not in str(e.value)


def test_two_data_sets_in_a_folder_are_not_mixed(tmp_path):
    for name in ("a_train.bin", "b_train.bin", "a_val.bin"):
        foreign_file(tmp_path / name, "llm.c")
    with pytest.raises(ValueError, match=r"several data sets: a_train.bin, b_train.bin; give each"):
        Data(f"{tmp_path}/")


def test_our_shards_without_their_meta_are_no_others(tmp_path):
    name = write(tmp_path)
    (Data(name).folder / "meta.json").unlink()
    with pytest.raises(ValueError, match="no prepared data"):
        Data(name)


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes", "char"])
def test_long_and_many_documents_have_the_ids_of_each_alone(tmp_path, tokenizer):
    texts = ["One  story,\n and 'nother's end … " * 20_000, "x", "x" * 400_000, *STORIES, "é " * 300_000]
    opened = char_tokenizer(set("".join(texts))) if tokenizer == "char" else open_tokenizer(tokenizer)
    write_data(f"{tmp_path}/set", opened, {"train": texts, "val": ["x"]})
    end = [] if opened.eos_id is None else [opened.eos_id]
    want = np.concatenate([part for text in texts for part in (opened.encode(text), end)])
    data = Data(f"{tmp_path}/set")
    assert (data.train.rows([0], data.train.tokens)[0] == want).all()
    assert data.meta["splits"]["train"]["documents"] == len(texts)


@pytest.mark.parametrize(("count", "size"), [(120, 1_000_000), (600, 200_000)])
def test_what_is_read_ahead_is_bounded_by_characters(tmp_path, monkeypatch, count, size):
    monkeypatch.setattr("data.available_cores", lambda: 64)
    read, written = 0, lambda: sum(file.stat().st_size for file in tmp_path.glob("set/new.part/*.bin"))

    def documents():
        nonlocal read
        for _ in range(count):
            read += size
            assert read - written() < 50_000_000
            yield "ab c" * (size // 4)

    write_data(f"{tmp_path}/set", open_tokenizer("bytes"), {"train": documents(), "val": ["x"]})


def test_cores_are_those_of_the_affinity_and_of_the_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(48), raising=False)
    monkeypatch.setattr(bpe, "CGROUPS", tmp_path)
    assert bpe.available_cores() == 48
    for quota, cores in (("max 100000", 48), ("150000 100000", 2), ("6400000 100000", 48)):
        (tmp_path / "cpu.max").write_text(quota + "\n")
        assert bpe.available_cores() == cores


@pytest.mark.parametrize("change", [
    {"dtype": "float64"}, {"vocab_size": -1}, {"vocab_size": 10**30}, {"vocab_size": "256"},
    {"sha256": "0"}, {"eos_id": 999}, {"splits": {}}, {"splits": {"train": 3, "val": 4}},
    {"splits": {"train": {"bytes": 1, "shards": []}, "val": {"bytes": 1, "shards": []}}}])
def test_a_wrong_meta(tmp_path, change):
    def apply(folder):
        meta = json.loads((folder / "meta.json").read_text()) | change
        if "sha256" not in change:
            del meta["sha256"]
        (folder / "meta.json").write_text(json.dumps(meta))

    with pytest.raises(ValueError, match=r"set.* run again: python prepare_text\.py") as e:
        Data(damage(tmp_path, apply)).tokenizer()
    assert "\n" not in str(e.value)


def test_meta_cannot_name_a_file_outside(tmp_path):
    def apply(folder):
        meta = json.loads((folder / "meta.json").read_text())
        meta["splits"]["train"]["shards"][0]["file"] = "../../etc/passwd"
        del meta["sha256"]
        (folder / "meta.json").write_text(json.dumps(meta))

    with pytest.raises(ValueError, match="outside the folder"):
        Data(damage(tmp_path, apply))


def test_changed_metadata_is_noticed(tmp_path):
    name = write(tmp_path)
    for file, old, new in (("meta.json", '"documents": 70', '"documents": 71'),
                           ("tokenizer.json", '"Ġ"', '"ġ"')):
        path = Data(name).folder / file
        kept = path.read_text(encoding="utf-8")
        path.write_text(kept.replace(old, new), encoding="utf-8")
        with pytest.raises(ValueError, match=file):
            Data(name).tokenizer()
        path.write_text(kept, encoding="utf-8")
    (Data(name).folder / "meta.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="RecursionError"):
        Data(name)


def test_a_shard_changed_while_it_is_read(tmp_path):
    name = write(tmp_path)
    opened = Data(name)
    before = opened.train.rows([0], opened.train.tokens)
    write(tmp_path, train=STORIES[:3], val=STORIES[3:5])  # prepared again: the run keeps its data
    assert (opened.train.rows([0], opened.train.tokens) == before).all()
    opened = Data(name)
    os.truncate(opened.train.files[0], 100)
    with pytest.raises(ValueError, match=r"train_00000\.bin was cut while it was in use"):
        opened.train.rows([50], 100)


def test_an_id_past_the_vocabulary_is_named(tmp_path):
    ids = np.zeros(3000, np.uint16)
    ids[1234] = 777
    ids.tofile(tmp_path / "x.bin")
    split = Split([tmp_path / "x.bin"], "<u2", 500)
    assert split.rows([0], 100).max() == 0
    with pytest.raises(ValueError, match=r"x\.bin: token id 777 at token 1234 .* of 500"):
        split.rows([0, 1200], 100)


def test_documents_of_every_format(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = "".join(json.dumps({"text": s}) + "\n" for s in STORIES)
    (tmp_path / "a.jsonl").write_text(rows, encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as f:
        f.write(rows)
    with lzma.open(tmp_path / "a.jsonl.xz", "wt", encoding="utf-8") as f:
        f.write(rows)
    pq.write_table(pa.table({"text": STORIES}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.parquet"):
        assert list(read_documents(tmp_path / name)) == STORIES, name
    shutil.copy(tmp_path / "a.jsonl.gz", tmp_path / "B.JSONL.GZ")
    assert list(read_documents(tmp_path / "B.JSONL.GZ")) == STORIES
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(STORIES), encoding="utf-8")
    assert list(read_documents(tmp_path / "a.txt", "<|endoftext|>")) == STORIES
    assert list(read_documents(tmp_path / "a.txt")) == ["<|endoftext|>".join(STORIES)]
    for name in ("a.txt", "a.jsonl"):  # with Windows' byte-order mark
        (tmp_path / name).write_text((tmp_path / name).read_text("utf-8"), encoding="utf-8-sig")
    assert list(read_documents(tmp_path / "a.jsonl")) == STORIES
    assert list(read_documents(tmp_path / "a.txt", "<|endoftext|>")) == STORIES
    (tmp_path / "a.jfolder").mkdir()
    assert [f.name for f in find_files([f"{tmp_path}/a.j*"])] == ["a.jsonl", "a.jsonl.gz",
                                                               "a.jsonl.xz"]


BOOKS = ["One\nbook, “quoted”; | \t.", "Zwei\n\né 😀", "Three"]


def saved_tables(folder):
    """The same three books and a null in every format of a table; line ends are Windows'."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow import feather
    rows = [{"id": i, "story": book and book.replace("\n", "\r\n")}
            for i, book in enumerate([*BOOKS[:2], None, BOOKS[2]])]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    written = {"a.json": json.dumps(rows, indent=1), "b.json": lines, "c.ndjson": lines,
               "d.json": "\n".join(json.dumps(row, indent=2) for row in rows)}
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8-sig")
    for name, delimiter in (("e.csv", ","), ("f.csv", ";"), ("g.csv", "|"), ("h.tsv", "\t")):
        with open(folder / name, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, delimiter=delimiter)
            table.writerow(["id", " Story"])  # the null is a row of one field
            table.writerows(row.values() if row["story"] else [row["id"]] for row in rows)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "i.parquet")
    feather.write_feather(table, folder / "j.arrow", compression="zstd")
    with pa.ipc.new_stream(folder / "k.arrow", table.schema) as stream:
        stream.write_table(table)
    datasets.Dataset.from_list([{"id": 9, "story": "an older save's"}] * 4).save_to_disk(folder / "l", num_shards=4)
    datasets.Dataset.from_list(rows).save_to_disk(folder / "l", num_shards=2)  # does not remove those
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(folder / "m")
    (folder / "n.jsonl.bz2").write_bytes(bz2.compress(lines.encode()))
    for name, raw in (("o.jsonl.zst", lines.encode()), ("p.csv.zst", (folder / "e.csv").read_bytes())):
        with pa.output_stream(folder / name, compression="zstd") as file:
            file.write(raw)
    return folder


def test_every_table_gives_the_same_documents(tmp_path, capsys):
    paths = [*saved_tables(tmp_path).iterdir(), tmp_path / "m" / "train"]
    paths.remove(tmp_path / "m")
    for path in sorted(paths):
        found = [text for file in find_files([str(path)])
                 for text in read_documents(file, column="story")]
        assert found == BOOKS, path
        said = capsys.readouterr().err
        assert said.count("1 of") == 1 and "rows left out, whose story is null" in said, path
        texts = [row.get("story", row.get("Story")) for row in read_table(path)]
        assert [text and text.replace("\r", "") for text in texts] == [*BOOKS[:2], None, BOOKS[2]], path
    with pytest.raises(ValueError, match=r"m is a folder: give \S+/m/train"):
        find_files([str(tmp_path / "m")])
    with pytest.raises(ValueError, match="line 2: expected .* 'text', found {'id': 'str', 'Story': 'str'}"):
        list(read_documents(tmp_path / "e.csv"))


def test_a_long_json_array_is_read_piece_by_piece(tmp_path):
    texts = ["x" * n for n in (3_000_000, 1, 1_048_576, 5)] * 3
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    assert list(read_documents(tmp_path / "a.json")) == texts


@pytest.mark.parametrize(("name", "content", "word"), [
    ("a.pdf", b"%PDF", "is a document, not its text: save it as .txt"), ("a.xlsx", b"PK", "spreadsheet: save it as .csv"),
    ("a.HTML", b"<p>", "text among markup"), ("train.bin", b"\1\2", "shards of tokens"),
    ("a.txt", "caf\u00e9".encode("utf-16-le"), "not UTF-8 text: byte 0x00 in line 1; save it"), ("blob", b'{"text": "x"}', "begins as JSON: let its name end in .json"),
    ("a.json", b'[{"text": "x"}, {"text": ]', "record 2: not JSON"), ("a.json", b'[{"text": "x"}', "record 2: not JSON"),
    ("a.json", b'{"data": [{"text": "x"}]}', "record 1: .*found {'data': 'list'}"),
    ("a.zst", b"no zstd", "cannot read"), ("a.bz2", b"no bz2", "cannot read"),
    ("a.csv", b'text\n"a\nb"\n"c\n d" e\nf\n', "that begins in line 4"), ("a.arrow", b"no", "cannot be read as .arrow"),
    ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', r"line 2: .* field 'text', found {'body': 'str'}"),
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: not JSON"),
    ("a.jsonl", b'{"text": 3}\n', "found {'text': 'int'}"), ("a.jsonl", b"3\n", "found int"), ("a.txt", b"caf\xe9", "not UTF-8 text: byte 0xe9 in line 1"),
    ("a.jsonl.gz", b"no gzip", "cannot read"), ("a.jsonl.xz", b"no xz", "cannot be read"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999)[:40] + b"\xff" * 40, "cannot be read"),
    ("a.parquet", b"no parquet", "cannot be read"), ("a.tar.gz", b"", "archive"), ("A.ZIP", b"", "archive"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "line 2: .* byte 0xff"),
    ("a.jsonl", b'{"text": "x\\ud800"}\n', r"line 1: .*ud800' in position 1"),
    ("a.jsonl", b"[" * 99999, "line 1: not JSON"),
    ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1: not JSON")])
def test_documents_that_cannot_be_read(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=word) as e:
        list(read_documents(tmp_path / name))
    assert name in str(e.value)
    (tmp_path / "notes").mkdir()
    for pattern, told in (("*.nothing", "no file matches"), ("note*", "no file matches"),
                          ("notes", r"notes is a folder: give \S+/notes/\*"), ("notes/", "is a folder")):
        with pytest.raises(ValueError, match=told):
            find_files([f"{tmp_path}/{name}", f"{tmp_path}/{pattern}"])


# ---- the order ----

def test_an_epoch_visits_every_window_once():
    order = WindowOrder(tokens=1007, T=10, seed=3)
    assert order.n == 99
    first, second = order(0, 99), order(99, 99)
    for epoch in (first, second):
        assert len(set(epoch)) == 99 and epoch.min() < 10 and epoch.max() + 11 <= 1007
        assert (np.diff(np.sort(epoch)) == 10).all()
    assert (first != np.sort(first)).any() and (first != second).any()
    phases = {int(order.epoch(e).min()) for e in range(60)}
    assert phases == set(range(10))


def test_the_order_is_a_function_of_seed_and_count():
    order = WindowOrder(1007, 10, 3)
    everything = order(0, 400)
    assert (np.concatenate([order(i, 7) for i in range(0, 399, 7)]) == everything[:399]).all()
    assert (WindowOrder(1007, 10, 3)(250, 60) == everything[250:310]).all()  # resumed
    assert (WindowOrder(1007, 10, 4)(0, 400) != everything).any()
    micro = [order(100 + number * 4, 4) for number in range(4)]  # 2 ranks x 2 micro-steps
    assert (np.concatenate(micro) == everything[100:116]).all()


def test_the_smallest_splits():
    assert WindowOrder(11, 10, 0)(0, 3).tolist() == [0, 0, 0]
    assert set(WindowOrder(15, 10, 0)(0, 200)) == set(range(5))
    with pytest.raises(ValueError, match="needs 11"):
        WindowOrder(10, 10, 0)


def test_replacing_keeps_the_old_file_on_failure(tmp_path):
    file = tmp_path / "f"
    file.write_text("old")
    with pytest.raises(OSError, match="untouched"), replacing(file) as tmp:
        tmp.write_text("half")
        raise OSError(28, "No space left on device")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    with replacing(file) as tmp:
        tmp.write_text("new")
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def test_names_of_data_sets(tmp_path, monkeypatch):
    """data/NAME is beside the scripts wherever one stands, a slash may end a name, a path stays one."""
    from data import data_folder
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    home = HERE / "data" / "shakespeare"
    for name in ("shakespeare", "shakespeare/", "data/shakespeare", "data/shakespeare/"):
        assert data_folder(name) == home
    assert data_folder("mine/") == Path("mine") and data_folder("a/b") == Path("a/b")
    assert data_folder("./other") == Path("other")
    assert data_folder("mine") == HERE / "data" / "mine"
    for name in ("", ".", "/", "../"):
        with pytest.raises(ValueError, match="does not name a data set"):
            data_folder(name)
