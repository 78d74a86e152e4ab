#!/usr/bin/env python3
"""dpo-lora against TRL + PEFT on the inputs of make_inputs.py: parity first, then speed and memory.

    cargo build --release
    python scripts/bench/run.py INPUTS --baselines default,tuned,best --repeats 2 --out results.md

Every run is a fresh process, in the order A B B A; a figure is the median of its runs. Seconds are those of the reference
and of the updates, on both sides without imports and loading; tokens are those of all prompts with their completions,
without padding, on both sides. Losses of the first ten updates have to agree to 1e-3 of their size, else nothing is timed.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BINARY = HERE.parent.parent / "target" / "release" / "dpo-lora"
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TOP_PAD_": "67108864"}


def idle(seconds: float = 2.0) -> float:
    """The share of all processors' time that nobody used, and that no neighbour of a virtual machine took."""

    def read():
        return list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]))

    before = read()
    time.sleep(seconds)
    spent = [b - a for a, b in zip(before, read())]
    return (spent[3] + spent[4]) / max(sum(spent), 1)


def ours(inputs: Path) -> dict:
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "run"
        env = {**os.environ, "DPO_LORA_CACHE": str(Path(place) / "cache"), "RAYON_NUM_THREADS": "2"}
        command = [BINARY, "run", inputs / "recipe.toml", "--out", out, "--json", "--quiet"]
        summary = json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seen, updates = 0, 0.0
    for line in lines:
        updates += (line["num_tokens"] - seen) / line["tokens_per_sec"]
        seen = line["num_tokens"]
    return {
        "seconds_reference": summary["reference"]["seconds"],
        "seconds_updates": updates,
        "losses": [line["loss"] for line in lines],
        "grad_norms": [line["grad_norm"] for line in lines],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "tokens": seen,
    }


def trl(inputs: Path, mode: str, device_batch: int) -> dict:
    env = {**os.environ, **(ALLOCATOR if mode == "best" else {})}
    command = [sys.executable, HERE / "trl_side.py", inputs, "--mode", mode, "--device-batch", str(device_batch)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"TRL {mode}, device batch {device_batch}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def total(run: dict) -> float:
    return run["seconds_reference"] + run["seconds_updates"]


def check_parity(a: dict, b: dict) -> str:
    worst = {}
    for name, tolerance in (("losses", 1e-3), ("grad_norms", 1e-2)):
        pairs = list(zip(a[name], b[name]))[:10]
        worst[name] = max(abs(x - y) / abs(y) for x, y in pairs)
        if len(a[name]) != len(b[name]) or not worst[name] <= tolerance:
            sys.exit(f"no parity: {name} differ by {worst[name]:.1e}\n  ours {a[name]}\n  TRL  {b[name]}")
    return f"losses of {len(pairs)} updates agree to {worst['losses']:.0e}, gradient norms to {worst['grad_norms']:.0e}"


def least_flop(facts: dict, rank: int = 16) -> float:
    """Operations that the work takes at the least, the reference once: prompts shared, completion rows scored, logits once."""
    d, layers, f, vocabulary = (facts[k] for k in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"))
    q = d
    k = d // facts["num_attention_heads"] * facts["num_key_value_heads"]
    linears = 2 * d * q + 2 * d * k + 3 * d * f
    adapters = layers * rank * (2 * (d + q) + 2 * (d + k) + 3 * (d + f))

    def causal(n):
        return n * (n + 1) // 2

    flop = 0
    for p, *sides in facts["lengths"]:
        rows = p + sum(c - 1 for c in sides)
        scored, seen = sum(sides), causal(p) + sum(c * p + causal(c) for c in sides)
        forward = 2 * layers * linears * rows - 2 * p * (linears - 2 * d * k)
        backward = forward - 2 * rows * d * (q + 2 * k)
        attention = 4 * q * layers * seen
        head = 2 * d * vocabulary * scored
        flop += forward + backward + 3.5 * attention + 6 * adapters * rows + 2 * head
        flop += 2 * layers * linears * rows + attention + head
    return flop


def measured_peak(inputs: Path) -> float:
    """GFLOP/s of a large product in f32, as `dpo-lora plan` measures it; torch's is no higher."""
    command = [BINARY, "plan", inputs / "recipe.toml", "--json", "--quiet"]
    env = {**os.environ, "RAYON_NUM_THREADS": "2"}
    plans = [json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout) for _ in range(3)]
    return max(plan["time"]["product_flops_per_second"] for plan in plans) / 1e9


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text()
    name = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), platform.processor())
    wide = "AVX-512" if "avx512f" in info else "AVX2" if "avx2" in info else "no AVX2"
    return f"{name}, {os.cpu_count()} processors, {wide}"


def versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("trl", "peft", "transformers", "torch"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--baselines", default="default,tuned,best")
    parser.add_argument("--device-batch", default="default=4,tuned=2,best=1", help="pairs at once of each baseline: 1, 2, 4 or 8")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side")
    parser.add_argument("--force", action="store_true", help="on a machine that is not idle, too")
    parser.add_argument("--out", type=Path, default=Path("bench.md"))
    args = parser.parse_args()
    facts = json.loads((args.inputs / "lengths.json").read_text())
    rows = len(facts["lengths"])

    free = idle()
    if free < 0.97 and not args.force:
        sys.exit(f"the machine is only {free:.0%} idle: figures would say nothing (--force measures all the same)")
    peak = measured_peak(args.inputs)
    device_batch = {mode: int(pairs) for mode, pairs in (item.split("=") for item in args.device_batch.split(","))}
    baselines = [mode for mode in args.baselines.split(",") if mode]
    runs = {"ours": [], **{mode: [] for mode in baselines}}

    def one(side: str) -> None:
        run = ours(args.inputs) if side == "ours" else trl(args.inputs, side, device_batch[side])
        runs[side].append(run)
        print(f"{side:8} {total(run):7.1f} s, {run['peak_memory_bytes'] / 2**30:.2f} GiB", file=sys.stderr, flush=True)

    one("ours")
    # in the order of the file; "best" sorts its rows, which changes what an update holds
    in_order = next((mode for mode in baselines if mode != "best"), "default")
    runs.setdefault(in_order, [])
    one(in_order)
    parity = check_parity(runs["ours"][0], runs[in_order][0])
    print(parity, file=sys.stderr)
    for mode in baselines:
        for side in ((mode, "ours", "ours", mode) * args.repeats)[: 2 * args.repeats]:
            if len(runs[side]) < args.repeats * (len(baselines) if side == "ours" else 1):
                one(side)
    peak = max(peak, measured_peak(args.inputs))

    tokens, flop = runs["ours"][0]["tokens"], least_flop(facts)
    seconds = {side: statistics.median(map(total, of_side)) for side, of_side in runs.items()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, stdout=subprocess.PIPE, text=True).stdout.strip()
    p, c, r = (statistics.mean(side) for side in zip(*facts["lengths"]))
    lines = [
        f"{facts['shape']}, {rows} rows (prompt {p:.0f}, chosen {c:.0f}, rejected {r:.0f} tokens on average, {facts['max_length']} at"
        f" most), {tokens} tokens, one epoch, 8 pairs an update, rank 16 on all linear layers, f32, two threads.",
        f"{machine()}; {peak:.0f} GFLOP/s in a large product; {versions()}; commit {commit}, {datetime.date.today()}.",
        f"Parity: {parity}.",
        "",
        "| | device batch | seconds (reference) | runs | tokens/s | pairs/s | peak memory | ours is | of the GEMM peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for side, of_side in runs.items():
        reference = statistics.median(run["seconds_reference"] for run in of_side)
        memory = max(run["peak_memory_bytes"] for run in of_side)
        fastest, slowest = min(map(total, of_side)), max(map(total, of_side))
        name = "dpo-lora" if side == "ours" else f"TRL {side}"
        ratio = "" if side == "ours" else f"{seconds[side] / seconds['ours']:.2f} times as fast"
        lines.append(
            f"| {name} | {'' if side == 'ours' else device_batch[side]} | {seconds[side]:.1f} ({reference:.1f}) |"
            f" {len(of_side)}: {fastest:.1f} to {slowest:.1f} | {tokens / seconds[side]:.0f} | {rows / seconds[side]:.3f} |"
            f" {memory / 2**30:.2f} GiB | {ratio} | {flop / seconds[side] / peak / 1e9:.0%} |"
        )
    text = "\n".join(lines) + "\n"
    args.out.write_text(text)
    args.out.with_suffix(".json").write_text(json.dumps({"facts": facts, "flop": flop, "peak_gflops": peak, "runs": runs}))
    print(text)


if __name__ == "__main__":
    main()
