"""Do two sentences from the news mean the same? (Microsoft Research Paraphrase Corpus)

    python finetune_cls.py config/finetune_mrpc.py --data_dir=FOLDER    # msr_paraphrase_*.txt
    python finetune_cls.py config/finetune_mrpc.py                      # from the hub

The base model: python train.py config/pretrain_imdb.py. A tenth of the local training file serves
as the dev set; the hub has a dev set of its own.
"""

# First what these recipes share: the base model, Muon and its learning rates, word dropout.
from config.muon_cls import *

out_dir = "out/finetune_mrpc"
train_file = "msr_paraphrase_train.txt"
test_file = "msr_paraphrase_test.txt"
dataset = "nyu-mll/glue:mrpc"
text_column = ["#1 String", "sentence1"]
text_pair_column = ["#2 String", "sentence2"]
label_column = ["Quality", "label"]
classes = ["0", "1"]
prompt = 'sentence 1 : " {text} " sentence 2 : " {text_pair} " do they say the same ?'
verbalizers = [" no", " yes"]

word_dropout = 0.1  # of short texts; no other was tried
epochs = 2
