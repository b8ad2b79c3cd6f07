"""Do two questions ask the same? (Quora's question pairs)

    python finetune_cls.py config/finetune_quora.py --data_dir=FOLDER   # CS224n's files
    python finetune_cls.py config/finetune_quora.py --data_dir=FOLDER --style=cloze --epochs=0
    python finetune_cls.py config/finetune_quora.py                     # from the hub

The base model: python train.py config/pretrain_imdb.py.
"""

# First what these recipes share: the base model, Muon and its learning rates, word dropout.
from config.muon_cls import *

out_dir = "out/finetune_quora"
train_file = "quora-train.csv"
dev_file = "quora-dev.csv"
dataset = "nyu-mll/glue:qqp"
text_column = ["sentence1", "question1"]
text_pair_column = ["sentence2", "question2"]
label_column = ["is_duplicate", "label"]
classes = ["0", "1"]
prompt = 'question 1 : " {text} " question 2 : " {text_pair} " do they ask the same ?'
verbalizers = [" no", " yes"]

word_dropout = 0.1  # of short texts; no other was tried
epochs = 3
