"""Shakespeare's plays, character by character: a small GPT in under two minutes on 2 cores.

    python prepare_text.py
    python train.py config/quickstart.py

nanoGPT's quick-start network (4 layers, 4 heads, width 128, context 64) and its 2,000 steps of 12 x 64
characters, with a higher learning rate that falls to zero: see README for what it reaches.
"""

out_dir = "out/quickstart"
dataset = "shakespeare"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12

max_steps = 2000
learning_rate = 3e-3
lr_schedule = "linear"
min_lr_scale = 0.0
beta2 = 0.99

eval_interval = 1000
log_interval = 100
sample_tokens = 200
