"""Reads captions and their tokens from pycocoevalcap 1.2's PTBTokenizer, which runs in Java.

In the input of the tokenizer, the caption "zebra" follows each caption. Its output is split at all
spaces, as in the metrics.
"""

import json
import pathlib

LINES = pathlib.Path(__file__).with_suffix(".jsonl").read_text("utf-8").split("\n")
CAPTIONS = tuple(tuple(json.loads(line)) for line in LINES if line)
