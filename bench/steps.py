#!/usr/bin/env python3
"""Times decode steps over batches, depths and models, and shows them beside what the memory allows.

Runs `oracle steps` for every combination, and writes into a folder: steps.json with what was measured, steps.md with a
table, and for each model plots of the step's time over the batch and over the depth, each with its floor. The floor is
all weights that a step reads, and the keys and values of every sequence, over the memory's bandwidth. Every finished
combination is kept: a run that was cut short goes on where it ended.

    cargo build --release -p mirage-runtime --example oracle
    python3 bench/steps.py --model 0.6B=/tmp/ck --batch 1 2 4 8 16 --depth 64 1000 -o bench/results/steps
    python3 bench/steps.py --redraw -o bench/results/steps    # table and plots anew, from steps.json; needs no GPU
"""

import argparse
import json
import math
import pathlib
import re
import subprocess
import sys

# `oracle steps` times the steps 17 to 80 after the prompt; the cache must hold them all.
MEAN_STEP, LAST_STEP = 48, 80
LINE = re.compile(
    r"batch (\d+), position (\d+), temperature ([\d.]+): ([\d.]+) us a step \(min ([\d.]+), max ([\d.]+)\)"
)
COLOURS = ["#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#666666"]


def bytes_of_step(config):
    """Bytes of weights that a step reads, and bytes of keys and values of one position."""
    hidden, layers, heads = (config[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * hidden * config["intermediate_size"]
    return 2 * (layers * layer + hidden * config["vocab_size"]), 2 * 2 * layers * kv_heads * head_dim


def floor(model, batch, depth, gbps):
    """Microseconds that the memory takes for a step's bytes."""
    return (model["weight_bytes"] + batch * (depth + MEAN_STEP) * model["position_bytes"]) / (gbps * 1e3)


def measure(args, model, folder, batch, depth):
    """One run of the oracle: {temperature: [median, least, most]}, and the GPU's name."""
    max_seq = max(args.max_seq, depth + LAST_STEP + 1)
    command = [str(args.oracle.resolve()), "steps", str(args.graph), str(folder), str(batch), str(max_seq), str(depth)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr or done.stdout}")
    times = {temperature: [float(t) for t in times] for _, _, temperature, *times in LINE.findall(done.stdout)}
    if not times:
        sys.exit(f"{' '.join(command)} told no time:\n{done.stdout}")
    print(f"{model}, batch {batch}, depth {depth}: {times['0'][0]:.1f} us", flush=True)
    return times, done.stdout.split(":")[0]


def table(results):
    """Markdown."""
    lines = [
        f"# Step times on {results['gpu']}",
        "",
        "Microseconds of a decode step after a prompt of so many tokens: median of 5 (least, most). *Sampled* is temperature 0.8",
        f"with top-p 0.95. The floor is weights, keys and values over {results['gbps']:.0f} GB/s. Made by `bench/steps.py`.",
        "",
        "| model | batch | depth | floor | greedy | over the floor | sampled |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    cell = lambda times: "–" if times is None else f"{times[0]:.1f} ({times[1]:.1f}, {times[2]:.1f})"
    for p in results["points"]:
        least = floor(results["models"][p["model"]], p["batch"], p["depth"], results["gbps"])
        greedy = p["times"]["0"]
        sampled = next((times for key, times in p["times"].items() if key != "0"), None)
        lines.append(
            f"| {p['model']} | {p['batch']} | {p['depth']} | {least:.0f} | {cell(greedy)} |"
            f" {100 * (greedy[0] / least - 1):.0f} % | {cell(sampled)} |"
        )
    return "\n".join(lines) + "\n"


def ticks(most):
    """About five round numbers from zero to `most`."""
    step = 10 ** math.floor(math.log10(most / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step * 5.5 >= most)
    return [i * step for i in range(int(most / step) + 1)]


def plot(title, x_name, lines, log):
    """An SVG: `lines` of (name, [(x, measured, least, most, floor)]); `log` spaces x by its logarithm."""
    width, height, left, right, top, bottom = 720, 400, 70, 150, 40, 50
    xs = sorted({point[0] for _, points in lines for point in points})
    place = (lambda x: math.log2(x)) if log else (lambda x: x)
    low, high = place(xs[0]), place(xs[-1])
    most = 1.08 * max(point[3] for _, points in lines for point in points)
    across = lambda x: left + (width - left - right) * ((place(x) - low) / (high - low) if high > low else 0.5)
    up = lambda y: height - bottom - (height - top - bottom) * y / most
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{left}" y="24" font-size="15">{title}</text>',
    ]
    for y in ticks(most):
        out.append(f'<path d="M{left} {up(y):.1f}H{width - right}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 8}" y="{up(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in xs:
        out.append(f'<text x="{across(x):.1f}" y="{height - bottom + 18}" text-anchor="middle">{x}</text>')
    out.append(f'<text x="{(left + width - right) / 2}" y="{height - 10}" text-anchor="middle">{x_name}</text>')
    out.append(
        f'<text x="18" y="{(top + height - bottom) / 2}" text-anchor="middle"'
        f' transform="rotate(-90 18 {(top + height - bottom) / 2})">us a step</text>'
    )
    for index, (name, points) in enumerate(lines):
        colour = COLOURS[index % len(COLOURS)]
        for which, style in ((1, ""), (4, ' stroke-dasharray="5 4"')):
            path = "L".join(f"{across(p[0]):.1f} {up(p[which]):.1f}" for p in points)
            out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"{style}/>')
        for x, measured, least, greatest, _ in points:
            out.append(f'<circle cx="{across(x):.1f}" cy="{up(measured):.1f}" r="3" fill="{colour}"/>')
            out.append(f'<path d="M{across(x):.1f} {up(least):.1f}V{up(greatest):.1f}" stroke="{colour}"/>')
        y = top + 10 + 18 * index
        out.append(f'<path d="M{width - right + 14} {y}h24" stroke="{colour}" stroke-width="1.8"/>')
        out.append(f'<text x="{width - right + 44}" y="{y + 4}">{name}</text>')
    y = top + 10 + 18 * len(lines)
    out.append(f'<path d="M{width - right + 14} {y}h24" stroke="#222" stroke-dasharray="5 4" stroke-width="1.8"/>')
    out.append(f'<text x="{width - right + 44}" y="{y + 4}">floor</text>')
    return "\n".join(out + ["</svg>"]) + "\n"


def plots(results):
    """{file name: SVG}: a model's steps over the batch, a line a depth, and over the depth, a line a batch."""
    made = {}
    for model, facts in results["models"].items():
        points = [p for p in results["points"] if p["model"] == model]
        for over, along, log in (("batch", "depth", True), ("depth", "batch", False)):
            lines = []
            for value in sorted({p[along] for p in points}):
                line = sorted((p for p in points if p[along] == value), key=lambda p: p[over])
                row = lambda p: (p[over], *p["times"]["0"], floor(facts, p["batch"], p["depth"], results["gbps"]))
                lines.append((f"{along} {value}", [row(p) for p in line]))
            if len({x for _, line in lines for x, *_ in line}) > 1:
                made[f"{model}-over-{over}.svg"] = plot(f"{model}: a decode step over the {over}", over, lines, log)
    return made


def write(folder, results):
    folder.mkdir(parents=True, exist_ok=True)
    results["points"].sort(key=lambda p: (list(results["models"]).index(p["model"]), p["depth"], p["batch"]))
    files = {"steps.json": json.dumps(results, indent=1) + "\n", "steps.md": table(results), **plots(results)}
    for name, text in files.items():
        (folder / name).write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="NAME=DIR", nargs="+", default=[], help="checkpoints, and what to call them")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences at once [default: 1]")
    parser.add_argument("--depth", type=int, nargs="+", default=[64], help="tokens of the prompts [default: 64]")
    parser.add_argument("--max-seq", type=int, default=4096, help="positions of the cache, at least [default: 4096]")
    parser.add_argument("--gbps", type=float, default=3060.0, help="the memory's bandwidth, for the floor [default: an H100's 3060]")
    parser.add_argument("--graph", type=pathlib.Path, default=pathlib.Path("graphs/qwen3.ron"), help="[default: graphs/qwen3.ron]")
    parser.add_argument("--oracle", type=pathlib.Path, default=pathlib.Path("target/release/examples/oracle"), help="[default: target/release/examples/oracle]")
    parser.add_argument("--redraw", action="store_true", help="measure nothing")
    parser.add_argument("-o", "--output", type=pathlib.Path, required=True, help="folder of the results")
    args = parser.parse_args()
    file = args.output / "steps.json"
    results = json.loads(file.read_text()) if file.exists() else {"models": {}, "points": []}
    if args.redraw:
        if not results["points"]:
            parser.error(f"{file} holds nothing to draw")
        return write(args.output, results)
    if not args.oracle.is_file():
        parser.error(f"--oracle {args.oracle} is no file; `cargo build --release -p mirage-runtime --example oracle` makes it")
    if not args.model:
        parser.error("--model NAME=DIR names what to measure")
    results["gbps"] = args.gbps
    for given in args.model:
        model, _, folder = given.partition("=")
        config = pathlib.Path(folder) / "config.json"
        if not folder or not config.is_file():
            parser.error(f"--model {given}: give NAME=DIR with a checkpoint's folder; {config} is no file")
        weights, position = bytes_of_step(json.loads(config.read_text()))
        results["models"][model] = {"weight_bytes": weights, "position_bytes": position}
        for depth in args.depth:
            for batch in args.batch:
                here = {"model": model, "batch": batch, "depth": depth}
                if any(here.items() <= point.items() for point in results["points"]):
                    continue
                times, results["gpu"] = measure(args, model, folder, batch, depth)
                results["points"].append({**here, "times": times})
                write(args.output, results)


if __name__ == "__main__":
    main()
