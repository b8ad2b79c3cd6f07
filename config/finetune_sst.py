"""Sentiment of sentences from movie reviews in 5 classes, very negative to very positive (SST).

    python finetune_cls.py config/finetune_sst.py --data_dir=FOLDER     # CS224n's files
    python finetune_cls.py config/finetune_sst.py --data_dir=FOLDER --mode=last_layer \\
        --epochs=20 --head_learning_rate=1e-2 --out_dir=out/finetune_sst_last
    python finetune_cls.py config/finetune_sst.py                       # from the hub

The base model: python train.py config/pretrain_imdb.py.
"""

# First what these recipes share: the base model, Muon and its learning rates, word dropout.
from config.muon_cls import *

out_dir = "out/finetune_sst"
train_file = "ids-sst-train.csv"
dev_file = "ids-sst-dev.csv"
test_file = "ids-sst-test-student.csv"
dataset = "SetFit/sst5"
text_column = ["sentence", "text"]
label_column = ["sentiment", "label"]
classes = ["0", "1", "2", "3", "4"]
prompt = "{text} overall , this movie is"
verbalizers = [" terrible", " bad", " okay", " good", " great"]

epochs = 3
