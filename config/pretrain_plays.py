"""A small GPT-2 on Shakespeare's plays, to fine-tune on his sonnets: 7 minutes of one core in bfloat16.

    python prepare_text.py --save_text=data/plays.txt
    python tokenizer.py train --input=data/plays.txt --vocab_size=2048 --out=data/plays2k.json
    python prepare_text.py --name=plays --tokenizer=data/plays2k.json
    OMP_NUM_THREADS=1 python train.py config/pretrain_plays.py --dtype=bfloat16    # if the chip has it

4.8 MB, of which the last tenth is for validation. The poems are not in it.
"""

out_dir = "out/pretrain_plays"
dataset = "plays"

n_layer = 4
n_head = 6
n_embd = 192
block_size = 512  # a sonnet has up to 250 tokens
activation = "gelu"  # as good as the tanh form, and faster on a CPU
batch_size = 8

max_steps = 500  # 2.0 M tokens, an epoch and a quarter
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

eval_interval = 125
log_interval = 50
sample_tokens = 100
