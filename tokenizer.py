"""Text to token ids and back: GPT-2's byte-level BPE, bytes, characters, a BPE of one's own, and
any other tokenizer of Hugging Face's, as the `tokenizers` library has it.

    python tokenizer.py train --input data/*.txt --vocab_size=4096 --out=data/ts4k.json
    python tokenizer.py show "Once upon a time" --tokenizer gpt2 data/ts4k.json

Every kind is kept as a Hugging Face `tokenizer.json`. How `train` learns a BPE stands in bpe.py.
"""

import io
import json
import pickle
import re
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

import bpe
import foreign
from bpe import BYTE_ORDER, CHARS, PATTERN, token_bytes
from files import HERE, read_text, write_text
from foreign import BYTE_LEVEL, EOT, library_errors
from text import find_files, normalize, read_documents, sha256

input: list[str] = []  # train: files or globs, as of prepare_text.py
column = "text"  # train: of a table
vocab_size = 4096  # train: ids in all, special tokens included, 257 to 65536
special_tokens: list[str] = []  # train: further special tokens, after <|endoftext|>
lowercase = False  # train: on lower-cased text, as prepare_text.py --lowercase writes it
out = "data/bpe.json"  # train: a tokenizer.json file; without .json a folder for transformers
tokenizer: list[str] = ["gpt2", "bytes"]  # show: names, files or folders

# A kind of tokenizer is known by the pre_tokenizer of its tokenizer.json.
PRE_TOKENIZERS = {"bpe": BYTE_LEVEL, "bytes": BYTE_LEVEL | {"use_regex": False}, "char": None}
PLAIN_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
               "special": True}

# What clean_up_tokenization_spaces joins to the word before it, in the order of transformers.
DETACHED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class Tokenizer:
    """Ids and back. Made by `open_tokenizer`, `from_json`, `char_tokenizer` or `train_bpe`.

    name: `gpt2`, `bytes`, `char`, or `bpe` for any other byte-level BPE with GPT-2's pattern.
    vocab_size: number of ids, special tokens included.
    eos_id: the id that closes documents, or None.  bos_id: that a text from nothing starts with.
    pad_id: that fills up a batch.  stop_ids: those at which a generated text ends.
    dtype: of `encode`'s arrays and of shards, uint8 where all ids fit, else little-endian uint16.
    ids: {token: id} in order, bytes written as GPT-2 does ("Ġthe") except where name is `char`.
    special: {content: id}.  tokens: the bytes of each id.
    merges: of a BPE, lines such as "Ġ t".  ranks: {bytes: number in the order tokens are made}.
    config: fields of tokenizer_config.json beyond those that `save` writes anyway.
    """

    frame = ([], [])  # ids that stand before and after a whole text

    def __init__(self, name: str, ids: dict[str, int], merges=(), special=(), config=None):
        self.name, self.merges, self.vocab_size = name, list(merges), len(ids)
        self.strips = {}  # {special token: whether it takes the spaces before, and after it}
        self.ids = dict(sorted(ids.items(), key=lambda item: item[1]))
        self.special = {t: i for t, i in self.ids.items() if t in special}
        if list(self.ids.values()) != list(range(len(ids))):
            raise ValueError(f"the ids are not 0 to {len(ids) - 1}: one is missing or there twice")
        self.tokens = [t.encode() if name == "char" or t in self.special else token_bytes(t)
                       for t in self.ids]
        self._name_ids(config or {})
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

    def _name_ids(self, config):
        """Finds the ids that a tokenizer_config.json names."""
        if not 1 <= self.vocab_size <= 65536:
            raise ValueError(f"{self.vocab_size:,} ids; shards can hold 1 to 65,536")
        self.dtype = np.dtype("uint8" if self.vocab_size <= 256 else "<u2")
        bos, eos, pad = (self.ids.get(config.get(f"{key}_token")) for key in ("bos", "eos", "pad"))
        if "eos_token" not in config:
            eos = self.usual_eos()
        self.config, self.eos_id = config, eos
        self.stop_ids = [] if eos is None else [eos]
        self.bos_id = eos if bos is None else bos
        self.pad_id = eos if pad is None else pad
        self.named_ids = self.model_ids()

    def usual_eos(self) -> int | None:
        """The id that closes documents where no tokenizer_config.json names one: end-of-text or,
        where ours has another name for it, the only special token."""
        only = self.name != "tokenizers" and len(self.special) == 1
        return self.special.get(min(self.special) if only else EOT)

    def _make_encoding(self):
        import tiktoken

        self.ranks = bpe.merge_ranks(self.merges)
        ids = {self.tokens[i]: i for t, i in self.ids.items() if t not in self.special}
        odd = ids.keys() ^ self.ranks.keys()
        if odd:
            raise ValueError(f"{min(odd)!r} is in the vocabulary or made by a merge, but not both")
        self.id_of_rank = np.array([ids[t] for t in self.ranks], self.dtype)
        if self.special == {EOT: 50256} and (self.id_of_rank == np.arange(len(ids))).all():
            known = sha256(self.merges_txt().encode()) == bpe.VOCAB_BPE_SHA256
            self.name = "gpt2" if known else "bpe"
        if self.name != "gpt2":
            bpe.check_merges(self.merges, self.ranks)
        self.encoding = tiktoken.Encoding(  # it must have a special token; `encode` allows none
            self.name, pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens={EOT: len(ids)})

    def model_ids(self) -> dict:
        """The ids as config.json and generation_config.json name them."""
        stop = self.stop_ids if len(self.stop_ids) > 1 else (self.stop_ids or [None])[0]
        return {"bos_token_id": self.bos_id, "eos_token_id": stop, "pad_token_id": self.pad_id}

    def take_model_ids(self, found: dict):
        """Takes over such ids of a model; those past the vocabulary are never drawn."""
        def known(key):
            ids = found.get(key)
            ids = ids if isinstance(ids, list) else [ids]
            return [i for i in ids if type(i) is int and 0 <= i < self.vocab_size]

        self.stop_ids = known("eos_token_id") or self.stop_ids
        if self.eos_id is None and self.stop_ids:  # no tokenizer_config.json named one
            self.eos_id = self.stop_ids[0]
        self.bos_id, = known("bos_token_id")[:1] or [self.bos_id]
        self.pad_id, = known("pad_token_id")[:1] or [self.pad_id]

    @property
    def start_id(self) -> int:
        """The id that a text from nothing starts with: bos_id, or a line break, else 0."""
        if self.bos_id is not None:
            return self.bos_id
        return self.tokens.index(b"\n") if b"\n" in self.tokens else 0

    @cached_property
    def special_pattern(self) -> re.Pattern:
        """Finds special tokens in a text; of several that begin at one place, the longest."""
        contents = sorted(self.special, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, contents))})" if contents else "(?!)()")

    def encode(self, text: str, special: bool = False, whole: bool = True) -> np.ndarray:
        """Ids of `text` (self.dtype). Special tokens in it are ordinary text or, with `special`,
        their ids. whole: with what the tokenizer puts around a whole text (ours: nothing).
        Thread-safe; BPE runs without the GIL. ValueError: a lone surrogate, a character outside the
        alphabet."""
        if special and self.special and not self.config.get("split_special_tokens"):
            parts = self.special_pattern.split(text)  # every other one is a special token
            return np.concatenate([
                np.array([self.special[part]], self.dtype) if number % 2 else self.encode(part)
                for number, part in enumerate(parts)])
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
        except UnicodeEncodeError as e:
            raise ValueError(f"the text is no Unicode text: {e}") from None
        except ValueError as e:  # so many spaces in a row that its stack overflows
            raise ValueError(f"GPT-2's pattern cannot split the text: {e}") from None

    def encode_documents(self, texts: list[str], special: bool = False) -> list[np.ndarray]:
        """Ids of each document, without the end-of-text that closes it."""
        return [self.encode(text, special) for text in texts]

    def decode_bytes(self, ids) -> bytes:
        """The bytes that `ids` stand for; one token need not be whole characters."""
        return b"".join([self.tokens[i] for i in self._checked(ids)])

    def decode(self, ids) -> str:
        """The text that `ids` stand for, U+FFFD in place of bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def _checked(self, ids) -> list[int]:
        ids = np.asarray(ids).reshape(-1).tolist()
        for i in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is past the vocabulary of {self.vocab_size}")
        return ids

    # ---- files ----

    def definition(self) -> dict:
        """A Hugging Face tokenizer.json: what becomes which ids."""
        split = PRE_TOKENIZERS.get(self.name, PRE_TOKENIZERS["bpe"])
        return {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": t, **PLAIN_TOKEN}
                             for t, i in self.special.items()],
            "normalizer": None, "pre_tokenizer": split, "post_processor": split,
            "decoder": split or {"type": "Fuse"},
            "model": foreign.BPE | {"vocab": self.ids, "merges": self.merges}}

    def to_json(self) -> str:
        """All that there is to know; `from_json` is its inverse. It is a tokenizer.json, but for
        the field `talegpt` where a tokenizer_config.json or a model said something of its own."""
        more = {}
        if self.config:
            more["config"] = self.config
        if self.model_ids() != self.named_ids:
            more["ids"] = self.model_ids()
        own = {"talegpt": more} if more else {}
        return json.dumps(self.definition() | own, ensure_ascii=False)

    def merges_txt(self) -> str:
        """The merges as in OpenAI's vocab.bpe and Hugging Face's merges.txt."""
        return "\n".join(["#version: 0.2", *self.merges, ""])

    def save(self, folder, pairs: bool = False, **more) -> None:
        """Writes the files that `transformers.AutoTokenizer.from_pretrained(folder)` loads. pairs:
        it puts end-of-text between the two texts of a pair. more: fields of tokenizer_config.json,
        such as model_max_length."""
        definition = self.definition()
        if pairs:
            names = {i: token for token, i in self.ids.items()}
            a, b = ({"Sequence": {"id": side, "type_id": 0}} for side in "AB")
            first, last, eos = ([{"SpecialToken": {"id": names[i], "type_id": 0}} for i in ids]
                                for ids in (*self.frame, [self.eos_id]))
            definition["post_processor"] = {
                "type": "TemplateProcessing", "single": [*first, a, *last],
                "pair": [*first, a, *eos, b, *last],
                "special_tokens": {names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]}
                                   for i in {*self.frame[0], *self.frame[1], self.eos_id}}}
        prefix = (definition["pre_tokenizer"] or {}).get("add_prefix_space")
        config = self._default_config() | self.config | more
        if isinstance(config.get("extra_special_tokens"), list):  # by its name in transformers 4
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        if prefix:  # which transformers 4 would turn off
            config["add_prefix_space"] = True
        files = {"tokenizer.json": json.dumps(definition, ensure_ascii=False),
                 "tokenizer_config.json": json.dumps(config, indent=1, ensure_ascii=False)}
        if self.name in ("gpt2", "bpe"):
            files |= {"vocab.json": json.dumps(self.ids), "merges.txt": self.merges_txt()}
        for name, text in files.items():
            write_text(Path(folder) / name, text)

    def _default_config(self) -> dict:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left",
                  "clean_up_tokenization_spaces": False,
                  # without it transformers 4 adds token_type_ids, which GPT-2 adds to its input
                  "model_input_names": ["input_ids", "attention_mask"]}
        names = {i: token for token, i in self.ids.items()}
        for key, i in (("bos_token", self.bos_id), ("eos_token", self.eos_id),
                       ("pad_token", self.pad_id), ("unk_token", self.eos_id)):
            if i is not None:
                config[key] = names[i]
        return config


class ForeignTokenizer(Tokenizer):
    """A tokenizer that is not ours: the `tokenizers` library reads its tokenizer.json and computes.
    Its name is `tokenizers`; ids of which there is no token decode to nothing."""

    def __init__(self, definition: dict, config: dict | None = None):
        import tokenizers

        text = json.dumps(definition | {"truncation": None, "padding": None})
        with library_errors("not a whole tokenizer.json"):
            self.plain, self.parsing = (tokenizers.Tokenizer.from_str(text) for _ in range(2))
        config = config or {}
        self.plain.encode_special_tokens = True  # they are ordinary text
        self.parsing.encode_special_tokens = bool(config.get("split_special_tokens"))
        self.attaches = bool(config.get("clean_up_tokenization_spaces")  # which is not for BPE
                             and type(self.plain.model).__name__ != "BPE")
        self.name, self.merges = "tokenizers", []
        vocab = self.plain.get_vocab(with_added_tokens=True)
        self.ids = dict(sorted(vocab.items(), key=lambda item: item[1]))
        self.vocab_size = max(self.ids.values(), default=-1) + 1
        if len(set(self.ids.values())) < len(self.ids):
            raise ValueError("one of its ids stands for two tokens")
        added = self.plain.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        self._name_ids(config)
        self.strips = {token.content: (token.lstrip, token.rstrip) for token in added.values()}
        for text in ("a", *self.ids) if self.plain.num_special_tokens_to_add(False) else ():
            framed = self.plain.encode(text)
            mask = framed.special_tokens_mask  # 1 for what the post-processor added
            if 0 in mask:
                first, end = mask.index(0), len(mask) - mask[::-1].index(0)
                self.frame = framed.ids[:first], framed.ids[end:]
                break

    @cached_property
    def tokens(self) -> list[bytes]:
        return [text.encode() for text in self.plain.decode_batch(
            [[i] for i in range(self.vocab_size)], skip_special_tokens=False)]

    def encode(self, text: str, special: bool = False, whole: bool = True) -> np.ndarray:
        """As in Tokenizer; whole: with the beginning and the end that its post-processor adds."""
        library = self.parsing if special else self.plain
        with library_errors("its tokenizer cannot encode the text"):
            return np.array(library.encode(text, add_special_tokens=whole).ids, self.dtype)

    def encode_documents(self, texts: list[str], special: bool = False) -> list[np.ndarray]:
        """As in Tokenizer, by the library's threads."""
        library = self.parsing if special else self.plain
        with library_errors("its tokenizer cannot encode a text"):
            rows = [encoding.ids for encoding in library.encode_batch_fast(texts)]
        closed = self.eos_id is not None and self.frame[1][-1:] == [self.eos_id]
        return [np.array(row[:-1] if closed else row, self.dtype) for row in rows]

    def decode_bytes(self, ids) -> bytes:
        return self.decode(ids).encode()

    def decode(self, ids) -> str:
        text = self.plain.decode(self._checked(ids), skip_special_tokens=False)
        for form in DETACHED if self.attaches else ():
            text = text.replace(form, form.strip())
        return text

    def definition(self) -> dict:
        return json.loads(self.plain.to_str())


# ---- one by its name, file or folder ----

def open_tokenizer(name) -> Tokenizer:
    """`gpt2`, `bytes`, a tokenizer.json-format file, a merges file (vocab.bpe), nanoGPT's meta.pkl,
    a run folder, or a folder as transformers' AutoTokenizer loads it, or with vocab.bpe.
    ValueError where it cannot. GPT-2's own, once opened from a file, serves `gpt2` from then on."""
    if name == "gpt2":
        return _from_merges(bpe.gpt2_vocab_bpe())
    if name == "bytes":  # id 255 is free to close documents: UTF-8 has no byte 0xFF
        ids = {c: b for c, b in zip(CHARS, BYTE_ORDER) if b < 255}
        return Tokenizer("bytes", ids | {EOT: 255}, special=[EOT])
    path = Path(name)
    if not path.exists() and path.parts[:1] in (("data",), ("weights",)):
        path = HERE / name
    if path.is_dir() and not any((path / file).is_file() for file in foreign.TOKENIZER_FILES):
        path = path / "best"
    if path.is_dir() and any((path / file).is_file() for file in ("tokenizer_config.json",
                                                                  "config.json", "vocab.json")):
        result = _from_folder(path)
    else:
        if path.is_dir():
            files = [path / "tokenizer.json", path / "vocab.bpe", path / "merges.txt"]
            path = next((file for file in files if file.is_file()), files[0])
        result = _from_file(path, name)
    if result.name == "gpt2":
        bpe.keep_vocab_bpe(result.merges_txt())
    return result


def _from_folder(folder) -> Tokenizer:
    definition, config = foreign.read_folder(folder)
    try:
        result = from_definition(definition, config)
    except ValueError as e:
        raise ValueError(f"{folder} holds no usable tokenizer ({e})") from None
    # What `save` writes anyway is left out, so that to_json is a plain tokenizer.json where it can.
    usual = result._default_config() | dict.fromkeys(foreign.NAMED_TOKENS, config["eos_token"])
    result.config = {key: value for key, value in config.items() if value is not None
                     and value != usual.get(key) and key not in foreign.BUILDING}
    if result.eos_id != result.usual_eos():
        result.config["eos_token"] = config["eos_token"]
    return result


def _from_file(path, name) -> Tokenizer:
    if not path.is_file():
        raise ValueError(
            f"no tokenizer {str(name)!r}: expected gpt2, bytes, a tokenizer.json file, or a folder "
            "with tokenizer.json, vocab.json and merges.txt, or vocab.bpe")
    try:
        if path.suffix == ".pkl":
            return _from_nanogpt(path.read_bytes())
        text = read_text(path)
        return _from_merges(text) if text.startswith("#version") else from_json(text)
    except Exception as e:  # noqa: BLE001 (whatever a damaged file or pickle raises)
        kind = "meta.pkl of nanoGPT's" if path.suffix == ".pkl" else "tokenizer"
        raise ValueError(f"{path} is no {kind} ({type(e).__name__}: {e})") from None


def _from_nanogpt(raw):
    """The tokenizer of nanoGPT's meta.pkl; a pickle that names any class or function is refused,
    but for NumPy's numbers. A vocabulary of words is cut at spaces; of a mere number of ids, number
    7 is written <7>."""
    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            if module.split(".")[0] == "numpy" and name in ("scalar", "dtype"):
                return super().find_class(module, name)
            raise ValueError(f"the pickle wants to run {module}.{name}: refused")

    meta = Plain(io.BytesIO(raw)).load()
    ids = meta.get("stoi")
    if "itos" in meta:
        words = meta["itos"]
        words = words.items() if isinstance(words, dict) else enumerate(words)
        ids = {word: i for i, word in words}
    elif ids is None and meta["vocab_size"] in (50257, 50304):  # GPT-2's, perhaps padded
        return open_tokenizer("gpt2")
    elif ids is None:
        ids = {f"<{i}>": i for i in range(int(meta["vocab_size"]))}
    ids = {word: int(i) for word, i in ids.items()}
    longer = [word for word in ids if len(word) != 1]
    if len(longer) < len(ids) / 2:
        return Tokenizer("char", ids, special=longer, config={"eos_token": None})
    return ForeignTokenizer({"version": "1.0", "added_tokens": [], "normalizer": None,
                             "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None,
                             "decoder": None,
                             "model": {"type": "WordLevel", "vocab": ids, "unk_token": "<unk>"}})


def from_json(text: str) -> Tokenizer:
    """A tokenizer from `to_json`'s text, or from any tokenizer.json. ValueError where the library
    cannot read it."""
    try:
        data = json.loads(text)
        own = data.pop("talegpt", {})
        result = from_definition(data, own.get("config"))
        result.take_model_ids(own.get("ids", {}))
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as e:
        raise ValueError(f"not a whole tokenizer.json: {type(e).__name__}: {e}") from None
    return result


def from_definition(data: dict, config: dict | None = None) -> Tokenizer:
    """Ours where a tokenizer.json says nothing that ours would not do, else the library's."""
    model, added = data["model"], data["added_tokens"]
    split, after = data["pre_tokenizer"], data.get("post_processor") or {}
    if split:  # older files leave use_regex out; offsets are not asked for
        split = {"use_regex": True} | split | {"trim_offsets": True}
    name = next((name for name, known in PRE_TOKENIZERS.items() if known == split), None)
    merges = model.get("merges", [])
    special = {token["content"]: token["id"] for token in added}
    if model.get("dropout"):
        raise ValueError(f"its dropout of merges, {model['dropout']}, would encode a text "
                         "otherwise each time; it must be null")
    another = (
        name is None or model.get("type", "BPE") != "BPE" or (merges and name != "bpe")
        or any(model.get(key) for key in ("byte_fallback", "ignore_merges", "end_of_word_suffix",
                                          "continuing_subword_prefix"))
        or data.get("normalizer") or after.get("cls") or after.get("processors")
        or any("SpecialToken" in part for part in after.get("single", []))
        or (data.get("decoder") or {}).get("type") != ("Fuse" if name == "char" else "ByteLevel")
        or any(token | PLAIN_TOKEN != token for token in added)
        or name == "char" and any(len(token) != 1 for token in model["vocab"].keys() - special))
    if not another:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        with suppress(ValueError):  # such as a token that no merge makes: the library knows how
            return Tokenizer(name, model["vocab"] | special, merges, special, config)
    return ForeignTokenizer(data, config)


def _from_merges(text) -> Tokenizer:
    """GPT-2's own, or one like it, from vocab.bpe: ids in the order of the merges."""
    merges = [line for line in text.split("\n")[1:] if line]
    made = [*CHARS, *(line.replace(" ", "") for line in merges)]
    ids = {t: i for i, t in enumerate(dict.fromkeys([*made, EOT]))}
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
    come the merges, <|endoftext|>, which also divides the texts, and `special_tokens`. ValueError:
    a vocab_size too small for the bytes and special tokens, above 65,536, or one that the texts are
    too few for."""
    special = list(dict.fromkeys([EOT, *special_tokens]))
    least = 256 + len(special)  # the bytes and the special tokens
    if not least <= vocab_size <= 65536:
        raise ValueError(f"vocab_size {vocab_size}: expected {least} to 65536")
    vocab, merges = list(CHARS), []
    parts = (part for text in documents for part in text.split(EOT))
    for a, b in bpe.learn_merges(parts, vocab_size - least):
        merges.append(f"{vocab[a]} {vocab[b]}")
        vocab.append(vocab[a] + vocab[b])
    if clash := set(special) & set(vocab):
        raise ValueError(f"the special token {min(clash)!r} is an ordinary token of the text, too; "
                         "give another")
    vocab += special
    if len(vocab) < vocab_size:
        raise ValueError(f"vocab_size {vocab_size}: the text allows no more than {len(vocab)}")
    return Tokenizer("bpe", {t: i for i, t in enumerate(vocab)}, merges, special)


# ---- the command line ----

def train(*words):
    if words or not input:
        raise ValueError("train needs its files as --input FILE …")
    texts = (normalize(text) if lowercase else text
             for path in find_files(input) for text in read_documents(path, None, column))
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


def main(command, *words):
    {"train": train, "show": show}[command](*words)


if __name__ == "__main__":
    from configurator import run

    run(main, globals(), commands=("train", "show"), positionals=True)
