"""Captions, and what pycocoevalcap 1.2 makes of them: its PTBTokenizer, run in Java.

Each caption was followed by the caption "zebra". The tokens are those that the metrics compare,
split at all spaces.
"""

import json
import pathlib

LINES = pathlib.Path(__file__).with_suffix(".jsonl").read_text("utf-8").split("\n")
CAPTIONS = tuple(tuple(json.loads(line)) for line in LINES if line)
