"""The folder weights/, converted from the run of config/tinystories_box.py:

    python convert.py config/weights.py

Afterwards evaluate it, write the figures into `notes`, and convert once more.
"""

input = "out/tinystories_box"
out = "weights"
dtype = "float16"
licence = "cdla-sharing-1.0"
notes = """\
Validation: loss 1.7551, perplexity 5.78, 0.6391 bits per byte, on all 1,399,746 tokens of 7,002 validation stories
Evaluation: `python train.py --eval_only --init_from=weights --dataset=tinystories_4k`
Training: 9,750 steps, 39,936,000 tokens (ten epochs), 3 hours on one core (AMD Zen 4) in bfloat16
Command: `python train.py config/tinystories_box.py --dtype=bfloat16 --dataset=stories_98`, data as \
docs/tinystories.md prepares them
Data: 19,440 stories of TinyStories (Eldan and Li 2023, roneneldan/TinyStories), CDLA-Sharing-1.0; \
evaluated on 7,002 of its validation stories
On the hub's whole validation split, unmeasured: `python prepare_tinystories.py --name=hub \
--tokenizer=weights/tokenizer.json --limit=22000`, then `python train.py --eval_only \
--init_from=weights --dataset=hub`
Use: it writes short stories in the words of a small child, and knows nothing else\
""".splitlines()
