"""The network against transformers' GPT-2, in float64, with every parameter randomised."""

import json
import math
import os
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from model import GPT, PRESETS, GPTConfig, KVCache, draw

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

TINY = {"block_size": 40, "vocab_size": 97, "n_layer": 3, "n_head": 4, "n_embd": 32}


def tiny(seed=0, **options) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**TINY | options)).double().eval()
    randomise(model)
    return model


def randomise(model):
    """std 0.3 everywhere, biases and LayerNorms too: the default init hides a wrong GELU."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)


def tiny_hf(**options):
    torch.manual_seed(1)
    config = {"n_layer": 3, "n_head": 4, "n_embd": 32, "vocab_size": 97, "n_positions": 40,
              "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
              "bos_token_id": None, "eos_token_id": None} | options
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).double().eval()
    randomise(model)
    return model


def ids(B=2, T=20, seed=0):
    return torch.randint(97, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [
    {}, {"activation_function": "gelu"}, {"tie_word_embeddings": False}])
def test_logits_loss_and_gradients_equal_transformers(tmp_path, options):
    hf = tiny_hf(**options)
    hf.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    x = ids()
    assert (model(x)[0] - hf(x).logits).abs().max() < 1e-10
    loss = model(x[:, :-1], x[:, 1:])[1]
    # not their `labels=`, which computes the loss in float32
    hf_loss = F.cross_entropy(hf(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert abs(loss - hf_loss) < 1e-10
    loss.backward()
    hf_loss.backward()
    theirs = dict(hf.named_parameters())
    for name, p in model.named_parameters():
        grad = theirs[name].grad
        grad = grad.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else grad
        assert (p.grad - grad).abs().max() < 1e-8, name
    assert len(list(model.parameters())) == len(theirs)


def test_presets_have_the_published_parameter_counts():
    counts = {}
    with torch.device("meta"):
        for name, config in PRESETS.items():
            counts[name] = GPT(config).num_params()
    assert counts == {"gpt2": 124_439_808, "gpt2-medium": 354_823_168,
                      "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}


def test_flops_per_token_counts_matrix_products():
    model = tiny()
    C, L, T, V = 32, 3, 40, 97
    matmuls = L * (3 * C * C + C * C + 8 * C * C) + V * C
    attention = 2 * L * T * C  # q k^T and the weighted sum of v, a multiply-add each
    exact = 6 * (matmuls + attention)
    small = 6 * (L * (13 * C) + 2 * C)  # biases and LayerNorms, counted as weights
    assert model.flops_per_token(T) == exact + small
    assert tiny(tie_word_embeddings=False).flops_per_token(T) == exact + small


def test_init_statistics():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=256, vocab_size=1000, block_size=128))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif ".ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert abs(p.std() / std - 1) < 0.03 and abs(p.mean()) < 0.05 * std, name
    x = torch.randint(1000, (4, 64))
    assert abs(model(x, x.roll(-1, 1))[1].item() - math.log(1000)) < 0.1


def test_causality():
    model, x = tiny(), ids()
    y = x.clone()
    y[:, 12] = (y[:, 12] + 1) % 97
    difference = (model(x)[0] - model(y)[0]).abs().amax((0, 2))
    assert (difference[:12] == 0).all() and (difference[12:] > 1e-6).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_has_the_logits_it_has_alone(side):
    model, x = tiny(), ids(1, 13)
    pad = torch.full((1, 7), 5)
    padded = torch.cat([pad, x] if side == "left" else [x, pad], 1)
    mask = torch.cat([torch.zeros_like(pad), torch.ones_like(x)] if side == "left"
                     else [torch.ones_like(x), torch.zeros_like(pad)], 1)
    logits = model(padded, attention_mask=mask)[0]
    assert logits.isfinite().all()
    real = logits[:, 7:] if side == "left" else logits[:, :13]
    assert (real - model(x)[0]).abs().max() < 1e-10


def test_hidden_equals_transformers_on_right_padded_ids(tmp_path):
    hf = tiny_hf()
    hf.save_pretrained(tmp_path)
    x, mask = ids(3, 11), torch.ones(3, 11, dtype=torch.long)
    mask[1, 6:] = 0
    ours = GPT.from_pretrained(tmp_path).hidden(x, mask)
    theirs = hf.transformer(x, attention_mask=mask).last_hidden_state
    assert ((ours - theirs).abs().amax(2) * mask).max() < 1e-10


def test_ignored_targets_do_not_count():
    model, x = tiny(), ids()
    y = x.roll(-1, 1)
    y[:, 9:] = -100
    loss = F.cross_entropy(model(x)[0][:, :9].flatten(0, 1), y[:, :9].flatten())
    assert abs(model(x, y)[1] - loss) < 1e-12


def test_overfits_one_batch():
    torch.manual_seed(0)
    model, x = GPT(GPTConfig(**TINY)), ids(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(x[:, :-1], x[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_no_bias_and_dropout_switches():
    model = tiny(bias=False)
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    model = tiny(dropout=0.5)
    x = ids()
    assert (model(x)[0] == model(x)[0]).all()
    assert (model.train()(x)[0] != model(x)[0]).any()


def test_the_loss_of_a_half_precision_model_is_float32s():
    for dtype in (torch.bfloat16, torch.float16):
        model, x = tiny().to(dtype), ids(8, 40)
        exact = F.cross_entropy(model(x[:, :-1])[0].double().flatten(0, 1), x[:, 1:].flatten())
        assert abs(model(x[:, :-1], x[:, 1:])[1] - exact) < 1e-4


# ---- the cache and sampling ----

@pytest.mark.parametrize("chunks", [[1] * 20, [7, 1, 5, 7], [20]])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_cached_logits_equal_the_full_forward(chunks, dtype, tolerance):
    model, x = tiny().to(dtype), ids()
    cache = KVCache(model.config, 2, 30, dtype=dtype)
    parts = [model(part, cache=cache)[0] for part in x.split(chunks, 1)]
    assert cache.length == 20
    assert (torch.cat(parts, 1) - model(x)[0]).abs().max() < tolerance


@pytest.mark.parametrize("chunks", [[1] * 20, [9, 1, 10]])
def test_cached_logits_with_left_padding(chunks):
    model, x = tiny(), ids()
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    cache = KVCache(model.config, 2, 20, dtype=torch.float64)
    parts = [model(part, attention_mask=mask[:, :cache.length + part.size(1)], cache=cache)[0]
             for part in x.split(chunks, 1)]
    alone = model(x[1:, 6:])[0]
    assert (torch.cat(parts, 1)[1:, 6:] - alone).abs().max() < 1e-10
    assert (torch.cat(parts, 1)[:1] - model(x[:1])[0]).abs().max() < 1e-10


def test_greedy_equals_transformers(tmp_path):
    hf = tiny_hf(n_positions=240)
    hf.save_pretrained(tmp_path)
    x = ids(3, 5)
    theirs = hf.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=200, do_sample=False,
                         pad_token_id=0)
    assert (GPT.from_pretrained(tmp_path).generate(x, 200, temperature=0) == theirs).all()


def test_generation_past_the_context_moves_the_window():
    model, x = tiny(), ids(2, 10)
    out = model.generate(x, 90, temperature=0)
    window = x
    for i in range(90):  # the same by full forwards
        if window.size(1) > 40:
            window = window[:, -20:]
        token = model(window)[0][:, -1].argmax(-1)
        assert (token == out[:, 10 + i]).all(), i
        window = torch.cat([window, token[:, None]], 1)
    long = ids(1, 60)
    assert (model.generate(long, 3, temperature=0)[:, 60:]
            == model.generate(long[:, -40:], 3, temperature=0)[:, 40:]).all()


def test_rows_draw_independently_and_do_not_depend_on_the_batch():
    model, x = tiny(), ids(1, 4)
    state = torch.get_rng_state()
    batch = model.train().generate(x.expand(5, -1), 30, generator=torch.Generator().manual_seed(7))
    assert model.training and (torch.get_rng_state() == state).all()
    model.eval()
    alone = model.generate(x, 30, generator=torch.Generator().manual_seed(7))
    assert (batch[0] == alone[0]).all()
    assert len({tuple(row) for row in batch.tolist()}) == 5
    torch.manual_seed(3)
    a = model.generate(x, 30)
    assert (model.generate(x, 30) != a).any()
    torch.manual_seed(3)
    assert (model.generate(x, 30) == a).all()


@pytest.mark.parametrize("block_size", [64, 16])  # all fits; every row moves its window alone
def test_left_padded_prompts_generate_what_they_do_alone(block_size):
    model = tiny(block_size=block_size)
    short, long = ids(1, 3, 1), ids(1, 9, 2)
    batch = torch.cat([F.pad(short, (6, 0)), long])
    mask = torch.ones_like(batch)
    mask[0, :6] = 0
    out = model.generate(batch, 50, temperature=0, attention_mask=mask)
    assert (out[0, 6:] == model.generate(short, 50, temperature=0)[0]).all()
    assert (out[1] == model.generate(long, 50, temperature=0)[0]).all()


def test_a_row_ends_at_end_of_text():
    model, x = tiny(), ids(4, 6)
    free = model.generate(x, 30, temperature=0)[:, 6:].tolist()
    eos = free[0][10]
    out = model.generate(x, 30, temperature=0, eos_id=eos)[:, 6:].tolist()
    for a, b in zip(free, out):
        end = a.index(eos) + 1 if eos in a else len(a)
        assert b[:end] == a[:end][:len(b)] and set(b[end:]) <= {eos}
    one = model.generate(x[:1], 30, temperature=0, eos_id=[eos, 96])
    assert one[0, -1] in (eos, 96) and one.size(1) <= 6 + 11


def test_draw_follows_the_distribution_top_k_and_top_p():
    probs = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    u = torch.rand(20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def frequencies(**options):
        logits = (probs.log() * options.get("temperature", 1.0)).expand(len(u), -1)
        options = {"temperature": 1.0, "top_k": None, "top_p": None} | options
        return torch.bincount(draw(logits, u, **options), minlength=5) / len(u)

    assert (frequencies() - probs).abs().max() < 0.01
    assert (frequencies(temperature=0.5) - probs).abs().max() < 0.01
    kept = frequencies(top_k=4)  # the tie at the fourth place does not let the fifth in
    assert (kept > 0).sum() == 4 and abs(kept[0] - 0.5 / 0.9375) < 0.01
    assert (frequencies(top_p=0.6) > 0).tolist() == [True, True, False, False, False]
    assert (frequencies(top_p=0.5) > 0).tolist() == [True, False, False, False, False]
    assert (frequencies(top_p=1.0) > 0).all()
    assert all((frequencies(top_k=k) > 0).all() for k in (0, 99))  # off, and all there are
    assert (frequencies(top_k=3, top_p=0.9) > 0).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize(("options", "word"), [
    ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"top_p": 1.5}, "top_p"),
    ({"top_k": -1}, "top_k"), ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"attention_mask": torch.tensor([[1] * 9 + [0]] * 3)}, "padded on the left")])
def test_sampling_settings_out_of_range(options, word):
    with pytest.raises(ValueError, match=word):
        tiny().generate(ids(), **{"max_new_tokens": 3} | options)


# ---- files ----

@pytest.mark.parametrize("options", [{}, {"bias": False}, {"tie_word_embeddings": False},
                                     {"activation": "gelu", "dropout": 0.1}])
def test_ours_to_transformers_and_back(tmp_path, options):
    model, x = tiny(**options), ids()
    model.save_pretrained(tmp_path)
    hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert hf.dtype == torch.float64
    assert (hf.eval()(x).logits - model(x)[0]).abs().max() < 1e-10
    back = GPT.from_pretrained(tmp_path)
    assert back.config == model.config and not back.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_biases_that_transformers_trained_come_back(tmp_path):
    """A network without biases has them there, at zero, and its config.json says bias=false."""
    tiny(bias=False).save_pretrained(tmp_path)
    hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        hf.transformer.h[1].attn.c_attn.bias += 0.5
    hf.save_pretrained(tmp_path)
    assert (hf(ids()).logits - GPT.from_pretrained(tmp_path)(ids())[0]).abs().max() < 1e-10


def test_a_folder_with_a_model_is_no_run_whatever_its_best_is(tmp_path):
    tiny(seed=1).save_pretrained(tmp_path)
    tiny(seed=2).save_pretrained(tmp_path / "best")
    assert (GPT.from_pretrained(tmp_path)(ids())[0] - tiny(seed=1)(ids())[0]).abs().max() < 1e-12


def test_a_tied_weight_that_was_kept_as_the_heads(tmp_path):
    """As safetensors' save_model writes it."""
    tiny().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert (GPT.from_pretrained(tmp_path)(ids())[0] - tiny()(ids())[0]).abs().max() < 1e-12


def test_transformers_folder_in_other_layouts(tmp_path):
    hf, x = tiny_hf(), ids()
    logits = hf(x).logits
    hf.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    hf.save_pretrained(tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    shutil.copytree(tmp_path / "bin", tmp_path / "bins")
    parts = {f"pytorch_model-{i}.bin": [*hf.state_dict()][i::2] for i in range(2)}
    for file, names in parts.items():
        torch.save({name: hf.state_dict()[name] for name in names}, tmp_path / "bins" / file)
    (tmp_path / "bins" / "pytorch_model.bin.index.json").write_text(json.dumps(
        {"weight_map": {name: file for file, names in parts.items() for name in names}}))
    torch.save(hf.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    shutil.copytree(tmp_path / "bin", tmp_path / "old")
    torch.save(hf.state_dict(), tmp_path / "old" / "pytorch_model.bin",
               _use_new_zipfile_serialization=False)  # as torch wrote before 1.6
    edit(tmp_path / "old" / "config.json", num_attention_heads=4)
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["n_head"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    hf.transformer.save_pretrained(tmp_path / "bare")
    old = load_file(tmp_path / "bare" / "model.safetensors")
    for layer in range(3):  # buffers that old files carry
        old[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 40, 40).tril()
        old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(old, tmp_path / "bare" / "model.safetensors", {"format": "pt"})
    for layout in ("sharded", "bin", "bins", "old", "bare"):
        model = GPT.from_pretrained(tmp_path / layout)
        assert (model(x)[0] - logits).abs().max() < 1e-10, layout
    assert GPT.from_pretrained(tmp_path / "bin", dtype=torch.float32)(x)[0].dtype == torch.float32


def test_block_size_is_cropped_and_dropout_overridden(tmp_path):
    model, x = tiny(), ids()
    model.save_pretrained(tmp_path)
    small = GPT.from_pretrained(tmp_path, block_size=20, dropout=0.2)
    assert small.config.block_size == 20 and small.config.dropout == 0.2
    assert (small(x)[0] - model(x)[0]).abs().max() < 1e-12
    with pytest.raises(ValueError, match="40 positions"):
        GPT.from_pretrained(tmp_path, block_size=41)


@pytest.mark.parametrize(("name", "word"), [
    ("out/pretrain_imdb", r"no such run: .*config/pretrain_imdb\.py says how"),
    ("out/mine/best", "no such run: .*train it first")])
def test_a_missing_run_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name, word):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=word):
        GPT.from_pretrained(name)


def test_loaded_weights_can_be_written_and_the_file_stays(tmp_path):
    tiny().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = GPT.from_pretrained(tmp_path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    x = ids()
    for _ in range(2):
        loss = model(x[:, :-1], x[:, 1:])[1]
        loss.backward()
        optimizer.step()
    assert model(x[:, :-1], x[:, 1:])[1] < loss
    assert (tmp_path / "model.safetensors").read_bytes() == before
    model.save_pretrained(tmp_path)  # over the file that is mapped
    assert torch.equal(GPT.from_pretrained(tmp_path)(x)[0], model(x)[0])


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("change", "word"), [
    ({"n_inner": 100}, "n_inner"), ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
    ({"scale_attn_weights": False}, "scale_attn_weights"), ({"is_causal": False}, "is_causal"),
    ({"model_type": "llama"}, "llama"), ({"activation_function": "relu"}, "relu"),
    ({"n_embd": 64}, r"transformer\.wte\.weight.*\(97, 32\)"), ({"n_layer": 4}, r"h\.3\."),
    ({"n_layer": 2}, r"h\.2\."), ({"n_layer": -1}, "n_layer"), ({"vocab_size": "97"}, "vocab_size"),
    ({"n_embd": 10**12}, "n_embd"), ({"n_head": 5}, "n_head=5"), ({"n_layer": 10**9}, "n_layer"),
    ({"resid_pdrop": []}, "dropout"), ({"n_embd": None, "n_inner": 5}, "n_inner"),
    ({"num_attention_heads": 2}, "num_attention_heads=2 contradicts n_head=4"),
    ({"n_positions": 20}, r"wpe\.weight"), ({"n_embd": 2**40, "n_head": 1}, "n_embd")])
def test_a_config_that_does_not_fit_is_refused_by_name(tmp_path, change, word):
    tiny().save_pretrained(tmp_path)
    edit(tmp_path / "config.json", **change)
    with pytest.raises(ValueError, match=word):
        GPT.from_pretrained(tmp_path)


def test_damaged_and_hostile_files(tmp_path):
    model = tiny()
    with pytest.raises(ValueError, match=r"config\.json"):
        (tmp_path / "empty").mkdir()
        GPT.from_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="no folder"):
        GPT.from_pretrained(tmp_path / "missing")
    with pytest.raises(ValueError, match="hf download"):
        GPT.from_pretrained("nobody/nothing-at-all")
    model.save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        GPT.from_pretrained(tmp_path / "cut")
    file.unlink()

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    with open(tmp_path / "cut" / "pytorch_model.bin", "wb") as f:
        pickle.dump({"wte.weight": Bomb()}, f)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        GPT.from_pretrained(tmp_path / "cut")
    torch.save({"wte.weight": Bomb()}, tmp_path / "cut" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="run code"):
        GPT.from_pretrained(tmp_path / "cut")
    assert not (tmp_path / "exploded").exists()
    torch.save(torch.ones(2), tmp_path / "cut" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="expected a dict"):
        GPT.from_pretrained(tmp_path / "cut")
    for state in ({1: torch.ones(2)}, {"wte.weight": torch.eye(2).to_sparse()}, {"wte.weight": 3}):
        torch.save(state, tmp_path / "cut" / "pytorch_model.bin")
        with pytest.raises(ValueError, match="expected names and dense tensors"):
            GPT.from_pretrained(tmp_path / "cut")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        GPT.from_pretrained(tmp_path / "cut" / "pytorch_model.bin")
    torch.save({"step": 1}, tmp_path / "empty" / "ckpt.pt")
    with pytest.raises(ValueError, match=r"not written by train\.py"):
        GPT.from_pretrained(tmp_path / "empty")
    (tmp_path / "cut" / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="no model.safetensors"):
        GPT.from_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"wte.weight": "../outside.safetensors"}}))
    with pytest.raises(ValueError, match="outside"):
        GPT.from_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        GPT.from_pretrained(tmp_path / "cut")


@pytest.mark.parametrize(("change", "word"), [
    ({"n_head": 3, "n_embd": 32}, "n_head=2|n_head=4"), ({"n_layer": 0}, "n_layer"),
    ({"dropout": 1.0}, "dropout"), ({"activation": "relu"}, "relu"), ({"bias": 1}, "bias"),
    ({"vocab_size": True}, "vocab_size"), ({"dropout": False}, "dropout")])
def test_config_refuses_what_cannot_be_built(change, word):
    with pytest.raises(ValueError, match=word):
        GPTConfig(**TINY | change)
