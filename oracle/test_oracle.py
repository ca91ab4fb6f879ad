"""The oracle tried on itself with two-layer checkpoints, on the CPU:  python3 -m unittest discover oracle"""

import json
import tempfile
import unittest
from pathlib import Path

import numpy as np
import torch

from check import Limits, check
from logits import write_logits
from make_checkpoint import PRESETS, make
from make_prompts import lengths
from reference import load_model

PROMPTS = [[5], [7, 300, 21, 9], list(range(3, 60))]
POSITIONS = sum(map(len, PROMPTS))


class Oracle(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.prompts = self.folder / "prompts.json"
        self.prompts.write_text(json.dumps(PROMPTS))

    def failures(self, preset, dtype, damage=lambda logits: None):
        """What check() says about transformers' own logits of that type, after damage to them."""
        make(self.folder, preset, seed=3, device="cpu")
        raw = self.folder / "logits.f32"
        write_logits(load_model(self.folder, dtype, "cpu"), PROMPTS, raw)
        logits = np.memmap(raw, dtype="<f4", mode="r+", shape=(POSITIONS, PRESETS[preset][0]["vocab_size"]))
        damage(logits)
        logits.flush()
        return check(self.folder, self.prompts, raw, "cpu", Limits()).failures

    def test_float32_and_bfloat16_pass(self):
        for preset in ("qwen3-test", "qwen3-test-untied-sharded", "llama-test"):
            for dtype in (torch.float32, torch.bfloat16):
                with self.subTest(preset=preset, dtype=dtype):
                    self.assertEqual(self.failures(preset, dtype), [])

    def test_one_exchanged_argmax_is_found(self):
        def damage(logits):
            order = logits[20].argsort()
            logits[20, order[[-1, 0]]] = logits[20, order[[0, -1]]]

        found = self.failures("qwen3-test", torch.float32, damage)
        self.assertTrue(any("prompt 2, position 15: argmax" in line for line in found), found)

    def test_a_wrong_first_token_is_found(self):
        def damage(logits):
            logits[0] = logits[1]

        found = self.failures("qwen3-test", torch.float32, damage)
        self.assertTrue(any(line.startswith("prompt 0:") for line in found), found)

    def test_twice_the_noise_is_found(self):
        make(self.folder, "llama-test", seed=3, device="cpu")
        exact = self.folder / "exact.f32"
        write_logits(load_model(self.folder, torch.float32, "cpu"), PROMPTS, exact)
        reference = np.fromfile(exact, dtype="<f4").reshape(POSITIONS, -1)

        def damage(logits):
            logits += logits - reference

        found = self.failures("llama-test", torch.bfloat16, damage)
        self.assertTrue(any(line.startswith("error 2.0") for line in found), found)

    def test_not_a_number_is_found(self):
        def damage(logits):
            logits[4, 2] = np.nan

        self.assertIn("1 logits are not finite", self.failures("qwen3-test", torch.float32, damage))

    def test_lengths_reach_both_ends(self):
        sizes = lengths(32, 1, 600)
        self.assertEqual((len(sizes), sizes[0], sizes[-1]), (32, 1, 600))
        self.assertEqual(sizes, sorted(sizes))

    def test_shards_and_index_agree(self):
        make(self.folder, "qwen3-test-untied-sharded", seed=3, device="cpu")
        index = json.loads((self.folder / "model.safetensors.index.json").read_text())
        files = {file.name for file in self.folder.glob("*.safetensors")}
        self.assertGreater(len(files), 1)
        self.assertEqual(set(index["weight_map"].values()), files)
        self.assertIn("lm_head.weight", index["weight_map"])


if __name__ == "__main__":
    unittest.main()
