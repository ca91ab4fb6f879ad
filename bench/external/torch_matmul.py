#!/usr/bin/env python3
"""Puts PyTorch's matrix products beside the per-op baseline's, shape by shape: is the baseline a fair one?

Reads the shapes and our times from a results file of mirage-bench, and times torch.nn.functional.linear the way the
baseline is timed: as many different bfloat16 matrices of a shape as the model has, one after the other, replayed from a
CUDA graph, the fastest of some rounds. Before each round twice the L2 cache of other data is read, so that matrices come
from memory: where they lie would else decide how much of the last round's is still in the cache. Random values.

Once a process has used a few streams and graphs, the pauses between the kernels of every graph are 0.3 us longer than
before (H100, driver 580). An engine runs in that state, and so does the baseline: some graphs are replayed first.

    mirage-bench --output-json results.json
    python3 bench/external/torch_matmul.py results.json
"""

import argparse
import json
import pathlib

import torch

ROUNDS = 20
# Graphs that are recorded and replayed before any counts.
FIRST_GRAPHS = 8


def microseconds(batch, outputs, inputs, launches):
    matrices = [torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) for _ in range(launches)]
    x = torch.randn(batch, inputs, device="cuda", dtype=torch.bfloat16)
    cache = torch.cuda.get_device_properties().L2_cache_size
    others = torch.zeros(2 * cache // 4, device="cuda", dtype=torch.int32)
    multiply = torch.nn.functional.linear
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            multiply(x, matrices[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for matrix in matrices:
                multiply(x, matrix)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        fastest = float("inf")
        for _ in range(ROUNDS + 1):
            others.sum()
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            fastest = min(fastest, start.elapsed_time(end))
    return 1e3 * fastest / launches


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path, help="a results file of mirage-bench")
    parser.add_argument("-o", "--output", type=pathlib.Path, help="also write the table here, as markdown")
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    lines = [
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}; GB/s of weights",
        "",
        "| batch | product | matrix | per-op baseline | PyTorch | ratio |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for _ in range(FIRST_GRAPHS):
        microseconds(1, 1024, 1024, 8)
    for point in results["points"]:
        side = next((side for side in point["sides"] if side["matrix_products"]), None)
        for product in side["matrix_products"] if side else []:
            outputs, inputs = product["outputs"], product["inputs"]
            time = microseconds(point["batch"], outputs, inputs, product["launches"])
            theirs = 2 * outputs * inputs / time / 1e3
            lines.append(
                f"| {point['batch']} | {', '.join(product['values'])} | {outputs} x {inputs} | {product['gb_s']:.0f} "
                f"| {theirs:.0f} | {product['gb_s'] / theirs:.2f} |"
            )
    table = "\n".join(lines) + "\n"
    print(table)
    if args.output:
        args.output.write_text(table)


if __name__ == "__main__":
    main()
