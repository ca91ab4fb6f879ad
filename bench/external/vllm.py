#!/usr/bin/env python3
"""Measures vLLM and writes a file that `mirage-bench --external FILE` takes into its report.

Same prompts file, token counts and sampling as mirage-bench; the prompts' order is the file's. Needs a GPU and
`pip install vllm`. The format is described in bench/src/external.rs; write it for any other engine likewise.

    python3 bench/external/vllm.py --model Qwen/Qwen3-0.6B --batch-sizes 1 2 4 8 16 -o vllm.json
    mirage-bench --batch-sizes 1 2 4 8 16 --external vllm.json
"""

import argparse
import json
import pathlib
import time


def read_prompts(path):
    """The prompt file's format: see its own head."""
    prompts = []
    for line in pathlib.Path(path).read_text(encoding="utf-8-sig").split("\n"):
        line = line.strip()
        if not line or line[0] in "#@":
            continue
        prompts.append(json.loads(line) if line[0] == '"' else line)
    return prompts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--prompts", default=pathlib.Path(__file__).parent.parent / "prompts" / "test_prompts.txt")
    parser.add_argument("--max-tokens", type=int, default=50)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--num-warmup", type=int, default=5)
    parser.add_argument("--num-iterations", type=int, default=5)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("-o", "--output", default="vllm.json")
    args = parser.parse_args()

    import torch
    import vllm

    engine = vllm.LLM(model=args.model, dtype="bfloat16", max_model_len=4096, seed=0)
    tokenizer = engine.get_tokenizer()
    prompts = [{"prompt_token_ids": tokenizer.encode(text)} for text in read_prompts(args.prompts)]
    sampling = vllm.SamplingParams(
        max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, ignore_eos=True, seed=0
    )
    points, start = [], 0
    for batch in args.batch_sizes:
        iterations = []
        for index in range(args.num_warmup + args.num_iterations):
            chosen = [prompts[(start + at) % len(prompts)] for at in range(batch)]
            start += batch
            begin = time.perf_counter()
            outputs = engine.generate(chosen, sampling, use_tqdm=False)
            latency = time.perf_counter() - begin
            if index >= args.num_warmup:
                tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
                iterations.append({"latency_ms": 1e3 * latency, "tokens": tokens})
        points.append({"batch": batch, "iterations": iterations})
    results = {
        "format": "mirage-external",
        "version": 1,
        "engine": f"vLLM {vllm.__version__}",
        "description": f"bfloat16, CUDA graphs, PyTorch {torch.__version__}",
        "device": torch.cuda.get_device_name(),
        "points": points,
    }
    pathlib.Path(args.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
