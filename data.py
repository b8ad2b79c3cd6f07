"""Token shards: documents in, `data/NAME/` out, and the order in which training reads them.

A data folder holds `{train,val}_00000.bin …` (raw little-endian uint8 or uint16), `tokenizer.json`
and, written last, `meta.json`. One with only nanoGPT's `train.bin` and `val.bin` is read as uint16
GPT-2 tokens, or, with its `meta.pkl` beside them, as characters; so are the shards of llm.c (.bin
with a header) and build-nanogpt (.npy), `NAME_train_000001.bin` and the like.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import time
from bisect import bisect_right
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from bpe import available_cores, cut_batches, map_ahead
from files import HERE, naming, write_text
from text import sha256
from tokenizer import EOT, Tokenizer, open_tokenizer

# The commands that prepare the data sets of the configs.
SHARDS = ("train_[0-9]*.bin", "val_[0-9]*.bin")
PREPARE = {"shakespeare": "prepare_text.py", "tinystories": "prepare_tinystories.py",
           "tinystories_4k": "prepare_tinystories.py --name=tinystories_4k "
                             "--tokenizer=weights/tokenizer.json --limit=20000",
           "plays": "prepare_text.py --name=plays …, as config/pretrain_plays.py says",
           "base": "prepare_text.py --name=base …, as config/pretrain_imdb.py says",
           "openwebtext": "prepare_text.py --name=openwebtext --input=FILES --tokenizer=gpt2 "
                          "--val_fraction=0.0005"}


def data_folder(name: str) -> Path:
    """`data/NAME` beside the scripts, also written so; another name with a slash in it is a path as
    it stands."""
    if name.strip("/") in ("", ".", ".."):
        raise ValueError(f"{name!r} does not name a data set; a path needs a slash in it")
    path = Path(name)
    if len(path.parts) == 2 and path.parts[0] == "data" and not path.exists():
        return HERE / path
    alone = len(path.parts) == 1 and not name.startswith("./")  # a slash may end it
    if alone and (not path.is_dir() or "/" not in name):
        return HERE / "data" / path
    return path


def digest(value) -> str:
    """sha256 of a value's JSON."""
    return sha256(json.dumps(value, sort_keys=True).encode())


def sha256_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- writing ----

def write_data(name: str, tokenizer, splits: dict, shard_tokens: int = 100_000_000,
               special: bool = False) -> dict:
    """Encodes documents on all cores and writes a data folder; returns its meta.json.

    splits: {"train": documents as of bpe.cut_batches, "val": …}. End-of-text closes every document
    where the tokenizer has one. Special tokens written out in a text are text or, with `special`,
    tokens. Files appear under their names only when all are whole, meta.json last, so an
    interrupted call leaves either the old data or a folder without meta.json.
    """
    folder = data_folder(name)
    prepared = (folder / "meta.json").exists() or (folder / ".lock").exists()
    for pattern in () if prepared else ("tokenizer.json", *SHARDS):
        for file in folder.glob(pattern):
            raise ValueError(f"{file} is of no data set that was prepared here; give another "
                             "--name")
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "new.part"
    try:
        with FileLock(folder / ".lock", blocking=False):
            shutil.rmtree(new, ignore_errors=True)  # of a killed call
            new.mkdir()
            try:
                meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size,
                        "tokenizer_sha256": digest(tokenizer.to_json()),
                        "eos_id": tokenizer.eos_id, "dtype": tokenizer.dtype.name, "splits": {}}
                for split, documents in splits.items():
                    meta["splits"][split] = _write_split(new, split, documents, tokenizer,
                                                         shard_tokens, special)
                meta["sha256"] = digest(meta)
                write_text(new / "tokenizer.json", tokenizer.to_json())
                write_text(new / "meta.json", json.dumps(meta, indent=1) + "\n")
                for pattern in ("meta.json", *SHARDS):
                    for file in folder.glob(pattern):
                        file.unlink()
                for file in sorted(new.iterdir(), key=lambda file: file.name == "meta.json"):
                    os.replace(file, folder / file.name)  # meta.json last
            finally:
                shutil.rmtree(new, ignore_errors=True)
    except Timeout:
        raise ValueError(f"another process is preparing {folder}; wait for it to end") from None
    return meta


def _write_split(folder, split, documents, tokenizer, shard_tokens, special):
    end = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], tokenizer.dtype)
    info = {"documents": 0, "tokens": 0, "bytes": 0, "shards": []}
    start, workers, written = time.perf_counter(), available_cores(), Counter()

    def encode(batch):
        rows = tokenizer.encode_documents([text for text, _ in batch], special)
        ids = [part for row, (_, ends) in zip(rows, batch) for part in (row, end[:ends])]
        texts = [tokenizer.special_pattern.sub("", text) if special else text for text, _ in batch]
        size = sum(len(text.encode()) for text in texts)  # special tokens are no text
        for token in () if special else tokenizer.special:
            if len(token) > 1:  # a separator that is a character is part of the text
                written[token] += sum(text.count(token) for text, _ in batch)
        return sum(ends for _, ends in batch), size, np.concatenate(ids)

    # The parts of a long text have the ids of the whole by our own tokenizers, where it is cut.
    batches = cut_batches(documents, cut=tokenizer.name in ("gpt2", "bpe", "bytes", "char"))
    with (tqdm(desc=split, unit=" tokens", unit_scale=True, mininterval=0.5) as bar,
          ThreadPoolExecutor(workers) as pool):  # the encoders release the interpreter's lock
        for count, size, ids in map_ahead(pool, encode, batches, 3 * workers):
            info["documents"] += count
            info["bytes"] += size
            bar.update(len(ids))
            while len(ids):
                number, filled = divmod(info["tokens"], shard_tokens)
                part, ids = np.split(ids, [shard_tokens - filled])
                path = folder / f"{split}_{number:05d}.bin"
                with naming(path), open(path, "ab") as file:
                    file.write(part)
                info["tokens"] += len(part)
    if not info["tokens"]:
        raise ValueError(f"the {split} split is empty: no text was found for it")
    for path in sorted(folder.glob(f"{split}_*.bin")):
        with naming(path), open(path, "rb+") as file:
            os.fsync(file.fileno())
        info["shards"].append({
            "file": path.name, "tokens": path.stat().st_size // tokenizer.dtype.itemsize,
            "sha256": sha256_of_file(path)})
    if any(written.values()):
        info["special_tokens_as_text"] = {t: written[t] for t in sorted(written) if written[t]}
    info["seconds"] = round(time.perf_counter() - start, 2)
    return info


def describe(meta: dict) -> str:
    """The closing table of a prepare script."""
    lines = ["split  documents        tokens     MB  bytes/token  seconds    tokens/s"]
    for split, s in meta["splits"].items():
        lines.append(f"{split:5}{s['documents']:11,}{s['tokens']:14,}{s['bytes'] / 1e6:7.1f}"
                     f"{s['bytes'] / s['tokens']:13.2f}{s['seconds']:9.1f}"
                     f"{s['tokens'] / max(s['seconds'], 0.01):12,.0f}")
    several = any(s["documents"] > 1 for s in meta["splits"].values())
    if meta["eos_id"] is None and meta["tokenizer"] != "char" and several:
        lines.append("note: the tokenizer names no end-of-text, so documents run into each other")
    for split, s in meta["splits"].items():
        for token, count in s.get("special_tokens_as_text", {}).items():
            cut = f", --separator={shlex.quote(token)} cuts documents there"
            lines.append(f"note: {split} has {token} written out {count:,} times, encoded as text; "
                         "--parse_special makes the special token of it"
                         + (cut if token == EOT else ""))
    return "\n".join(lines)


# ---- reading ----

class Split:
    """The tokens of one split as one stream over its shards. They are read, not mapped: a file cut
    under a map would end the process without a word. The files stay open, so that a prepare in the
    middle of a run does not change its data."""

    def __init__(self, files: list, dtype, vocab_size: int, num_bytes: int | None = None,
                 headers: list | None = None):
        self.files, self.vocab_size, self.bytes = files, vocab_size, num_bytes
        self.dtype, self.lock = np.dtype(dtype), Lock()
        self.headers = headers or [0] * len(files)  # bytes before the tokens of each
        self.opened = [open(file, "rb") for file in files]  # noqa: SIM115 (closed with the split)
        sizes = [(os.fstat(file.fileno()).st_size - header) // self.dtype.itemsize
                 for file, header in zip(self.opened, self.headers)]
        self.ends = list(accumulate(sizes))  # of the shards, in tokens of the stream
        self.tokens = self.ends[-1]

    def read(self, start: int, count: int) -> np.ndarray:
        """At most `count` tokens of the stream from offset `start`, as far as their shard goes."""
        shard, size = bisect_right(self.ends, start), self.dtype.itemsize
        count = min(count, self.ends[shard] - start)
        offset = start - (self.ends[shard - 1] if shard else 0)
        try:
            self.opened[shard].seek(self.headers[shard] + offset * size)
            raw = self.opened[shard].read(count * size)
        except OSError as e:
            raise OSError(f"cannot read {self.files[shard]}: {e.strerror or e}") from e
        if len(raw) < count * size:
            raise ValueError(f"{self.files[shard]} was cut while it was in use; prepare it again")
        return np.frombuffer(raw, self.dtype)

    def rows(self, starts, length: int) -> np.ndarray:
        """(B, length) int64 ids from the B offsets `starts`; ValueError: one is past the
        vocabulary."""
        ids = np.empty((len(starts), length), np.int64)
        with self.lock:  # a file has one position for all threads
            for row, start in zip(ids, starts):
                filled = 0
                while filled < length:  # a window may cross into the next shard
                    part = self.read(int(start) + filled, length - filled)
                    row[filled:filled + len(part)] = part
                    filled += len(part)
        if ids.max() >= self.vocab_size:
            row, column = np.argwhere(ids >= self.vocab_size)[0]
            offset = int(starts[row] + column)
            raise ValueError(f"{self.files[bisect_right(self.ends, offset)]}: token id "
                             f"{ids[row, column]} at token {offset} of the split is past the "
                             f"vocabulary of {self.vocab_size}; prepare it again")
        return ids


class Data:
    """An opened data folder: `train` and `val` Splits, vocab_size, eos_id, tokenizer(). Sizes are
    checked against meta.json, and with `verify` the sha256 of all shards. ValueError says what is
    wrong and which command mends it."""

    def __init__(self, name: str, verify: bool = False):
        self.folder, self.note = data_folder(name), None
        self.again = "python " + PREPARE.get(
            name, f"prepare_text.py --name={shlex.quote(name)} --input=FILES")
        if (self.folder / "meta.json").is_file():
            self._open_shards(verify)
        else:
            self._open_foreign()

    def _open_foreign(self):
        self.meta, self.vocab_size, self.eos_id = None, 50257, 50256
        files, missing = {}, []
        for split in ("train", "val"):
            name = re.compile(rf"(.*_)?{split}(_\d+)?\.(bin|npy)")
            files[split] = sorted(f for f in self.folder.glob("*") if name.fullmatch(f.name))
            kinds = {(*name.fullmatch(f.name).group(1, 3), f.stem == split) for f in files[split]}
            if len(kinds) > 1:
                names = ", ".join(file.name for file in files[split])
                raise ValueError(f"{self.folder} has shards of several data sets: {names}; give "
                                 "each a folder of its own")
            missing += [] if files[split] else [f"{split}.bin"]
        broken = (self.folder / ".lock").exists() and not (self.folder / "train.bin").is_file()
        if missing or broken:  # a lock beside shards with numbers: ours, and not whole
            missing = " and ".join(missing) or "shards of others"
            small = ("; or begin with a small text: python prepare_text.py, then python train.py "
                     "config/quickstart.py" if self.folder.name != "shakespeare" else "")
            raise ValueError(f"no prepared data in {self.folder} (neither meta.json nor {missing});"
                             f" first run: {self.again}{small}; or name a folder that has "
                             "train.bin and val.bin: --dataset=../FOLDER")
        if (self.folder / "meta.pkl").is_file():
            self.vocab_size, self.eos_id = self.tokenizer().vocab_size, None
        else:
            self.note = f"note: {self.folder} has no meta.pkl: its ids are taken as GPT-2's tokens"
        for split, shards in files.items():
            headers = [*map(foreign_header, shards)]
            setattr(self, split, Split(shards, "<u2", self.vocab_size, headers=headers))

    def _open_shards(self, verify):
        try:
            self.meta = meta = json.loads((self.folder / "meta.json").read_text("utf-8"))
            if meta.pop("sha256", None) not in (None, digest(meta)):
                raise ValueError("the content of meta.json changed")
            self.vocab_size, self.eos_id = meta["vocab_size"], meta["eos_id"]
            dtype = np.dtype({"uint8": "u1", "uint16": "<u2"}[meta["dtype"]])
            for split in ("train", "val"):
                info = meta["splits"][split]
                files = [self.folder / shard["file"] for shard in info["shards"]]
                for file, shard in zip(files, info["shards"]):
                    if not re.fullmatch(rf"{split}_\d+\.bin", shard["file"]):
                        raise ValueError(f"{shard['file']!r} is no shard, or outside the folder")
                    size, found = shard["tokens"] * dtype.itemsize, file.stat().st_size
                    if found != size or not size:
                        raise ValueError(f"{file.name} has {found:,} bytes, meta.json says "
                                         f"{size:,}")
                    found = verify and sha256_of_file(file)
                    if verify and found != shard["sha256"]:
                        raise ValueError(f"{file.name} has sha256 {found}, meta.json says "
                                         f"{shard['sha256']}")
                setattr(self, split, Split(files, dtype, self.vocab_size, int(info["bytes"])))
        except Exception as e:  # noqa: BLE001 (whatever a damaged file raises)
            raise ValueError(f"{self.folder} cannot be used ({type(e).__name__}: {e!s:.200}); "
                             f"run again: {self.again}") from None

    def tokenizer(self) -> Tokenizer:
        """The Tokenizer that made the shards; ValueError where the folder has another."""
        if self.meta is None:
            characters = self.folder / "meta.pkl"
            return open_tokenizer(characters if characters.is_file() else "gpt2")
        try:
            tokenizer = open_tokenizer(self.folder)
        except ValueError as e:
            raise ValueError(f"{e}; run again: {self.again}") from None
        found = digest(tokenizer.to_json()), tokenizer.vocab_size, tokenizer.eos_id
        if found != (self.meta.get("tokenizer_sha256"), self.vocab_size, self.eos_id):
            raise ValueError(f"{self.folder / 'tokenizer.json'} is not the tokenizer that made the "
                             f"shards: it was changed; run again: {self.again}")
        return tokenizer

    def fingerprint(self) -> str:
        """The same for the same tokens in the same shards: sizes, and checksums where known."""
        shards = self.meta and [shard.get("sha256") for split in ("train", "val")
                                for shard in self.meta["splits"][split]["shards"]]
        return digest([self.train.tokens, self.val.tokens, shards])


def foreign_header(file: Path) -> int:
    """The size in bytes of the header of a shard with uint16 tokens: of llm.c, of build-nanogpt's
    .npy, or none, of nanoGPT, known by their content. ValueError for one of any other kind."""
    size = file.stat().st_size
    if size % 2 or not size:
        raise ValueError(f"{file} has {size:,} bytes, expected whole uint16 tokens")
    ids = np.memmap(file, "<u2", "r")
    magic, version, count = np.frombuffer(ids[:6].tobytes().ljust(12, b"\0"), "<i4")
    if ids[:3].tobytes() == b"\x93NUMPY":
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        if array.dtype != np.uint16 or array.ndim != 1:
            raise ValueError(f"{file} is an array of {array.dtype} {array.shape}, expected (N,) "
                             "uint16 tokens as build-nanogpt writes")
        return array.offset
    if 20240000 < magic < 309 * 2**16:  # no GPT-2 tokens: the first would be above 50,257
        if (magic, version, size) != (20240520, 1, 1024 + 2 * count):
            raise ValueError(f"{file} has {size:,} bytes, magic number {magic}, version {version} "
                             f"and {count:,} tokens by its header; expected llm.c's GPT-2 tokens: "
                             "20240520, version 1, 1,024 bytes and two for each token")
        return 1024
    if file.suffix == ".npy" or file.stem not in ("train", "val"):
        raise ValueError(f"{file} has no header of llm.c's or NumPy's; if it has nanoGPT's plain "
                         f"uint16 tokens, name it train.bin or val.bin")
    start = ids[:1 << 16]
    if len(start) >= 64 and start[1::2].max() <= 2 < start[::2].max():
        raise ValueError(f"{file} has uint32 tokens, every second uint16 is 0 to 2; GPT-2's can be "
                         "made uint16: numpy.fromfile(FILE, 'u4').astype('u2').tofile(FILE)")
    return 0


# ---- the order of training ----

class WindowOrder:
    """Which windows of T + 1 tokens come next: a pure function of (seed, windows consumed so far).
    An epoch visits each of its `n` windows once, shuffled; they start at a random phase, so that
    they do not fall on the same bounds in every epoch."""

    def __init__(self, tokens: int, T: int, seed: int):
        if tokens < T + 1:
            raise ValueError(f"the split has {tokens} tokens, a window of block_size={T} needs "
                             f"{T + 1}; lower block_size or bring more text")
        self.tokens, self.T, self.seed = tokens, T, seed
        self.n = max(1, (tokens - T) // T)

    @lru_cache(maxsize=2)  # noqa: B019 (lives as long as the run)
    def epoch(self, number: int) -> np.ndarray:
        """Start offsets (n,) of epoch `number`, in order."""
        rng = np.random.default_rng((self.seed, number))
        phase = rng.integers(min(self.T, self.tokens - self.n * self.T))
        return phase + self.T * rng.permutation(self.n)

    def __call__(self, consumed: int, count: int) -> np.ndarray:
        """Start offsets (count,) of the windows after the first `consumed`."""
        starts = []
        while count:
            number, position = divmod(consumed, self.n)
            part = self.epoch(number)[position:position + count]
            starts.append(part)
            consumed, count = consumed + len(part), count - len(part)
        return np.concatenate(starts)
