"""Writes random token prompts as JSON: a list of lists of ids.

    python3 make_prompts.py --vocab 151936 --seed 1 --count 32 --min 1 --max 600 --out prompts.json
    python3 make_prompts.py --vocab 151936 --seed 2 --count 0 --depth 4000 --out deep.json

Lengths are spread evenly on a logarithmic scale, the first exactly --min and the last exactly --max; --depth adds
prompts of exactly that length (repeatable). Random ids reach every row of the embedding, which text would not.
"""

import argparse
import json
import random
from pathlib import Path


def lengths(count: int, shortest: int, longest: int) -> list[int]:
    """count lengths from shortest to longest, evenly spaced in their logarithm."""
    if count == 1:
        return [longest]
    return [round(shortest * (longest / shortest) ** (i / (count - 1))) for i in range(count)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, required=True, help="ids are drawn below this")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=32, help="prompts of spread lengths")
    parser.add_argument("--min", type=int, default=1)
    parser.add_argument("--max", type=int, default=600)
    parser.add_argument("--depth", type=int, action="append", default=[], help="one more prompt of this length")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if not 1 <= arguments.min <= arguments.max:
        parser.error("--min and --max: 1 <= min <= max")

    rng = random.Random(arguments.seed)
    sizes = lengths(arguments.count, arguments.min, arguments.max) + arguments.depth
    prompts = [[rng.randrange(arguments.vocab) for _ in range(size)] for size in sizes]
    arguments.out.write_text(json.dumps(prompts) + "\n")
    print(f"{arguments.out}: {len(prompts)} prompts, {sum(sizes)} tokens, lengths {sizes}")


if __name__ == "__main__":
    main()
