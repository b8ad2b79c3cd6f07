"""Each measure of evaluate.py by hand and against a plain reference; the script from end to end."""

import json
import random

import pytest
import torch

import evaluate
import files
from configurator import configure, find_settings
from data import write_data
from evaluate import (
    cut,
    distinct,
    longest_copies,
    loss,
    parse_decoding,
    repetition,
    words,
)
from model import GPT, GPTConfig
from tokenizer import open_tokenizer

DEFAULTS = {name: default for name, (default, _, _) in find_settings(vars(evaluate)).items()}


def bytes_model(**options):
    torch.manual_seed(3)
    return GPT(GPTConfig(**{"block_size": 48, "vocab_size": 256, "n_layer": 2, "n_head": 2,
                            "n_embd": 32} | options)).double().eval()


def test_words_and_measures_by_hand():
    assert words("Tim's dog -- it didn’t bark_at 2 cats. Été!") == [
        "tim's", "dog", "it", "didn’t", "bark", "at", "2", "cats", "été"]
    texts = [list("ababab"), ["c"]]
    assert distinct(texts, 1) == 3 / 7 and distinct(texts, 2) == 2 / 5 and distinct(texts, 3) == 2 / 4
    assert repetition(texts[0]) == pytest.approx(1 / 3)  # abab, baba, abab
    assert repetition(texts[1]) == 0 and repetition([]) == 0


def naive_copy(text, training):
    for size in range(len(text), 0, -1):
        runs = {tuple(story[i:i + size]) for story in training for i in range(len(story) - size + 1)}
        if any(tuple(text[i:i + size]) in runs for i in range(len(text) - size + 1)):
            return size
    return 0


def test_longest_copies_equal_a_plain_search():
    rng = random.Random(0)
    longest = 0
    for trial in range(150):
        alphabet = "abcdefgh"[:rng.choice([1, 2, 3, 8])]
        training = [rng.choices(alphabet, k=rng.randint(0, 30)) for _ in range(rng.randint(0, 8))]
        texts = [rng.choices(alphabet + "xy", k=rng.randint(0, 25)) for _ in range(rng.randint(0, 5))]
        if training and texts:
            texts[0] = texts[0] + rng.choice(training)[3:20] + texts[0]
        expected = [naive_copy(text, training) for text in texts]
        longest = max([longest, *expected])
        for chunk in (1, 40, 10**6):  # a story at a time, some, all
            assert longest_copies(texts, training, chunk) == expected, (trial, chunk)
    assert longest > 15


def test_longest_copies_do_not_cross_ends():
    training = [list("abc"), list("def")]
    assert longest_copies([list("bcde"), ["f"], [], ["z"]], training) == [2, 1, 0, 0]
    assert longest_copies([list("ab"), list("cd")], [list("abcd")]) == [2, 2]


def test_cut_keeps_the_story_and_its_tokens():
    evaluate.prompt_words = 3
    story = "One day,  Tim\n\nwent  home. The end.\n"
    prompt, ending = cut(story)
    assert prompt == "One day,  Tim" and prompt + ending == story.rstrip()
    assert cut("One day, Tim ") is None and cut("") is None
    tok = open_tokenizer("gpt2")
    assert [*tok.encode(prompt), *tok.encode(ending)] == tok.encode(story.rstrip()).tolist()


def test_parse_decoding():
    assert parse_decoding("greedy") == {"temperature": 0.0}
    assert parse_decoding("temperature=0.7,top_k=5") == {"temperature": 0.7, "top_k": 5}
    assert parse_decoding("num_beams=4,length_penalty=2") == {"num_beams": 4, "length_penalty": 2.0}
    for text in ("", "beams=4", "top_k=0.5", "top_p", "num_beams=4,top_p=0.9"):
        with pytest.raises(ValueError, match="decoding"):
            parse_decoding(text)


def test_loss_of_endings_within_and_past_the_context():
    model = bytes_model()
    x = torch.randint(256, (1, 120), generator=torch.Generator().manual_seed(0))
    ids = x[0].tolist()

    def nats(start, at):  # of token `at`, read from `start` on
        return -model(x[:, start:at])[0][0, -1].log_softmax(-1)[ids[at]].item()

    short = sum(nats(0, at) for at in range(10, 49))
    assert loss(model, ids[:10], ids[10:49]) == pytest.approx(short, abs=1e-4)
    # 48 of context: tokens 1 … 48 from 0, then 49 … 73 behind 24 others, and so on
    total = sum(nats(0, at) for at in range(10, 49))
    total += sum(nats((at - 49) // 25 * 25 + 25, at) for at in range(49, 120))
    assert loss(model, ids[:10], ids[10:]) == pytest.approx(total, abs=1e-4)
    late = sum(nats((at - 80) // 25 * 25 + 56, at) for at in range(80, 120))  # a long prompt
    assert loss(model, ids[:80], ids[80:]) == pytest.approx(late, abs=1e-4)


def test_batched_decoding_is_decoding_one_by_one():
    model, tok = bytes_model(), open_tokenizer("bytes")
    evaluate.max_new_tokens, evaluate.batch_size = 20, 3
    prompts = [tok.encode(text).tolist() for text in ("Once", "A longer one", "Tim", "Four", "x")]
    bar = type("Bar", (), {"update": lambda self, n: None})()
    for options in ({"temperature": 0.0}, {"num_beams": 3}):
        made = evaluate.decode_all(model, prompts, options, 255, bar)
        for prompt, ids in zip(prompts, made):
            alone = evaluate.decode_all(model, [prompt], options, 255, bar)[0]
            assert ids == alone and 0 < len(ids) <= 20
    drawn = evaluate.decode_all(model, prompts, {"top_p": 0.9}, 255, bar)
    assert drawn == evaluate.decode_all(model, prompts, {"top_p": 0.9}, 255, bar)
    eos = made[0][3]
    made = evaluate.decode_all(model, prompts, {"temperature": 0.0}, eos, bar)
    assert any(eos in ids for ids in made) and all(eos not in ids[:-1] for ids in made)


def test_script(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tok = open_tokenizer("bytes")
    train = [f"Tim had a ball {i} times and then he went home ." for i in range(20)]
    val = [f"Tim had a dog {i} times and then he went home ." for i in range(6)]
    write_data("./stories", tok, {"train": train, "val": val})
    bytes_model(block_size=96).float().save_pretrained("m")
    tok.save("m")

    def run(*argv):
        vars(evaluate).update(DEFAULTS)
        configure(vars(evaluate), ["--init_from=m", "--dataset=./stories", "--num_prompts=4",
                                   "--prompt_words=3", "--max_new_tokens=60", "--device=cpu", *argv])
        evaluate.main()
        return capsys.readouterr().out

    said = run("--decoding", "greedy", "top_k=5", "num_beams=2", "--out=q", "--stories=s.jsonl")
    assert max(map(len, said.splitlines())) < 100
    facts = json.loads((tmp_path / "q.json").read_text())
    real = facts["rows"][0]
    assert real["ended"] == 1 and real["words"] == 8 and real["copy"] == 7  # 3 times and … home
    assert real["rep-4"] == 0 and 150 < real["ppl"] < 400  # an untrained model of 256 bytes
    assert [row["decoding"] for row in facts["rows"]] == ["real endings", "greedy", "top_k=5",
                                                          "num_beams=2"]
    assert (tmp_path / "q.md").read_text().count("\n|") == 6 and "| greedy " in said
    told = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert len(told) == 4 and told[0]["prompt"] + told[0]["real endings"] in val
    assert run("--decoding=greedy", "--out=None") and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="6 stories"):
        run("--num_prompts=7")
    with pytest.raises(ValueError, match="batch_size"):
        run("--batch_size=0")
    monkeypatch.setattr(evaluate, "decode_all", None)  # before anything is decoded
    for way, word in (("top_p=1.5", "top_p must"), ("num_beams=0", "1 … 256"),
                      ("top_k=0", "top_k must"), ("temperature=-1", "temperature must"),
                      ("num_beams=2,length_penalty=nan", "length_penalty must")):
        with pytest.raises(ValueError, match=f"decoding '{way}': .*{word}"):
            run("--decoding", "greedy", way)
    monkeypatch.setattr(files, "HERE", tmp_path)
    with pytest.raises(ValueError, match="make run.*git checkout"):
        run("--init_from=None")
