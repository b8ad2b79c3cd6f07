"""A small GPT-2 on Shakespeare's plays, the base model for his sonnets.

It takes 7 minutes on one core in bfloat16:

    python prepare_text.py --save_text=data/plays.txt
    python tokenizer.py train --input=data/plays.txt --vocab_size=2048 --out=data/plays2k.json
    python prepare_text.py --name=plays --tokenizer=data/plays2k.json
    OMP_NUM_THREADS=1 python train.py config/pretrain_plays.py --dtype=bfloat16  # if the CPU has it

The plays are 4.8 MB, of which the last tenth is for validation. The poems are not among them.
"""

# First what the small recipes share: Muon, its learning rates and their schedule, GELU.
from config.muon_cpu import *

out_dir = "out/pretrain_plays"
dataset = "plays"

n_layer = 4
n_head = 6
n_embd = 192
block_size = 512  # a sonnet has up to 250 tokens
batch_size = 8

max_steps = 500  # 2.0 M tokens, an epoch and a quarter

eval_interval = 125
log_interval = 50
sample_tokens = 100
