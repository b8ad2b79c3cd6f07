"""GPT-2 124M from scratch on OpenWebText, for a node of 8 GPUs: the scale of nanoGPT's own run.

    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124M.py

Data: data/openwebtext, 9 billion GPT-2 tokens, by `prepare_text.py --name=openwebtext --input …
--tokenizer=gpt2 --val_fraction=0.0005`, or nanoGPT's folder with train.bin and val.bin as it is.
600,000 steps of 491,520 tokens are 295 billion tokens and 2.5e20 FLOP, about 4 days on 8 A100.
nanoGPT reports a validation loss of 2.85 nats per token for it. We have not run it.
"""
# ruff: noqa: N999 (the size of GPT-2 is written with a capital M)

out_dir = "out/gpt2_124M"
dataset = "openwebtext"

batch_size = 15
total_batch_tokens = 491_520  # 4 micro-batches on each of 8 GPUs, 2 on each of 16
max_steps = 600_000

learning_rate = 6e-4
weight_decay = 0.1
warmup_steps = 2000
lr_schedule = "cosine"
min_lr_scale = 0.1

eval_interval = 1000
eval_tokens = 2_097_152
