"""Shakespeare's plays, character by character: a small GPT in a minute or two on 2 cores.

    python prepare_text.py
    python train.py config/quickstart.py

A network of the size of nanoGPT's quick start (4 layers, 4 heads, width 128, context 64) with the
optimizer and rates of config/race.py, for longer: see README for what it reaches.
"""

out_dir = "out/quickstart"
dataset = "shakespeare"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
activation = "gelu"  # as good as the tanh form, and faster on a CPU
batch_size = 12

max_steps = 1500
optimizer = "muon"
learning_rate = 0.03
adamw_learning_rate = 0.03
momentum = 0.85
beta1 = 0.7
weight_decay = 0.0
lr_schedule = "wsd"
decay_fraction = 0.5
min_lr_scale = 0.0
warmup_steps = 0

eval_interval = 750
log_interval = 100
sample_tokens = 200
