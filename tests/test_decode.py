"""Beams against transformers and exhaustive search; layouts and int8; the terminal."""

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import files
import sample
import train
from configurator import configure, find_settings
from data import write_data
from decode import GraphedStep, Int8Linear, beam_search, prepare, stream_text
from model import GPT, GPTConfig, KVCache
from test_model import ids, randomise, tiny, tiny_hf
from tokenizer import open_tokenizer, train_bpe

transformers = pytest.importorskip("transformers")
HERE = Path(__file__).resolve().parent.parent
DEFAULTS = {module: {name: default for name, (default, _, _) in find_settings(vars(module)).items()}
            for module in (sample, train)}


def bytes_model(**options):
    torch.manual_seed(2)
    return GPT(GPTConfig(**{"block_size": 48, "vocab_size": 256, "n_layer": 2, "n_head": 2,
                            "n_embd": 32} | options)).eval()


@pytest.mark.parametrize("num_beams", [1, 3, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("end", [False, True])
def test_beam_search_equals_transformers(tmp_path, num_beams, length_penalty, end):
    hf = tiny_hf()
    for p in hf.parameters():
        p.data *= 0.5  # flatter distributions: beams that end at different lengths
    hf.save_pretrained(tmp_path)
    model, x = GPT.from_pretrained(tmp_path), ids(3, 6)
    eos = int(model.generate(x, 8, temperature=0)[0, 9]) if end else None
    theirs = hf.generate(
        x, attention_mask=torch.ones_like(x), max_new_tokens=25, num_beams=num_beams,
        do_sample=False, length_penalty=length_penalty, early_stopping=False, eos_token_id=eos,
        pad_token_id=eos, return_dict_in_generate=True, output_scores=True)
    sequences, scores = beam_search(model, x, 25, num_beams, length_penalty, eos)
    assert sequences.tolist() == theirs.sequences.tolist()
    if num_beams > 1:
        assert (scores - theirs.sequences_scores).abs().max() < 1e-4


def test_beams_over_everything_are_exhaustive_search():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=2, n_head=2, n_embd=8)).double().eval()
    randomise(model)
    x = torch.tensor([[1, 2]])
    best, best_score = None, -1e9
    for new in itertools.product(range(5), repeat=2):  # 0 ends: what follows it does not count
        length = new.index(0) + 1 if 0 in new else 2
        full = torch.tensor([[1, 2, *new]])
        logp = F.log_softmax(model(full)[0][0, 1:-1], -1)
        score = sum(logp[i, new[i]].item() for i in range(length)) / length
        if score > best_score:
            best, best_score = [1, 2, *new[:length]], score
    sequences, scores = beam_search(model, x, 2, num_beams=5, eos_id=0)
    assert sequences[0].tolist() == best and abs(scores[0].item() - best_score) < 1e-5


def test_beams_past_the_context():
    model = tiny(block_size=16)
    x = ids(2, 10)
    sequences, scores = beam_search(model, x, 30, num_beams=3)
    assert sequences.shape == (2, 40) and scores.isfinite().all()
    one, _ = beam_search(model, x, 30, num_beams=1)
    assert (one == model.generate(x, 30, temperature=0)).all()
    alone = torch.cat([beam_search(model, row[None], 30, num_beams=3)[0] for row in x])
    assert (alone == sequences).all()


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.skipif(
    not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler"))])
@torch.inference_mode()
def test_steps_of_fixed_shape_equal_the_others(compile):
    """What a GPU records as a graph, run here without one."""
    plain, model = tiny(block_size=24).double(), tiny(block_size=24).double()
    randomise(plain)
    model.load_state_dict(plain.state_dict())
    model.next_logits = step = GraphedStep(model, compile)
    left_padded = torch.ones(3, 7, dtype=torch.long)
    left_padded[1, :4] = 0
    left_padded[2, :6] = 0
    seen = []
    cases = [(ids(3, 7), left_padded), (ids(3, 7), None), (ids(2, 1), None)]
    for x, mask in cases[:1] if compile else cases:
        want, got = ([m.generate(x, 40, temperature=t, attention_mask=mask,  # the window moves twice
                                 generator=torch.Generator().manual_seed(5)) for t in (0, 1)]
                     for m in (plain, model))
        assert all((a == b).all() for a, b in zip(want, got))
        cache, other = (KVCache.for_model(plain, len(x), 20) for _ in range(2))
        for chunk in (x, ids(len(x), 1), ids(len(x), 1)):
            if mask is not None and chunk is not x:
                mask = F.pad(mask, (0, 1), value=1)
            seen.append((step(chunk, mask, cache) - plain.next_logits(chunk, mask, other)).abs().max())
    assert max(seen) < 1e-10
    if compile:
        return
    for a, b in zip(beam_search(plain, ids(2, 5), 30, 3), beam_search(model, ids(2, 5), 30, 3)):
        assert torch.allclose(a, b)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available()
                    or not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 units")
def test_bfloat16_weights_are_laid_out_too():
    model, x = tiny().bfloat16(), ids()
    logits = model(x)[0].float()
    packed = prepare(model)(x)[0].float()
    assert (packed - logits).abs().max() < 0.02 * logits.abs().max()


def test_cache_reorder():
    model, x = tiny(), ids(4, 9)
    cache = KVCache.for_model(model, 4, 20)
    model(x, cache=cache)
    rows = torch.tensor([2, 1, 1, 0])
    cache.reorder(rows)
    token = ids(4, 1, 5)
    full = model(torch.cat([x[rows], token], 1))[0][:, -1]
    assert (model(token, cache=cache)[0][:, 0] - full).abs().max() < 1e-10


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"tie_word_embeddings": False}])
def test_prepared_models_have_the_same_logits(options):
    model, x = tiny(**options).float(), ids()
    logits = model(x)[0]
    greedy = model.generate(x, 30, temperature=0)
    packed = prepare(model)
    assert (packed(x)[0] - logits).abs().max() < 1e-4 * logits.abs().max()
    assert (packed.generate(x, 30, temperature=0) == greedy).all()


def test_int8_rounds_weights_per_output(monkeypatch):
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64) * torch.logspace(-3, 1, 48)[:, None], torch.randn(5, 64)
    layer = Int8Linear(weight, torch.ones(48))
    back = layer.weight.float() * layer.scale.float()[:, None]
    assert ((back - weight).abs() <= 0.75 * layer.scale.float()[:, None]).all()
    exact = F.linear(x.bfloat16().float(), back, torch.ones(48))
    assert ((layer(x) - exact).abs() <= 0.005 * exact.abs() + 0.005 * back.norm(dim=1)).all()
    odd = Int8Linear(torch.randn(10, 20), None)  # no multiple of the kernel's 16
    exact = F.linear(x[:, :20], odd.weight.float() * odd.scale.float()[:, None])
    assert (odd(x[:, :20]) - exact).abs().max() < 1e-4
    model, y = bytes_model(), torch.randint(256, (2, 40))
    loss = model(y[:, :-1], y[:, 1:])[1]
    prepare(model, "int8")
    for rows in (0, 10**9):  # through float weights, through the kernel
        monkeypatch.setattr(Int8Linear, "kernel_rows", rows)
        assert 0 < abs(model(y[:, :-1], y[:, 1:])[1] / loss - 1) < 0.005
    with pytest.raises(ValueError, match="int4"):
        prepare(model, "int4")


def test_streamed_text_is_the_generated_text():
    model, tok = bytes_model(), open_tokenizer("bytes")
    x = torch.tensor([list(b"Once")])
    options = {"generator": torch.Generator().manual_seed(5), "eos_id": tok.eos_id}
    pieces = list(stream_text(model, tok, x, 60, **options))
    options["generator"] = torch.Generator().manual_seed(5)
    row = model.generate(x, 60, **options)[0, 4:].tolist()
    text = row[:row.index(255)] if 255 in row else row
    assert "".join(piece for piece, _ in pieces) == tok.decode(text)
    assert pieces[-1][1] == len(row)
    accents = [i for word in ("é", "😀") for i in word.encode()]
    assert "".join(p for p, _ in stream_text(Fixed(accents), tok, x, 6)) == "é😀"


class Fixed:
    """A model that says what it is told."""

    def __init__(self, tokens):
        self.tokens = tokens

    def stream(self, *args, **options):
        yield from map(torch.tensor, self.tokens)


def test_beams_out_of_range():
    with pytest.raises(ValueError, match=r"1 … 97"):
        beam_search(tiny(), ids(), 5, num_beams=98)
    for n in (0, 10**12):
        with pytest.raises(ValueError, match="max_new_tokens"):
            beam_search(tiny(), ids(), n, num_beams=2)
    for penalty in (1000, float("nan")):
        with pytest.raises(ValueError, match="length_penalty"):
            beam_search(tiny(), ids(), 5, 2, penalty)


def test_sample_script(tmp_path):
    bytes_model().save_pretrained(tmp_path)
    open_tokenizer("bytes").save(tmp_path)

    def sample(*argv, stdin="", code=0):
        done = subprocess.run(
            [sys.executable, HERE / "sample.py", f"--init_from={tmp_path}", "--device=cpu",
             "--max_new_tokens=12", *argv], input=stdin, capture_output=True, text=True,
            timeout=120, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    assert "tokens/s" in sample("--start", "Once")
    assert "score" in sample("--num_beams=3", "--quantize=int8")
    text = sample("--interactive", stdin="one\n\ntwo\n")
    assert text.count("tokens/s") == 3 and "one" in text
    for flag, word in (("--temperature=-1", "temperature"), ("--top_p=2", "top_p"),
                       ("--top_k=257", "256"), ("--max_new_tokens=0", "max_new_tokens"),
                       ("--num_beams=0", "num_beams"), ("--quantize=int4", "int4"),
                       ("--tokenizer=gpt2", "50257 ids"), ("--start=FILE:/none.txt", "/none.txt")):
        text = sample(flag, code=2)
        assert word in text and "Traceback" not in text, text


def test_weights_beside_the_scripts_serve_until_there_is_a_run(tmp_path, monkeypatch, capsys):
    def script(module, *argv):
        vars(module).update(DEFAULTS[module])
        configure(vars(module), [*argv, "--device=cpu"])
        module.main()
        return capsys.readouterr().out

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(files, "HERE", tmp_path)
    for words in ([sample], [train, "--eval_only", "--init_from=weights", "--dataset=./stories"]):
        if words[0] is train:
            tok = train_bpe(["Once upon a time there was a cat. "] * 9, 270)
            write_data("./stories", tok, {"train": ["Once upon"], "val": ["Once there was"] * 9})
        with pytest.raises(ValueError, match="make run.*or bring weights/ back"):
            script(*words)
    model = bytes_model(vocab_size=270)
    model.save_pretrained(tmp_path / "weights", tok.eos_id)
    tok.save(tmp_path / "weights")
    said = script(sample, "--start=从前有一只猫, é😀", "--max_new_tokens=5")
    assert said.startswith("no run under out/ yet: this is the model in weights/")
    assert "从前有一只猫, é😀" in said
    evaluation = script(train, "--eval_only", "--init_from=weights", "--dataset=./stories")
    assert "weights on ./stories" in evaluation
    again = script(train, "--eval_only", f"--init_from={tmp_path}/weights", "--dataset=./stories")
    assert again.partition(": ")[2] == evaluation.partition(": ")[2]
    script(train, "--dataset=./stories", "--out_dir=out/mine", "--n_layer=1", "--n_head=1",
           "--n_embd=8", "--block_size=4", "--batch_size=1", "--max_steps=1", "--sample_tokens=0")
    assert script(sample, "--max_new_tokens=2").startswith("out/mine: ")
