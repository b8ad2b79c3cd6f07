"""Tokenizers that are not ours: the same ids as transformers' AutoTokenizer, or a refusal."""

import json
import random
from itertools import product

import pytest

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers import pre_tokenizers as pre

from tokenizer import from_json, open_tokenizer

WORDS = ["the", "Cat", "sat", "don't", "I'll", "1234", "x_y", "é", "naïve", "ﬁ", "日本語", "中", "🙂", "👩‍👩‍👧",
         "def f(x):", "    return x", "\t", "  ", "   ", "\n", "\n\n", "\r\n", "!", "...", "--", "<", ">", "|",
         "<|endoftext|>", "<|im_end|>", "<|user|>", "<|user", "</s>", "<s>", "<pad>", "<mask>", "café", "e\u0301",
         "word", "İ", "ß", "\u00a0", "\u200b", "A", "a", "toks"]


def make_texts(n=500, seed=0):
    rng = random.Random(seed)
    texts = ["", " ", "a", "\n", "<|im_end|>", " <|im_end|> ", "a<|im_end|>b", "word", "words word"]
    while len(texts) < n:
        texts.append("".join(rng.choice(WORDS) + rng.choice(["", " ", " ", ""])
                             for _ in range(rng.randint(1, 12))))
    return texts


TEXTS = make_texts()


def trained(pre_tokenizer=None, normalizer=None, special=("<|endoftext|>",), prefix=False):
    tok = Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = pre_tokenizer or pre.ByteLevel(add_prefix_space=prefix)
    tok.decoder = tokenizers.decoders.ByteLevel()
    if normalizer:
        tok.normalizer = normalizer
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=list(special), show_progress=False,
                                  initial_alphabet=pre.ByteLevel.alphabet())
    tok.train_from_iterator(TEXTS[:200], trainer)
    return tok


def template(single, tok, *names):
    return tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[(name, tok.token_to_id(name)) for name in names])


IM = AddedToken("<|im_end|>", special=True)
DIGITS = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
LLAMA3 = pre.Sequence([
    pre.Split(tokenizers.Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+"), "isolated"),
    pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def variants():
    """(name, what `build` is to make of it)"""
    yield "plain", {}
    yield "prefix space", {"prefix": True}
    for normal in ("NFC", "NFKC", "NFD", "Lowercase", "Strip", "StripAccents"):
        yield f"normalizer {normal}", {"normalizer": getattr(normalizers, normal)()}
    yield "normalizers", {"normalizer": normalizers.Sequence([
        normalizers.NFKC(), normalizers.Replace("--", "—"), normalizers.Sequence([normalizers.Strip()])])}
    yield "empty sequences", {"normalizer": normalizers.Sequence([])}
    yield "digits", {"pre_tokenizer": DIGITS}
    yield "llama 3's pattern", {"pre_tokenizer": LLAMA3}
    yield "nested", {"pre_tokenizer": pre.Sequence([pre.Sequence([pre.Whitespace()]), pre.ByteLevel(add_prefix_space=False)])}
    for flags in product((False, True), repeat=2):
        lstrip, rstrip = flags
        yield f"special, lstrip {lstrip}, rstrip {rstrip}", {
            "added": [AddedToken("<|im_end|>", lstrip=lstrip, rstrip=rstrip, special=True)]}
    yield "single word", {"added": [AddedToken("word", single_word=True, normalized=False), IM]}
    yield "normalized", {"added": [AddedToken("Cat", normalized=True), IM],
                         "normalizer": normalizers.Lowercase()}
    yield "added, not special", {"added": [AddedToken("<|user|>"), AddedToken("toks", lstrip=True), IM]}
    yield "bos", {"special": ("<s>", "</s>"), "template_": "<s> $A"}
    yield "bos and eos", {"special": ("<s>", "</s>"), "template_": "<s> $A </s>"}
    yield "eos", {"template_": "$A <|endoftext|>"}
    yield "roberta", {"special": ("<s>", "</s>"), "roberta": True}
    yield "processors", {"special": ("<s>", "</s>"), "template_": "<s> $A", "sequence": True}


def build(folder, how, added=(), template_=None, roberta=False, sequence=False, kwargs=None, **options):
    tok = trained(**options)
    tok.add_tokens(list(added))
    special = options.get("special", ("<|endoftext|>",))
    if template_:
        tok.post_processor = template(template_, tok, *special)
    if roberta:
        tok.post_processor = tokenizers.processors.RobertaProcessing(("</s>", tok.token_to_id("</s>")),
                                                          ("<s>", tok.token_to_id("<s>")))
    if sequence:
        tok.post_processor = tokenizers.processors.Sequence([tokenizers.processors.ByteLevel(trim_offsets=False), tok.post_processor])
    folder.mkdir(exist_ok=True, parents=True)
    eos = special[-1]
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    named = {"eos_token": eos, "bos_token": special[0]}
    if how == "tokenizers":
        tok.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    elif how == "fast":
        transformers.PreTrainedTokenizerFast(tokenizer_object=tok, **named, **(kwargs or {})).save_pretrained(folder)
    elif how == "gpt2":
        data = json.loads(tok.to_str())["model"]
        transformers.GPT2Tokenizer(vocab=data["vocab"], merges=[tuple(m) for m in data["merges"]], **named,
                                   **(kwargs or {})).save_pretrained(folder)
    elif how == "raw":  # without a tokenizer_config.json
        tok.save(str(folder / "tokenizer.json"))
    else:
        data = json.loads(tok.to_str())
        extra = {t["content"]: t["id"] for t in data["added_tokens"] if t["content"] not in data["model"]["vocab"]}
        (folder / "vocab.json").write_text(json.dumps(data["model"]["vocab"]))
        merges = [" ".join(m) for m in data["model"]["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **named, **(kwargs or {})}))
        if extra:
            (folder / "added_tokens.json").write_text(json.dumps(extra))
            (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": list(extra)[:1]}))


def cases():
    """Each variant saved in two of five ways, in turn."""
    ways = ("tokenizers", "fast", "gpt2", "raw", "files") * 2
    for number, (name, options) in enumerate(variants()):
        for how in ways[2 * number % 5:][:2]:
            yield pytest.param(how, options, id=f"{name}, {how}")
    for how in ("fast", "gpt2", "files"):
        yield pytest.param(how, {"kwargs": {"add_prefix_space": True}}, id=f"add_prefix_space, {how}")
        yield pytest.param(how, {"kwargs": {"add_bos_token": True, "add_eos_token": True}}, id=f"add_bos_token, {how}")
        yield pytest.param(how, {"kwargs": {"split_special_tokens": True}, "added": [IM]}, id=f"split_special_tokens, {how}")
        yield pytest.param(how, {"kwargs": {"pad_token": "<pad>", "extra_special_tokens": ["<|user|>", "<|bot|>"]}}, id=f"extra, {how}")


@pytest.mark.parametrize("how, options", [*cases()])
def test_ids_are_those_of_autotokenizer(tmp_path, how, options):
    build(tmp_path, how, **options)
    ours = open_tokenizer(str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    reference = theirs.backend_tokenizer
    for text in TEXTS:
        assert ours.encode(text, special=True).tolist() == theirs(text)["input_ids"], text
        reference.encode_special_tokens = True
        assert ours.encode(text).tolist() == reference.encode(text).ids, text
        ids = ours.encode(text, special=True)
        assert ours.decode(ids) == reference.decode(ids.tolist(), skip_special_tokens=False)
    assert ours.eos_id == theirs.eos_token_id and ours.vocab_size == len(theirs)
    again = from_json(ours.to_json())
    assert again.to_json() == ours.to_json() and again.eos_id == ours.eos_id
    closed = bool(ours.frame[1]) and ours.frame[1][-1] == ours.eos_id
    for ids, text in zip(again.encode_documents(TEXTS), TEXTS):
        assert ids.tolist() == ours.encode(text).tolist()[:-1 if closed else None]
    ours.save(tmp_path / "export")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    for text in TEXTS:
        assert exported(text)["input_ids"] == theirs(text)["input_ids"]


def test_the_frame_of_a_small_alphabet_is_the_librarys(tmp_path):
    """Also where most texts encode to nothing: no token of a document is lost."""
    vocab = {"<|endoftext|>": 0, "A": 1, "C": 2, "G": 3, "T": 4}
    tok = Tokenizer(tokenizers.models.BPE(vocab, []))
    tok.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tok.post_processor = template("<|endoftext|> $A", tok, "<|endoftext|>")
    dna = from_json(tok.to_str())
    assert dna.frame == ([0], []) and [ids.tolist() for ids in dna.encode_documents(["GGCA", "TT"])] == [
        [0, 3, 3, 2, 1], [0, 4, 4]]
    assert dna.encode("GA", whole=False).tolist() == [3, 1]


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("extra", [{}, [], {"image_token": "<img>"}, ["<img>"]])
def test_further_special_tokens_by_both_names(tmp_path, kind, extra):
    trained().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": kind, "eos_token": "<|endoftext|>", "additional_special_tokens": ["<|user|>"],
        "extra_special_tokens": extra}))
    ours, text = open_tokenizer(str(tmp_path)), "a<|user|>b<img>c"
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert ours.encode(text, special=True).tolist() == ids
    ours.save(tmp_path / "export")
    assert open_tokenizer(str(tmp_path / "export")).encode(text, special=True).tolist() == ids
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "export")(text)["input_ids"] == ids


def test_decoded_text_is_that_of_autotokenizer(tmp_path):
    """Of words with clean_up_tokenization_spaces, and of characters without a decoder."""
    words = Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(["do", "n't", ",", "he", "'s", "!", "'", "x"])}, "x"))
    words.pre_tokenizer = pre.WhitespaceSplit()
    characters = Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate("abc .")}, []))
    for tok, text, clean in ((words, "do n't , he 's ! x ' x", True), (words, "do n't !", False),
                             (characters, "ab c.", False), (characters, "ab c .", True)):
        tok.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": clean}))
        ours, theirs = open_tokenizer(str(tmp_path)), transformers.AutoTokenizer.from_pretrained(tmp_path)
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).tolist() == ids and ours.decode(ids) == theirs.decode(ids)
        assert from_json(ours.to_json()).decode(ids) == theirs.decode(ids)


def test_what_a_folder_names_survives_our_own_files(tmp_path):
    """Begin, end and padding by other names, told by dicts as older saves do, nulls, a list of further tokens."""
    tok = trained(special=("<s>", "</s>", "<pad>"))
    tok.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "mask_token": None, "additional_special_tokens": ["<|user|>"]}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({
        "bos_token": {"content": "<s>", "lstrip": False}, "eos_token": {"content": "</s>"}, "pad_token": "<pad>"}))
    ours = open_tokenizer(str(tmp_path))
    ours.save(tmp_path / "export")
    for found in (ours, from_json(ours.to_json()), open_tokenizer(str(tmp_path / "export"))):
        assert (found.bos_id, found.eos_id, found.pad_id) == (0, 1, 2)
    config = json.loads((tmp_path / "export" / "tokenizer_config.json").read_text())
    assert config["additional_special_tokens"] == ["<|user|>"] and "mask_token" not in config  # as transformers 4 reads it
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<s>", "</s>", "<pad>")


def test_a_damaged_file_is_one_line(tmp_path):
    data = json.loads(trained().to_str())
    for change in ({"padding": 7}, {"model": data["model"] | {"continuing_subword_prefix": "##"}}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(data | change))
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        with pytest.raises(ValueError, match="no usable tokenizer|not a whole") as e:
            open_tokenizer(str(tmp_path / "tokenizer.json") if "model" in change else str(tmp_path))
        assert "\n" not in str(e.value)
