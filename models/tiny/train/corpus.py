"""The corpus file of get_data.py, split into training and held-out documents."""

import gzip
import json
from pathlib import Path

DATA = Path(__file__).parent / "data" / "corpus.jsonl.gz"
HELD_OUT_EVERY = 40  # one document in 40 of every source, so 2.5 %


def load(path: Path = DATA) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Training and held-out texts, each as {source: [text of one document]}."""
    if not path.exists():
        raise SystemExit(f"{path}: the corpus is not there; run get_data.py first")
    train, held_out, seen = {}, {}, {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            source = record["source"]
            seen[source] = seen.get(source, 0) + 1
            side = held_out if seen[source] % HELD_OUT_EVERY == HELD_OUT_EVERY // 2 else train
            side.setdefault(source, []).append(record["text"])
    return train, held_out
