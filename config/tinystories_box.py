"""The model in weights/: a small GPT-2 on TinyStories, about 40 minutes of one core.

    python prepare_tinystories.py --name=tinystories_4k --tokenizer=weights/tokenizer.json \
        --limit=20000      # from the hub; or, from local files, as README says
    OMP_NUM_THREADS=1 python train.py config/tinystories_box.py --dtype=bfloat16

config/tinystories_cpu.py with as much width as 9 MB in float16 hold, and 2.4 epochs of 19,837
stories instead of 0.9. With all of TinyStories, give more --max_steps and no --limit.
"""

out_dir = "out/tinystories_box"
dataset = "tinystories_4k"

n_layer = 4
n_head = 8
n_embd = 256
block_size = 256
activation = "gelu"  # as good as the tanh form, and faster on a CPU
batch_size = 16

max_steps = 2400  # 9.8 M tokens
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

eval_interval = 300
log_interval = 50
sample_tokens = 200
