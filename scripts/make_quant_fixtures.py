"""Makes tests/fixtures/quant: what gguf and bitsandbytes make of quantized matrices.

    venv/bin/pip install -r scripts/requirements-fixtures.txt gguf==0.19.0 bitsandbytes==0.50.2
    venv/bin/python scripts/make_quant_fixtures.py

    blocks.safetensors   for each block type of GGUF: `<type>.bytes`, random blocks, and `<type>.values`, what gguf's own
                         dequantization makes of them
    nf4.safetensors      `weight` [24, 832] and, under bitsandbytes' names, what it makes of it with double quantization;
                         `dequantized`, what it makes of that; `plain.*` without double quantization
"""

import json
from importlib.metadata import version
from pathlib import Path

import bitsandbytes.functional as bnb
import gguf
import numpy as np
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "quant"
# where each block type has its f16 scales: random bytes there would be infinities
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}


def blocks(random, kind):
    size, length = gguf.GGML_QUANT_SIZES[kind]
    made = random.integers(0, 256, (6, length), dtype=np.uint8)
    for at in SCALES[kind.name]:
        scale = (random.standard_normal(6) * 0.05).astype(np.float16)
        made[:, at:at + 2] = scale.view(np.uint8).reshape(6, 2)
    return made


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    tensors = {}
    for name in SCALES:
        kind = gguf.GGMLQuantizationType[name]
        made = blocks(random, kind)
        tensors[f"{name}.bytes"] = made
        tensors[f"{name}.values"] = gguf.dequantize(made, kind).astype(np.float32)
    half = random.standard_normal((2, 32)).astype(np.float32)
    for name in ("F16", "BF16"):
        kind = gguf.GGMLQuantizationType[name]
        made = gguf.quantize(half, kind)
        tensors[f"{name}.bytes"] = made.view(np.uint8)
        tensors[f"{name}.values"] = gguf.dequantize(made, kind).astype(np.float32)
    save_numpy(tensors, OUT / "blocks.safetensors")

    torch.manual_seed(1)
    # 312 blocks of 64: more than one block of scales
    weight = torch.randn(24, 832) * torch.rand(24, 1) * 0.1
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
    tensors = {"weight": weight, "packed": packed, "dequantized": bnb.dequantize_4bit(packed, state)}
    for key, value in state.as_dict(packed=True).items():
        tensors[f"state.{key}"] = value
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=False, blocksize=64)
    tensors |= {"plain.packed": packed, "plain.absmax": state.absmax, "plain.dequantized": bnb.dequantize_4bit(packed, state)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, OUT / "nf4.safetensors")
    print({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
    print(json.loads(bytes(tensors["state.quant_state.bitsandbytes__nf4"].tolist())))
    print("gguf", version("gguf"), "bitsandbytes", version("bitsandbytes"))


if __name__ == "__main__":
    main()
