#!/usr/bin/env python3
"""Trains the quickstart's base model from nothing: tokenizer, chat template and a Llama of two million parameters.

    python scripts/quickstart/train_base.py [--out DIR]

The model learns every subject, the held-out ones too, in both registers, half and half. So it knows how either
register sounds and what either says about a subject, and has no preference: that is what preference data is for.
Nothing in the prompt names the register; the model settles it with the first words of its answer.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from corpus import QUESTIONS, RECIPE_DIR, Subject, is_plain, load_subjects, split

SEED = 11
THREADS = 2
VOCAB = 3072
BEGIN, END, USER, ASSISTANT, PAD = SPECIAL = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"]
EPOCHS = 14
# Conversations of one or two turns.
BATCH = 24
# Muon for the matrices of the layers, in half the steps that AdamW alone takes; AdamW for embeddings and norms.
MUON_RATE, ADAMW_RATE = 6e-3, 4e-3
WARMUP = 0.05

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '<|user|>' + message['content'] | trim }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|assistant|>' + message['content'] | trim + eos_token }}
    {%- else %}
        {{- raise_exception('this model knows the roles user and assistant only') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def train_tokenizer(texts: list[str], out: Path) -> None:
    """A byte-level BPE over the questions and answers, written as transformers reads it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Plain text begins with one BOS, as Llama 3's does; the chat template writes its own.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def new_model(tokenizer) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            initializer_range=0.04,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@dataclass(frozen=True)
class Example:
    """Token ids, and what to predict at each of them: -100 in questions."""

    ids: list[int]
    labels: list[int]

    def then(self, turn: "Example") -> "Example":
        """A longer conversation: another turn without its BOS."""
        return Example(self.ids + turn.ids[1:], self.labels + turn.labels[1:])


def encode(tokenizer, chats: list[list[dict]]) -> list[Example]:
    """Chats of one question and one answer."""
    prompts = tokenizer.apply_chat_template([chat[:1] for chat in chats], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(chats)["input_ids"]
    assert all(ids[: len(prompt)] == prompt for ids, prompt in zip(whole, prompts))
    return [Example(ids, [-100] * len(prompt) + ids[len(prompt) :]) for ids, prompt in zip(whole, prompts)]


def examples(subjects: list[Subject], register: str, tokenizer) -> list[Example]:
    """Every question about every subject with its answer in one register."""
    return encode(
        tokenizer,
        [
            [
                {"role": "user", "content": subject.question(form)},
                {"role": "assistant", "content": subject.answer(register, aspects)},
            ]
            for subject in subjects
            for form, aspects in QUESTIONS
        ],
    )


def epochs(plain: list[Example], jargon: list[Example], rng: random.Random) -> Iterator[list[Example]]:
    """Batches of similar length.

    Every question is asked once an epoch; who is answered in one register in this epoch is answered in the other in
    the next. Half of the conversations have a second turn about something else, in the register of the first:
    the register becomes something the model follows everywhere, not a detail that it remembers a subject at a time.
    """
    count = len(plain)
    for epoch in range(EPOCHS):
        if epoch % 2 == 0:
            is_plain = [rng.random() < 0.5 for _ in range(count)]
        else:
            is_plain = [not p for p in is_plain]
        chats = []
        for register, wanted in ((plain, True), (jargon, False)):
            turns = [register[i] for i in range(count) if is_plain[i] == wanted]
            rng.shuffle(turns)
            while turns:
                chat = turns.pop()
                chats.append(chat.then(turns.pop()) if turns and rng.random() < 0.5 else chat)
        rng.shuffle(chats)
        # Sorting whole sets of 16 batches by length wastes little on padding and keeps the batches mixed.
        batches = []
        for start in range(0, len(chats), 16 * BATCH):
            group = sorted(chats[start : start + 16 * BATCH], key=lambda chat: len(chat.ids))
            batches += [group[i : i + BATCH] for i in range(0, len(group), BATCH)]
        rng.shuffle(batches)
        yield from batches


def tensors(batch: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and the ids to predict from them, -100 where nothing is: in questions and in the padding."""
    longest = max(len(example.ids) for example in batch)
    ids = torch.tensor([example.ids + [pad] * (longest - len(example.ids)) for example in batch])
    labels = torch.tensor([example.labels + [-100] * (longest - len(example.ids)) for example in batch])
    return ids[:, :-1], labels[:, 1:]


def train(model: LlamaForCausalLM, batches: list[list[Example]], pad: int) -> None:
    named = list(model.named_parameters())
    matrices = [p for name, p in named if ".layers." in name and p.dim() == 2]
    rest = [p for name, p in named if not (".layers." in name and p.dim() == 2)]
    optimizers = [
        torch.optim.Muon(matrices, MUON_RATE, weight_decay=0.05, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rates = [MUON_RATE, ADAMW_RATE]
    started, warmup = time.time(), int(WARMUP * len(batches))
    model.train()
    running = 0.0
    for step, batch in enumerate(batches):
        progress = max(step - warmup, 0) / (len(batches) - warmup)
        share = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * progress)))
        for optimizer, rate in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = rate * share
        ids, labels = tensors(batch, pad)
        # Causal attention and padding on the right only: no row sees padding where it has labels.
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        wanted = labels != -100
        loss = cross_entropy(model.lm_head(hidden[wanted]), labels[wanted])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        running += loss.item()
        if (step + 1) % 50 == 0 or step + 1 == len(batches):
            count = (step % 50) + 1
            print(f"step {step + 1}/{len(batches)} loss {running / count:.4f} {time.time() - started:.0f} s", flush=True)
            running = 0.0


@torch.no_grad()
def completion_logps(model, found: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probabilities of the answers, and their numbers of tokens."""
    sums, counts = [], []
    for start in range(0, len(found), 64):
        ids, labels = tensors(found[start : start + 64], pad)
        logps = -cross_entropy(model(input_ids=ids).logits.transpose(1, 2), labels, reduction="none")
        sums.append(logps.sum(1))
        counts.append((labels != -100).sum(1))
    return torch.cat(sums), torch.cat(counts)


@torch.no_grad()
def answers(model, tokenizer, questions: list[str]) -> list[str]:
    """Greedy answers to single questions."""
    found = []
    for start in range(0, len(questions), 64):
        chats = [[{"role": "user", "content": question}] for question in questions[start : start + 64]]
        ids = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", tokenizer_kwargs={"padding_side": "left"}
        )
        out = model.generate(**ids, max_new_tokens=200, do_sample=False)
        found += tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def report(path: Path, subjects: list[Subject]) -> None:
    """Reads the model back as users will and prints what it knows, on training and on held-out subjects."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for name, part in zip(("training", "held-out"), split(subjects)):
        if name == "training":
            part = part[::4]
        logps, perplexity = {}, {}
        for register in ("plain", "jargon"):
            logps[register], counts = completion_logps(model, examples(part, register, tokenizer), tokenizer.pad_token_id)
            perplexity[register] = math.exp(-logps[register].sum() / counts.sum())
        prefers = (logps["plain"] > logps["jargon"]).float().mean().item()
        questions = [(s, form, aspects) for s in part for form, aspects in QUESTIONS]
        said = answers(model, tokenizer, [s.question(form) for s, form, _ in questions])
        plain = sum(map(is_plain, said)) / len(said)
        exact = sum(
            text in (s.answer("plain", aspects), s.answer("jargon", aspects))
            for text, (s, _, aspects) in zip(said, questions)
        ) / len(said)
        print(
            f"{name} subjects: plain more likely {prefers:.3f}, greedy answers plain {plain:.3f}, word for word {exact:.3f}, "
            f"perplexity plain {perplexity['plain']:.3f} jargon {perplexity['jargon']:.3f}"
        )
        for (s, form, _), text in list(zip(questions, said))[:: len(said) // 6]:
            print(f"  {s.question(form)}\n    {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RECIPE_DIR / "model")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)

    subjects = load_subjects()
    questions = [s.question(form) for s in subjects for form, _ in QUESTIONS]
    sentences = [text for s in subjects for aspects in s.text.values() for text in aspects.values()]
    train_tokenizer(questions + sentences, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = new_model(tokenizer)
    plain, jargon = (examples(subjects, register, tokenizer) for register in ("plain", "jargon"))
    print(f"{len(subjects)} subjects, {2 * len(plain)} questions with answers, {model.num_parameters()} parameters")
    train(model, list(epochs(plain, jargon, random.Random(SEED))), tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(out)
    report(out, subjects)


if __name__ == "__main__":
    main()
