"""The tokenizer of a Hugging Face folder, as AutoTokenizer of transformers 5 builds it."""

import json
from contextlib import contextmanager
from pathlib import Path

from files import read_json, read_text
from text import say_once

EOT = "<|endoftext|>"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": True}
BPE = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
       "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False}
# The files of a tokenizer that are read, and those of others, which are not.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.bpe",
                   "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja")
OTHER_FILES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "vocab.txt",
               "tekken.json", "tiktoken.model")
# The classes of transformers that take a tokenizer.json as it is, "Fast" or not.
GENERIC_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
SAVE = "transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
                "mask_token")
# Fields of tokenizer_config.json that describe other files or how a tokenizer was built.
BUILDING = ("tokenizer_class", "added_tokens_decoder", "add_prefix_space", "add_bos_token",
            "add_eos_token", "auto_map", "name_or_path", "model_input_names", "model_max_length",
            "backend", "is_local", "local_files_only", "vocab_file", "merges_file",
            "tokenizer_file")


@contextmanager
def library_errors(what):
    """Whatever the `tokenizers` library raises, its panics included, as one ValueError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # noqa: BLE001 (a panic is no Exception)
        raise ValueError(f"{what}: {e}") from None


def read_folder(folder: Path) -> tuple[dict, dict]:
    """(tokenizer.json, tokenizer_config.json) with all that a folder's other files add to them.

    The class GPT2Tokenizer takes vocabulary, merges, added tokens and post-processor of a
    tokenizer.json, the generic classes take it as it is; then come the tokens that only the other
    files name. ValueError for another class, and for files that the `tokenizers` library refuses.
    """
    import tokenizers

    def read(file):
        return read_json(folder / file) if (folder / file).is_file() else {}

    config, data = read("tokenizer_config.json"), read("tokenizer.json")
    name = config.get("tokenizer_class") or read("config.json").get("tokenizer_class")
    kind = str(name or "GPT2Tokenizer").removesuffix("Fast")
    if kind == "GPT2Tokenizer":
        config = dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT) | config
    elif kind not in GENERIC_CLASSES or not data:
        raise ValueError(f"{folder}: its tokenizer_class is {name!r}, supported are GPT2Tokenizer "
                         "and, with a tokenizer.json, PreTrainedTokenizerFast")
    if "added_tokens_decoder" not in config:
        more = read("special_tokens_map.json")
        more.pop("additional_special_tokens", None)  # which transformers 5 does not read there
        config |= more
    older = config.pop("additional_special_tokens", None)  # the name in transformers 4
    if older and not config.get("extra_special_tokens"):
        config["extra_special_tokens"] = older
    elif older and isinstance(config["extra_special_tokens"], dict):  # which do not replace them
        config["additional_special_tokens"] = older
    config.setdefault("eos_token", None)  # none is named, so there is none
    if (folder / "chat_template.jinja").is_file():
        config["chat_template"] = read_text(folder / "chat_template.jinja")
    with library_errors(f"{folder} holds no usable tokenizer"):
        if kind != "GPT2Tokenizer" and data.get("padding"):
            config.setdefault("pad_token", data["padding"].get("pad_token"))
        definition = data if kind != "GPT2Tokenizer" else _gpt2_definition(folder, data, config)
        library = tokenizers.Tokenizer.from_str(json.dumps(definition))
        _add_tokens(library, data, config, read("added_tokens.json"))
        if not data:
            _add_frame(library, config)
    config |= {key: content_of(config[key]) for key in NAMED_TOKENS if key in config}
    return json.loads(library.to_str()), config


def _gpt2_definition(folder, data, config) -> dict:
    """The tokenizer.json of GPT2Tokenizer's: byte-level, with the vocabulary and the merges of
    `data`, the folder's own, or of vocab.json and merges.txt."""
    if data:
        vocab, merges = data["model"]["vocab"], data["model"]["merges"]
        for key, ours in (("normalizer", None), ("pre_tokenizer", "ByteLevel")):
            found = (data.get(key) or {}).get("type")
            if found != ours:
                say_once(f"note: {folder}/tokenizer.json has the {key} {found}, which "
                         "GPT2Tokenizer of transformers 5 leaves out, and so do we")
    else:
        vocab, lines = read_json(folder / "vocab.json"), read_text(folder / "merges.txt")
        merges = [line for line in lines.split("\n") if line and not line.startswith("#version")]
    prefix = {"add_prefix_space": bool(config.get("add_prefix_space"))}
    return {"version": "1.0", "added_tokens": [], "normalizer": None, "decoder": BYTE_LEVEL,
            "pre_tokenizer": BYTE_LEVEL | prefix,
            "post_processor": data.get("post_processor"),
            "model": BPE | {"vocab": vocab, "merges": merges}}


def content_of(token) -> str | None:
    """The text of a token that a configuration names by it or describes by a dict."""
    return token.get("content") if isinstance(token, dict) else token


def _add_tokens(library, data, config, added_json):
    """Adds to a library's tokenizer the tokens that the files name and that are not in it so, in
    the order of their ids. Named ones, such as eos_token, are special whatever the files say."""
    from tokenizers import AddedToken

    extra = config.get("extra_special_tokens") or []
    own = [key for key, value in config.items() if key.endswith("_token")
           and key not in NAMED_TOKENS and isinstance(value, str)]
    named = [config[key] for key in (*NAMED_TOKENS, *own) if config.get(key)]
    named += extra.values() if isinstance(extra, dict) else extra
    named += config.get("additional_special_tokens", [])
    contents = [content_of(token) for token in named]
    added = config.get("added_tokens_decoder")
    if added is None:
        added = {i: {"content": token, "special": token in contents,
                     "normalized": token not in contents} for token, i in added_json.items()}
        added |= {token["id"]: token for token in data.get("added_tokens", [])}
    tokens = [added[i] for i in sorted(added, key=int)]
    known = {content_of(token) for token in tokens}
    known |= {token.content for token in library.get_added_tokens_decoder().values()}
    tokens += [token for token in named if content_of(token) not in known]
    there = {repr(token) for token in library.get_added_tokens_decoder().values()}
    for token in tokens:
        flags = token if isinstance(token, dict) else {"content": token, "special": True}
        flags = {key: value for key, value in flags.items() if key not in ("__type", "id")}
        token = AddedToken(**flags)
        if token.content in contents:
            token.special = True
        if repr(token) not in there:
            library.add_tokens([token])


def _add_frame(library, config):
    """What add_bos_token and add_eos_token of a tokenizer_config.json ask for."""
    from tokenizers.processors import TemplateProcessing

    bos, eos = (content_of(config.get(f"{key}_token")) if config.get(f"add_{key}_token") else None
                for key in ("bos", "eos"))
    if bos or eos:
        library.post_processor = TemplateProcessing(
            single=[part for part in (bos, "$A", eos) if part],
            special_tokens=[(name, library.token_to_id(name)) for name in {bos, eos} if name])
