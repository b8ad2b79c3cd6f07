"""Sentiment of movie reviews, negative or positive (Large Movie Review Dataset, Maas et al. 2011).

    python finetune_cls.py config/finetune_imdb.py --data_dir=FOLDER
    python finetune_cls.py config/finetune_imdb.py                      # from the hub
    python finetune_cls.py config/finetune_imdb.py --data_dir=FOLDER --mode=last_layer \\
        --epochs=20 --head_learning_rate=1e-2 --out_dir=out/finetune_imdb_last

The base model: python train.py config/pretrain_imdb.py. A tenth of the training set serves as
the dev set. FOLDER has train.jsonl.xz and test_10k.jsonl.xz (10,000 of the 25,000 test
reviews; another file: --test_file), one {"text": ..., "label": 0 or 1} per line.
"""

# First what these recipes share: the base model, Muon and its learning rates, word dropout.
from config.muon_cls import *

out_dir = "out/finetune_imdb"
train_file = "train.jsonl.xz"
test_file = "test_10k.jsonl.xz"
dataset = "stanfordnlp/imdb"
text_column = ["text"]
label_column = ["label"]
classes = ["0", "1"]
prompt = "{text} overall , this movie is"
verbalizers = [" bad", " good"]

keep = "tail"  # reviews conclude at their end
epochs = 3
