"""Sentiment of whole movie reviews, negative or positive (CFIMDB).

    python finetune_cls.py config/finetune_cfimdb.py --data_dir=FOLDER  # CS224n's files
    python finetune_cls.py config/finetune_cfimdb.py --data_dir=FOLDER --mode=last_layer --epochs=10

The body: python train.py config/pretrain_imdb.py. It may have read the text of some of the dev
reviews, which are in IMDB's training set too, but no label of them.
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

keep = "tail"  # of the few reviews longer than the context: where they conclude
epochs = 6
batch_size = 16
learning_rate = 6e-4
head_learning_rate = 5e-3
