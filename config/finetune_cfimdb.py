"""Sentiment of whole movie reviews, negative or positive (CFIMDB).

    python finetune_cls.py config/finetune_cfimdb.py --data_dir=FOLDER  # CS224n's files
    python finetune_cls.py config/finetune_cfimdb.py --data_dir=FOLDER --mode=last_layer \\
        --epochs=20 --head_learning_rate=1e-2 --out_dir=out/finetune_cfimdb_last

The base model: python train.py config/pretrain_imdb.py. Some of the dev and test reviews are in
IMDB's training set: docs/base_text.py leaves out what shares 12 words in a row with one of them.
"""

# First what these recipes share: the base model, Muon and its learning rates, word dropout.
from config.muon_cls import *

out_dir = "out/finetune_cfimdb"
train_file = "ids-cfimdb-train.csv"
dev_file = "ids-cfimdb-dev.csv"
test_file = "ids-cfimdb-test-student.csv"
text_column = ["sentence"]
label_column = ["sentiment"]
classes = ["0", "1"]
prompt = "{text} overall , this movie is"
verbalizers = [" bad", " good"]

keep = "tail"  # the end of the few reviews longer than the context, where they conclude
epochs = 6
batch_size = 16
