"""Token shards: documents in, `data/NAME/` out, and the order in which training reads them.

A data folder holds `{train,val}_00000.bin …` (raw little-endian uint8 or uint16), `tokenizer.json`
and, written last, `meta.json`. One with only nanoGPT's `train.bin` and `val.bin` is read as uint16
GPT-2 tokens, or, with its `meta.pkl` beside them, as characters.
"""

import csv
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shlex
import time
import zlib
from bisect import bisect_right
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from threading import Lock

import numpy as np

from files import HERE, naming, write_text

SHARD_TOKENS = 100_000_000


def data_folder(name: str) -> Path:
    """`data/NAME` beside the scripts; something with a slash in it is a path as it stands."""
    if name in ("", ".", ".."):
        raise ValueError(f"{name!r} does not name a data set; expected a name, or a path with a slash")
    return Path(name) if "/" in name or os.sep in name else HERE / "data" / name


# ---- documents ----

def find_files(patterns) -> list[Path]:
    """Files named by paths and globs, in the order given; ValueError for one that names none."""
    files = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            raise ValueError(f"{pattern} is a folder: give {os.path.join(pattern, '*')}")
        found = [pattern] if os.path.isfile(pattern) else [
            file for file in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(file)]
        if not found:
            raise ValueError(f"no file matches {pattern!r}")
        files += map(Path, found)
    return files


def read_documents(path, separator: str | None = None, column: str = "text"):
    """Yields the documents of a file: the `column` of each row of .jsonl[.gz|.xz] or .parquet; any
    other file is UTF-8 text (.gz and .xz too), one document, or cut at `separator`.
    ValueError names the file and the line of what cannot be read."""
    path, number = Path(path), 0
    kinds, opener = kind_of(path)
    if ".parquet" in kinds:
        import pyarrow as pa
        import pyarrow.parquet as pq
        try:
            table = pq.ParquetFile(path)
            if column not in table.schema_arrow.names:
                raise ValueError(f"{path} has no column {column!r}; it has "
                                 f"{table.schema_arrow.names}")
            for batch in table.iter_batches(columns=[column]):
                for number, text in enumerate(batch.column(0).to_pylist(), number + 1):  # noqa: B020
                    if not isinstance(text, str):
                        raise ValueError(f"{path}, row {number}: {column!r} is "  # noqa: TRY004
                                         f"{type(text).__name__}, expected text")
                    yield text
        except (pa.ArrowException, UnicodeDecodeError, OSError) as e:
            raise ValueError(f"{path} is damaged, or not parquet: {e}") from None
        return
    try:
        with opener(path, "rb") as file:
            if ".jsonl" in kinds:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        line = line.decode("utf-8-sig" if number == 1 else "utf-8")
                        yield _text_field(line, column, f"{path}, line {number}")
                return
            file = io.TextIOWrapper(file, "utf-8-sig")  # without Windows' byte-order mark
            if separator is None:
                yield file.read()
            else:
                rest = ""
                while chunk := file.read(1 << 22):
                    *documents, rest = (rest + chunk).split(separator)
                    yield from documents
                yield rest
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text: byte 0x{e.object[e.start]:02x} ({e.reason})"
                         + f" in line {number}" * (number > 0)) from None
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as e:
        raise ValueError(f"{path} is damaged: {e}") from None


def kind_of(path: Path) -> tuple:
    """(suffixes in lower case, the function that opens such a file); ValueError for an archive."""
    kinds = [suffix.lower() for suffix in path.suffixes[-2:]]
    if {".tar", ".tgz", ".zip"} & set(kinds):
        raise ValueError(f"{path} is an archive of files: unpack it, and give those")
    return kinds, {".gz": gzip.open, ".xz": lzma.open}.get(kinds[-1] if kinds else "", open)


def read_table(path) -> list[dict]:
    """The rows of a .csv, .tsv or .txt file (tabs, no quoting), .json, .jsonl or .parquet, all but
    the last also as .gz or .xz. ValueError, with the line where it has one, for what cannot be
    read."""
    path, raw = Path(path), b""
    kinds, opener = kind_of(path)
    try:
        if ".parquet" in kinds:
            from pyarrow.parquet import read_table as read_parquet
            return read_parquet(path).to_pylist()
        with opener(path, "rb") as file:
            raw = file.read()
        text = raw.decode("utf-8-sig")
        if {".json", ".jsonl"} & set(kinds):
            return json.loads(text) if text.lstrip().startswith("[") else [
                json.loads(line) for line in text.split("\n") if line.strip()]
        csv.field_size_limit(2**31 - 1)
        reader, rows = csv.DictReader(
            io.StringIO(text, newline=""), delimiter="\t" if "\t" in text.split("\n")[0] else ",",
            quoting=csv.QUOTE_NONE if ".txt" in kinds else csv.QUOTE_MINIMAL, strict=True), []
        if twice := [name for name, n in Counter(reader.fieldnames or ()).items() if name and n > 1]:
            raise ValueError(f"its header has {twice[0]!r} twice")
        for row in reader:
            if any(row.get(None) or ()):  # else the rest of a text would be lost
                raise ValueError(f"line {reader.line_num} has more fields than the header; a text with "
                                 "the delimiter in it needs quotes")
            rows.append(row)
        return rows
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text: byte 0x{raw[e.start]:02x} in line "
                         f"{raw[:e.start].count(10) + 1}; save it as UTF-8") from None
    except OSError as e:
        raise OSError(f"cannot read {path}: {e.strerror or e}") from None
    except csv.Error as e:
        raise ValueError(f"{path} cannot be read as {path.suffix}: line {reader.line_num}: {e}; a table "
                         "without quoting is read as .txt") from None
    except Exception as e:  # noqa: BLE001 (whatever a damaged file raises)
        raise ValueError(f"{path} cannot be read as {path.suffix}: {e}") from None


def normalize(text: str) -> str:
    """Lower case, one space between words and punctuation much as the Penn Treebank and CS224n have
    it: clitics such as n't and 's apart, too; hyphens and the points of numbers also, which they
    leave. Without line breaks and HTML's."""
    text = re.sub(r"<br ?/?>", " ", text.lower()).replace("\\/", "/")
    text = re.sub(r"``|''|\"(\s*\")*", ' " ', text.replace("-lrb-", "(").replace("-rrb-", ")"))
    text = re.sub(r"\s*(n't|'(?:s|re|ve|ll|d|m))\b", r" \1 ", text)
    return " ".join(re.sub(r"(([.,!?;:()*/-])\2*)", r" \1 ", text).split())


def words(text: str) -> list[str]:
    """The words of a text, lower-cased, without punctuation but for apostrophes inside."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def ngrams(tokens: list, n: int) -> list[tuple]:
    """All runs of n tokens."""
    return list(zip(*(tokens[i:] for i in range(n))))


def _text_field(line, column, where):
    try:
        row = json.loads(line)
        text = row[column]
        if "\\u" in line and isinstance(text, str):
            text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{where}: U+{ord(text[e.start]):04X} at position {e.start} of {column!r} is "
                         "half a surrogate pair, no character") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: not JSON: {e}") from None
    except (KeyError, TypeError):
        fields = list(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: no field {column!r} in {fields}") from None
    if not isinstance(text, str):
        raise ValueError(f"{where}: {column!r} is {type(text).__name__}, expected text")  # noqa: TRY004
    return text


def fill_template(template: str, instruction: str, text: str = "") -> tuple[str, str]:
    """A prompt in two parts: up to the end of the input (of the instruction, where there is none),
    and from there to where the answer begins."""
    if not text:
        template = "\n\n".join(part for part in template.split("\n\n") if "{input}" not in part
                           or "{instruction}" in part or "{output}" in part)
    slot = "{input}" if text else "{instruction}"
    cut = template.rindex(slot) + len(slot)
    values = {"instruction": instruction, "input": text, "output": ""}
    return tuple(re.sub(r"\{(instruction|input|output)\}", lambda slot: values[slot[1]], part)
                 for part in (template[:cut], template[cut:]))


def prompt_ids(tokenizer, template: str, instruction: str, text: str, room: int):
    """(ids of a filled template, whether it was cut): one of more than `room` tokens loses the end of
    its input (of the instruction, where there is none)."""
    parts = fill_template(template, instruction, text)
    ids = tokenizer.encode("".join(parts)).tolist()
    if len(ids) <= room:
        return ids, False
    head, tail = (tokenizer.encode(part).tolist() for part in parts)
    return head[:max(0, room - len(tail))] + tail[-room:], True


# ---- writing ----

def write_data(name: str, tokenizer, splits: dict, shard_tokens: int = SHARD_TOKENS) -> dict:
    """Encodes documents on all cores and writes a data folder; returns its meta.json.

    splits: {"train": iterable of str, "val": …}. End-of-text closes every document where the
    tokenizer has one. Files appear under their names only when all are whole, meta.json last, so
    an interrupted call leaves either the old data or a folder without meta.json.
    """
    from filelock import FileLock, Timeout
    folder = data_folder(name)
    if (folder / "tokenizer.json").exists() and not any(
            (folder / own).exists() for own in ("meta.json", ".lock")):
        raise ValueError(f"{folder} holds a tokenizer.json that is no data set's, and would be "
                         "replaced; give another --name")
    folder.mkdir(parents=True, exist_ok=True)

    def parts():
        return [file for kind in ("train_*.bin", "val_*.bin", "tokenizer.json", "meta.json")
                for file in folder.glob(f"{kind}.part")]
    try:
        with FileLock(folder / ".lock", blocking=False):
            remove([*parts(), *folder.glob("*.json.part.[0-9]*.tmp")])  # of a killed call
            meta = {"tokenizer": tokenizer.name, "tokenizer_sha256": digest(tokenizer.to_json()),
                    "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id,
                    "dtype": tokenizer.dtype.name, "splits": {}}
            try:
                for split, documents in splits.items():
                    meta["splits"][split] = _write_split(folder, split, documents, tokenizer,
                                                         shard_tokens)
                meta["sha256"] = digest(meta)
                write_text(folder / "tokenizer.json.part", tokenizer.to_json())
                write_text(folder / "meta.json.part", json.dumps(meta, indent=1) + "\n")
            except BaseException:
                remove(parts())
                raise
            remove([folder / "meta.json", *folder.glob("train_[0-9]*.bin"),
                    *folder.glob("val_[0-9]*.bin")])
            for part in parts():  # meta.json last
                os.replace(part, part.with_suffix(""))
            return meta
    except Timeout:
        raise ValueError(f"another process is preparing {folder}; wait for it to end") from None


def digest(value) -> str:
    """sha256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def remove(files):
    for file in files:
        file.unlink(missing_ok=True)


def _write_split(folder, split, documents, tokenizer, shard_tokens):
    from tqdm import tqdm
    end = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], tokenizer.dtype)
    info = {"documents": 0, "tokens": 0, "bytes": 0, "shards": []}
    start, file, sha256, filled = time.perf_counter(), None, None, 0

    def encode(texts):
        ids = [part for text in texts for part in (tokenizer.encode(text), end)]
        size = sum(len(t) if t.isascii() else len(t.encode()) for t in texts)
        return len(texts), size, np.concatenate(ids).astype(tokenizer.dtype, copy=False)

    def close():
        with naming(file.name):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        info["shards"].append({"file": Path(file.name).stem, "tokens": filled,
                               "sha256": sha256.hexdigest()})

    workers = os.cpu_count()
    # the encoders release the interpreter's lock
    with (tqdm(desc=split, unit=" tokens", unit_scale=True, mininterval=0.5) as bar,
          ThreadPoolExecutor(workers) as pool):
        pending, documents = deque(), iter(documents)
        while True:
            while len(pending) < 3 * workers and (batch := list(islice(documents, 512))):
                pending.append(pool.submit(encode, batch))
            if not pending:
                break
            count, size, ids = pending.popleft().result()
            info["documents"] += count
            info["tokens"] += len(ids)
            info["bytes"] += size
            bar.update(len(ids))
            while len(ids):
                if file is None:
                    path = folder / f"{split}_{len(info['shards']):05d}.bin.part"
                    file, sha256, filled = path.open("wb"), hashlib.sha256(), 0
                part, ids = np.split(ids, [shard_tokens - filled])
                with naming(path):
                    file.write(part.tobytes())
                sha256.update(part.tobytes())
                filled += len(part)
                if filled == shard_tokens:
                    close()
                    file = None
    if file is not None:
        close()
    if not info["tokens"]:
        raise ValueError(f"the {split} split is empty: no text was found for it")
    info["seconds"] = round(time.perf_counter() - start, 2)
    return info


def describe(meta: dict) -> str:
    """The closing table of a prepare script."""
    lines = ["split  documents        tokens     MB  bytes/token  seconds   tokens/s"]
    for split, s in meta["splits"].items():
        lines.append(f"{split:5}{s['documents']:11,}{s['tokens']:14,}{s['bytes'] / 1e6:7.1f}"
                     f"{s['bytes'] / s['tokens']:13.2f}{s['seconds']:9.1f}"
                     f"{s['tokens'] / max(s['seconds'], 0.01):11,.0f}")
    return "\n".join(lines)


# ---- reading ----

class Split:
    """The tokens of one split as one stream over its shards. They are read, not mapped: pages of a
    map would stay in the process, and a file cut under it would end the process without a word.
    The files stay open, so that a prepare in the middle of a run does not change its data."""

    def __init__(self, files: list, dtype, vocab_size: int, num_bytes: int | None = None):
        self.files, self.vocab_size, self.bytes = files, vocab_size, num_bytes
        self.dtype, self.lock = np.dtype(dtype), Lock()
        self.opened = [open(file, "rb") for file in files]  # noqa: SIM115 (closed with the split)
        size = self.dtype.itemsize
        self.ends = list(accumulate(os.fstat(f.fileno()).st_size // size for f in self.opened))
        self.tokens = self.ends[-1]

    def read(self, at: int, count: int) -> np.ndarray:
        """At most `count` tokens of the stream from offset `at`, as far as their shard goes."""
        shard = bisect_right(self.ends, at)
        begin, size = self.ends[shard - 1] if shard else 0, self.dtype.itemsize
        count = min(count, self.ends[shard] - at)
        try:
            self.opened[shard].seek((at - begin) * size)
            raw = self.opened[shard].read(count * size)
        except OSError as e:
            raise OSError(f"cannot read {self.files[shard]}: {e.strerror or e}") from e
        if len(raw) < count * size:
            raise ValueError(f"{self.files[shard]} was cut while it was in use; prepare it again")
        return np.frombuffer(raw, self.dtype)

    def rows(self, starts, length: int) -> np.ndarray:
        """(B, length) int64 ids from the B offsets `starts`; ValueError for an id past the
        vocabulary, naming its file."""
        out = np.empty((len(starts), length), np.int64)
        with self.lock:  # a file has one position for all threads
            for row, start in zip(out, starts):
                filled = 0
                while filled < length:  # a window may cross into the next shard
                    part = self.read(int(start) + filled, length - filled)
                    row[filled:filled + len(part)] = part
                    filled += len(part)
        if out.max() >= self.vocab_size:
            row, column = np.argwhere(out >= self.vocab_size)[0]
            at = int(starts[row] + column)
            raise ValueError(f"{self.files[bisect_right(self.ends, at)]}: token id {out[row, column]} "
                             f"at token {at} of the split is past the vocabulary of "
                             f"{self.vocab_size}; prepare it again")
        return out


class Data:
    """An opened data folder: `train` and `val` Splits, vocab_size, eos_id, tokenizer().

    Sizes are checked against meta.json here; `verify=True` reads everything and checks sha256 too.
    ValueError says what is wrong and which command mends it.
    """

    def __init__(self, name: str, verify: bool = False):
        self.folder = folder = data_folder(name)
        again = self.again = "python " + PREPARE.get(
            name, f"prepare_text.py --name={shlex.quote(name)} --input=FILES")
        if not (folder / "meta.json").is_file():
            old = [folder / f"{split}.bin" for split in ("train", "val")]
            if not all(file.is_file() for file in old):
                there = [f"{file.name} is there, " for file in old if file.is_file()]
                raise ValueError(f"no prepared data in {folder} ({''.join(there)}meta.json is not); "
                                 f"first run: {again}")
            for file in old:
                if file.stat().st_size % 2 or not file.stat().st_size:
                    raise ValueError(f"{file} has {file.stat().st_size:,} bytes, expected whole uint16 "
                                     "tokens: it was cut; prepare it again")
            self.meta, self.vocab_size, self.eos_id = None, 50257, 50256
            if (folder / "meta.pkl").is_file():
                self.vocab_size, self.eos_id = self.tokenizer().vocab_size, None
            self.train, self.val = (Split([file], "<u2", self.vocab_size) for file in old)
            return
        try:
            self.meta = meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if meta.pop("sha256", None) not in (None, digest(meta)):
                raise ValueError("its content changed")
            self.vocab_size, self.eos_id = whole(meta["vocab_size"], 1), meta["eos_id"]
            dtype = {"uint8": np.dtype("u1"), "uint16": np.dtype("<u2")}[meta["dtype"]]
            if self.vocab_size > 256 ** dtype.itemsize:
                raise ValueError(f"vocab_size {self.vocab_size} does not fit {meta['dtype']}")
            if not (self.eos_id is None or whole(self.eos_id) < self.vocab_size):
                raise ValueError(f"eos_id {self.eos_id} is not in a vocabulary of "
                                 f"{self.vocab_size}")
            for split in ("train", "val"):
                info, files = meta["splits"][split], []
                for shard in info["shards"]:
                    if not re.fullmatch(r"\w[\w.-]{,99}", shard["file"]):
                        raise ValueError(f"{shard['file']!r:.99} is no file name, or outside the "
                                         "folder")
                    self._check(folder / shard["file"], whole(shard["tokens"]) * dtype.itemsize,
                                shard["sha256"] if verify else None, again)
                    files.append(folder / shard["file"])
                setattr(self, split, Split(files, dtype, self.vocab_size, whole(info["bytes"])))
        except Damaged as e:
            raise ValueError(str(e)) from None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as e:
            raise ValueError(f"{folder / 'meta.json'} is damaged ({type(e).__name__}: "
                             f"{str(e)[:200]}); run again: {again}") from None

    @staticmethod
    def _check(file, size, sha256, again):
        if not file.is_file():
            raise Damaged(f"{file} is missing; run again: {again}")
        if file.stat().st_size != size or not size:
            raise Damaged(f"{file} has {file.stat().st_size:,} bytes, meta.json says {size:,}: it was "
                          f"cut or changed; run again: {again}")
        if sha256 is not None:
            with open(file, "rb") as f:
                found = hashlib.file_digest(f, "sha256").hexdigest()
            if found != sha256:
                raise Damaged(f"{file} has sha256 {found[:12]}…, meta.json says {str(sha256)[:12]}…: "
                              f"its content changed; run again: {again}")

    def tokenizer(self):
        """The Tokenizer that made the shards; ValueError where the folder has another."""
        from tokenizer import open_tokenizer
        if self.meta is None:
            characters = self.folder / "meta.pkl"
            return open_tokenizer(characters if characters.is_file() else "gpt2")
        try:
            tokenizer = open_tokenizer(self.folder)
        except ValueError as e:
            raise ValueError(f"{self.folder}: {e}; run again: {self.again}") from None
        known = self.meta.get("tokenizer_sha256")
        if ((tokenizer.vocab_size, tokenizer.eos_id) != (self.vocab_size, self.eos_id)
                or known not in (None, digest(tokenizer.to_json()))):
            raise ValueError(f"{self.folder / 'tokenizer.json'} is not the tokenizer that made the "
                             f"shards: it was changed; run again: {self.again}")
        return tokenizer

    def fingerprint(self) -> str:
        """The same for the same tokens in the same shards: sizes, and checksums where known."""
        shards = self.meta and [shard.get("sha256") for split in ("train", "val")
                                for shard in self.meta["splits"][split]["shards"]]
        return digest([self.train.tokens, self.val.tokens, shards])


def whole(value, least: int = 0) -> int:
    """The value, if it is an int and not too small; ValueError otherwise."""
    if type(value) is not int or value < least:
        raise ValueError(f"{str(value)[:50]!r} is no whole number of at least {least}")
    return value


class Damaged(Exception):
    """A shard that is not what meta.json says."""


PREPARE = {"shakespeare": "prepare_text.py", "tinystories": "prepare_tinystories.py",
           "tinystories_4k": "prepare_tinystories.py --name=tinystories_4k "
                             "--tokenizer=weights/tokenizer.json --limit=20000",
           "plays": "prepare_text.py --name=plays …, as config/pretrain_plays.py says",
           "imdb": "prepare_text.py --name=imdb …, as config/pretrain_imdb.py says"}


# ---- the order of training ----

class WindowOrder:
    """Which windows of T + 1 tokens come next: a pure function of (seed, windows consumed so far).

    An epoch visits each of its `n` windows once, shuffled, without replacement; they start at a
    random phase, so that windows do not fall on the same bounds in every epoch.
    """

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
            number, at = divmod(consumed, self.n)
            part = self.epoch(number)[at:at + count]
            starts.append(part)
            consumed, count = consumed + len(part), count - len(part)
        return np.concatenate(starts)
