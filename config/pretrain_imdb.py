"""A small GPT-2 on movie reviews, the base model for sentiment: 66 minutes on one core in bfloat16.

    python tokenizer.py train --input train.jsonl.xz unsup.jsonl.xz --lowercase --vocab_size=8192 \\
        --out=data/imdb8k.json
    python prepare_text.py --name=imdb --input train.jsonl.xz unsup.jsonl.xz --lowercase \\
        --val_fraction=0.01 --tokenizer=data/imdb8k.json
    OMP_NUM_THREADS=1 python train.py config/pretrain_imdb.py --dtype=bfloat16  # if the CPU has it

The text, without labels, of the 75,000 reviews of the Large Movie Review Dataset (Maas et al. 2011)
that are not in its test set; 750 of them are for validation.
"""

# First what the small recipes share: Muon, its learning rates and their schedule, GELU.
from config.muon_cpu import *

out_dir = "out/pretrain_imdb"
dataset = "imdb"

n_layer = 4
n_head = 6
n_embd = 192
block_size = 512
batch_size = 8

max_steps = 3250  # 13.3 M tokens

eval_interval = 650
log_interval = 50
sample_tokens = 100
