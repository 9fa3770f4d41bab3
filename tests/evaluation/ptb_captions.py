"""Reads captions and their tokens by pycocoevalcap 1.2's PTBTokenizer, which runs in Java.

Each caption was followed by the caption "zebra". Tokens are split at all spaces, as in the metrics.
"""

import json
import pathlib

LINES = pathlib.Path(__file__).with_suffix(".jsonl").read_text("utf-8").split("\n")
CAPTIONS = tuple(tuple(json.loads(line)) for line in LINES if line)
