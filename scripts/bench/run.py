#!/usr/bin/env python3
"""dpo-lora against TRL + PEFT on the inputs of make_inputs.py: parity first, then speed and memory.

    cargo build --release
    python scripts/bench/run.py INPUTS --baselines default,tuned,best --repeats 2 --out results.md
    python scripts/bench/run.py INPUTS --binary target/cuda/sm_90/release/dpo-lora --memory 24 --device-batch default=8,tuned=8 ...

Every run is a fresh process, in the order A B B A; a figure is the median of its runs. Seconds are those of the reference
and of the updates, on both sides without imports and loading; tokens are those of all prompts with their completions,
without padding, on both sides. Losses of the first ten updates have to agree to 1e-3 of their size (3e-2 in bf16), else nothing
is timed. A binary with CUDA finds its libraries by LD_LIBRARY_PATH.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
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


def threads(facts: dict) -> dict:
    return {"RAYON_NUM_THREADS": "2"} if facts["device"] == "cpu" else {}


def device(facts: dict) -> list[str]:
    return ["--device", "cpu" if facts["device"] == "cpu" else "cuda:0"]


def ours(inputs: Path, facts: dict, binary: Path, gib: float | None) -> dict:
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "run"
        env = {**os.environ, "DPO_LORA_CACHE": str(Path(place) / "cache"), **threads(facts)}
        command = [binary, "run", inputs / "recipe.toml", "--out", out, "--json", "--quiet", *device(facts)]
        if gib:
            command += ["--set", f'train.memory="{gib:g}GiB"']
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


def trl(inputs: Path, mode: str, device_batch: int, gib: float | None) -> dict:
    env = {**os.environ, **(ALLOCATOR if mode == "best" else {})}
    command = [sys.executable, HERE / "trl_side.py", inputs, "--mode", mode, "--device-batch", str(device_batch)]
    if gib:
        command += ["--memory", str(gib)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"TRL {mode}, device batch {device_batch}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def total(run: dict) -> float:
    return run["seconds_reference"] + run["seconds_updates"]


def check_parity(a: dict, b: dict, facts: dict) -> str:
    worst = {}
    # bf16 rounds activations to 2^-9, and log-probs of some hundred nats by some hundredths
    tolerances = (1e-3, 1e-2) if facts["device"] == "cpu" else (3e-2, 1e-1)
    for name, tolerance in zip(("losses", "grad_norms"), tolerances):
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


def measured_peak(inputs: Path, facts: dict, binary: Path) -> float:
    """GFLOP/s of a large product, as `dpo-lora plan` measures it: in f32, where torch's is no higher, or by cuBLAS in bf16."""
    command = [binary, "plan", inputs / "recipe.toml", "--json", "--quiet", *device(facts)]
    env = {**os.environ, **threads(facts)}
    plans = [json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout) for _ in range(3)]
    return max(plan["time"]["product_flops_per_second"] for plan in plans) / 1e9


def machine(facts: dict) -> str:
    if facts["device"] == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader"]
        return subprocess.run(query, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[0]
    info = Path("/proc/cpuinfo").read_text()
    name = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), platform.processor())
    wide = "AVX-512" if "avx512f" in info else "AVX2" if "avx2" in info else "no AVX2"
    return f"{name}, {os.cpu_count()} processors, {wide}"


def versions(facts: dict) -> str:
    from importlib.metadata import version

    names = ("trl", "peft", "transformers", "torch") + (("bitsandbytes",) if facts["quant"] == "nf4" else ())
    return ", ".join(f"{name} {version(name)}" for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--baselines", default="default,tuned,best")
    parser.add_argument("--device-batch", default="default=4,tuned=2,best=1", help="pairs at once of each baseline, which an update's are a multiple of")
    parser.add_argument("--binary", type=Path, default=BINARY)
    parser.add_argument("--memory", type=float, help="GiB of the GPU (or of memory, for dpo-lora) that each side may take")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side")
    parser.add_argument("--force", action="store_true", help="on a machine that is not idle, too")
    parser.add_argument("--out", type=Path, default=Path("bench.md"))
    args = parser.parse_args()
    facts = {"batch_size": 8, "quant": "none", "device": "cpu"} | json.loads((args.inputs / "lengths.json").read_text())
    rows = len(facts["lengths"])

    free = idle()
    if free < 0.97 and not args.force:
        sys.exit(f"the machine is only {free:.0%} idle: figures would say nothing (--force measures all the same)")
    peak = measured_peak(args.inputs, facts, args.binary)
    device_batch = {mode: int(pairs) for mode, pairs in (item.split("=") for item in args.device_batch.split(","))}
    baselines = [mode for mode in args.baselines.split(",") if mode]
    runs = {"ours": [], **{mode: [] for mode in baselines}}

    def one(side: str) -> None:
        if side == "ours":
            run = ours(args.inputs, facts, args.binary, args.memory)
        else:
            run = trl(args.inputs, side, device_batch[side], args.memory if facts["device"] == "cuda" else None)
        runs[side].append(run)
        print(f"{side:8} {total(run):7.1f} s, {run['peak_memory_bytes'] / 2**30:.2f} GiB", file=sys.stderr, flush=True)

    one("ours")
    # in the order of the file; "best" sorts its rows, which changes what an update holds
    in_order = next((mode for mode in baselines if mode != "best"), "default")
    runs.setdefault(in_order, [])
    one(in_order)
    parity = check_parity(runs["ours"][0], runs[in_order][0], facts)
    print(parity, file=sys.stderr)
    for mode in baselines:
        for side in ((mode, "ours", "ours", mode) * args.repeats)[: 2 * args.repeats]:
            if len(runs[side]) < args.repeats * (len(baselines) if side == "ours" else 1):
                one(side)
    peak = max(peak, measured_peak(args.inputs, facts, args.binary))

    tokens, flop = runs["ours"][0]["tokens"], least_flop(facts)
    seconds = {side: statistics.median(map(total, of_side)) for side, of_side in runs.items()}
    commit = "unknown"
    if shutil.which("git"):
        revision = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(revision, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.strip() or commit
    base = {"none": "", "nf4": "the base in NF4, "}[facts["quant"]] + {"cpu": "f32, two threads", "cuda": "bf16"}[facts["device"]]
    most = f", at most {args.memory:g} GiB" if args.memory else ""
    p, c, r = (statistics.mean(side) for side in zip(*facts["lengths"]))
    lines = [
        f"{facts['shape']}, {rows} rows (prompt {p:.0f}, chosen {c:.0f}, rejected {r:.0f} tokens on average, {facts['max_length']} at"
        f" most), {tokens} tokens, one epoch, {facts['batch_size']} pairs an update, rank 16 on all linear layers, {base}{most}.",
        f"{machine(facts)}; {peak:.0f} GFLOP/s in a large product; {versions(facts)}; commit {commit}, {datetime.date.today()}.",
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
