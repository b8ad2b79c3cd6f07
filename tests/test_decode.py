"""Beams against transformers and exhaustive search; layouts and int8; the terminal."""

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F

import decode
import hf
import sample
import train
from configurator import configure, find_settings
from data import write_data
from decode import (
    GraphedStep,
    Int8Linear,
    PackedLinear,
    beam_search,
    packs,
    prepare,
    stream_text,
)
from lora import adapted, add_lora
from model import GPT, Attention, GPTConfig
from ops import accelerate
from test_model import ids, randomise, tiny, tiny_hf
from tokenizer import from_json, open_tokenizer, train_bpe

transformers = pytest.importorskip("transformers")
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
    theirs = tiny_hf()
    for p in theirs.parameters():
        p.data *= 0.5  # flatter distributions: beams that end at different lengths
    theirs.save_pretrained(tmp_path)
    model, x = GPT.from_pretrained(tmp_path), ids(3, 6)
    eos = int(model.generate(x, 8, temperature=0)[0, 9]) if end else None
    found = theirs.generate(
        x, attention_mask=torch.ones_like(x), max_new_tokens=25, num_beams=num_beams,
        do_sample=False, length_penalty=length_penalty, early_stopping=False, eos_token_id=eos,
        pad_token_id=eos, return_dict_in_generate=True, output_scores=True)
    sequences, scores = beam_search(model, x, 25, num_beams, length_penalty, eos)
    assert sequences.tolist() == found.sequences.tolist()
    if num_beams > 1:
        assert (scores - found.sequences_scores).abs().max() < 1e-4


def test_beams_of_several_end_tokens_equal_transformers(tmp_path):
    """A beam may have as many candidates that end as there are such tokens."""
    theirs = tiny_hf(vocab_size=6, n_embd=8, n_head=2, n_positions=16)
    for seed in (0, 6, 18, 23, 37, 51):  # with two for each beam, all of these differ
        torch.manual_seed(seed)
        randomise(theirs)
        for p in theirs.parameters():
            p.data *= 0.3
        theirs.save_pretrained(tmp_path)
        model, x = GPT.from_pretrained(tmp_path), torch.randint(3, 6, (2, 3))
        for num_beams, penalty in ((2, 2.0), (3, 2.0), (3, 0.0)):
            found = theirs.generate(
                x, attention_mask=torch.ones_like(x), max_new_tokens=6, do_sample=False,
                num_beams=num_beams, length_penalty=penalty, early_stopping=False, eos_token_id=[0, 1, 2], pad_token_id=0,
                return_dict_in_generate=True, output_scores=True)
            sequences, scores = beam_search(model, x, 6, num_beams, penalty, [0, 1, 2])
            assert sequences.tolist() == found.sequences.tolist()
            assert (scores - found.sequences_scores).abs().max() < 1e-4


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


@pytest.mark.parametrize("window", [None, 5])
def test_graphed_steps_equal_the_others(monkeypatch, window):
    """What a GPU records as a graph, run here without one; also with a sliding window, whose
    distances between tokens must stay right."""
    textbook = Attention.attend

    def attend(self, q, k, v, mask):
        T, S = q.size(2), k.size(2)
        near = torch.ones(T, S, dtype=torch.bool).tril(S - T).triu(S - T + 1 - window)
        return textbook(self, q, k, v, near if mask is None else near & mask)

    if window:
        monkeypatch.setattr(Attention, "attend", attend)
    plain, model = tiny(block_size=24), tiny(block_size=24)
    model.next_logits = GraphedStep(model)
    left_padded = torch.ones(3, 7, dtype=torch.long)
    left_padded[1, :4] = 0
    left_padded[2, :6] = 0
    for x, mask in ((ids(3, 7), left_padded), (ids(3, 7), None), (ids(2, 1), None)):
        for temperature in (0, 1):
            options = temperature, None, None, None  # 40 tokens: the window moves twice
            want, got = (m.generate(x, 40, *options, torch.Generator().manual_seed(5), mask)
                         for m in (plain, model))
            assert torch.equal(want, got)
    for a, b in zip(beam_search(plain, ids(2, 5), 30, 3), beam_search(model, ids(2, 5), 30, 3)):
        assert torch.allclose(a, b)


def test_texts_share_a_recorded_step(monkeypatch):
    """Also those that are written in turn, each of whose windows moves."""
    recorded, record = [], GraphedStep.record
    monkeypatch.setattr(GraphedStep, "record", lambda step, *args: recorded.append(record(step, *args)))
    model, prompts = tiny(block_size=24), (ids(1, 9), ids(1, 3), ids(1, 12))
    want = [torch.stack([*model.stream(x, 30, 0)], 1) for x in prompts]
    model.next_logits = GraphedStep(model)
    for x, text in zip(prompts, want):
        assert torch.equal(model.generate(x, 30, 0)[:, x.size(1):], text)
    streams = [model.stream(x, 30, 0) for x in prompts]
    for tokens in zip(*streams, zip(*(text[0] for text in want))):
        assert [int(token) for token in tokens[:-1]] == [*map(int, tokens[-1])]
    assert len(recorded) == 1
    model.generate(ids(2, 3), 30, 0)  # two texts
    assert len(recorded) == 2


@pytest.mark.skipif(not torch.backends.mkldnn.is_available()
                    or not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 units")
def test_bfloat16_weights_are_laid_out_too():
    model, x = tiny().bfloat16(), ids()
    logits = model(x)[0].float()
    packed = prepare(model)(x)[0].float()
    assert (packed - logits).abs().max() < 0.02 * logits.abs().max()


def test_prepared_models_keep_adapters_and_their_logits():
    for fast in (False, True):  # plain, and accelerated for training
        for options in ({}, {"bias": False}, {"tie_word_embeddings": False}):
            model, x = tiny(**options).float(), ids()
            add_lora(model, 2, 4.0, targets=["c_fc"])
            for layer in adapted(model):
                torch.nn.init.normal_(layer.lora_B)
            logits, greedy = model(x)[0], model.generate(x, 30, temperature=0)
            prepare(accelerate(model) if fast else model)
            assert len(adapted(model)) == 3
            assert (model(x)[0] - logits).abs().max() < 1e-4 * logits.abs().max()
            assert (model.generate(x, 30, temperature=0) == greedy).all()


@pytest.mark.parametrize("lacking", ["REORDER", "POINTWISE", "INT8"])
def test_a_torch_without_private_operators(monkeypatch, lacking):
    x = torch.randint(256, (2, 8))
    want = [prepare(bytes_model(), quantize)(x)[0] for quantize in (None, "int8")]
    monkeypatch.setattr(decode, lacking, None)
    models = [prepare(bytes_model(), quantize) for quantize in (None, "int8")]
    for model, logits, tolerance in zip(models, want, (1e-5, 0.02)):  # the kernel's are in bfloat16
        assert (model(x)[0] - logits).abs().max() < tolerance * logits.abs().max()
    assert lacking == "INT8" or type(models[0].transformer.h[0].mlp.c_fc) is torch.nn.Linear


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


@pytest.mark.skipif(not packs(torch.ones(1)), reason="this torch lacks oneDNN's layout")
@pytest.mark.parametrize("units", [True, False])
def test_many_texts_are_decoded_in_floats(monkeypatch, units):
    """The rounded weights stay what they are; only where bfloat16 has units is it computed with."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        for quantize in (None, "int8"):
            model, x = bytes_model().to(dtype), torch.randint(256, (2, 40))
            if quantize:
                few, many = (prepare(copy.deepcopy(model), quantize, rows=n) for n in (1, 8))
            else:
                few, many = model, prepare(copy.deepcopy(model), rows=8)
            layer = many.transformer.h[0].mlp.c_fc
            assert type(layer) is PackedLinear and layer.weight.dtype == (
                torch.float32 if dtype == torch.float32 or not units else torch.bfloat16)
            want, got = few(x)[0].float(), many(x)[0].float()
            assert (want - got).abs().max() < tolerance * want.abs().max()


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


def test_streamed_bytes_of_a_foreign_tokenizer():
    """Whose decoder makes U+FFFD of each byte of an unfinished character."""
    from tokenizers import Tokenizer, decoders, models
    names = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *"helo "]
    library = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True,
                                   unk_token="<unk>"))
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tok = from_json(library.to_str())
    for text in ("hello 😀\n", "日本語 🎉🎉\n\nhe", "é"):
        before, tokens = tok.encode("é he").tolist(), tok.encode(text).tolist()
        pieces = [piece for piece, _ in stream_text(Fixed(tokens), tok, None, before=before)]
        assert "".join(pieces) == text and len(tokens) > 1


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


def script(module, *argv):
    vars(module).update(DEFAULTS[module])
    configure(vars(module), [*argv, "--device=cpu"])
    module.main()


def test_sample_script(tmp_path, monkeypatch, capsys):
    bytes_model().save_pretrained(tmp_path)
    open_tokenizer("bytes").save(tmp_path)
    (tmp_path / "prompt.txt").write_text("from a file")

    def write(*argv):
        script(sample, f"--init_from={tmp_path}", "--max_new_tokens=12", *argv)
        return capsys.readouterr().out

    assert "Once" in write("--start", "Once") and "tokens/s" in write()
    assert "one\ntwo" in write("--start", "one\\ntwo")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "from a file" in write("--start=FILE:~/prompt.txt")
    assert "--- 2\nOnce" in write("--start=Once", "--num_samples=2")
    assert "score" in (said := write("--num_beams=3", "--quantize=int8")) and "note" not in said
    assert "note: top_p does nothing with num_beams=2" in write("--num_beams=2", "--top_p=0.9")
    assert "note: length_penalty does nothing with num_beams=1" in write("--length_penalty=2")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\n\n\xff\ntwo\nquit\nthree\n")))
    text = write("--interactive", "--start=zero")
    assert text.count("tokens/s") == 4 and "zero" in text and "one" in text and "error: " in text
    assert "three" not in text
    for flag, word in (("--temperature=-1", "temperature"), ("--top_p=2", "top_p"),
                       ("--top_k=-1", "top_k"), ("--max_new_tokens=0", "max_new_tokens"),
                       ("--num_beams=0", "num_beams"), ("--quantize=int4", "int4"),
                       ("--tokenizer=gpt2", "50257 ids"), ("--start=FILE:/none.txt", "/none.txt"),
                       ("--instruct=Add.", "--start"), ("--revision=v1", "is a folder"),
                       ("--init_from=resume", "resume is for training; name a model")):
        with pytest.raises((ValueError, OSError), match=word):
            write(*flag.split())


def test_weights_beside_the_scripts_serve_until_there_is_a_run(tmp_path, monkeypatch, capsys):
    def said(*words):
        script(*words)
        return capsys.readouterr().out

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(hf, "HERE", tmp_path)
    tok = train_bpe(["Once upon a time there was a cat. "] * 9, 270)
    write_data("./stories", tok, {"train": ["Once upon"], "val": ["Once there was"] * 9})
    evaluation = [train, "--eval_only", "--dataset=./stories"]
    for words in ([sample], [*evaluation, "--init_from=weights"]):
        with pytest.raises(ValueError, match="make run.*or bring weights/ back"):
            script(*words)
    model = bytes_model(vocab_size=270)
    model.save_pretrained(tmp_path / "weights", tok.eos_id)
    tok.save(tmp_path / "weights")
    text = said(sample, "--start=从前有一只猫, é😀", "--max_new_tokens=5")
    assert text.startswith("no run under out/ yet: this is the model in weights/")
    assert "从前有一只猫, é😀" in text
    found = said(*evaluation, "--init_from=weights")
    assert "weights on ./stories" in found
    again = said(*evaluation, f"--init_from={tmp_path}/weights")
    assert again.partition(": ")[2] == found.partition(": ")[2]
    script(train, "--dataset=./stories", "--out_dir=out/mine", "--n_layer=1", "--n_head=1",
           "--n_embd=8", "--block_size=4", "--batch_size=1", "--max_steps=1", "--sample_tokens=0")
    capsys.readouterr()
    assert said(sample, "--max_new_tokens=2").startswith("out/mine: ")
