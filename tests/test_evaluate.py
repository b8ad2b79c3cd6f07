"""Each measure of evaluate.py by hand and against a plain reference; the script from end to end."""

import json

import pytest
import torch

import evaluate
from configurator import configure, find_settings
from data import write_data
from evaluate import (
    copied,
    distinct,
    ending_loss,
    parse_decoding,
    repetition,
    split_story,
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
    assert words("हिन्दी में नमस्ते") == ["हिन्दी", "में", "नमस्ते"] and words("cafe\u0301s") == ["cafés"]
    assert words("Tim's dog -- it didn’t bark_at 2 cats. Été!") == [
        "tim's", "dog", "it", "didn’t", "bark", "at", "2", "cats", "été"]
    texts = [list("ababab"), ["c"]]
    assert [distinct(texts, n) for n in (1, 2, 3, 9)] == [3 / 7, 2 / 5, 2 / 4, 0]
    assert repetition(texts[0]) == pytest.approx(1 / 3)  # abab, baba, abab
    assert repetition(texts[1]) == 0 and repetition([]) == 0


def test_copied_by_hand():
    """Runs of eight words are counted as often as they occur, and do not go on over an end."""
    training = ["Tim had a big red ball and he ran .", "He ran home to mum and dad that day"]
    groups = [["tim HAD a big, red ball and he ran", "he sat"],  # two runs of eight, both copies
              ["had a big red ball and he ran home to mum", "Tim had a big red ball and he"],
              ["a b c d e f g h", "big red ball and he ran he ran home to mum and"],
              ["too short for a run"], []]
    assert copied(groups, iter(training)) == [1, 2 / 5, 0, 0, 0]
    assert copied(groups, []) == [0, 0, 0, 0, 0]
    assert copied([["a b a b", "b a"]], ["a b"], n=2) == [2 / 4]


def test_split_story_keeps_the_story_and_its_tokens():
    evaluate.prompt_words = 3
    story = "One day,  Tim\n\nwent  home. The end.\n"
    prompt, ending = split_story(story)
    assert prompt == "One day,  Tim" and prompt + ending == story.rstrip()
    assert split_story("One day, Tim ") is None and split_story("") is None
    tok = open_tokenizer("gpt2")
    assert [*tok.encode(prompt), *tok.encode(ending)] == tok.encode(story.rstrip()).tolist()


def test_parse_decoding():
    config = GPTConfig(vocab_size=256)
    assert parse_decoding("greedy", config) == {"temperature": 0.0}
    assert parse_decoding("temperature=0.7,top_k=5", config) == {"temperature": 0.7, "top_k": 5}
    assert parse_decoding("num_beams=4,length_penalty=2", config) == {
        "num_beams": 4, "length_penalty": 2.0}
    for text in ("", "beams=4", "top_k=0.5", "top_p", "num_beams=4,top_p=0.9", "length_penalty=2",
                 "top_k=5,top_k=6"):
        with pytest.raises(ValueError, match=f"decoding '{text}'"):
            parse_decoding(text, config)


@torch.inference_mode()
def test_loss_of_endings_within_and_past_the_context():
    model = bytes_model()
    x = torch.randint(256, (1, 120), generator=torch.Generator().manual_seed(0))
    ids = x[0].tolist()

    def nats(start, at):  # of token `at`, read from `start` on
        return -model(x[:, start:at])[0][0, -1].log_softmax(-1)[ids[at]].item()

    short = sum(nats(0, at) for at in range(10, 49))
    assert ending_loss(model, ids[:10], ids[10:49]) == pytest.approx(short, abs=1e-4)
    # 48 of context: tokens 1 … 48 from 0, then 49 … 73 behind 24 others, and so on
    total = sum(nats(0, at) for at in range(10, 49))
    total += sum(nats((at - 49) // 25 * 25 + 25, at) for at in range(49, 120))
    assert ending_loss(model, ids[:10], ids[10:]) == pytest.approx(total, abs=1e-4)
    late = sum(nats((at - 80) // 25 * 25 + 56, at) for at in range(80, 120))  # a long prompt
    assert ending_loss(model, ids[:80], ids[80:]) == pytest.approx(late, abs=1e-4)


def test_batched_decoding_is_decoding_one_by_one():
    model, tok = bytes_model(), open_tokenizer("bytes")
    evaluate.max_new_tokens, evaluate.batch_size = 20, 3
    prompts = [tok.encode(text).tolist() for text in ("Once", "A longer one", "Tim", "Four", "x")]
    bar = type("Bar", (), {"update": lambda self, n: None})()
    for options in ({"temperature": 0.0}, {"num_beams": 3}):
        made = evaluate.decode_all(model, prompts, options, [255], bar)
        for prompt, ids in zip(prompts, made):
            alone = evaluate.decode_all(model, [prompt], options, [255], bar)[0]
            assert ids == alone and 0 < len(ids) <= 20
    drawn = evaluate.decode_all(model, prompts, {"top_p": 0.9}, [255], bar)
    assert drawn == evaluate.decode_all(model, prompts, {"top_p": 0.9}, [255], bar)
    eos = made[0][3]
    made = evaluate.decode_all(model, prompts, {"temperature": 0.0}, [255, eos], bar)
    assert any(eos in ids for ids in made) and all(eos not in ids[:-1] for ids in made)


def test_script(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tok = open_tokenizer("bytes")
    train = [f"Tim had a ball {i} times and then he went home ." for i in range(20)]
    train += [f"Sam had a dog {i} times and then he went home ." for i in range(6)]
    val = [f"Tim had a dog {i} times and then he went home ." for i in range(6)]
    write_data("./stories", tok, {"train": train, "val": val})
    bytes_model(block_size=96).float().save_pretrained("m")
    tok.save("m")

    def run(*argv):
        vars(evaluate).update(DEFAULTS)
        configure(vars(evaluate), [
            "--init_from=m", "--dataset=./stories", "--num_prompts=4", "--prompt_words=3",
            "--max_new_tokens=60", "--device=cpu", *argv])
        evaluate.main()
        return capsys.readouterr().out

    printed = run("--decoding", "greedy", "top_k=5", "num_beams=2", "--out=q", "--stories=s.jsonl")
    assert max(map(len, printed.splitlines())) < 100
    figures = json.loads((tmp_path / "q.json").read_text())
    real, greedy, *_ = figures["rows"]
    assert real["ended"] == 1 and real["words"] == 8
    assert real["copied"] == 1 and greedy["copied"] == 0  # "dog 3 … home" is eight words
    assert real["rep-4"] == 0 and 150 < real["ppl"] < 400  # an untrained model of 256 bytes
    assert [row["decoding"] for row in figures["rows"]] == ["real endings", "greedy", "top_k=5",
                                                          "num_beams=2"]
    assert (tmp_path / "q.md").read_text().count("\n|") == 6 and "| greedy " in printed
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and lines[0]["prompt"] + lines[0]["real endings"] in val
    assert run("--decoding=greedy", "--out=None") and not (tmp_path / "out").exists()
    (first, *_), file = tok.encode(lines[0]["greedy"]), tmp_path / "m" / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [255, int(first)]}))  # a second token that ends a text
    decode_all, made = evaluate.decode_all, []
    monkeypatch.setattr(evaluate, "decode_all", lambda *args: made.append(decode_all(*args)) or made[-1])
    run("--decoding=greedy", "--out=q", "--stories=s.jsonl")
    assert made[0][0] == [first]
    assert json.loads((tmp_path / "s.jsonl").read_text().splitlines()[0])["greedy"] == ""
    assert json.loads((tmp_path / "q.json").read_text())["rows"][1]["ended"] >= 1 / 4
    with pytest.raises(ValueError, match="6 stories"):
        run("--num_prompts=7")
    with pytest.raises(ValueError, match="batch_size"):
        run("--batch_size=0")
    monkeypatch.setattr(evaluate, "decode_all", None)  # before anything is decoded
    for way, word in (("top_p=1.5", "top_p must"), ("num_beams=0", "1 … 256"),
                      ("top_k=-1", "top_k must"), ("temperature=-1", "temperature must"),
                      ("num_beams=2,length_penalty=nan", "length_penalty must")):
        with pytest.raises(ValueError, match=f"decoding '{way}': .*{word}"):
            run("--decoding", "greedy", way)
