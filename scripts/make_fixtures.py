"""Makes tests/fixtures/golden: what transformers, PEFT, TRL and torch compute on tiny random models of every family.

    python -m venv venv && venv/bin/pip install -r scripts/requirements-fixtures.txt
    venv/bin/python scripts/make_fixtures.py

Made with Python 3.11, torch 2.15.0, transformers 5.23.0, peft 0.21.2, trl 1.16.0, on a CPU; another version stops the
script. The models and the adapters are stored in f32; everything computed from them is computed in f64, so that the
tests measure this project's rounding and not the reference's. For that norms and softmax are kept from casting to
f32 (as transformers always does); rope's angles, cosines and sines stay in f32, as transformers has them.

    <model>/config.json, model.safetensors    a model folder, as save_pretrained writes it
    <model>/golden.json                        token ids; what transformers' generate answers to a prompt
    <model>/golden.safetensors                 `logits` [T, V] of `ids`, `inverse_frequencies` [E/2]
    <model>/<adapter>/adapter_*                as PEFT's save_pretrained writes them, B not zero
    <model>/<adapter>/golden.json              pairs: per-token scores with the adapter, log-probs without; DPO's loss
    <model>/<adapter>/gradients.safetensors    of DPO's loss (beta 0.1, mean over the pairs), under PEFT's names
    gqa/all/adamw-*.json                       ten steps on those pairs: the log of TRL's DPOTrainer, and of the same
                                               steps by torch.optim.AdamW in f64, with which TRL has to agree
    gqa/all/adamw-*.safetensors                the adapter after them (adamw-loraplus: PEFT's LoRA+ optimizer)
    gqa/{pissa,olora}.safetensors              s·B·A of those initialisations, under the modules' paths
"""

import importlib.metadata
import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.smollm3.modeling_smollm3 import SmolLM3RMSNorm
from trl import DPOConfig, DPOTrainer

OUT = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "golden"
BETA = 0.1


def check_versions():
    for line in (Path(__file__).parent / "requirements-fixtures.txt").read_text().split():
        package, wanted = line.split("==")
        found = importlib.metadata.version(package).split("+")[0]
        assert found == wanted, f"{package} is {found}, the fixtures are made with {wanted}"


def norm_in_own_dtype(self, x):
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def gemma_norm_in_own_dtype(self, x):
    return (1 + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def softmax_in_own_dtype(x, dim=None, dtype=None, softmax=torch.nn.functional.softmax):
    return softmax(x, dim=dim)


for norm in (LlamaRMSNorm, MistralRMSNorm, Phi3RMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, SmolLM3RMSNorm):
    norm.forward = norm_in_own_dtype
for norm in (Gemma2RMSNorm, Gemma3RMSNorm):
    norm.forward = gemma_norm_in_own_dtype
torch.nn.functional.softmax = softmax_in_own_dtype

COMMON = dict(num_hidden_layers=2, bos_token_id=None, pad_token_id=None, max_position_embeddings=128)
MODELS = {
    # heads x head_dim is not the hidden size, as in some real models
    "gqa": dict(hidden_size=24, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                vocab_size=61, rms_norm_eps=1e-5),
    "tied": dict(hidden_size=16, intermediate_size=28, num_attention_heads=4, num_key_value_heads=1, vocab_size=53,
                 tie_word_embeddings=True, rms_norm_eps=1e-6),
    # wavelengths 6.3, 63, 628 and 6283: one kept, one blended, two divided
    "llama3": dict(hidden_size=16, intermediate_size=20, num_attention_heads=2, num_key_value_heads=2, vocab_size=47,
                   rope_parameters=dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0,
                                        high_freq_factor=4.0, original_max_position_embeddings=64)),
    "bias": dict(hidden_size=16, intermediate_size=20, num_attention_heads=4, num_key_value_heads=2, vocab_size=47,
                 attention_bias=True, mlp_bias=True),
    # the other families, each with what sets it apart in use; windows are shorter than the sequences
    "mistral": dict(model_type="mistral", hidden_size=16, intermediate_size=20, num_attention_heads=2, head_dim=6,
                    num_key_value_heads=1, vocab_size=47, sliding_window=4),
    "qwen2": dict(model_type="qwen2", hidden_size=16, intermediate_size=20, num_attention_heads=4,
                  num_key_value_heads=2, vocab_size=47, tie_word_embeddings=True, use_sliding_window=True,
                  sliding_window=5, max_window_layers=1),
    "qwen3": dict(model_type="qwen3", hidden_size=16, intermediate_size=20, num_attention_heads=4, head_dim=6,
                  num_key_value_heads=2, vocab_size=47),
    # caps that bend the scores and the logits
    "gemma2": dict(model_type="gemma2", hidden_size=16, intermediate_size=20, num_attention_heads=2, head_dim=6,
                   num_key_value_heads=1, vocab_size=47, query_pre_attn_scalar=10, sliding_window=4,
                   attn_logit_softcapping=1.5, final_logit_softcapping=3.0),
    "gemma3": dict(model_type="gemma3_text", hidden_size=16, intermediate_size=20, num_attention_heads=2, head_dim=6,
                   num_key_value_heads=1, vocab_size=47, query_pre_attn_scalar=10, sliding_window=4,
                   layer_types=["sliding_attention", "full_attention"],
                   rope_parameters=dict(
                       sliding_attention=dict(rope_type="default", rope_theta=100.0),
                       full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1000.0))),
    # sequences above 8 tokens take the long factors
    "phi3": dict(model_type="phi3", hidden_size=16, intermediate_size=20, num_attention_heads=2, num_key_value_heads=1,
                 vocab_size=47, sliding_window=6, max_position_embeddings=64, original_max_position_embeddings=8,
                 rope_parameters=dict(rope_type="longrope", rope_theta=100.0, original_max_position_embeddings=8,
                                      short_factor=[1.0, 1.1, 1.3, 1.5], long_factor=[1.2, 2.0, 3.5, 6.0])),
    "smollm3": dict(model_type="smollm3", hidden_size=16, intermediate_size=20, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=47, no_rope_layers=[0, 1],
                    layer_types=["full_attention", "full_attention"]),
}
# Gemma 2's caps are only in transformers' own attention
ATTENTION = {"gemma2": "eager"}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    ("gqa", "all"): dict(r=4, lora_alpha=6, target_modules=ALL),
    ("gqa", "rslora"): dict(r=4, lora_alpha=3, target_modules=ALL, use_rslora=True),
    ("gqa", "subset"): dict(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"]),
    ("gqa", "dora"): dict(r=3, lora_alpha=5, target_modules=ALL, use_dora=True),
    ("gqa", "patterns"): dict(r=4, lora_alpha=6, target_modules=ALL, layers_to_transform=[1], use_rslora=True,
                              rank_pattern={"down_proj": 3, "v_proj": 1}, alpha_pattern={"q_proj": 9}),
    ("tied", "all"): dict(r=2, lora_alpha=3, target_modules=ALL),
    ("llama3", "all"): dict(r=2, lora_alpha=3, target_modules=ALL),
    ("bias", "all"): dict(r=2, lora_alpha=3, target_modules=ALL),
    ("bias", "dora"): dict(r=2, lora_alpha=3, target_modules=ALL, use_dora=True),
    **{(family, "all"): dict(r=2, lora_alpha=3, target_modules=ALL)
       for family in ("mistral", "qwen2", "qwen3", "gemma2", "gemma3", "smollm3")},
    ("phi3", "all"): dict(r=2, lora_alpha=3, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
}


def make_model(folder, config):
    """Random weights of the size that trained ones have: another scale anywhere would change the logits."""
    options = COMMON | dict(model_type="llama", eos_token_id=config["vocab_size"] - 1) | config
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options), dtype=torch.float32)
    centre = 0 if "gemma" in options["model_type"] else 1
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(centre + 0.3 * torch.randn_like(weight))
            elif weight.dim() == 1:
                weight.copy_(0.5 * torch.randn_like(weight))
            elif "embed_tokens" in name or "lm_head" in name:
                # Gemma's, which are scaled and tied, would else only repeat their token
                weight.copy_((0.2 if centre == 0 else 0.6) * torch.randn_like(weight))
            else:
                weight.copy_(1.3 * weight.shape[1] ** -0.5 * torch.randn_like(weight))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()


def load(folder):
    attention = ATTENTION.get(folder.name, "sdpa")
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).double().eval()


@torch.no_grad()
def logits_of(model, ids):
    return model(torch.tensor([ids])).logits[0]


@torch.no_grad()
def greedy(model, prompt, tokens=12):
    """What transformers' generate says, where no step is so near a tie that rounding could decide it."""
    prompt = torch.tensor([prompt])
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
                            eos_token_id=None, pad_token_id=0)[0].tolist()
    top = logits_of(model, answer)[prompt.shape[1] - 1:-1].topk(2).values
    assert (top[:, 0] - top[:, 1]).min() > 2e-3, "a near tie: take another prompt"
    return answer[prompt.shape[1]:]


def make_pairs(model, lengths):
    """Pairs of the given (prompt, chosen, rejected) lengths; completions end in the last token, the end of text."""
    end = model.config.vocab_size - 1
    draw = lambda n: torch.randint(0, end, (n,)).tolist()
    pairs = [dict(prompt=draw(p), chosen=draw(c - 1) + [end], rejected=draw(r - 1) + [end]) for p, c, r in lengths]
    # random tokens are hardly ever the most probable ones: the last pair chooses those
    pairs[-1]["chosen"] = greedy(model, pairs[-1]["prompt"], lengths[-1][1] - 1) + [end]
    return pairs


def token_scores(model, prompt, completion):
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1:-1]
    logps = logits.log_softmax(-1)
    targets = torch.tensor(completion)
    return dict(
        logps=logps.gather(-1, targets[:, None])[:, 0],
        entropies=-(logps.exp() * logps).sum(-1),
        mean_logits=logits.mean(-1),
        top1=logits.argmax(-1) == targets,
    )


def dpo_loss(model, pairs):
    """TRL's sigmoid loss, mean over the pairs; the reference is the model with its adapter disabled."""
    margins = []
    for pair in pairs:
        sides = [token_scores(model, pair["prompt"], pair[side])["logps"].sum() for side in ("chosen", "rejected")]
        with torch.no_grad(), model.disable_adapter():
            reference = [token_scores(model, pair["prompt"], pair[side])["logps"].sum()
                         for side in ("chosen", "rejected")]
        margins.append((sides[0] - reference[0]) - (sides[1] - reference[1]))
    return -torch.nn.functional.logsigmoid(BETA * torch.stack(margins)).mean()


def named_gradients(model):
    """Gradients under the names of PEFT's files."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None for g in gradients.values())
    return {name.replace(".default.", "."): g for name, g in gradients.items()}


def as_f32(tensors):
    return {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}


def plain(value):
    return value.tolist() if isinstance(value, torch.Tensor) else value


def write_json(path, value):
    """A key a line, and the items of a list of objects a line each."""
    lines = lambda v: "[\n  " + ",\n  ".join(map(json.dumps, v)) + "\n ]"
    listed = lambda v: isinstance(v, list) and v and isinstance(v[0], dict)
    items = (f" {json.dumps(key)}: {lines(v) if listed(v) else json.dumps(v)}" for key, v in value.items())
    path.write_text("{\n" + ",\n".join(items) + "\n}\n")


def make_adapter(model_folder, folder, options, pairs, prompt):
    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, base_model_name_or_path="tiny", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.copy_(0.3 * torch.randn_like(weight))
            if ".lora_magnitude_vector." in name:
                weight.mul_(1.0 + 0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    # a path of the machine that made them, and no order: PEFT keeps target_modules as a set
    saved = json.loads((folder / "adapter_config.json").read_text())
    saved |= dict(base_model_name_or_path="tiny", target_modules=sorted(saved["target_modules"]))
    write_json(folder / "adapter_config.json", saved)

    model = PeftModel.from_pretrained(load(model_folder), folder, is_trainable=True).double().eval()
    scored = []
    with torch.no_grad():
        for pair in pairs:
            entry = dict(pair)
            for side in ("chosen", "rejected"):
                scores = token_scores(model, pair["prompt"], pair[side])
                entry[f"policy_{side}"] = {key: plain(value) for key, value in scores.items()}
                with model.disable_adapter():
                    entry[f"reference_{side}"] = plain(token_scores(model, pair["prompt"], pair[side])["logps"])
            scored.append(entry)
    loss = dpo_loss(model, pairs)
    loss.backward()
    gradients = named_gradients(model)
    assert min(g.abs().max() for g in gradients.values()) > 1e-5, "a gradient too small to test anything"
    save_file(as_f32(gradients), folder / "gradients.safetensors")
    write_json(folder / "golden.json", dict(
        beta=BETA, pairs=scored, loss=loss.item(),
        prompt=prompt, greedy=greedy(model, prompt),
    ))


def torch_steps(model_folder, adapter, pairs, weight_decay, ratio=None):
    """Ten steps with torch's own AdamW and clipping: TRL's run has to be the same. With a ratio, PEFT's LoRA+."""
    model = PeftModel.from_pretrained(load(model_folder), adapter, is_trainable=True).double().eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    options = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    optimizer = torch.optim.AdamW(trained, weight_decay=weight_decay, **options)
    if ratio:
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, loraplus_lr_ratio=ratio,
                                              loraplus_weight_decay=weight_decay, **options)
    steps = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = dpo_loss(model, pairs)
        loss.backward()
        steps.append((loss.item(), torch.nn.utils.clip_grad_norm_(trained, 1.0).item()))
        optimizer.step()
    return steps, get_peft_model_state_dict(model)


def trl_steps(model_folder, adapter, options, pairs, weight_decay):
    """Ten steps of TRL's DPOTrainer, all pairs in each."""
    model = load(model_folder)
    vocab = {f"w{i}": i for i in range(model.config.vocab_size - 1)} | {"</s>": model.config.vocab_size - 1}
    words = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    end = model.config.vocab_size - 1
    text = lambda ids: "".join("</s>" if i == end else f" w{i}" for i in ids)
    rows = Dataset.from_list([{key: text(ids) for key, ids in pair.items()} for pair in pairs])
    with tempfile.TemporaryDirectory() as out:
        args = DPOConfig(
            output_dir=out, beta=BETA, loss_type=["sigmoid"], max_length=None, max_steps=10,
            per_device_train_batch_size=len(pairs), learning_rate=1e-2, lr_scheduler_type="constant", warmup_steps=0,
            weight_decay=weight_decay, max_grad_norm=1.0, optim="adamw_torch", logging_steps=1, report_to="none",
            save_strategy="no", bf16=False, fp16=False, gradient_checkpointing=False, use_cpu=True, disable_tqdm=True,
        )
        # a fresh adapter, so that TRL's reference is the base with its adapter disabled; then the stored values
        trainer = DPOTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer,
                             peft_config=LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **options))
        trainer.model.double()
        stored = load_file(adapter / "adapter_model.safetensors")
        with torch.no_grad():
            for name, p in trainer.model.named_parameters():
                if p.requires_grad:
                    p.copy_(stored.pop(name.replace(".default.", ".")))
        assert not stored
        for row, pair in zip(trainer.train_dataset, pairs):
            assert {key: row[f"{key}_ids"] for key in pair} == pair, "TRL's tokens are not the fixture's"
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        return log, get_peft_model_state_dict(trainer.model)


def make_trajectories(model_folder, adapter, options, pairs):
    for name, weight_decay in [("plain", 0.0), ("decay", 0.01)]:
        log, trl_final = trl_steps(model_folder, adapter, options, pairs, weight_decay)
        steps, final = torch_steps(model_folder, adapter, pairs, weight_decay)
        assert len(log) == 10
        # TRL 1.16 computes the head in f32 whatever the model is in: the two are the same to f32's rounding
        for entry, (loss, norm) in zip(log, steps):
            assert abs(entry["loss"] - loss) < 1e-6 and abs(entry["grad_norm"] - norm) < 1e-5 * norm, entry
        for key, tensor in final.items():
            assert torch.allclose(trl_final[key], tensor, rtol=0, atol=1e-5), key
        write_json(adapter / f"adamw-{name}.json", dict(
            learning_rate=1e-2, weight_decay=weight_decay, max_grad_norm=1.0,
            trl=[{key: entry[key] for key in ("loss", "grad_norm")} for entry in log],
            torch=[dict(loss=loss, grad_norm=norm) for loss, norm in steps],
        ))
        save_file(as_f32(final), adapter / f"adamw-{name}.safetensors")


def make_loraplus(model_folder, adapter, pairs):
    steps, final = torch_steps(model_folder, adapter, pairs, 0.01, ratio=4.0)
    write_json(adapter / "adamw-loraplus.json", dict(
        learning_rate=1e-2, weight_decay=0.01, max_grad_norm=1.0, loraplus_ratio=4.0, trl=[],
        torch=[dict(loss=loss, grad_norm=norm) for loss, norm in steps],
    ))
    save_file(as_f32(final), adapter / "adamw-loraplus.safetensors")


@torch.no_grad()
def make_first_values(model_folder):
    """What PiSSA and OLoRA take out of each matrix: the scaled product, since signs of its factors are a matter of taste."""
    for name in ("pissa", "olora"):
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=ALL, init_lora_weights=name)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32), config)
        products = {path.removeprefix("base_model.model."): module.get_delta_weight("default")
                    for path, module in model.named_modules() if hasattr(module, "get_delta_weight")}
        assert len(products) == 14
        save_file(as_f32(products), model_folder / f"{name}.safetensors")


def main():
    check_versions()
    shutil.rmtree(OUT, ignore_errors=True)
    for seed, (name, config) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        folder = OUT / name
        folder.mkdir(parents=True)
        make_model(folder, config)
        model = load(folder)
        vocab = config["vocab_size"]
        ids = torch.randint(0, vocab, (48 if name == "llama3" else 16,)).tolist()
        logits = logits_of(model, ids)
        if name == "llama3":
            unscaled = AutoModelForCausalLM.from_pretrained(
                folder, rope_parameters=dict(rope_type="default", rope_theta=10000.0)).double().eval()
            assert (logits_of(unscaled, ids) - logits)[-8:].abs().max() > 0.1, "the scaling does not show"
        tensors = dict(logits=logits)
        if "model_type" not in config:
            tensors["inverse_frequencies"] = model.model.rotary_emb.inv_freq
        save_file(as_f32(tensors), folder / "golden.safetensors")
        prompt = ids[:30] if name == "llama3" else ids[:7]
        write_json(folder / "golden.json", dict(ids=ids, prompt=prompt, greedy=greedy(model, prompt)))
        longer = 30 if name == "llama3" else 0
        pairs = make_pairs(model, [(5 + longer, 4, 7), (1, 3, 1), (9, 6, 2), (4, 8, 8)])
        for (of, adapter), options in ADAPTERS.items():
            if of == name:
                make_adapter(folder, folder / adapter, options, pairs, prompt)
        if name == "gqa":
            make_trajectories(folder, folder / "all", ADAPTERS[name, "all"], pairs)
            make_loraplus(folder, folder / "all", pairs)
            make_first_values(folder)
    files = [path for path in OUT.rglob("*") if path.is_file()]
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files):,} bytes")


if __name__ == "__main__":
    main()
