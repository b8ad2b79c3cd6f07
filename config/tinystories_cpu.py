"""A small GPT-2 on TinyStories for a machine without a GPU: about 10 minutes of training on 2 cores.

    python prepare_tinystories.py --name=tinystories_4k --tokenizer=weights/tokenizer.json \
        --limit=20000      # from the hub; or, from local files, as README says
    python train.py config/tinystories_cpu.py

Measured on 19,837 stories for training and 7,002 for validation: see README.
"""

out_dir = "out/tinystories_cpu"
dataset = "tinystories_4k"

n_layer = 4
n_head = 6
n_embd = 192
block_size = 256
activation = "gelu"  # as good as the tanh form, and faster on a CPU
batch_size = 8

max_steps = 1700  # 3.5 M tokens
optimizer = "muon"
learning_rate = 0.03
adamw_learning_rate = 0.01
momentum = 0.85
beta1 = 0.8
weight_decay = 0.0
lr_schedule = "wsd"
decay_fraction = 0.5
min_lr_scale = 0.0
warmup_steps = 0

eval_interval = 850
log_interval = 100
sample_tokens = 200
