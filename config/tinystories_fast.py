"""GPT-2 124M on TinyStories in as little time as possible, for one H200: Muon, one epoch.

    python train.py config/tinystories_fast.py
    torchrun --standalone --nproc_per_node=8 train.py config/tinystories_fast.py

Data: python prepare_tinystories.py (474 million GPT-2 tokens). One epoch in steps of 262,144 tokens
is 0.41 EFLOP, 15 minutes at the 45 % of an H200's 989 TFLOP/s that were counted,
not measured. The recipe is that of
config/tinystories_cpu.py with lower learning rates, a higher momentum and a short warmup for the
larger network. It has not been run: see docs/training_speed.md.
"""

out_dir = "out/tinystories_fast"
dataset = "tinystories"

block_size = 1024
batch_size = 32
total_batch_tokens = 262_144
max_steps = 1807  # one epoch

optimizer = "muon"
learning_rate = 0.02
adamw_learning_rate = 3e-3
momentum = 0.95
beta1 = 0.8
weight_decay = 0.0
lr_schedule = "wsd"
decay_fraction = 0.5
min_lr_scale = 0.0
warmup_steps = 20

eval_interval = 250
eval_tokens = 2_097_152
