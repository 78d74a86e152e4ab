"""Makes tests/fixtures/losses.json: losses, derivatives and metrics by TRL's own code.

Made with Python 3.11, torch 2.15.0 (CPU), transformers 5.23.0, trl 1.16.0. To make it again, with those installed:

    python scripts/make_loss_fixtures.py

Every number is computed by the loss methods of TRL's trainers, in float64, and differentiated by torch. The model is
replaced by a stub that returns given log-probabilities of tokens; the trainers are made without `__init__`, with the
attributes that these methods read. Nothing of TRL is copied or changed, but ORPO casts to float32 inside its loss,
which is turned off while it runs.

Where TRL does not have a loss of ours under its name, its code for the same formula is called:
- cDPO (TRL's `sigmoid` ignores `label_smoothing`): `aot`, which is cDPO in a batch of one pair, where there is nothing
  to sort; the loss is the mean over such batches.
- IPO on sums: `ipo`, which takes means over tokens, on completions of one token with the whole log-probability.
- ORPO with the likelihood of the completion: prompts of one token, which is never scored.
- SFT on chosen completions: DPO's `sft`.
"""

import json
import random
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import trl
from trl import DPOTrainer, KTOTrainer
from trl.experimental.orpo import ORPOTrainer

PINNED = {"torch": "2.15.0", "transformers": "5.23.0", "trl": "1.16.0"}
PROMPT = 4  # tokens

random.seed(20)
torch.set_default_dtype(torch.float64)


def trainer(kind, **attributes):
    it = object.__new__(kind)
    same = lambda x: x
    it.model = SimpleNamespace(training=True)
    it.accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)
    it._metrics = defaultdict(lambda: defaultdict(list))
    it._total_train_tokens, it._tp_size = 0, 1
    it.aux_loss_enabled = False
    for name, value in attributes.items():
        setattr(it, name, value)
    return it


def tokens(count, mean):
    """Log-probabilities of tokens."""
    return [-random.expovariate(1 / mean) for _ in range(count)]


def sequence(count, mean=1.5):
    policy = tokens(count, mean)
    return {"policy": policy, "reference": sum(policy) * random.uniform(0.7, 1.3)}


def padded(rows, before):
    """Rows of token log-probabilities after `before` tokens that are not scored, and which of them are scored."""
    width = max(len(row) for row in rows)
    values = torch.tensor([[0.0] * before + row + [0.0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[0] * before + [1] * len(row) + [0] * (width - len(row)) for row in rows])
    return values.requires_grad_(), mask


def outputs(values, mask):
    zeros = torch.zeros_like(values)
    return SimpleNamespace(log_probs=values * mask, entropy=zeros, mean_logits=zeros, is_top1=mask.bool())


def slopes(gradient, mask):
    """A row's one derivative, which all its tokens must have."""
    found = []
    for row, scored in zip(gradient, mask.bool()):
        each = row[scored]
        assert torch.allclose(each, each[:1], rtol=1e-12, atol=1e-15)
        found.append(each[0].item())
    return found


def by_dpo(pairs, **config):
    """DPOTrainer on pairs: the loss, a slope for each chosen and each rejected completion, metrics."""
    it = trainer(
        DPOTrainer, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False,
        loss_weights=[1.0], **config,
    )  # fmt: skip
    rows = [pair[side] for side in ("chosen", "rejected") for pair in pairs]
    # the log-probability at t is that of token t + 1; the first token of the prompt has none
    values, mask = padded([row["policy"] for row in rows], PROMPT - 1)
    whole_mask = torch.cat([torch.zeros(len(rows), 1, dtype=mask.dtype), mask], dim=1)
    references = torch.tensor([row["reference"] for row in rows])
    inputs = {
        "input_ids": torch.zeros_like(whole_mask),
        "attention_mask": torch.ones_like(whole_mask),
        "completion_mask": whole_mask,
        "ref_chosen_logps": references[: len(pairs)],
        "ref_rejected_logps": references[len(pairs) :],
    }
    loss = it._compute_loss(lambda **_: outputs(values, mask), inputs, False)
    loss.backward()
    found = slopes(values.grad, mask)
    logged = {name: it._metrics["train"][name][-1] for name in ("rewards/chosen", "rewards/rejected")}
    return loss.item(), found[: len(pairs)], found[len(pairs) :], logged


def by_kto(rows, kl, **config):
    """KTOTrainer on labelled completions, with mismatched completions of divergence `kl`."""
    it = trainer(KTOTrainer, calculate_KL=True, loss_type="kto", precompute_ref_logps=True, **config)
    values, mask = padded([row["policy"] for row in rows], PROMPT - 1)
    whole_mask = torch.cat([torch.zeros(len(rows), 1, dtype=mask.dtype), mask], dim=1)
    mismatched, mismatched_mask = padded([tokens(3, 1.0) for _ in rows], PROMPT - 1)
    spread = torch.tensor([random.gauss(0, 1) for _ in rows])
    references = mismatched.detach().sum(1) - kl + spread - spread.mean()
    kl_ids = torch.ones(len(rows), mismatched.size(1) + 1, dtype=torch.long)
    inputs = {
        "input_ids": torch.zeros_like(whole_mask),
        "attention_mask": torch.ones_like(whole_mask),
        "completion_mask": whole_mask,
        "label": torch.tensor([row["desirable"] for row in rows]),
        "ref_logps": torch.tensor([row["reference"] for row in rows]),
        "KL_input_ids": kl_ids,
        "KL_attention_mask": torch.ones_like(kl_ids),
        "KL_completion_mask": torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), mismatched_mask], dim=1),
        "ref_KL_logps": references,
    }
    model = lambda input_ids, **_: outputs(mismatched, mismatched_mask) if input_ids[0, 0] else outputs(values, mask)
    loss = it._compute_loss(model, inputs, False)
    loss.backward()
    assert mismatched.grad is None
    return loss.item(), slopes(values.grad, mask), it._metrics["train"]["kl"][-1]


def by_orpo(pairs, prompts, **config):
    """ORPOTrainer on pairs, through logits of a vocabulary of two, where log-probability = log sigmoid(logit)."""
    it = trainer(ORPOTrainer, is_encoder_decoder=False, padding_value=1, **config)
    rows = [(prompt, pair[side]) for side in ("chosen", "rejected") for pair, prompt in zip(pairs, prompts)]
    logps, mask = padded([prompt + row["policy"] for prompt, row in rows], 0)
    completion = mask.clone()
    for i, (prompt, _) in enumerate(rows):
        completion[i, : len(prompt)] = 0
    logits = torch.where(mask.bool(), logps - torch.log(-torch.expm1(logps)), 0.0).detach().requires_grad_()
    batch = {}
    for side, part in (("chosen", slice(0, len(pairs))), ("rejected", slice(len(pairs), None))):
        # the first token is attended and not predicted
        first = torch.ones(len(pairs), 1, dtype=torch.long)
        attended = torch.cat([first, mask[part]], dim=1)
        labelled = torch.cat([0 * first, completion[part]], dim=1)
        batch[f"{side}_input_ids"] = torch.where(attended == 1, 0, 1)
        batch[f"{side}_attention_mask"] = attended
        batch[f"{side}_labels"] = torch.where(labelled == 1, 0, -100)

    def model(ids, **_):
        two = torch.stack([logits, torch.zeros_like(logits)], dim=-1)
        return SimpleNamespace(logits=torch.cat([two, torch.zeros(len(rows), 1, 2)], dim=1))

    cast = torch.Tensor.float
    torch.Tensor.float = lambda it: it if it.dtype == torch.float64 else cast(it)
    try:
        loss, logged = it.get_batch_loss_metrics(model, batch)
    finally:
        torch.Tensor.float = cast
    loss.backward()
    by_logp = logits.grad / torch.sigmoid(-logits.detach())
    found = slopes(by_logp, completion)
    n = len(pairs)
    of_prompts = slopes(by_logp[:n], (mask - completion)[:n]) if any(prompts) else [0.0] * n
    names = ("nll_loss", "log_odds_ratio", "log_odds_chosen", "rewards/chosen", "rewards/rejected")
    return loss.item(), of_prompts, found[:n], found[n:], {name: logged[name] for name in names}


def side(row):
    """A sequence as the fixture has it: [log-probability, reference's, tokens]."""
    return row and [sum(row["policy"]), row.get("reference"), len(row["policy"])]


def case(loss, rows, value, of_each, kl=0.0, metrics=None):
    parts = ("prompt", "chosen", "rejected")
    return {
        "loss": loss,
        "kl": kl,
        "examples": [[side(row.get(part)) for part in parts] for row in rows],
        "value": value,
        "slopes": of_each,
        "metrics": metrics or {},
    }


def pair_case(loss, rows, result):
    value, chosen, rejected, metrics = result
    return case(loss, rows, value, [[0.0, *both] for both in zip(chosen, rejected)], metrics=metrics)


def cases():
    pairs = [{"chosen": sequence(c), "rejected": sequence(r)} for c, r in [(7, 11), (30, 4), (1, 1), (12, 12)]]
    whole = [
        {side: {**row, "policy": [sum(row["policy"])]} for side, row in pair.items()} for pair in pairs
    ]  # of one token
    for beta in (0.1, 0.5):
        dpo = by_dpo(pairs, loss_types=["sigmoid"], beta=beta, label_smoothing=0.0)
        yield pair_case({"dpo": {"beta": beta}}, pairs, dpo)

        ones = [by_dpo([pair], loss_types=["aot"], beta=beta, label_smoothing=0.2) for pair in pairs]
        mean = lambda values: sum(values) / len(pairs)
        value = mean([one[0] for one in ones])
        both = [[one[side][0] / len(pairs) for one in ones] for side in (1, 2)]
        yield pair_case({"dpo": {"beta": beta, "label_smoothing": 0.2}}, pairs, (value, *both, dpo[3]))

        ipo = by_dpo(pairs, loss_types=["ipo"], beta=beta, label_smoothing=0.0)
        yield pair_case({"ipo": {"beta": beta, "reduction": "token_mean"}}, pairs, ipo)
        ipo = by_dpo(whole, loss_types=["ipo"], beta=beta, label_smoothing=0.0)
        yield pair_case({"ipo": {"beta": beta, "reduction": "sum"}}, pairs, ipo)

        rows = [{**sequence(n), "desirable": label} for n, label in zip((5, 9, 1, 20, 6), (1, 0, 1, 1, 0))]
        for kl, weights in ((0.75, (1.0, 1.0)), (2.5, (1.5, 0.5))):
            weights = dict(zip(("desirable_weight", "undesirable_weight"), weights))
            value, found, used = by_kto(rows, kl, beta=beta, **weights)
            labelled = [{"chosen" if row["desirable"] else "rejected": row} for row in rows]
            each = [[0.0, s, 0.0] if row["desirable"] else [0.0, 0.0, s] for row, s in zip(rows, found)]
            yield case({"kto": {"beta": beta, **weights}}, labelled, value, each, kl=used)

        prompts = [tokens(n, 2.0) for n in (5, 1, 8, 3)]
        value, of_prompts, chosen, rejected, metrics = by_orpo(pairs, prompts, beta=beta)
        rows = [{**pair, "prompt": {"policy": prompt}} for pair, prompt in zip(pairs, prompts)]
        each = [list(three) for three in zip(of_prompts, chosen, rejected)]
        yield case({"orpo": {"beta": beta, "nll": "prompt+completion"}}, rows, value, each, metrics=metrics)
        value, _, chosen, rejected, metrics = by_orpo(pairs, [[] for _ in pairs], beta=beta)
        each = [[0.0, *both] for both in zip(chosen, rejected)]
        yield case({"orpo": {"beta": beta, "nll": "completion"}}, pairs, value, each, metrics=metrics)

    value, chosen, rejected, _ = by_dpo(pairs, loss_types=["sft"], beta=0.1, label_smoothing=0.0)
    each = [[0.0, *both] for both in zip(chosen, rejected)]
    yield case({"sft": {}}, pairs, value, each)


if __name__ == "__main__":
    versions = {module.__name__: module.__version__.split("+")[0] for module in (torch, transformers, trl)}
    assert versions == PINNED, versions
    about = (
        "By TRL's own code in float64, see scripts/make_loss_fixtures.py. An example is [prompt, chosen, rejected], "
        "each [log-probability, reference's, tokens] or null; its slopes are in the same order."
    )
    lines = ",\n".join(json.dumps(case) for case in cases())
    path = Path(__file__).parent.parent / "tests/fixtures/losses.json"
    path.write_text(
        f'{{"about": {json.dumps(about)},\n"versions": {json.dumps(versions)},\n"cases": [\n{lines}\n]}}\n'
    )
