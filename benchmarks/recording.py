"""What recording costs: `python -m benchmarks recording`.

A Llama of 6 layers at 1,024 tokens is run eagerly with its weights returned, as transformers has it, and recorded as
it is, in turns, on one thread. In a process of its own, attention of 8 layers of 4 heads at 8,192 tokens is recorded,
counted and shown on a page. Fails where recording takes more than 1.6 × the eager run's time, keeps more than a tenth
of its weights' bytes, or where the process needs more than 1 GB.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch.nn import functional as F

from benchmarks import memory
from regard.look import page, record, table

TOKENS, LONG, LAYERS = 1024, 8192, 8
SLOWER, KEPT, PEAK = 1.6, 0.1, 1e9  # of the eager run's time, of its weights' bytes, in bytes


def main() -> int:
    parser = argparse.ArgumentParser(description="What recording costs in time and memory.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--long", action="store_true", help="the long sequence, in this process")
    options = parser.parse_args()
    if options.long:
        print(long())
        return 0
    slower, kept = short(options.rounds)
    command = [sys.executable, "-m", "benchmarks.recording", "--long"]
    root = Path(__file__).parents[1]
    peak = float(subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True).stdout)
    eager = LAYERS * 4 * LONG * LONG * 4
    bars = (
        (f"time of recording, of the eager run's with weights, {TOKENS:,} tokens", slower, SLOWER),
        ("bytes kept, of those of the weights", kept, KEPT),
        (
            f"peak GB of record, statistics and page, {LONG:,} tokens, {LAYERS} × 4 heads; weights: {eager / 1e9:.1f}",
            peak / 1e9,
            PEAK / 1e9,
        ),
    )
    for name, found, bar in bars:
        print(f"{'missed' if found > bar else 'met':7} {found:6.3f} ≤ {bar:5.3f}  {name}")
    return int(any(found > bar for _, found, bar in bars))


def short(rounds: int) -> tuple[float, float]:
    """Time of a recorded run over that of an eager one, medians; and bytes kept over the weights'."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    models = {}
    for attention in ("sdpa", "eager"):
        config = transformers.LlamaConfig(
            vocab_size=1000, hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8,
            num_key_value_heads=2,
        )  # fmt: skip
        models[attention] = transformers.LlamaModel._from_config(config, attn_implementation=attention).eval()
    models["eager"].load_state_dict(models["sdpa"].state_dict())
    ids = torch.randint(1000, (1, TOKENS))
    times: dict[str, list[float]] = {"plain": [], "recorded": [], "eager": []}
    kept = 0.0
    with torch.no_grad():
        for _ in range(rounds + 1):
            start = perf_counter()
            models["sdpa"](ids)
            times["plain"].append(perf_counter() - start)
            start = perf_counter()
            with record(models["sdpa"]) as seen:
                models["sdpa"](ids)
            times["recorded"].append(perf_counter() - start)
            start = perf_counter()
            weights = models["eager"](ids, output_attentions=True).attentions
            times["eager"].append(perf_counter() - start)
            both = zip(seen, weights, strict=True)
            apart = max((each.weights() - expected).abs().max().item() for each, expected in both)
            if not apart <= 1e-5:
                raise SystemExit(f"the recorded weights are off by {apart}")
            kept = seen.nbytes / sum(x.nbytes for x in weights)
    found = {name: median(each[1:]) for name, each in times.items()}
    print(", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in found.items()))
    return found["recorded"] / found["eager"], kept


def long() -> float:
    """Bytes that this process needs at most, what torch itself takes included."""
    torch.manual_seed(0)

    x = torch.randn(1, 4, LONG, 64)
    with record(torch.nn.Identity()) as seen:
        for _ in range(LAYERS):
            x = torch.randn_like(x) + F.scaled_dot_product_attention(x, torch.randn_like(x), x, is_causal=True)
    table(seen)
    with tempfile.TemporaryDirectory() as folder:
        page(seen, path=Path(folder, "page.html"))
    return 2**20 * memory.status("VmHWM")


if __name__ == "__main__":
    sys.exit(main())
