"""Sentiment of whole movie reviews, negative or positive (CFIMDB).

    python finetune_cls.py config/finetune_cfimdb.py --data_dir=FOLDER  # CS224n's files
    python finetune_cls.py config/finetune_cfimdb.py --data_dir=FOLDER --mode=last_layer --epochs=10

The base model: python train.py config/pretrain_imdb.py. The text of some of the dev
reviews, which are also in IMDB's training set, may be in its data, but none of their labels.
"""

out_dir = "out/finetune_cfimdb"
init_from = "out/pretrain_imdb"
train_file = "ids-cfimdb-train.csv"
dev_file = "ids-cfimdb-dev.csv"
test_file = "ids-cfimdb-test-student.csv"
text_column = ["sentence"]
label_column = ["sentiment"]
classes = ["0", "1"]
lowercase = True
prompt = "{text} overall , this movie is"
verbalizers = [" bad", " good"]

keep = "tail"  # the end of the few reviews longer than the context, where they conclude
epochs = 6
batch_size = 16
learning_rate = 6e-4
head_learning_rate = 5e-3
