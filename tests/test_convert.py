"""Exports that transformers loads, nanoGPT's checkpoints, hub names from a local cache."""

import json
import os
import pickle
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import convert
import train
from checkpoint import load_model
from configurator import command_line, configure, find_settings
from data import Data, write_data
from decode import beam_search
from hf import load_torch
from lora import add_lora, merge, save_adapter, unmerge
from model import GPT, MLP, GPTConfig
from test_model import ids, tiny, tiny_hf
from text import say_once
from tokenizer import char_tokenizer, from_json, open_tokenizer

transformers = pytest.importorskip("transformers")
DEFAULTS, TRAIN_DEFAULTS = ({name: default for name, (default, _, _) in find_settings(
    vars(module)).items()} for module in (convert, train))


def run_convert(*argv):
    vars(convert).update(DEFAULTS)
    configure(vars(convert), list(argv))
    convert.main()


def test_export_of_a_run_loads_in_transformers(tmp_path):
    text = "the cat sat on the mat\n" * 50
    write_data(f"{tmp_path}/c", char_tokenizer(set(text)), {"train": [text], "val": [text]})
    vars(train).update(TRAIN_DEFAULTS)
    configure(vars(train), [
        f"--dataset={tmp_path}/c", f"--out_dir={tmp_path}/run", "--n_layer=2", "--n_head=2",
        "--n_embd=16", "--block_size=16", "--batch_size=2", "--max_steps=2", "--bias=False",
        "--device=cpu", "--sample_tokens=0", "--eval_interval=1"])
    train.main()
    run_convert(f"--input={tmp_path}/run", f"--out={tmp_path}/export", "--licence=mit",
                "--notes", "Data: cats, CC0", "Use: none: a test")
    hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "export").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    model, ours = load_model(tmp_path / "export")
    inputs = tokenizer("the cat\n", return_tensors="pt")
    x = inputs["input_ids"]
    assert x[0].tolist() == ours.encode("the cat\n").tolist()
    assert inputs.keys() == {"input_ids", "attention_mask"}  # else GPT-2 adds token_type_ids, too
    assert (hf(**inputs).logits - model(x)[0]).abs().max() < 1e-5
    card = (tmp_path / "export" / "README.md").read_text()
    assert "license: mit" in card and "2 steps, 64 tokens" in card and "bits per byte" in card
    assert "- **Data**: cats, CC0\n" in card and "- **Use**: none: a test\n" in card
    assert f"--eval_only --init_from={tmp_path}/export --dataset={tmp_path}/c`" in card
    assert "first" not in card and "rounded" not in card
    with pytest.raises(ValueError, match="notes: got 'Data'"):
        run_convert(f"--input={tmp_path}/run", f"--out={tmp_path}/export", "--notes=Data")
    pipe = transformers.pipeline("text-generation", str(tmp_path / "export"))
    said = pipe("the ", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    greedy = model.generate(torch.tensor([ours.encode("the ").tolist()]), 8, temperature=0)
    assert said == ours.decode(greedy[0].tolist())


def test_weights_of_a_run_on_part_of_the_validation_split(tmp_path):
    """As config/weights.py: float16, the tied head stored once, the card honest about its loss."""
    run, tok = tmp_path / "run", open_tokenizer("bytes")
    model = tiny(vocab_size=256, n_embd=64).float()
    model.save_pretrained(run / "best", tok.eos_id)
    tok.save(run / "best")
    torch.save({"settings": {"dataset": "stories", "eval_tokens": 3000}, "step": 9, "tokens": 90,
                "command": "python train.py"}, run / "ckpt.pt")
    (run / "metrics.jsonl").write_text('{"step": 9, "val_loss": 1.5, "val_ppl": 4.481689}\n')
    run_convert("config/weights.py", f"--input={run}", f"--out={tmp_path}/weights", "--notes=A: b")
    size = (tmp_path / "weights" / "model.safetensors").stat().st_size
    assert 0 < size - 2 * model.num_params() < 4000
    card = (tmp_path / "weights" / "README.md").read_text()
    assert "loss 1.5000, perplexity 4.482, on the first 3,000 tokens, before rounding to" in card
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"step": 12, "val_loss": 2.5, "val_ppl": 12.1825}\n')
    state = {"step": 12, "model": model.state_dict(), "config": vars(model.config)}
    torch.save(torch.load(run / "ckpt.pt") | state | {"tokenizer": tok.to_json()}, run / "ckpt.pt")
    for best, told in ((True, "this is step 9, the best"), (False, "loss 2.5000")):
        if not best:
            (run / "best").rename(run / "elsewhere")
        run_convert(f"--input={run}", f"--out={tmp_path}/again{best}")
        text = (tmp_path / f"again{best}" / "README.md").read_text()
        assert told in text and ("loss 1.5000" in text) == best
    hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "weights").float().eval()
    assert hf.lm_head.weight is hf.transformer.wte.weight
    x, half = ids(), load_model(tmp_path / "weights", dtype=torch.float32)[0]
    assert (hf(x).logits - half(x)[0]).abs().max() < 1e-4
    assert 0 < (half(x)[0] - model(x)[0]).abs().max() < 0.1


def test_exports_are_checked(tmp_path, monkeypatch, capsys):
    """What transformers would compute otherwise is refused, and nothing in --out is touched."""
    tiny(vocab_size=256).save_pretrained(tmp_path / "m")
    open_tokenizer("bytes").save(tmp_path / "m")
    argv = f"--input={tmp_path}/m", f"--out={tmp_path}/export/m"
    run_convert(*argv)
    assert "\nchecked: transformers computes the same (largest" in capsys.readouterr().out
    before = {file: file.read_bytes() for file in (tmp_path / "export").rglob("*.*")}
    with monkeypatch.context() as patch:
        patch.setattr(MLP, "forward", lambda self, x: self.c_proj(self.c_fc(x).relu()))
        with pytest.raises(ValueError, match=r"^transformers would compute .*difference \d"):
            run_convert(*argv)
        patch.setitem(sys.modules, "transformers", None)
        run_convert(*argv[:1], f"--out={tmp_path}/other")
        assert "not checked: transformers is not installed" in capsys.readouterr().out
    assert before == {file: file.read_bytes() for file in (tmp_path / "export").rglob("*.*")}
    (tmp_path / "export/m/best").mkdir()
    with pytest.raises(ValueError, match="holds best, which would be loaded"):
        run_convert(*argv)


def test_a_network_that_transformers_lacks_says_so(tmp_path, monkeypatch, capsys):
    @dataclass
    class Config(GPTConfig):
        window: int = 0

    monkeypatch.setattr("model.GPTConfig", Config)
    GPT(Config(40, 256, 1, 2, 8, window=5)).save_pretrained(tmp_path / "m")
    open_tokenizer("bytes").save(tmp_path / "m")
    run_convert(f"--input={tmp_path}/m", f"--out={tmp_path}/export")
    assert "only the scripts here load a network with {'window': 5}" in capsys.readouterr().out
    card = (tmp_path / "export/README.md").read_text()
    assert "library_name: taleGPT" in card and "pipeline(" not in card and "'window': 5" in card
    with pytest.raises(ValueError, match="talegpt"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")


def test_export_with_gpt2_tokens_stops_at_end_of_text(tmp_path):
    torch.manual_seed(0)
    GPT(GPTConfig(32, 50257, 1, 2, 8)).save_pretrained(tmp_path / "m")
    run_convert(f"--input={tmp_path}/m", f"--out={tmp_path}/export", "--dtype=float16")
    hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "export")
    assert hf.generation_config.eos_token_id == 50256 and hf.dtype == torch.float16
    text = "Once upon a time, Lily's cat\n\n sat."
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")(text)["input_ids"]
    assert ids == open_tokenizer("gpt2").encode(text).tolist()


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_checkpoint(tmp_path, bias):
    """The reference is transformers with erf GELU; the file is laid out as nanoGPT writes it."""
    hf = tiny_hf(activation_function="gelu", vocab_size=50257)
    if not bias:
        for name, p in hf.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(p)
    state = {}
    for name, tensor in hf.state_dict().items():
        conv = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        if bias or not name.endswith("bias"):
            state[f"_orig_mod.{name}"] = tensor.t().contiguous() if conv else tensor
    padding = torch.full((47, 32), 9.0, dtype=torch.float64)
    padded = torch.cat([state["_orig_mod.transformer.wte.weight"], padding])
    state["_orig_mod.transformer.wte.weight"] = state["_orig_mod.lm_head.weight"] = padded
    state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 40, 40).tril()
    args = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 40, "bias": bias,
            "vocab_size": 50304, "dropout": 0.0}
    saved = {"model": state, "optimizer": {}, "model_args": args, "iter_num": 5,
             "best_val_loss": torch.tensor(1.5), "config": {"dataset": "x"}}
    torch.save(saved, tmp_path / "ckpt.pt")
    run_convert(f"--input={tmp_path}/ckpt.pt", f"--out={tmp_path}/out")
    model, x = GPT.from_pretrained(tmp_path / "out"), ids()
    assert model.config.activation == "gelu" and model.config.vocab_size == 50257
    assert (model(x)[0] - hf(x).logits).abs().max() < 1e-10
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    assert (back(x).logits - hf(x).logits).abs().max() < 1e-10
    torch.save(saved | {"model_args": args | {"n_kv_head": 2}}, tmp_path / "fork.pt")
    with pytest.raises(ValueError, match=r"fork\.pt: its network has the setting 'n_kv_head'"):
        run_convert(f"--input={tmp_path}/fork.pt", f"--out={tmp_path}/fork")
    state["_orig_mod.lm_head.weight"] = 2 * padded  # of a fork that does not tie it
    torch.save(saved, tmp_path / "ckpt.pt")
    run_convert(f"--input={tmp_path}/ckpt.pt", f"--out={tmp_path}/out")
    untied = GPT.from_pretrained(tmp_path / "out")
    assert (untied(x)[0] - 2 * hf(x).logits).abs().max() < 1e-10


def test_nanogpt_characters(tmp_path):
    """A folder of nanoGPT's characters has the alphabet of its meta.pkl, of which nothing is run."""
    alphabet, folder = sorted("abc \n!"), tmp_path / "chars"
    meta = {"vocab_size": 6, "itos": dict(enumerate(alphabet)),
            "stoi": {c: i for i, c in enumerate(alphabet)}}
    folder.mkdir()
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    for split in ("train", "val"):
        np.array([meta["stoi"][c] for c in "cab!" * 9], "<u2").tofile(folder / f"{split}.bin")
    data = Data(str(folder))
    assert (data.vocab_size, data.eos_id) == (6, None)
    assert data.tokenizer().decode(data.val.read(0, 5)) == "cab!c"
    assert data.tokenizer().encode("cab!").tolist() == [meta["stoi"][c] for c in "cab!"]

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": Bomb()}))
    with pytest.raises(ValueError, match="refused"):
        Data(str(folder))
    assert not (tmp_path / "exploded").exists()
    for raw in (pickle.dumps({"itos": {0: "a", 1: 3}}), pickle.dumps({"itos": {0: "a", 2: "b"}}), b"",
                b"I12a\n.", b"X\x01\0\0\0\xff.", b"\xff\xfe"):
        (folder / "meta.pkl").write_bytes(raw)
        with pytest.raises(ValueError, match=r"meta\.pkl is no meta\.pkl of nanoGPT's") as e:
            Data(str(folder))
        assert type(e.value) is ValueError


@pytest.mark.parametrize("meta, ids, text", [
    ({"itos": {0: "b", 1: "a"}}, [0, 1, 1], "baa"),  # in any order
    ({"stoi": {"b": np.int64(1), "a": np.int64(0)}}, [0, 1, 0], "aba"),
    ({"itos": ["the", "cat", "sat"]}, [0, 1, 2, 0], "the cat sat the"),
    ({"vocab_size": 300}, [7, 299], "<7> <299>")])
def test_other_vocabularies_of_nanogpt(tmp_path, meta, ids, text):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    tok = open_tokenizer(tmp_path / "meta.pkl")
    assert tok.decode(ids) == text and tok.encode(text).tolist() == ids
    assert tok.eos_id is None and tok.vocab_size == meta.get("vocab_size", max(ids) + 1)
    again = from_json(tok.to_json())
    assert again.decode(ids) == text and again.to_json() == tok.to_json()
    if len(text) > 3:
        with pytest.raises(ValueError, match="cannot encode"):
            tok.encode("unknown")


def test_gpt2s_number_of_ids_alone_is_gpt2s_vocabulary(tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 50257}))
    assert open_tokenizer(tmp_path / "meta.pkl").name == "gpt2"


def test_what_cannot_be_converted(tmp_path):
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pt")
    for argv, word in (([], "--input"),
                       ([f"--input={tmp_path}/other.pt", f"--out={tmp_path}/o"], "model_args"),
                       ([f"--input={tmp_path}/none/here", f"--out={tmp_path}/o"], "no folder"),
                       ([f"--input={tmp_path}", f"--out={tmp_path}/o"], "not a model folder")):
        with pytest.raises(ValueError, match=word):
            run_convert(*argv)
    tiny().save_pretrained(tmp_path / "m")
    args = {"block_size": 8, "vocab_size": 400, "n_layer": 1, "n_head": 1, "n_embd": 8, "bias": True, "dropout": 0.0}
    state = GPT(GPTConfig(**args)).state_dict()
    torch.save({"model_args": args, "model": state | {"lm_head.weight": state["transformer.wte.weight"]}}, tmp_path / "wide.pt")
    with pytest.raises(ValueError, match="a vocabulary of 400, the tokenizer .bytes. one of 256"):
        run_convert(f"--input={tmp_path}/wide.pt", f"--out={tmp_path}/o", "--tokenizer=bytes")
    with pytest.raises(ValueError, match="50257 ids, the model .* has 97 rows"):
        run_convert(f"--input={tmp_path}/m", f"--out={tmp_path}/o")
    assert not (tmp_path / "o").exists()


def test_hub_names_come_from_the_local_cache(tmp_path, monkeypatch):
    """A hub cache as a download leaves it: refs/, snapshots/REVISION/."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--someone--tiny-gpt2"
    models = {"a" * 40: tiny(seed=1), "b" * 40: tiny(seed=2)}
    for commit, model in models.items():
        model.save_pretrained(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    (repo / "refs" / "v2").write_text("b" * 40)
    x = ids()
    for revision, commit in ((None, "a" * 40), ("v2", "b" * 40), ("b" * 40, "b" * 40)):
        model = GPT.from_pretrained("someone/tiny-gpt2", revision=revision)
        assert (model(x)[0] - models[commit](x)[0]).abs().max() < 1e-12
    with pytest.raises(ValueError, match="hf download someone/other"):
        GPT.from_pretrained("someone/other")
    for commit in models:  # beside a whole model, and alone
        (repo / "snapshots" / commit / "adapter_config.json").write_text("{}")
    (repo / "snapshots" / ("b" * 40) / "config.json").unlink()
    for revision in (None, "v2"):
        with pytest.raises(ValueError, match="someone/tiny-gpt2 on the hub has an adapter: download it"):
            load_model("someone/tiny-gpt2", revision=revision)


def test_fresh_network_with_pretrained_token_embeddings(tmp_path):
    text = "the cat sat on the mat\n" * 50
    tok = char_tokenizer(set(text))
    write_data(f"{tmp_path}/c", tok, {"train": [text], "val": [text]})
    tiny(vocab_size=tok.vocab_size).float().save_pretrained(tmp_path / "m")
    argv = [f"--dataset={tmp_path}/c", f"--out_dir={tmp_path}/run", "--n_layer=1", "--n_head=2",
            "--n_embd=32", "--block_size=16", "--batch_size=2", "--max_steps=1", "--device=cpu",
            f"--wte_from={tmp_path}/m", "--learning_rate=0", "--sample_tokens=0", "--overwrite"]
    vars(train).update(TRAIN_DEFAULTS)
    configure(vars(train), argv)
    train.main()
    state = load_torch(tmp_path / "run" / "ckpt.pt")["model"]
    given = GPT.from_pretrained(tmp_path / "m")
    assert torch.equal(state["transformer.wte.weight"], given.transformer.wte.weight)
    assert state["transformer.wpe.weight"].std() < 0.03  # the rest is new
    with pytest.raises(ValueError, match=r"\(11, 32\).*\(11, 16\)"):
        configure(vars(train), [*argv, "--n_embd=16"])
        train.main()


def test_adapters_merged_on_loading_stay_merged(tmp_path):
    model = tiny(vocab_size=256)
    model.save_pretrained(tmp_path / "base")
    open_tokenizer("bytes").save(tmp_path / "base")
    add_lora(model, 2, 4.0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    loaded, _ = load_model(tmp_path / "adapter")
    want = loaded(ids())[0]
    assert (want - model.eval()(ids())[0]).abs().max() < 1e-9
    merge(loaded)  # as fine-tunings do to save
    unmerge(loaded)
    assert torch.equal(loaded(ids())[0], want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_are_merged_in_float32_whatever_their_base_is_in(tmp_path, dtype):
    peft = pytest.importorskip("peft")
    model = tiny(vocab_size=256).to(dtype)
    model.save_pretrained(tmp_path / "base")
    open_tokenizer("bytes").save(tmp_path / "base")
    add_lora(model.float(), 2, 4.0)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    run_convert(f"--input={tmp_path}/adapter", f"--out={tmp_path}/o")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert (theirs(ids()).logits - GPT.from_pretrained(tmp_path / "o")(ids())[0]).abs().max() < 1e-4


def test_nothing_of_another_model_stays_beside_an_export(tmp_path):
    model = tiny(vocab_size=256).float()
    model.save_pretrained(tmp_path / "m")
    open_tokenizer("bytes").save(tmp_path / "m")
    (tmp_path / "m" / "template.txt").write_text("{instruction}{input}{output}\n")
    (tmp_path / "o").mkdir()
    for name, content in (("special_tokens_map.json", '{"eos_token": "a"}'), ("chat_template.jinja", "x"),
                          ("added_tokens.json", '{"<x>": 256}'), ("template.txt", "old"), ("notes.txt", "mine")):
        (tmp_path / "o" / name).write_text(content)
    run_convert(f"--input={tmp_path}/m", f"--out={tmp_path}/o")
    found = {file.name: file for file in (tmp_path / "o").iterdir()}
    assert found["template.txt"].read_text() == "{instruction}{input}{output}\n" and "notes.txt" in found
    assert not found.keys() & {"special_tokens_map.json", "chat_template.jinja", "added_tokens.json"}


def test_what_a_model_asks_of_decoding_is_kept_and_said(tmp_path, capsys):
    """Also that of an adapter's base, and beside the rows that no token has."""
    model = tiny(vocab_size=260)
    model.save_pretrained(tmp_path / "base")
    open_tokenizer("bytes").save(tmp_path / "base")
    load_model(tmp_path / "base")
    add_lora(model, 2, 4.0)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    run_convert(f"--input={tmp_path}/base", f"--out={tmp_path}/again")
    assert "asks for" not in capsys.readouterr().err
    file = tmp_path / "base" / "generation_config.json"
    asked = {"repetition_penalty": 1.8, "suppress_tokens": [53, 54], "top_k": 5, "no_repeat_ngram_size": 0}
    file.write_text(json.dumps(asked))
    for source in ("base", "adapter"):
        load_model(tmp_path / source)
        assert f"note: {file} asks for repetition_penalty, suppress_tokens, which" in capsys.readouterr().err
        say_once.cache_clear()
        run_convert(f"--input={tmp_path / source}", f"--out={tmp_path}/out_{source}")
        kept = json.loads((tmp_path / f"out_{source}" / "generation_config.json").read_text())
        assert asked | {"suppress_tokens": [53, 54, 256, 257, 258, 259]} == {key: kept[key] for key in asked}
        say_once.cache_clear()


def test_an_adapter_of_a_revision_of_its_base(tmp_path):
    model = tiny()
    add_lora(model, 2, 4.0)
    save_adapter(model, tmp_path, "someone/gpt2")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"revision": "v2"}))
    with pytest.raises(ValueError, match="names revision v2 of someone/gpt2, expected none"):
        load_model(tmp_path)


def test_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "config/x.py", "--init_from", "auto", "--seed=2",
                                     "--init-from=y", "--eval_only"])
    assert command_line(init_from="resume") == (
        "python train.py config/x.py --seed=2 --eval_only --init_from=resume")


# ---- what other people's files say, and what becomes of it ----

def their_model(folder, **config):
    """A GPT-2 of transformers with random weights, saved."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=272, n_positions=32, n_embd=16, n_layer=2, n_head=2, **config)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


def rewrite(folder, change):
    """Puts tensors that `change` made of a model's own into its file."""
    path = folder / "model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path, {"format": "pt"})


@pytest.mark.parametrize("said", [None, True, False])
@pytest.mark.parametrize("head", ["other", "same"])
def test_a_separate_head_is_kept(tmp_path, said, head):
    their_model(tmp_path)
    new = torch.randn(272, 16).double()
    rewrite(tmp_path, lambda t: t | {
        "lm_head.weight": new if head == "other" else t["transformer.wte.weight"].clone()})
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    config |= {} if said is None else {"tie_word_embeddings": said}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).double()
    model, x = GPT.from_pretrained(tmp_path), torch.arange(20)[None]
    assert (model(x)[0] - theirs(x).logits).abs().max() < 1e-9
    assert model.config.tie_word_embeddings == (head == "same" and said is not False)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(GPT.from_pretrained(tmp_path / "again")(x)[0], model(x)[0])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "_orig_mod.module."])
def test_prefixes_and_old_configs(tmp_path, prefix):
    theirs, x = their_model(tmp_path, resid_pdrop=0.3), torch.arange(20)[None]
    rewrite(tmp_path, lambda t: {f"{prefix}{k}": v for k, v in t.items()})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (GPT.from_pretrained(tmp_path)(x)[0] - theirs(x).logits).abs().max() < 1e-9


STOPS = {"eos_token_id": [3, 5], "bos_token_id": 7, "pad_token_id": 4}


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_what_stops_begins_and_pads_comes_from_the_models_files(tmp_path, file):
    """And rows past the tokenizer's ids are kept, but never drawn."""
    theirs = their_model(tmp_path / "m", bos_token_id=None, eos_token_id=None)
    char_tokenizer([chr(97 + i) for i in range(20)]).save(tmp_path / "m")
    config = tmp_path / "m" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "{{ x }}", "mask_token": "b"}))
    said = json.loads((tmp_path / "m" / file).read_text()) if (tmp_path / "m" / file).exists() else {}
    (tmp_path / "m" / file).write_text(json.dumps(said | STOPS | {"note": 1}))
    model, tok = load_model(tmp_path / "m")
    assert (tok.stop_ids, tok.bos_id, tok.pad_id, tok.eos_id) == ([3, 5], 7, 4, 3) and tok.start_id == 7
    drawn = model.generate(torch.tensor([[1]]).expand(50, -1), 20, eos_id=tok.stop_ids)
    assert drawn.max() < 20 and (drawn == 5).any()
    beams = beam_search(model, torch.tensor([[1, 2]]), 8, 3, eos_id=tok.stop_ids)[0]
    assert beams.max() < 20
    run_convert(f"--input={tmp_path}/m", f"--out={tmp_path}/o")
    for name in ("config.json", "generation_config.json"):
        assert STOPS.items() <= json.loads((tmp_path / "o" / name).read_text()).items()
    exported, x = transformers.AutoTokenizer.from_pretrained(tmp_path / "o"), torch.arange(20)[None]
    assert exported.chat_template == "{{ x }}" and exported.mask_token == "b"
    assert exported.model_max_length == 32 and exported.padding_side == "left"
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "o").double()
    assert (loaded(x).logits - theirs(x).logits).abs().max() < 1e-9
    greedy = loaded.generate(torch.tensor([[1, 2]]), max_length=30, do_sample=False)
    assert greedy.max() < 272 and loaded.generation_config.eos_token_id == [3, 5]


def test_fewer_rows_than_ids(tmp_path):
    their_model(tmp_path)
    char_tokenizer([chr(97 + i) for i in range(300)]).save(tmp_path)
    with pytest.raises(ValueError, match=r"\(char\) has 300 ids, the model in .* has 272 rows"):
        load_model(tmp_path)


@pytest.mark.parametrize("file", ["spiece.model", "vocab.txt", "tokenizer.model"])
def test_tokenizers_that_nothing_here_reads(tmp_path, file):
    tiny(vocab_size=50257).save_pretrained(tmp_path)
    (tmp_path / file).write_text("x")
    with pytest.raises(ValueError, match=f"its tokenizer is {file}, which is not read here"):
        load_model(tmp_path)


def test_a_classifier_is_no_language_model(tmp_path):
    config = transformers.GPT2Config(vocab_size=300, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a classifier.* finetune_cls.py --init_from=.* --predict"):
        load_model(tmp_path)


def test_weights_only(tmp_path, capsys):
    args = {"block_size": 8, "vocab_size": 33, "n_layer": 1, "n_head": 1, "n_embd": 8, "dropout": 0.0, "bias": True}
    model = GPT(GPTConfig(**args, activation="gelu"))
    state = model.state_dict() | {"lm_head.weight": model.transformer.wte.weight}
    torch.save({"model_args": args, "model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "ckpt.pt")
    run_convert(f"--input={tmp_path}/ckpt.pt", f"--out={tmp_path}/o")
    assert "weights only" in capsys.readouterr().out and "weights only" in (tmp_path / "o" / "README.md").read_text()
    x = torch.arange(8)[None]
    assert (GPT.from_pretrained(tmp_path / "o")(x)[0] - model(x)[0]).abs().max() < 1e-6


def test_an_adapters_own_tokenizer_and_training_from_it(tmp_path):
    model = tiny(vocab_size=260)
    model.float().save_pretrained(tmp_path / "base")
    open_tokenizer("bytes").save(tmp_path / "base")
    add_lora(model, 2, 4.0)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    own = open_tokenizer("bytes")
    own.save(tmp_path / "adapter", eos_token="Ġ")
    loaded, tok = load_model(tmp_path / "adapter")
    assert tok.eos_id == 32 and all(p.requires_grad for p in loaded.parameters())


def test_training_from_a_model_keeps_what_stops_its_texts(tmp_path):
    text = "the cat sat on the mat\n" * 50
    tok = char_tokenizer(set(text), "\n")
    write_data(f"{tmp_path}/c", tok, {"train": [text], "val": [text]})
    tiny(vocab_size=tok.vocab_size).float().save_pretrained(tmp_path / "m", eos_token_id=[3, 4])
    tok.save(tmp_path / "m")
    vars(train).update(TRAIN_DEFAULTS)
    configure(vars(train), [f"--dataset={tmp_path}/c", f"--out_dir={tmp_path}/run", f"--init_from={tmp_path}/m",
                            "--batch_size=2", "--max_steps=1", "--device=cpu", "--sample_tokens=0"])
    train.main()
    said = json.loads((tmp_path / "run" / "best" / "generation_config.json").read_text())
    assert said["eos_token_id"] == [3, 4, tok.eos_id]  # which closes the documents
