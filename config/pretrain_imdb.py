"""A small GPT-2 on movie reviews, to fine-tune for sentiment: 66 minutes of one core in bfloat16.

    python tokenizer.py train --input train.jsonl.xz unsup.jsonl.xz --lowercase --vocab_size=8192 \\
        --out=data/imdb8k.json
    python prepare_text.py --name=imdb --input train.jsonl.xz unsup.jsonl.xz --lowercase \\
        --val_fraction=0.01 --tokenizer=data/imdb8k.json
    OMP_NUM_THREADS=1 python train.py config/pretrain_imdb.py --dtype=bfloat16    # if the chip has it

The text of the 75,000 reviews of the Large Movie Review Dataset (Maas et al. 2011) that are not for
testing, without their labels; 750 of them are held out.
"""

out_dir = "out/pretrain_imdb"
dataset = "imdb"

n_layer = 4
n_head = 6
n_embd = 192
block_size = 512
activation = "gelu"  # as good as the tanh form, and faster on a CPU
batch_size = 8

max_steps = 3250  # 13.3 M tokens
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

eval_interval = 650
log_interval = 50
sample_tokens = 100
