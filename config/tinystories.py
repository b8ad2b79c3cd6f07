"""GPT-2 124M on TinyStories, the published recipe: 3,000 steps of 524,288 tokens, 3.3 epochs.

Data: python prepare_tinystories.py (474 million GPT-2 tokens). Published for this recipe: a
validation loss of 1.24 nats per token after 3 h 45 min on one A100. It needs 1.6 billion tokens x
0.86 GFLOP = 1.35 EFLOP, 50 minutes at the 45 % of an H200's 989 TFLOP/s that
were counted, not measured. We have not run it to the end.
"""

out_dir = "out/tinystories"
dataset = "tinystories"

batch_size = 16
total_batch_tokens = 524_288
max_steps = 3000

learning_rate = 6e-4
weight_decay = 0.001
warmup_steps = 100
lr_schedule = "cosine"
grad_clip = 1.0

eval_interval = 250
