"""Adapters against PEFT in float64; instruction tuning from records to answers."""

import gzip
import io
import itertools
import json
import lzma
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import HERE, check_equal, defaults, give, start, two_ranks, untimed
from conftest import rows as rows_of
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

import finetune_instruct as script
import sample as sampler
from checkpoint import load_model, save_best
from convert import load_nanogpt
from device import Device
from hf import load_torch
from lora import (
    LoRA,
    add_lora,
    load_adapter,
    merge,
    save_adapter,
    set_trainable,
    unmerge,
)
from model import GPT, GPTConfig
from text import prompt_ids
from tokenizer import char_tokenizer, open_tokenizer, train_bpe

os.environ["HF_HUB_OFFLINE"] = "1"
RECORDS = HERE / "../shared/data/instruct/instruction-data.json"
for module in (script, sampler):
    defaults(module)  # now, before a test changes them


def tiny(seed=0, **options) -> GPT:
    """All parameters random at std 0.3: a default init hides mistakes."""
    torch.manual_seed(seed)
    sizes = {"block_size": 40, "vocab_size": 97, "n_layer": 3, "n_head": 4, "n_embd": 32}
    model = GPT(GPTConfig(**sizes | options)).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def ids(B=2, T=20):
    return torch.randint(97, (B, T), generator=torch.Generator().manual_seed(0))


def randomise(model, std=0.3):
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=std)


# ---- adapters ----

@pytest.mark.parametrize("bias", [True, False])
def test_identity_at_first_and_merged_equals_unmerged(bias):
    model = tiny(bias=bias)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model(ids())[0]
    add_lora(model, rank=4, alpha=6.0, dropout=0.5)
    assert torch.equal(model.eval()(ids())[0], before)
    randomise(model)
    after = model(ids())[0]
    assert (after - before).abs().max() > 1
    merge(model)
    assert model.state_dict().keys() == base.keys()  # a plain GPT
    assert (model(ids())[0] - after).abs().max() < 1e-10
    assert not torch.equal(model.state_dict()["transformer.h.1.mlp.c_fc.weight"],
                           base["transformer.h.1.mlp.c_fc.weight"])
    unmerge(model)
    assert torch.equal(model(ids())[0], after)
    check_equal({name: model.state_dict()[name] for name in base}, base)


def test_only_the_adapters_are_trained():
    model = tiny()
    r, C = 4, 32
    assert set_trainable(model, "lora", rank=r) == 3 * r * (C + 3 * C + 2 * C + 2 * (C + 4 * C))
    model(ids()[:, :-1], ids()[:, 1:])[1].backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == ("lora_" in name), name
    linears = {n for n, m in model.named_modules() if isinstance(m, LoRA)}
    assert len(linears) == 12 and all(".h." in n for n in linears)
    model = tiny(tie_word_embeddings=False)
    add_lora(model, 2, 2.0, targets=["attn.c_proj", "transformer.h.1.mlp.c_fc"])
    assert {n for n, m in model.named_modules() if isinstance(m, LoRA)} == {
        *(f"transformer.h.{i}.attn.c_proj" for i in range(3)), "transformer.h.1.mlp.c_fc"}


def test_modes():
    total = tiny().num_params()
    block = sum(p.numel() for p in tiny().transformer.h[0].parameters())
    assert set_trainable(tiny(), "full") == total
    assert set_trainable(tiny(), "last_layer") == 0
    assert set_trainable(tiny(), "last_blocks", 2) == 2 * block + 2 * 32
    for mode, blocks, word in (("some", 1, "full, last_layer, lora, last_blocks"),
                               ("last_blocks", 4, "1 … 3"), ("last_blocks", 0, "1 … 3")):
        with pytest.raises(ValueError, match=word):
            set_trainable(tiny(), mode, blocks)


def test_dropout_falls_on_what_the_adapters_read_alone():
    model = tiny()
    add_lora(model, 4, 4.0, dropout=0.5)
    model.train()
    assert torch.equal(model(ids())[0], model(ids())[0])  # B = 0
    randomise(model)
    assert not torch.equal(model(ids())[0], model(ids())[0])


def test_compile_and_bfloat16():
    model = tiny().float()
    add_lora(model, 4, 8.0)
    randomise(model, 0.05)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    x, y = ids()[:, :-1], ids()[:, 1:]
    losses, grads = [], []
    for net, kind in ((model, torch.float32), (whole, torch.float32), (model, torch.bfloat16),
                      (whole, torch.float32)):
        model.zero_grad()
        merge(model)  # as a save between two updates does
        unmerge(model)
        with torch.autocast("cpu", kind, enabled=kind != torch.float32):
            loss = net(x, y)[1]
        loss.backward()
        losses.append(loss.item())
        grads.append(model.transformer.h[1].mlp.c_proj.lora_A.grad.clone())
    assert losses[1] == losses[3] == pytest.approx(losses[0], rel=1e-5)
    assert torch.equal(grads[1], grads[3])
    assert losses[2] == pytest.approx(losses[0], rel=3e-2)
    assert (grads[1] - grads[0]).abs().max() < 1e-4
    assert F.cosine_similarity(grads[2].flatten(), grads[0].flatten(), 0) > 0.9


TARGETS = [["c_attn"], ["attn.c_proj", "c_fc"], ["c_attn", "c_proj", "c_fc"],
           ["transformer.h.2.mlp.c_proj", "transformer.h.0.attn.c_attn"]]


@pytest.mark.parametrize("targets", TARGETS)
def test_peft_gives_our_logits_and_we_give_its(tmp_path, targets):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model = tiny()
    model.save_pretrained(tmp_path / "base")

    def theirs():
        return transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()

    assert theirs().dtype == torch.float64
    add_lora(model, 4, 10.0, 0.1, targets)
    randomise(model)
    save_adapter(model, tmp_path / "ours", tmp_path / "base")
    hf = peft.PeftModel.from_pretrained(theirs(), tmp_path / "ours", autocast_adapter_dtype=False)
    assert (hf(ids()).logits - model(ids())[0]).abs().max() < 1e-10
    assert sum("lora_" in n for n, _ in hf.named_parameters()) == sum(
        "lora_" in n for n, _ in model.named_parameters())

    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, fan_in_fan_out=True,
                             lora_dropout=0.1, task_type="CAUSAL_LM")
    hf = peft.get_peft_model(theirs(), config, autocast_adapter_dtype=False).eval()
    randomise(hf)
    hf.save_pretrained(tmp_path / "theirs")
    model = GPT.from_pretrained(tmp_path / "base")
    load_adapter(model, tmp_path / "theirs")
    assert (hf(ids()).logits - model(ids())[0]).abs().max() < 1e-10
    save_adapter(model, tmp_path / "again", tmp_path / "base")
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors")
                    for name in ("theirs", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)


def test_adapters_that_do_not_fit(tmp_path):
    model = tiny()
    add_lora(model, 4, 8.0)
    save_adapter(model, tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert config["fan_in_fan_out"] is True
    assert config["target_modules"] == ["c_attn", "c_proj", "c_fc"]
    for other, word in (({"n_embd": 64}, r"\[4, 32\].*needs \[4, 64\]"),
                        ({"n_layer": 2}, r"h\.2\.")):
        with pytest.raises(ValueError, match=word):
            load_adapter(tiny(**other), tmp_path)
    for change, word in (({"mystery": 3}, "mystery=3"), ({"peft_type": "IA3"}, "IA3"),
                         ({"init_lora_weights": "pissa"}, "pissa"), ({"r": 8}, r"needs \[8, 32\]"),
                         ({"task_type": "SEQ_CLS"}, "SEQ_CLS, .*merge it by PEFT"), ({"r": "4"}, "rank"),
                         ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias='all'"),
                         ({"modules_to_save": ["wte"]}, "modules_to_save"),
                         ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
                         ({"rank_pattern": {"c_fc": 1}}, r"needs \[1, 32\]"),
                         ({"lora_alpha": "4"}, "alpha"), ({"lora_dropout": None}, "dropout")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=word):
            load_adapter(tiny(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    first = min(tensors)
    for change, word in (({first: None}, "shape none"),
                         ({"base_model.model.x.lora_A.weight": torch.ones(2)}, "'x'"),
                         ({first: tensors[first].int()}, "not a floating-point"),
                         ({first.replace("lora_A", "lora_x"): torch.ones(2)}, "needs none")):
        changed = {k: v for k, v in (tensors | change).items() if v is not None}
        save_file(changed, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=word):
            load_adapter(tiny(), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors and no adapter_model\.bin"):
        load_adapter(tiny(), tmp_path)
    with pytest.raises(OSError, match="No such file"):
        load_adapter(tiny(), tmp_path / "nothing")
    for targets in (["c_attention"], [], ["c_attn", "wte"], ["lm_head"]):
        with pytest.raises(ValueError, match=r"attn\.c_attn"):
            add_lora(tiny(tie_word_embeddings=False), 4, 8.0, targets=targets)
    for rank, dropout in ((0, 0.0), (4, 1.0)):
        with pytest.raises(ValueError, match="rank must be"):
            add_lora(tiny(), rank, 8.0, dropout)


@pytest.mark.parametrize("options", [
    {"use_rslora": True}, {"rank_pattern": {"c_fc": 2, r"h\.1\.attn\.c_attn": 8}},
    {"alpha_pattern": {"attn.c_proj": 3}, "use_rslora": True}, {"layers_to_transform": [0, 2]},
    {"rank_pattern": {"mlp.c_proj": 3}, "alpha_pattern": {"c_proj": 5}}])
def test_adapters_of_peft_with_patterns(tmp_path, options):
    peft = pytest.importorskip("peft")
    tiny().save_pretrained(tmp_path / "base")
    theirs = pytest.importorskip("transformers").GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    config = peft.LoraConfig(r=4, lora_alpha=9, target_modules=["c_attn", "c_proj", "c_fc"],
                             fan_in_fan_out=True, task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False).double()
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", tmp_path / "older")
    (tmp_path / "older" / "adapter_model.safetensors").unlink()
    torch.save(load_file(tmp_path / "adapter" / "adapter_model.safetensors"), tmp_path / "older" / "adapter_model.bin")
    x = ids()
    for folder in ("adapter", "older"):
        model = GPT.from_pretrained(tmp_path / "base").double()
        load_adapter(model, tmp_path / folder)
        assert (model.eval()(x)[0] - theirs.eval()(x).logits).abs().max() < 1e-9


def test_a_missing_base_is_named(tmp_path):
    model = tiny()
    add_lora(model, 4, 8.0)
    save_adapter(model, tmp_path / "a", tmp_path / "gone")
    with pytest.raises(ValueError, match=r"a/adapter_config\.json names the base model .*gone: no folder"):
        load_model(tmp_path / "a")


# ---- records and templates ----

def write_records(path, records):
    path.write_text(json.dumps(records))
    return path


def test_every_format_gives_the_same_records(tmp_path, monkeypatch):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = [{"instruction": f"do {i} ", "input": " x\u2028y" * (i % 2), "output": f"\n done é {i}"}
            for i in range(5)]
    want = [{k: v.strip() for k, v in row.items()} for row in rows]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "d.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    for file in sorted(tmp_path.iterdir()):
        assert script.read_records(str(file)) == want, file
    said, none = [], {"instruction": "a", "input": "", "output": ""}  # tatsu-lab/alpaca has some
    monkeypatch.setattr(datasets, "load_dataset",
                        lambda name, **_: {"train": [*rows[:2], none, *rows[2:]]})
    assert script.read_records("some/set", said.append) == want
    assert said[0].startswith("1 of 6 records left out; record 3 of some/set needs texts")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: {"train": [none]})
    with pytest.raises(ValueError, match="record 1 of some/set needs texts"):
        script.read_records("some/set")
    without = [{"instruction": "a", "output": "b"},
               {"instruction": "a", "input": None, "output": "b"}]
    file = write_records(tmp_path / "f.json", without)
    assert [record["input"] for record in script.read_records(str(file))] == ["", ""]


@pytest.mark.parametrize("row", [
    {"instruction": "a", "input": ""}, "text", {"instruction": "a", "output": True},
    {"instruction": "", "output": "b"}, {"instruction": "a", "input": ["b"], "output": "b"}])
def test_a_record_that_cannot_be_used_is_named(tmp_path, row):
    file = write_records(tmp_path / "r.json", [{"instruction": "a", "output": "b"}, row])
    with pytest.raises(ValueError, match=r"record 2 of \S+r\.json needs texts as .*; it is ") as e:
        script.read_records(str(file))
    assert str(e.value).endswith(repr(row))


def turns(*texts, roles=("user", "assistant"), names=("role", "content")):
    return [dict(zip(names, turn)) for turn in zip(roles * 2, texts)]


SYSTEM = ("system", "user", "assistant")
OF = [  # what people bring, and the record that it is
    ({"prompt": "a", "completion": "b"}, ("a", "", "b")), ({"prompt": " a", "response": "b\n"}, ("a", "", "b")),
    ({"instruction": "a", "context": "c", "response": "b", "category": "qa"}, ("a", "c", "b")),
    ({"instruction": "a", "output": 3, "prompt": "Below is a"}, ("a", "", "3")),
    ({"instruction": "a", "input": 2.5, "output": 0}, ("a", "2.5", "0")),
    ({"instruction": "a", "input": float("nan"), "output": "b"}, ("a", "", "b")),
    ({"system": "s ", "prompt": "a", "response": "b"}, ("s\n\na", "", "b")),
    ({"system_prompt": "s", "instruction": "a", "output": "b"}, ("s\n\na", "", "b")),
    ({"system": "s", "conversations": turns("a", "b", names=("from", "value"))}, ("s\n\na", "", "b")),
    ({"messages": turns("a", "b")}, ("a", "", "b")), ({"messages": turns("s", "a", "b", roles=SYSTEM)}, ("s\n\na", "", "b")),
    ({"conversations": turns("a", "b", roles=("human", "gpt"), names=("from", "value")), "id": 7}, ("a", "", "b"))]


@pytest.mark.parametrize(("row", "want"), OF)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_instructions_by_other_names(tmp_path, row, want, suffix):
    import pyarrow as pa
    import pyarrow.parquet as pq
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "r.parquet")
    else:
        (tmp_path / "r.jsonl").write_text(json.dumps(row))
    found = script.read_records(str(tmp_path / f"r.{suffix}"))
    assert found == [dict(zip(("instruction", "input", "output"), want))]


@pytest.mark.parametrize(("row", "word"), [
    ({"question": "a", "answer": "b"}, r"found the fields question \(str\), answer \(str\);"), ({"prompt": "a"}, r"the fields prompt \(str\);"),
    ({"messages": turns("a", "b", "c", "d")}, r"a chat of 4 turns \(user assistant user assistant\);"),
    ({"messages": turns("a", "b", roles=("user", "tool"))}, r"a chat of 2 turns \(user tool\);"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}, {"role": "assistant", "content": "b"}]}, "record 2"),
    ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "a history of 1 earlier turns;"),
    ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "both input and context;"),
    ({"messages": "a"}, "record 2"), ({"prompt": "a", "completion": "b", "response": "c"}, "both completion and response;")])
def test_what_is_no_instruction_is_refused(tmp_path, row, word):
    file = write_records(tmp_path / "r.json", [{"instruction": "a", "output": "b"}, row])
    with pytest.raises(ValueError, match=word) as e:
        script.read_records(str(file))
    assert "expected" not in str(e.value) or "\n" not in str(e.value)
    assert "record 2" in str(e.value) and "prompt and completion" in str(e.value)


@pytest.mark.parametrize("answer", ["", " \n", None])
def test_empty_answers_are_counted_and_left_out(tmp_path, answer):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": answer}]
    said = []
    assert len(script.read_records(str(write_records(tmp_path / "r.json", rows)), said.append)) == 1
    assert said[0].startswith("1 of 2 records left out; record 2 of") and "an empty answer" in said[0]


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    for name, content in (("a.json", b"[{"), ("b.jsonl", b"no json"), ("c.json", b"\xff\xfe"),
                          ("d.json.gz", b"no gzip"), ("e.parquet", b"no parquet")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises((ValueError, OSError), match=f"{name} (cannot be read|is not UTF-8)|"
                                                        f"cannot read .*{name}"):
            script.read_records(str(tmp_path / name))
    with pytest.raises(ValueError, match="hub data set"):
        script.read_records("./nothing")


def test_templates():
    tok = open_tokenizer("bytes")

    def filled(template, instruction, text, limit=10**9):
        prompt, cut = prompt_ids(tok, template, instruction, text, limit)
        return tok.decode(prompt), cut

    whole = filled(script.ALPACA, "Add {input} up.", "1 {output} 2")[0]
    assert whole.endswith("### Instruction:\nAdd {input} up.\n\n### Input:\n1 {output} 2\n\n"
                          "### Response:\n")
    assert filled(script.ALPACA, "Count.", "")[0].endswith("### Instruction:\nCount.\n\n### Response:\n")
    assert filled("{instruction} {input}> {output}", "a", "")[0] == "a > "
    for limit, want in ((9, "do abcd>"), (7, "do abc>"), (3, "do>"), (1, ">")):
        assert filled("{instruction} {input}>{output}", "do", "abcd", limit) == (want, limit < 8)
    assert filled("{input}\n\n{instruction}\n{output}", "a", "b")[0] == "b\n\na\n"


def test_special_tokens_of_a_template():
    """Those of the template are ids, the same that transformers makes; those in a text are text."""
    tok = train_bpe(["ask and answer the <|user|> says hello " * 9], 270, ["<|user|>", "<|bot|>"])
    form, user, bot = "<|user|> {instruction}{input}<|bot|>{output}", tok.ids["<|user|>"], tok.ids["<|bot|>"]
    ids, _ = prompt_ids(tok, form, "say hello", "", 99)
    assert ids == [user, *tok.encode(" say hello"), bot] == tok.encode("<|user|> say hello<|bot|>", special=True).tolist()
    library = pytest.importorskip("tokenizers").Tokenizer.from_str(tok.to_json())
    assert ids == library.encode("<|user|> say hello<|bot|>").ids
    ids, _ = prompt_ids(tok, form, "say <|bot|>", "", 99)
    assert ids == [user, *tok.encode(" say <|bot|>"), bot] and ids.count(bot) == 1
    assert prompt_ids(tok, form, "say <|bot|>", "", 3) == ([user, tok.encode(" s")[0], bot], True)


def test_templates_that_are_none(tmp_path, monkeypatch):
    for text in ("{input} {output}", "{instruction} {output}", "{instruction} {input}",
                 "{instruction} {input} {output} end", "{system} {instruction} {input} {output}",
                 "{output} {instruction} {input} {output}"):
        (tmp_path / "t").write_text(text)
        monkeypatch.setattr(script, "template", str(tmp_path / "t"))
        with pytest.raises(ValueError, match=r"t must have .* \{input\}, no other, and end with \{output\}"):
            script.read_template()
    (tmp_path / "t").write_text("{instruction}|{input}|{output}\n", "utf-8-sig")
    assert script.read_template() == "{instruction}|{input}|{output}"
    (tmp_path / "t").write_bytes("é{instruction}|{input}|{output}".encode("latin-1"))
    with pytest.raises(ValueError, match="t is not UTF-8 text: .* at byte 0"):
        script.read_template()


def test_long_prompts_lose_the_end_of_their_input():
    tok = open_tokenizer("bytes")
    form = "I: {instruction}\n\nIn: {input}\n\nA:{output}"
    records = [{"instruction": "copy", "input": "abcdefghij", "output": "xyz"},
               {"instruction": "copy much", "input": "", "output": "xyz"}]

    def texts(T):
        _, rows, cuts = script.encode(records, tok, form, T)
        for prompt, answer in rows:
            assert len(prompt) + len(answer) - 1 <= T and answer == [*b"xyz", 255]
        return [bytes(prompt) for prompt, _ in rows], cuts

    full = [b"I: copy\n\nIn: abcdefghij\n\nA:", b"I: copy much\n\nA:"]
    assert texts(30) == (full, 0) and len(full[0]) + 3 == 30
    assert texts(27) == ([b"I: copy\n\nIn: abcdefg\n\nA:", full[1]], 1)
    assert texts(17) == ([b"I: copy\n\nI\n\nA:", b"I: copy mu\n\nA:"], 2)
    assert texts(5) == ([b"A:", b"A:"], 2)
    longer = records[1] | {"output": "xyzxyz"}
    assert script.encode([records[0], longer], tok, form, 5)[:2] == (
        records[:1], [([*b"A:"], [*b"xyz", 255])])  # whose answer does not fit is left out
    with pytest.raises(ValueError, match="no end-of-text"):
        script.encode(records, char_tokenizer("abc"), form, 40)
    with pytest.raises(ValueError, match="record 'copy' .*alphabet"):
        script.encode(records, char_tokenizer(["abc"], "c"), form, 40)


def test_splits(monkeypatch):
    records = [{"instruction": f"i{n}", "input": "", "output": "o"} for n in range(1100)]
    records[7] = records[900] = records[33] | {"output": "p"}
    train, dev, test = script.split(records)
    assert (len(train), len(dev), len(test)) == (935, 55, 110)
    assert sorted(train + dev + test) == list(range(1100)) and {7, 33, 900} <= set(train)
    assert script.split(records) == [train, dev, test]
    monkeypatch.setattr(script, "seed", 1)
    assert script.split(records)[2] != test
    assert [len(part) for part in script.split(records[:3])] == [1, 1, 1]
    with pytest.raises(ValueError, match="has 2 records"):
        script.split(records[:2])
    with pytest.raises(ValueError, match="40 records, 0 with a prompt of their own"):
        script.split(records[:20] * 2)


def test_epochs_visit_every_record_once_and_batches_are_of_similar_length(monkeypatch):
    monkeypatch.setattr(script, "batch_size", 8)
    monkeypatch.setattr(script, "epochs", 2)
    lengths = torch.randint(1, 90, (83,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [([0] * n, [0]) for n in lengths]
    batches = script.training_batches(rows)
    epochs = batches[:11], batches[11:]
    for part in epochs:
        assert sorted(itertools.chain(*part)) == list(range(83))
        assert len(part) == 11 and {len(b) for b in part} == {7, 8}
        assert sum(max(lengths[i] for i in b) * len(b) for b in part) < 1.1 * sum(lengths)
    first, second = ([b.tolist() for b in part] for part in epochs)
    assert first != second
    monkeypatch.setattr(script, "epochs", 1)  # more epochs begin alike
    assert [b.tolist() for b in script.training_batches(rows)] == first


# ---- losses ----

@pytest.mark.parametrize("on_all", [False, True])
def test_a_batch_has_the_loss_and_gradients_of_its_records_alone(on_all):
    model = tiny()
    rows = [(list(range(5, 12)) + [20 + n] * n, [30 + n] * m)
            for n, m in ((1, 4), (9, 2), (3, 20), (5, 1))]
    if on_all:  # as train_on_all has it
        rows = [(prompt[:1], prompt[1:] + answer) for prompt, answer in rows]
    prefix, x, at, targets = script.collate(rows, "cpu")
    assert prefix.tolist() == [[]] if on_all else [[5, 6, 7, 8, 9, 10, 11]]
    assert x.shape == (4, 29 if on_all else 22) and len(at) == len(targets)
    total = 0.0
    for prompt, answer in rows:  # by the logits of the plain model
        row = torch.tensor([prompt + answer])
        logp = F.log_softmax(model(row)[0][0], -1)
        total -= sum(logp[i - 1, row[0, i]] for i in range(len(prompt), row.size(1)))
    total.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = script.AnswerLoss(model)(prefix, x, at, targets)
    loss.backward()
    assert abs(loss.item() - total.item()) < 1e-10
    for name, p in model.named_parameters():
        assert (p.grad - want[name]).abs().max() < 1e-10, name
    mean = script.evaluate(script.AnswerLoss(model), rows, Device("cpu"))
    assert math.isclose(mean, total.item() / len(targets), rel_tol=1e-12)


def test_compiled_batches_of_all_shapes_are_few_whole_graphs():
    torch._dynamo.reset()
    net, graphs = script.AnswerLoss(tiny().float().train()), CompileCounter()
    whole = torch.compile(net, backend=graphs, dynamic=True, fullgraph=True)
    for n in range(2, 8):
        rows = [([5, 6] * (n > 4) + [40 + i] * (n + i), [7] * n) for i in range(n)]
        batch = script.collate(rows, "cpu")
        assert math.isclose(whole(*batch).item(), net(*batch).item(), rel_tol=1e-5)
    assert graphs.frame_count <= 4


def test_answers_of_a_batch_are_those_of_each_alone(monkeypatch):
    monkeypatch.setattr(script, "max_new_tokens", 9)
    tok = char_tokenizer(["abcdefgh"], "h")
    model = tiny(3, vocab_size=8, tie_word_embeddings=False)
    records = [{"instruction": text} for text in ("bcd", "e", "aafgbcdd", "gb")]
    together = script.answers(model, tok, [tok.encode(record["instruction"]).tolist() for record in records])
    alone = []
    for record in records:
        prompt = tok.encode(record["instruction"])
        new = model.generate(torch.tensor(prompt[None]).long(), 9, temperature=0.0, eos_id=7)
        alone.append(tok.decode(new[0, len(prompt):].tolist()).split("h")[0])
    assert together == alone == ["", "", "ccccccccc", "c"]


# ---- whole runs ----

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random base model of byte tokens, and records whose answer is a function of a letter."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=256, n_layer=2, n_head=2, n_embd=32))
    for name, p in model.named_parameters():
        if p.dim() > 1:  # embeddings that can tell 256 ids apart, as they stay frozen
            torch.nn.init.normal_(p, std=0.3 if ".wt" in name else 0.1)
    save_best(folder, model, open_tokenizer("bytes"))
    records = [{"instruction": "say", "input": f"{n:02x}{word[0]}", "output": word}
               for n, word in zip(range(120), itertools.cycle(["ja", "no", "oui"]))]
    write_records(folder / "data.json", records)
    (folder / "template").write_text("{instruction}\n\n{input}\n\n>{output}")
    return folder


COMMON = ["--device=cpu", "--batch_size=17", "--max_new_tokens=6", "--log_interval=1"]


def run_script(base, out, *argv):
    start(script, *COMMON, f"--init_from={base}", f"--data={base}/data.json",
          f"--template={base}/template", f"--out_dir={out}", *argv)


def sample(folder, *argv, typed=""):
    return subprocess.run(
        [sys.executable, HERE / "sample.py", f"--init_from={folder}", "--device=cpu",
         "--temperature=0", "--max_new_tokens=6", *argv],
        input=typed, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("mode", "rate", "epochs"), [
    ("full", 1e-2, 12), ("lora", 1e-2, 20), ("last_blocks", 1e-2, 16)])
def test_every_mode_learns_to_answer(base, tmp_path, capsys, monkeypatch, mode, rate, epochs):
    monkeypatch.setenv("COLUMNS", "60")
    run_script(base, tmp_path, f"--mode={mode}", f"--learning_rate={rate}", f"--epochs={epochs}",
               "--train_blocks=1", "--lora_rank=8")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["exact_match"] == 1 and results["chrf"] == 100 and results["loss"] < 0.1
    assert results["loss_before"] > 3 and results["split"] == "test" and results["records"] == 12
    assert results["perplexity"] == pytest.approx(math.exp(results["loss"]))
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and all(line["answer"] == line["output"] for line in lines)
    shown = capsys.readouterr().out
    cells = shown[shown.index("instruction "):shown.rindex("-+-")].splitlines()
    assert len(cells) > 20 and max(map(len, cells)) <= 60 and lines[3]["input"] in shown
    rows = rows_of(tmp_path)
    assert rows[0]["step"] == 0 and rows[-1]["step"] == epochs * 6 and "val_loss" in rows[-1]
    assert min(r["val_loss"] for r in rows if "val_loss" in r) == pytest.approx(results["dev_loss"])
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    form = (tmp_path / "best" / "template.txt").read_text()
    assert form == "{instruction}\n\n{input}\n\n>{output}\n"
    model, tok = load_model(str(tmp_path))  # as sample.py does
    prompt = tok.encode("say\n\nf3n\n\n>").tolist()
    assert script.answers(model, tok, [prompt]) == ["no"]
    if mode == "full":
        for argv, typed in ((["--instruct=say", "--instruct_input=f3n"], ""),
                            (["--instruct_input=f3n", "--interactive"], "say\n")):
            said = sample(tmp_path, *argv, typed=typed)
            assert said.returncode == 0 and "no" in said.stdout.split(), said.stderr
        for folder, argv, word in ((base, ["--instruct=say"], "template.txt"),
                                   (tmp_path, ["--instruct_input=f3n"], "--instruct")):
            said = sample(folder, *argv)
            assert said.returncode == 2 and word in said.stderr and said.stderr.count("\n") == 1

    old, new = GPT.from_pretrained(base).state_dict(), load_torch(tmp_path / "ckpt.pt")["model"]
    frozen = {"full": [], "lora": old,
              "last_blocks": [n for n in old if ".h.1." not in n and "ln_f" not in n]}
    assert all(torch.equal(old[name], new[name]) for name in frozen[mode])
    assert all(not torch.equal(old[name], new[name]) for name in old if name not in frozen[mode])
    if mode == "lora":
        transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
        assert results["trained_parameters"] == 2 * 8 * (4 * 32 + 2 * 32 + 2 * 5 * 32)
        hf = transformers.GPT2LMHeadModel.from_pretrained(base / "best").eval()
        hf = peft.PeftModel.from_pretrained(hf, tmp_path / "adapter")
        x = torch.tensor([prompt])
        assert (hf(x).logits - model(x)[0]).abs().max() < 1e-4
        assert hf.peft_config["default"].base_model_name_or_path == f"{base}/best"
        adapted, _ = load_model(str(tmp_path / "adapter"))  # on the base that it names
        assert (adapted(x)[0] - model(x)[0]).abs().max() < 1e-5
        assert (tmp_path / "adapter" / "template.txt").read_text() == form
        assert ">no" in sample(tmp_path / "adapter", "--start=say\n\nf3n\n\n>").stdout.split()


def test_prompts_of_answers_do_not_depend_on_the_reference(base, tmp_path, monkeypatch):
    T, seen, answers = load_model(base)[0].config.block_size, [], script.answers
    write_records(tmp_path / "data.json", [{"instruction": f"say {n}", "input": "x" * 2 * T, "output": "ja" * (1 + n % 3)}
                                           for n in range(60)])
    monkeypatch.setattr(script, "answers", lambda gpt, tok, prompts: seen.extend(prompts) or answers(gpt, tok, prompts))
    run_script(base, tmp_path / "run", "--epochs=1", f"--data={tmp_path}/data.json")
    assert {*map(len, seen)} == {T - 6}  # 6 new tokens


def test_adapters_are_compiled_on_several_ranks(monkeypatch):
    """DDP cuts their graph in pieces, which it cannot with a number among its inputs."""
    import torch.distributed as dist
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compiler(*args, backend="aot_eager", **options))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        env, gpt = Device("cpu"), GPT(GPTConfig(64, 500, 2, 4, 256))
        set_trainable(gpt, "lora", rank=96, alpha=32.0, dropout=0.1)  # over a megabyte: several pieces
        net = script.AnswerLoss(gpt)
        env.world = 2
        batch = [([1, 2, 3, 4 + i], [5, 6, 7]) for i in range(4)]
        with torch._dynamo.config.patch(specialize_float=False):  # as it is at first; put back
            _, fast = env.compiled(net, True, lambda model: model(*script.collate(batch, "cpu")), dynamic=True)
        assert fast is not net
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_resumed_equals_uninterrupted(base, tmp_path, monkeypatch, capsys, mode):
    options = (f"--mode={mode}", "--epochs=2", "--dropout=0.1", "--lora_dropout=0.2",
               "--log_interval=5")
    run_script(base, tmp_path / "whole", *options)

    kept = []

    def save_and_stop(*args):
        save_best(*args)
        kept.append(args)
        if len(kept) == 2:  # after the first epoch
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(script, "save_best", save_and_stop)
    run_script(base, tmp_path / "cut", *options, "--overwrite")
    said = capsys.readouterr().out
    assert "stopped by SIGINT at step 7; go on with: " in said and "--overwrite=False" in said
    assert load_torch(tmp_path / "cut" / "ckpt.pt")["step"] == 7
    assert not (tmp_path / "cut" / "results.json").exists()
    monkeypatch.undo()
    run_script(base, tmp_path / "cut", *options, "--init_from=resume")
    whole, cut = (load_torch(tmp_path / name / "ckpt.pt") for name in ("whole", "cut"))
    assert whole["step"] == cut["step"] == 12 and whole["best_loss"] == cut["best_loss"]
    assert whole["before"] == cut["before"] and whole["base"] == cut["base"]
    assert whole["settings"]["init_from"] == cut["settings"]["init_from"] == str(base)
    check_equal(whole["model"], cut["model"])
    rows, again = (untimed(tmp_path / name) for name in ("whole", "cut"))
    assert rows == again and [row["step"] for row in rows] == [0, 5, 6, 10, 12]
    assert (tmp_path / "whole" / "answers.jsonl").read_text() == (
        tmp_path / "cut" / "answers.jsonl").read_text()
    results = [json.loads((tmp_path / name / "results.json").read_text())
               for name in ("whole", "cut")]
    for key in ("loss_before", "loss", "chrf", "exact_match", "dev_loss", "bits_per_byte"):
        assert results[0][key] == results[1][key], key
    capsys.readouterr()
    run_script(base, tmp_path / "cut", *options, "--init_from=resume")
    assert "is finished: 12 steps" in capsys.readouterr().out
    torch.save(cut | {"skipped": 2}, tmp_path / "changed")  # not over the file that `cut` is mapped to
    os.replace(tmp_path / "changed", tmp_path / "cut" / "ckpt.pt")
    run_script(base, tmp_path / "cut", *options, "--init_from=resume", "--epochs=3",
               "--weight_decay=0.5")  # what may change does, and the old judgement is replaced
    more = load_torch(tmp_path / "cut" / "ckpt.pt")
    assert more["step"] == 18 and more["skipped"] == 2
    assert more["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    assert json.loads((tmp_path / "cut" / "results.json").read_text())["settings"]["epochs"] == 3
    for change, word in (("--seed=3", "seed=1337, not 3"), ("--batch_size=4", "batch_size=17"),
                         ("--mode=last_blocks", f"mode={mode}")):
        with pytest.raises(ValueError, match=word):
            run_script(base, tmp_path / "cut", *options, "--init_from=resume", change)


def test_a_resumed_run_keeps_its_template(base, tmp_path):
    form = Path(shutil.copy(base / "template", tmp_path / "form"))
    run_script(base, tmp_path / "run", f"--template={form}", "--epochs=1")
    form.write_text("Do: " + form.read_text())
    with pytest.raises(ValueError, match="was trained with another text than .*form has now"):
        run_script("resume", tmp_path / "run", f"--template={form}", f"--data={base}/data.json", "--epochs=2")


def test_rows_past_the_tokenizers_ids_are_never_drawn(base, tmp_path):
    """Also by the best model, from whose folder the answers come."""
    model, tok = load_model(base)
    rows = torch.randn(320, 32)
    rows[:256] = model.transformer.wte.weight.detach()
    wide = GPT(GPTConfig(**vars(model.config) | {"vocab_size": 320}))
    wide.load_state_dict(model.state_dict() | {"transformer.wte.weight": 9 * rows})
    save_best(tmp_path / "wide", wide, tok)
    run_script(tmp_path / "wide/best", tmp_path / "run", f"--template={base}/template", f"--data={base}/data.json",
               "--epochs=1", "--learning_rate=0")
    assert len((tmp_path / "run" / "answers.jsonl").read_text().splitlines()) == 12


def test_no_adapters_on_adapters(base, tmp_path):
    run_script(base, tmp_path / "one", "--epochs=1", "--mode=lora")
    with pytest.raises(ValueError, match="is an adapter: give the best/"):
        run_script(base, tmp_path / "two", f"--init_from={tmp_path}/one/adapter", "--mode=lora")


def test_a_run_is_not_resumed_on_other_records(base, tmp_path):
    data = write_records(tmp_path / "data.json", json.loads((base / "data.json").read_text())[:40])
    run_script(base, tmp_path / "run", "--epochs=1", f"--data={data}")
    write_records(data, json.loads(data.read_text())[1:])
    with pytest.raises(ValueError, match=r"trained on other data than \S+data.json has now"):
        run_script(base, tmp_path / "run", f"--data={data}", "--init_from=resume", "--epochs=2")


def test_a_checkpoint_of_ours_is_converted_by_its_folder(tmp_path):
    torch.save({"model": {}, "config": {}, "settings": {}, "step": 1}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=f"give its folder, --input={tmp_path}$"):
        load_nanogpt(tmp_path / "ckpt.pt")


def test_what_is_given_is_answered_before_more_is_asked_for(base, tmp_path, monkeypatch, capsys):
    shutil.copytree(base / "best", tmp_path / "m")
    (tmp_path / "m" / "template.txt").write_text("{instruction}\n\n{input}\n\n>{output}")
    for argv, answered in (("--instruct=say", 1), ("--start=ab", 1), ("--instruct_input=f3n", 0)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"go\n")))
        start(sampler, f"--init_from={tmp_path / 'm'}", "--device=cpu", argv, "--interactive",
              "--max_new_tokens=4")
        before, after = capsys.readouterr().out.split("type an instruction")
        assert before.count("tokens in") == answered and after.count("tokens in") == 1
        assert ("\nab" in before) == (argv == "--start=ab")  # an instruction is not written again


def test_two_ranks_equal_one(base, tmp_path):
    run_script(base, tmp_path / "one", "--epochs=1")
    two_ranks(HERE / "finetune_instruct.py", *COMMON, f"--init_from={base}", "--epochs=1",
              f"--data={base}/data.json", f"--template={base}/template", f"--out_dir={tmp_path}/two")
    for one, two in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for key in {"step", "tokens", "train_loss", "grad_norm", "val_loss"} & one.keys():
            assert one[key] == pytest.approx(two[key], rel=1e-4), (key, one, two)
    one, two = (load_torch(tmp_path / name / "ckpt.pt")["model"] for name in ("one", "two"))
    check_equal(one, two, 1e-4)


@pytest.mark.parametrize(("argv", "word"), [
    (["--mode=adapters"], "mode must be full or lora"),
    (["--mode=last_layer"], "mode must be full or lora or last_blocks, got 'last_layer'"),
    (["--epochs=0"], "epochs must"),
    (["--batch_size=0"], "batch_size must"), (["--init_from=resume"], "to resume from"),
    (["--lora_targets=c_at"], r"attn\.c_attn"),
    (["--train_blocks=9", "--mode=last_blocks"], "1 … 2"),
    (["--block_size=2"], "too few"), (["--block_size=99"], "32 positions"),
    (["--init_from=./nothing"], "no folder"), (["--lora_rank=0"], "rank must")])
def test_mistakes_are_one_line(base, tmp_path, argv, word):
    with pytest.raises(ValueError, match=word) as e:
        run_script(base, tmp_path, *argv)
    assert "\n" not in str(e.value)


def test_no_run_begins_from_what_it_overwrites(base, tmp_path):
    for name, mode in (("", "full"), ("best", "lora")):
        shutil.copytree(base, tmp_path / name, dirs_exist_ok=True)
        with pytest.raises(ValueError, match="lies in --out_dir"):
            run_script(tmp_path / name, tmp_path, f"--data={base}/data.json", f"--mode={mode}",
                       f"--template={base}/template", "--overwrite")


def test_the_loss_of_prompts_too(base, tmp_path):
    run_script(base, tmp_path, "--epochs=1", "--train_on_all")
    records = script.read_records(f"{base}/data.json")
    _, rows, _ = script.encode(records, open_tokenizer("bytes"), (base / "template").read_text(), 32)
    first = [rows[i] for i in script.split(records)[0]]
    assert rows_of(tmp_path)[-1]["tokens"] == sum(len(p) + len(a) - 1 for p, a in first)


def test_the_real_records():
    if not RECORDS.is_file():
        pytest.skip("../shared/data/instruct is not here")
    records = script.read_records(str(RECORDS))
    give(script)
    parts = script.split(records)
    assert [len(part) for part in parts] == [935, 55, 110]
    train, dev, test = ({(records[i]["instruction"], records[i]["input"]) for i in part}
                        for part in parts)
    assert not train & test and not train & dev and not dev & test
    _, rows, cuts = script.encode(records, open_tokenizer("bytes"), script.ALPACA, 700)
    assert cuts == 0 and len(rows) == 1100
