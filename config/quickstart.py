"""Shakespeare's plays, character by character: a small GPT in a minute or two on 2 cores.

    python prepare_text.py
    python train.py config/quickstart.py

A network of the size of nanoGPT's quick start (4 layers, 4 heads, width 128, context 64), trained
with the optimizer and the learning rates of config/race.py for more steps. It ends at a validation
loss of about 1.68 nats per character.
"""

# First what the small recipes share: Muon, its learning rates and their schedule, GELU.
from config.muon_cpu import *

out_dir = "out/quickstart"
dataset = "shakespeare"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12

max_steps = 1500
adamw_learning_rate = 0.03  # this and beta1 are better on characters than the shared ones
beta1 = 0.7

eval_interval = 150
eval_tokens = 65_536  # of 478,671: a second instead of seven
log_interval = 100
sample_tokens = 200
