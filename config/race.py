"""nanoGPT's quick-start network to its README's result, in as few seconds as we know how.

    python prepare_text.py --name=ts --input=input.txt
    python train.py config/race.py --dataset=ts
    python bench.py race --dataset=ts --peer=../nanoGPT

The network is nanoGPT's: 4 layers, 4 heads, width 128, context 64, no biases, erf GELU. What differs
is in docs/training_speed.md, with what each change is worth.
"""

out_dir = "out/race"
dataset = "ts"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
bias = False
activation = "gelu"
batch_size = 12
dtype = "bfloat16"  # for chips with units for it; elsewhere float32 is as good, and faster

max_steps = 385
optimizer = "muon"
learning_rate = 0.03
adamw_learning_rate = 0.03
momentum = 0.85
beta1 = 0.7
weight_decay = 0.0
grad_clip = 0.0
lr_schedule = "wsd"
decay_fraction = 0.5
warmup_steps = 0
min_lr_scale = 0.0

eval_interval = 385
log_interval = 20
sample_tokens = 200
