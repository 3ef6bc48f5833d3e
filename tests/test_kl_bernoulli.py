"""Bernoulli-KL on GSM8K: losses and gradients against float64 and TRL; the verifier on all official answers; processes, resume, bad input."""
import copy
import csv
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from conftest import REPO, assert_one_line_error, call, load, run, without_device

FOLDER = REPO / "kl_bernoulli_gsm8k"
TRAIN, EVAL = FOLDER / "train_kl_bernoulli.py", FOLDER / "kl_bernoulli_eval.py"
train, evaluation = load("kl_bernoulli_gsm8k/train_kl_bernoulli.py"), load("kl_bernoulli_gsm8k/kl_bernoulli_eval.py")
base_model, gsm8k, study = (load(f"kl_bernoulli_gsm8k/{name}.py") for name in ("make_base_models", "get_gsm8k", "study"))
torch.set_num_threads(1)
WORLD = json.loads((FOLDER / "world.json").read_text(encoding="utf8"))
OFFICIAL = REPO.parent / "shared" / "data" / "gsm8k"
SIZES = dict(vocab_size=40, pad_token_id=0, eos_token_id=2, bos_token_id=None)
VARIANTS = [dict(method="kl_batch"), dict(method="kl_correct"), dict(method="kl_correct", detach_max=True), dict(method="kl_correct", ent_coef=-0.1), dict(method="fixed_half"),
            dict(method="fixed_half", half_tokens="all"), dict(method="fixed_half", ent_coef=-0.1), dict(method="dr_grpo", group_size=4), dict(method="dr_grpo", group_size=4, ent_coef=0.05)]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: " ".join(map(str, v.values())))


def random_models():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    decoder = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, **SIZES)
    return {"qwen2": Qwen2ForCausalLM(Qwen2Config(**decoder)).eval(), "llama": LlamaForCausalLM(LlamaConfig(**decoder)).eval(),
            "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, **SIZES)).eval()}


MODELS = random_models()
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def a_batch(seed=0, B=8, T=4, L=6):
    """A batch as collect() makes one, with unequal lengths; half of the answers are right."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, L + 1, (B,), generator=g)
    lengths[0] = L
    mask = (torch.arange(L) < lengths[:, None]).float()
    prompt_mask = (torch.arange(T) >= torch.randint(0, T, (B,), generator=g)[:, None]).long()
    prompt_mask[0] = 1
    return dict(prompt_ids=torch.randint(3, 40, (B, T), generator=g), prompt_mask=prompt_mask, completion_ids=torch.randint(3, 40, (B, L), generator=g), completion_mask=mask,
            old_logprobs=torch.zeros(B, L), rewards=torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 0] * (B // 8)))


def config(**changes):
    return train.Config(**(dict(max_grad_norm=1e9, max_new_tokens=6, group_size=1, micro_batch=8) | changes))


def gradient_of(model, settings, batch):
    """(gradient of all weights, what update() reports), without moving the weights."""
    model.zero_grad()
    terms = train.update(settings, Accelerator(cpu=True), model, torch.optim.SGD(model.parameters(), lr=0.0), batch)
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in model.parameters()]), terms


def terms64(logits, ids):
    """log p, log(1 − p), log P, log(1 − P), entropy: literally, from probabilities in float64."""
    p = logits.double().softmax(-1)
    rest = lambda k: torch.stack([torch.cat([row[:j], row[j + 1:]]).sum() for row, j in zip(p, k.tolist())])
    pick, top = p.gather(-1, ids[:, None])[:, 0], p.argmax(-1)
    return pick.log(), rest(ids).log(), p.max(-1).values.log(), rest(top).log(), -(p * p.log()).sum(-1)


def loss64(model, settings, batch):
    """The loss by a loop over answers and tokens, in float64, by the formulas of the thesis and of Dr. GRPO."""
    total, rewards = 0.0, batch["rewards"].double()
    correct = rewards.sum()
    for i, reward in enumerate(rewards):
        n = int(batch["completion_mask"][i].sum())
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i] == 1]
        ids = torch.cat([prompt, batch["completion_ids"][i, :n]])
        logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1:-1] / settings.temperature
        logp, log1mp, logP, log1mP, entropy = terms64(logits, batch["completion_ids"][i, :n])
        if settings.method == "dr_grpo":
            group = rewards[i // settings.group_size * settings.group_size:][:settings.group_size]
            total = total - ((reward - group.mean()) * logp).sum() / (len(rewards) * settings.max_new_tokens) - settings.ent_coef * entropy.mean() / len(rewards)
            continue
        if settings.detach_max:
            logP, log1mP = logP.detach(), log1mP.detach()
        if settings.method == "fixed_half":
            each = 0.5 * (0.5 / logp.exp()).log() + 0.5 * (0.5 / log1mp.exp()).log()
            each = each[logp.exp() > 0.5].sum() / n if settings.half_tokens == "confident" else each.mean()
        else:
            each = (logP.exp() * (logP.exp() / logp.exp()).log() + log1mP.exp() * (log1mP.exp() / log1mp.exp()).log()).mean()
        if reward:
            total = total + (each - settings.ent_coef * entropy.mean()) / (len(rewards) if settings.method == "kl_batch" else correct)
    return total


# ---- the losses -----------------------------------------------------------------------------------------------------

def test_token_terms_equal_a_transcription_in_float64():
    logits, ids = 4 * torch.randn(200, 30, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 30
    for got, wanted in zip(train.token_terms(logits, ids), terms64(logits, ids)):
        torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)


@each_variant
@each_model
def test_loss_and_gradient_equal_a_transcription(model, variant):
    settings, batch = config(temperature=0.8, **variant), a_batch()
    gradient, terms = gradient_of(model, settings, batch)
    model.zero_grad()
    loss = loss64(model, settings, batch)
    loss.backward()
    wanted = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in model.parameters()])
    assert terms["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert (gradient - wanted).norm() < 1e-4 * wanted.norm() + 1e-6
    assert terms["correct"] == 4


def test_batch_and_correct_normalisation_differ_by_the_number_of_answers():
    """§3.1 and §3.2: the same direction, N / correct apart. AdamW divides by the size of gradients, so what is left is a matter of how steps of different size mix."""
    batch = a_batch()
    batch["rewards"] = torch.tensor([1.0, 0, 0, 0, 0, 0, 1, 0])
    (by_batch, one), (by_correct, two) = (gradient_of(MODELS["gpt2"], config(method=method), batch) for method in ("kl_batch", "kl_correct"))
    torch.testing.assert_close(by_correct, by_batch * 8 / 2, rtol=1e-5, atol=1e-7)
    assert two["loss"] == pytest.approx(one["loss"] * 4)


def toy(*logits):
    return torch.tensor([logits], dtype=torch.float64, requires_grad=True)


def test_kl_loss_and_its_gradient_vanish_where_the_sampled_token_is_the_likeliest():
    for detach in (False, True):
        logits = toy(0.3, 2.0, -1.0)
        loss = train.kl_loss(*train.token_terms(logits, torch.tensor([1]))[:4], detach).sum()
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-12) and logits.grad.abs().max() < 1e-12
        loss = train.kl_loss(*train.token_terms(logits, torch.tensor([0]))[:4], detach).sum()
        assert loss.item() > 0.1
        gradient, = torch.autograd.grad(loss, logits)
        assert gradient[0, 0] < 0 < gradient[0, 1]                # the sampled token is pulled up, the likeliest one down


@pytest.mark.parametrize("detach, wanted", [(False, 0.400), (True, 0.420)])
def test_kl_loss_ends_where_both_tokens_are_alike(detach, wanted):
    """The end is p = P: the sampled token never wins. Where on that line depends on detaching."""
    logits = toy(0.0, 1.5, -0.5, -1.0)
    optimizer = torch.optim.SGD([logits], lr=0.05)
    for _ in range(6000):
        optimizer.zero_grad()
        train.kl_loss(*train.token_terms(logits, torch.tensor([0]))[:4], detach).sum().backward()
        optimizer.step()
    p = logits.detach().softmax(-1)[0]
    assert p[0].item() == pytest.approx(p[1].item(), abs=2e-3) and p[0].item() == pytest.approx(wanted, abs=2e-3)


def test_half_loss_has_its_minimum_at_one_half_and_the_gradient_p_minus_one_half():
    for value in (-3.0, -0.4, 0.0, 0.4, 3.0):
        for tokens in ("all", "confident"):
            logits = toy(value, 0.0)
            logp, log1mp, *_ = train.token_terms(logits, torch.tensor([0]))
            loss = train.half_loss(logp, log1mp, tokens).sum()
            gradient, = torch.autograd.grad(loss, logits)
            p = 1 / (1 + math.exp(-value))
            used = tokens == "all" or p > 0.5
            assert gradient[0, 0].item() == pytest.approx((p - 0.5) * used) and loss.item() == pytest.approx((0.5 * math.log(0.25 / (p * (1 - p)))) * used)
            assert loss.item() >= 0 and (not used or (loss.item() < 1e-12) == (value == 0))


def test_half_loss_at_many_tokens_moves_the_sampled_tokens_logit_by_p_minus_one_half():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    ids = torch.arange(50) % 7
    logp, log1mp, *_ = train.token_terms(logits, ids)
    gradient, = torch.autograd.grad(train.half_loss(logp, log1mp, "all").sum(), logits)
    torch.testing.assert_close(gradient.gather(1, ids[:, None])[:, 0], logp.detach().exp() - 0.5)


def test_the_worked_example_of_the_readme():
    """Four tokens with the logits 2, 1, 0, 0; the second one, or the favourite, was sampled."""
    logits = toy(2.0, 1.0, 0.0, 0.0)
    logp, log1mp, logP, log1mP, _ = terms = train.token_terms(logits, torch.tensor([1]))
    close = lambda value, wanted: value == pytest.approx(wanted, abs=1e-4)
    assert close(logp.exp().item(), 0.2245) and close(logP.exp().item(), 0.6103) and close(log1mp.item(), -0.2543)
    for detach, wanted in ((True, -0.3858), (False, -0.6171)):
        loss = train.kl_loss(*terms[:4], detach)
        gradient, = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
        assert close(loss.item(), 0.3421) and close(gradient[0, 1].item(), wanted)
    assert close(train.kl_loss(logP, log1mP, logp, log1mp, False).item(), 0.3091)                   # the other direction, KL(p‖P)
    loss = train.half_loss(logp, log1mp, "all")
    gradient, = torch.autograd.grad(loss.sum(), logits)
    assert close(loss.item(), 0.1809) and close(gradient[0, 1].item(), -0.2755) and train.half_loss(logp, log1mp, "confident").item() == 0
    terms = train.token_terms(logits, torch.tensor([0]))
    gradient, = torch.autograd.grad(train.half_loss(*terms[:2], "all").sum(), logits, retain_graph=True)
    assert close(train.kl_loss(*terms[:4], False).item(), 0) and close(gradient[0, 0].item(), 0.1103)


@pytest.mark.parametrize("gap", [1, 17, 30, 60, 100])
@pytest.mark.parametrize("drawn", [0, 1])
def test_losses_stay_finite_and_exact_at_any_gap(gap, drawn):
    """One logit far ahead, the sampled token is that one or another one; fp32. log1p(−exp(log p)) is lost from 17 on."""
    logits, ids = torch.tensor([[float(gap), 0.0, 0.0]], requires_grad=True), torch.tensor([drawn])
    terms = train.token_terms(logits, ids)
    with torch.no_grad():
        exact = torch.tensor(2.0, dtype=torch.float64).log() - torch.tensor([gap, 0.0, 0.0], dtype=torch.float64).logsumexp(0)
        assert terms[3].item() == pytest.approx(exact.item(), rel=1e-6)
    for loss in (train.kl_loss(*terms[:4], False), train.kl_loss(*terms[:4], True), train.half_loss(*terms[:2], "all"), terms[4]):
        gradient, = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
    if drawn == 0:
        gradient, = torch.autograd.grad(train.half_loss(*terms[:2], "all").sum(), logits, retain_graph=True)
        assert gradient[0, 0].item() == pytest.approx(1 / (1 + 2 * math.exp(-gap)) - 0.5, abs=1e-6)
    _, naive, *_ = train.token_terms(logits, ids, naive=True)
    assert torch.isfinite(naive).all() == (drawn == 1 or gap < 17)


def test_a_token_that_has_everything_stops_the_naive_form_only():
    import copy
    model, batch = copy.deepcopy(MODELS["qwen2"]), a_batch()
    model.get_output_embeddings().weight.data *= 1000
    with torch.no_grad():                                         # the first answer is right, and its prompt has no padding
        batch["completion_ids"][0, 0] = model(input_ids=batch["prompt_ids"][:1]).logits[0, -1].argmax()
    settings = config(method="fixed_half", half_tokens="all")
    assert torch.isfinite(gradient_of(model, settings, batch)[0]).all()
    with pytest.raises(FloatingPointError):
        gradient_of(model, replace(settings, broken="naive-log1mp"), batch)


def test_centred_rewards():
    got = train.centred_rewards(torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]), 4)
    assert got.tolist() == [0.75, -0.25, -0.25, -0.25] + [0.0] * 8


@each_variant
def test_parts_chunks_and_order_do_not_change_the_gradient(variant):
    model, batch = MODELS["llama"], a_batch()
    whole, terms = gradient_of(model, config(**variant), batch)
    for changes in (dict(micro_batch=1), dict(micro_batch=3), dict(token_chunk=1), dict(token_chunk=5, micro_batch=2)):
        parts, again = gradient_of(model, config(**variant | changes), batch)
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)
        assert again["loss"] == pytest.approx(terms["loss"], abs=1e-6)
    wide = {key: torch.nn.functional.pad(value, (0, 5)) if value.dim() == 2 and not key.startswith("prompt") else value for key, value in batch.items()}
    torch.testing.assert_close(gradient_of(model, config(**variant), wide)[0], whole, atol=1e-6, rtol=1e-4)
    shuffled = {key: value[torch.tensor([5, 4, 7, 6, 1, 0, 3, 2])] for key, value in batch.items()}                      # groups of four stay together
    torch.testing.assert_close(gradient_of(model, config(**variant), shuffled)[0], whole, atol=1e-6, rtol=1e-4)


@each_model
def test_gradient_checkpointing_changes_nothing_and_leaves_dropout_off(model, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "check_policy", lambda *_: None)       # the tokenizer below knows no word
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    batch = a_batch()
    whole, _ = gradient_of(model, config(method="kl_correct"), batch)
    model.save_pretrained(tmp_path / "m")
    bare = Tokenizer(models.WordLevel({"<end>": 2, "<unk>": 1}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>", unk_token="<unk>").save_pretrained(tmp_path / "m")
    settings = config(method="kl_correct", gradient_checkpointing=True, model=str(tmp_path / "m"))
    other, _ = train.load_policy(settings)
    assert not other.training and other.is_gradient_checkpointing
    other.train()                                                 # as train() does around update(); GPT-2 has dropout of .1 by default
    torch.testing.assert_close(gradient_of(other, settings, batch)[0], whole, atol=1e-6, rtol=1e-4)


def test_wrong_answers_do_not_enter_and_without_right_ones_nothing_moves():
    model, batch = MODELS["gpt2"], a_batch()
    whole, terms = gradient_of(model, config(method="kl_correct"), batch)
    assert terms["trained"] == 4
    other = dict(batch, completion_ids=torch.where(batch["rewards"][:, None] > 0, batch["completion_ids"], 7))
    torch.testing.assert_close(gradient_of(model, config(method="kl_correct"), other)[0], whole)
    assert (gradient_of(model, config(method="kl_correct", broken="train-on-wrong"), other)[0] - whole).norm() > 0.01
    batch["rewards"] = torch.zeros(8)
    for variant in VARIANTS[:-1]:                                 # the last one has an entropy term, which needs no reward
        before = [p.clone() for p in model.parameters()]
        terms = train.update(config(**variant), Accelerator(cpu=True), model, torch.optim.SGD(model.parameters(), lr=1.0), batch)
        assert terms["trained"] == 0 and all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_policy_gradient_of_a_toy_by_enumeration():
    """One problem, three answers of one token, groups of two: the expected gradient of Eq. 5 is (k − 1)/k of the exact one."""
    logits, value = torch.randn(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    logp = logits.log_softmax(0)
    exact, = torch.autograd.grad((logp.exp() * value).sum(), logits, retain_graph=True)
    total = torch.zeros(3, dtype=torch.float64)
    for pair in itertools.product(range(3), repeat=2):
        pair = list(pair)
        weights = train.sequence_weights(config(method="dr_grpo", group_size=2, max_new_tokens=1), value[pair], torch.ones(2, 1, dtype=torch.float64), 2, 1)
        loss = (weights[:, 0] * train.token_losses(config(method="dr_grpo"), train.TokenTerms(logp[pair], None, None, None, None))).sum()
        total -= torch.autograd.grad(loss, logits, retain_graph=True)[0] * logp[pair].sum().exp().detach()
    torch.testing.assert_close(total, exact / 2)


def test_dr_grpo_equals_trl(tmp_path):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "<unk>", "<end>", *(f"w{i}" for i in range(37))])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    MODELS["qwen2"].save_pretrained(tmp_path / "m")
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<end>").save_pretrained(tmp_path / "m")
    trainer = GRPOTrainer(model=Qwen2ForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32), reward_funcs=lambda completions, **_: [0.0] * len(completions),
                          train_dataset=Dataset.from_dict(dict(prompt=["w1 w2 w3"] * 8)),
                          args=GRPOConfig(output_dir=str(tmp_path / "o"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", per_device_train_batch_size=8, num_generations=4,
                                          max_completion_length=6, temperature=1.0, disable_dropout=True, save_strategy="no", loss_type="dr_grpo", scale_rewards="none", beta=0.0))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = a_batch(3)
    advantages = batch["rewards"] - batch["rewards"].view(-1, 4).mean(dim=1).repeat_interleave(4)
    loss = trainer._compute_loss(trainer.model, dict(prompt_ids=batch["prompt_ids"], prompt_mask=batch["prompt_mask"], completion_ids=batch["completion_ids"],
                                                     completion_mask=batch["completion_mask"].long(), advantages=advantages, num_items_in_batch=batch["completion_mask"].sum()))
    trainer.model.zero_grad()
    loss.backward()
    theirs = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    ours, _ = gradient_of(MODELS["qwen2"], config(method="dr_grpo", group_size=4, micro_batch=3), batch)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5          # the values differ: TRL's ratio is 1, ours is log π


# ---- sampling ------------------------------------------------------------------------------------------------------

PROMPTS = torch.tensor([[0, 0, 5, 6], [7, 2, 9, 10], [0, 11, 12, 13]])
PROMPT_MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])


@each_model
def test_sampled_logprobs_equal_a_second_pass_and_masks_end_at_the_first_end(model):
    ends = [2, 3, 4, 5, 6]
    ids, mask, logprobs = train.generate(model, PROMPTS, PROMPT_MASK, 10, 12, 0.8, ends, torch.Generator().manual_seed(0))
    for i, (row, m) in enumerate(zip(ids, mask)):
        n, prompt = int(m.sum()), PROMPTS[i // 10][PROMPT_MASK[i // 10] == 1]
        assert (m[:n] == 1).all() and (m[n:] == 0).all() and not any(t in ends for t in row[:n - 1].tolist()) and (row[n - 1].item() in ends or n == 12)
        logits = model(input_ids=torch.cat([prompt, row[:n]])[None]).logits[0, len(prompt) - 1:-1] / 0.8
        torch.testing.assert_close(logprobs[i, :n], logits.log_softmax(-1).gather(1, row[:n, None])[:, 0], atol=1e-4, rtol=0)


@each_model
def test_a_prompt_read_once_gives_the_states_and_the_gradient_of_a_plain_forward_pass(model):
    """Three different prompts in any order, an empty answer among them; then nothing but empty answers; also where the model makes its own logits."""
    batch, order = a_batch(), torch.tensor([2, 0, 1, 1, 0, 2, 0, 2])
    batch["prompt_ids"], batch["prompt_mask"] = PROMPTS[order], PROMPT_MASK[order]
    batch["completion_mask"][3, 1:] = 0
    empty = batch | dict(completion_ids=batch["completion_ids"][:, :1], completion_mask=batch["completion_mask"][:, :1])
    for case in (batch, empty):
        mask = torch.cat([case["prompt_mask"], case["completion_mask"].long()], dim=1)
        ids, T = torch.cat([case["prompt_ids"], case["completion_ids"]], dim=1), case["prompt_ids"].shape[1]
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, T - 1:-1]
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)) * case["completion_mask"][..., None]
        wanted = torch.cat([g.flatten() for g in torch.autograd.grad((logits * weights).sum(), list(model.parameters()))])
        for head in (train.last_layer(model), torch.nn.Identity()):
            for shared in (True, False):
                found = head(train.answer_states(model, head, case, shared))
                torch.testing.assert_close(found * case["completion_mask"][..., None], logits * case["completion_mask"][..., None], atol=1e-5, rtol=1e-5)
                got = torch.cat([g.flatten() for g in torch.autograd.grad((found * weights).sum(), list(model.parameters()))])
                assert (got - wanted).norm() < 1e-5 * wanted.norm()


@each_model
def test_temperature_zero_takes_the_most_likely_token(model):
    ids, mask, _ = train.generate(model, PROMPTS, PROMPT_MASK, 1, 8, 0.0, [2], None)
    for i, row in enumerate(ids):
        sequence = PROMPTS[i][PROMPT_MASK[i] == 1]
        for token in row[:int(mask[i].sum())]:
            assert token == model(input_ids=sequence[None]).logits[0, -1].argmax()
            sequence = torch.cat([sequence, token[None]])


def test_samples_follow_the_models_own_distribution_whatever_its_generation_settings_say():
    model = MODELS["gpt2"]
    model.generation_config.top_k, model.generation_config.temperature, model.generation_config.do_sample = 3, 0.1, True
    ids, _, _ = train.generate(model, PROMPTS[2:], PROMPT_MASK[2:], 3000, 1, 1.3, [2], torch.Generator().manual_seed(0))
    wanted = 3000 * (model(input_ids=PROMPTS[2:, 1:]).logits[0, -1] / 1.3).softmax(-1).detach()
    assert ((torch.bincount(ids[:, 0], minlength=40) - wanted).square() / wanted).sum().item() < 39 + 5 * math.sqrt(2 * 39)


# ---- the verifier ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, number", [("1,080", 1080), ("1080", 1080), ("$5.00", 5), (" 5 ", 5), ("5.", 5), ("-3", -3), ("-$3.50", Fraction(-7, 2)), ("$-3", -3), (".5", Fraction(1, 2)), ("015", 15),
                                          ("12,345,678.90", Fraction(1234567890, 100)), ("", None), ("five", None), ("5 apples", None), ("1,08", None), ("--3", None), ("-$-3", None), ("5 6", None),
                                          ("1e3", None), ("²", None), ("٣", None), ("5,", None), (".", None), ("9" * 5000, None), ("$", None), ("0.1.2", None)])
def test_numbers(text, number):
    assert train.number_of(text) == number


@pytest.mark.parametrize("answer, thinks, reward", [
    ("7+8=15.</think>\n#### 15", True, 1), ("7+8=15.</think>\n#### 5", True, 0), ("</think>#### 15.00", True, 1), ("</think>#### $15", True, 1), ("</think>15", True, 0),
    ("#### 15", True, 0), ("#### 15", False, 1), ("#### 15</think>", True, 0), ("#### 3</think>#### 4 #### 15", True, 1), ("</think>#### 15 #### 4", True, 0),
    ("</think>#### 3</think>#### 15", True, 1), ("</think>#### 15 apples", True, 0), ("", True, 0), ("</think>####", True, 0)])
def test_rewards_by_hand(answer, thinks, reward):
    assert train.reward_of(answer, Fraction(15), thinks) == reward


@given(st.fractions(max_denominator=1).filter(lambda x: abs(x) < 10**12), st.integers(0, 6), st.booleans(), st.booleans(), st.text(max_size=20), st.sampled_from(["", " ", "\n", "\t"]))
def test_every_way_to_write_a_number_counts_and_every_other_number_does_not(value, places, comma, dollar, thought, space):
    text = f"{'-' if value < 0 else ''}{'$' if dollar else ''}{format(abs(int(value)), ',' if comma else '')}" + ("." + "0" * places if places else "")
    answer = f"{thought.replace('</think>', '')}</think>\n####{space}{text}{space}"
    assert train.reward_of(answer, value, True) == 1.0
    for other in (value + 1, -value - 1, value * 10 + 5, value + Fraction(1, 10**6)):
        assert train.reward_of(answer, other, True) == 0.0


@given(st.text(max_size=60))
def test_no_text_makes_the_verifier_stumble(text):
    assert train.reward_of(text, Fraction(5), True) in (0.0, 1.0) and train.reward_of("</think>####" + text, Fraction(5), True) in (0.0, 1.0)
    if "5" not in text:
        assert train.reward_of("</think>####" + text, Fraction(5), True) == 0.0


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the official GSM8K files are not in ../shared/data/gsm8k")
def test_all_official_answers_parse(tmp_path):
    problems, tests = train.load_problems(train.Config(data=str(OFFICIAL)))
    assert (len(problems), len(tests)) == (7473, 1319)
    for name, part in (("train", problems), ("test", tests)):
        for line, (question, result, steps) in zip((OFFICIAL / f"{name}.jsonl").read_text(encoding="utf8").split("\n"), part):
            answer = json.loads(line)["answer"]
            assert float(result) == float(answer.split("####")[1].replace(",", "").replace("$", "")) and train.reward_of(answer, result, thinks=False) == 1.0
            assert train.reward_of(answer, result + 1, thinks=False) == 0.0 and train.reward_of(answer, result, thinks=True) == 0.0
    process = call(train, "--data", OFFICIAL, "--updates", "1", "--out", tmp_path / "o")
    assert_one_line_error(process, "context")                     # the small model cannot read them all, and says so


def test_the_download_is_checked(tmp_path, monkeypatch):
    import io
    monkeypatch.setattr(gsm8k.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"something else"))
    assert_one_line_error(call(gsm8k, "--data-dir", tmp_path / "d"), "SHA-256")
    assert not (tmp_path / "d").exists()
    monkeypatch.setitem(gsm8k.GSM8K, "train.jsonl", "f41f3fa625ff120ddca7ef456bf66371ecea23c129f4e4c32367101edb516cf8")      # the first file is accepted, the second is not
    assert_one_line_error(call(gsm8k, "--data-dir", tmp_path / "d"), "SHA-256", "test.jsonl")
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["train.jsonl"]
    monkeypatch.setattr(gsm8k.urllib.request, "urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no net")))
    assert_one_line_error(call(gsm8k, "--data-dir", tmp_path / "d"), "--data-dir")


def test_the_trainer_names_the_script_that_fetches_missing_problems(tmp_path):
    process = call(train, "--data", tmp_path / "d e", "--quiet", "--out", tmp_path / "o")
    assert_one_line_error(process, "train.jsonl", "get_gsm8k.py")
    assert not (tmp_path / "d e").exists() and {path.name for path in (tmp_path / "o").iterdir()} == {"config.json", ".in_use"}


# ---- the problems ---------------------------------------------------------------------------------------------------

def test_the_generator_computes_rightly_and_keeps_its_promises():
    assert len(WORLD["situations"]) >= 40 and len({s["item"] for s in WORLD["situations"]}) == len(WORLD["situations"]) and len(WORLD["held_out"]) >= 5
    rng = np.random.default_rng(0)
    extras, carries, steps = 0, 0, set()
    for _ in range(400):
        problem = base_model.make_problem(WORLD, WORLD["situations"], rng)
        value, numbers = None, [int(n) for n in re.findall(r"\d+", problem["question"])]
        for calculation in problem["working"].splitlines():
            a, sign, b, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", calculation).groups()
            assert value in (None, int(a)) and int(a) in numbers + [value] and int(b) in numbers
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": Fraction(int(a), int(b))}[sign]
            assert value == int(result) and 2 <= value <= 99
            carries += sign == "+" and int(a) % 10 + int(b) % 10 > 9
        assert value == problem["result"] and problem["working"].count("=") == problem["steps"]
        steps.add(problem["steps"])
        extras += len(numbers) == problem["steps"] + 2
    assert steps == {2, 3, 4, 5} and 150 < extras < 250 and carries > 50


def test_shipped_problems_are_new_ones():
    sets = {name: train.read_problems(FOLDER / "data" / f"{name}.jsonl") for name in ("train", "test", "held_out", "large")}
    assert [len(s) for s in sets.values()] == [16_000, 500, 500, 500]
    questions = [question for s in sets.values() for question, _, _ in s]
    assert len(set(questions)) == len(questions)
    held = {s["ask"].split("{n}")[0] for s in WORLD["situations"] if s["item"] in WORLD["held_out"]}
    assert all(any(part in question for part in held) for question, _, _ in sets["held_out"])


# ---- whole runs -----------------------------------------------------------------------------------------------------

TINY = ["--updates", "6", "--batch-size", "16", "--eval-every", "2", "--eval-problems", "6", "--device", "cpu", "--quiet"]
KEYS = {"greedy_accuracy", "sampled_accuracy", "pass_at_8", "entropy", "length", "problems"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few of the shipped problems, so that the final evaluation is short."""
    directory = tmp_path_factory.mktemp("data")
    for name, count in (("train", 300), ("test", 12)):
        (directory / f"{name}.jsonl").write_text("\n".join((FOLDER / "data" / f"{name}.jsonl").read_text().split("\n")[:count]) + "\n")
    return directory


@pytest.mark.long
def test_a_run_leaves_what_the_readme_promises(tmp_path, data):
    before = (FOLDER / "weights" / "base" / "model.safetensors").read_bytes()
    out = tmp_path / "o"
    process = run(TRAIN, *TINY[:-1], "--data", data, "--out", out)
    assert process.returncode == 0, process.stderr
    for words in ("right", "gradient", "    -> ", "before", "at best", "target", "policy, best policy and tables", "greedy by steps", "Look at"):
        assert words in process.stdout, words
    rows, tests = (list(csv.DictReader((out / f"{name}.csv").open())) for name in ("metrics", "tests"))
    assert len(rows) == 6 and [row["update"] for row in tests] == ["0", "2", "4", "6"]
    assert set(json.loads((out / "eval.json").read_text())) == KEYS
    assert (out / "best" / "model.safetensors").exists() and (out / "curve.png").exists()
    process = run(EVAL, "--weights", out, "--samples", "8", "--show", "1", "--json", tmp_path / "e.json")
    assert process.returncode == 0 and "greedy by steps" in process.stdout, process.stderr
    assert json.loads((tmp_path / "e.json").read_text()) == json.loads((out / "eval.json").read_text())
    process = call(study, "--compare", out, out, "--figure", tmp_path / "c.png")
    assert process.returncode == 0 and (tmp_path / "c.png").exists()
    assert (FOLDER / "weights" / "base" / "model.safetensors").read_bytes() == before
    # --run judges it again, with the same result, and prints a next step that works as it stands
    first = {name: (out / name).read_bytes() for name in ("eval.json", "curve.png")}
    for name in first:
        (out / name).unlink()
    process = run(EVAL, "--run", out)
    assert process.returncode == 0, process.stderr
    assert all((out / name).read_bytes() == content for name, content in first.items())
    step = shlex.split(process.stdout.splitlines()[-1].partition("answers: ")[2])
    process = subprocess.run([*step, "--samples", "1"], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0 and process.stdout.count("\n  ") == 3 + 1, process.stderr
    process = run(EVAL, "--run", out, "--quiet")
    assert process.returncode == 0 and not process.stdout


def test_run_takes_finished_runs_only(tmp_path, data):
    (tmp_path / "config.json").write_text("{}")
    assert_one_line_error(call(evaluation, "--run", tmp_path), "is no finished run")
    (tmp_path / "train.json").write_text("{}")
    (tmp_path / "config.json").write_text("{")
    assert_one_line_error(call(evaluation, "--run", tmp_path), "config.json")


def test_latest_is_the_newest_run_that_is_no_smoke_run(tmp_path, monkeypatch):
    for module in (train, evaluation):
        monkeypatch.setattr(module, "HERE", tmp_path)
        assert_one_line_error(call(module, "--resume" if module is train else "--run", "latest"), "latest")
    for when, name in enumerate(("old", "new", "newer_smoke")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        for file, text in (("train.json", ""), ("config.json", json.dumps(dict(seed=-1 - when)))):
            (tmp_path / "runs" / name / file).write_text(text)
            os.utime(tmp_path / "runs" / name / file, (when, when))
        os.utime(tmp_path / "runs" / name, (when, when))
    assert evaluation.newest_run("train.json").name == "new"
    assert_one_line_error(call(train, "--resume", "latest"), "--seed", "-2")


def test_an_answer_keeps_the_end_of_its_thoughts_special_or_not():
    from tokenizers import AddedToken
    for special in (False, True):
        _, tokenizer = train.load_policy(train.Config())
        tokenizer.add_tokens([AddedToken("</think>", special=special)], special_tokens=special)
        ids = torch.tensor([tokenizer("7+8=15\n</think>\n#### 15<|end|>")["input_ids"]])
        assert train.answer_texts(tokenizer, ids, torch.ones(ids.shape)) == ["7+8=15\n</think>\n#### 15"]


@pytest.mark.parametrize("preset", [name for name, settings in train.PRESETS.items() if "model" not in settings])     # the others need the hub
def test_every_preset_runs(preset, tmp_path, data):
    process = call(train, *TINY, "--preset", preset, "--updates", "1", "--eval-problems", "1", "--data", data, "--out", tmp_path / "o")
    assert process.returncode == 0, process.stderr
    stored = json.loads((tmp_path / "o" / "config.json").read_text())
    assert all(stored[name] == value for name, value in train.PRESETS[preset].items()) and stored["group_size"] == (4 if preset == "gsm8k_reinforce" else 1)


def test_full_size_settings_are_those_of_the_thesis(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_one_line_error(call(train, "--preset", "full_size", "--quiet", "--out", tmp_path / "o"), "Qwen/Qwen3-4B-Thinking-2507", "hub")
    full = train.Config(**train.PRESETS["full_size"])
    assert full.updates * 512 // 7473 in (143, 144) and (full.batch_size, full.lr, full.weight_decay, full.max_grad_norm, full.temperature, full.max_new_tokens, full.eval_every) == (512, 1e-6, 0.01, 1.0, 1.0, 8192, 5)


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_resume_equals_the_uninterrupted_run(how, tmp_path, data):
    flags = [*TINY, "--data", str(data), "--method", "kl_correct"]
    assert run(TRAIN, *flags, "--out", tmp_path / "whole").returncode == 0
    process = subprocess.Popen([sys.executable, str(TRAIN), *flags, "--out", str(tmp_path / "stopped")], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "stopped" / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(how)
    error = process.communicate()[1]
    if how == signal.SIGINT:
        assert process.returncode == 130 and "--resume" in error and "Traceback" not in error
    assert run(TRAIN, "--quiet", "--resume", tmp_path / "stopped").returncode == 0
    for name in ("metrics.csv", "tests.csv", "eval.json", "config.json", "curve.png", "policy/model.safetensors", "best/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
    for flags in (["--lr", "1e-4"], ["--smoke"], ["--out", tmp_path / "x"], ["--preset", "gsm8k_0"]):
        assert_one_line_error(call(train, "--resume", tmp_path / "stopped", *flags), "--device")


WORKER = """
import sys, torch
sys.path.insert(0, {folder!r}); sys.path.insert(0, {tests!r})
import test_kl_bernoulli as t, train_kl_bernoulli as train
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == int(sys.argv[2])
model = t.MODELS["gpt2"]
policy, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
batch = t.a_batch(5)
# In the second case the first process has no correct answer at all
for case, rewards in enumerate(([1.0, 0, 0, 0, 1, 1, 0, 1], [0.0, 0, 0, 0, 1, 1, 0, 1])):
    batch["rewards"] = torch.tensor(rewards)
    half = {{key: value[4 * accelerator.process_index:][:4] for key, value in batch.items()}} if accelerator.num_processes == 2 else dict(batch)
    for number, variant in enumerate([*t.VARIANTS]):
        model.zero_grad()
        terms = train.update(t.config(micro_batch=2, **variant), accelerator, policy, optimizer, half)
        if accelerator.is_main_process:
            torch.save((torch.cat([p.grad.flatten() for p in model.parameters()]), terms), sys.argv[1] + f"{{case}}_{{number}}")
half["rewards"] = torch.zeros(len(half["rewards"]))               # and now nobody has one: no update, no hang
terms = train.update(t.config(method="kl_batch"), accelerator, policy, optimizer, half)
assert terms["trained"] == 0
accelerator.wait_for_everyone()
accelerator.end_training()
import os; os._exit(0)            # on a busy machine a thread of gloo may still run, and the interpreter would abort on its way out
"""


def launch(n, *command):
    """On n processes. torchrun, because `accelerate launch --cpu` starts one process whatever --num_processes says."""
    process = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), *map(str, command)], capture_output=True, text=True, timeout=300,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr[-3000:]
    return process


@pytest.mark.long
def test_two_processes_have_the_gradient_of_one(tmp_path):
    """Unequal lengths, one process without a correct answer: divided by the global number, and nobody waits for ever."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(folder=str(FOLDER), tests=str(REPO / "tests")))
    for n in (1, 2):
        launch(n, script, tmp_path / f"p{n}_", n)
    for case, number in itertools.product(range(2), range(len(VARIANTS))):
        (one, terms), (two, again) = (torch.load(tmp_path / f"p{n}_{case}_{number}", weights_only=True) for n in (1, 2))
        torch.testing.assert_close(two, one, atol=1e-6, rtol=1e-4)
        for key in ("loss", "grad_norm", "trained", "correct"):
            assert again[key] == pytest.approx(terms[key], abs=1e-5, rel=1e-4), key


@pytest.mark.long
@pytest.mark.parametrize("method", ["dr_grpo", "kl_correct"])
def test_two_processes_train_together(method, tmp_path, data):
    process = launch(2, TRAIN, *without_device(TINY[:-1]), "--updates", "2", "--method", method, "--data", data, "--out", tmp_path / "o")
    assert f" × 2 · {method} · seed" in process.stdout
    assert json.loads((tmp_path / "o" / "train.json").read_text())["result"]["updates"] == 2


@pytest.mark.parametrize("name", train.BREAKS)
def test_every_broken_variant_runs(name, tmp_path, data):
    process = call(train, *TINY[:-1], "--updates", "1", "--break", name, "--method", "kl_correct", "--data", data, "--out", tmp_path / "o")
    assert process.returncode == 0 and f"BROKEN: {name}" in process.stdout or name == "naive-log1mp" and "not finite" in process.stderr, process.stderr


def test_what_a_batch_is_described_by():
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]])
    old = torch.tensor([[-1.0, -2, 0], [-1, -1, -1], [-4, 0, 0], [-0.5, -0.5, 0]])
    row = train.describe(train.Config(max_new_tokens=3), Accelerator(cpu=True), dict(completion_mask=mask, old_logprobs=old, rewards=torch.tensor([1.0, 0, 0, 0])))
    assert row == pytest.approx(dict(sampled_accuracy=0.25, entropy=11 / 8, completion_length=2.0, cut_off_ratio=0.25))


def test_the_training_loop_keeps_its_books(tmp_path, monkeypatch, data):
    sampled, greedy, checkpoints, saved, collect, save_checkpoint = [], [], [], [], train.collect, train.save_checkpoint
    accuracies = iter([0.5, 0.75, 0.75, 0.25, 0.0])

    def watched(config, model, tokenizer, problems, generator):
        batch, texts = collect(config, model, tokenizer, problems, generator)
        if config.temperature == 0:
            greedy.append((config.group_size, len(problems)))
            batch["rewards"] = torch.full((4,), next(accuracies))
        else:
            sampled.append((batch, texts, problems))
        return batch, texts

    monkeypatch.setattr(train, "collect", watched)
    monkeypatch.setattr(train, "save", lambda model, tokenizer, directory: saved.append(directory.name))
    monkeypatch.setattr(train, "save_checkpoint", lambda out, model, optimizer, state: checkpoints.append(state["update"]) or save_checkpoint(out, model, optimizer, state))
    lines, config = [], train.Config(data=str(data), updates=7, batch_size=8, group_size=4, max_new_tokens=8, eval_every=2, eval_problems=3, seed=3)
    _, _, result = train.train(config, tmp_path, Accelerator(cpu=True), lines.append)
    assert greedy == [(1, 3)] * 5 and saved == ["best", "best", "best"]        # the first, a better one, one as good
    assert checkpoints == [2, 4, 6, 7] and result["updates"] == 7
    assert [(test["update"], test["greedy_accuracy"]) for test in result["tests"]] == [(0, 0.5), (2, 0.75), (4, 0.75), (6, 0.25), (7, 0.0)]
    with (tmp_path / "metrics.csv").open(encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    assert [row["update"] for row in rows] == [str(k) for k in range(1, 8)] and len((tmp_path / "timing.csv").read_text().splitlines()) == 8
    for row, (batch, texts, problems) in zip(rows, sampled):
        assert float(row["sampled_accuracy"]) == pytest.approx(batch["rewards"].mean().item()) and float(row["completion_length"]) == pytest.approx(
            batch["completion_mask"].sum().item() / 8, rel=1e-4)
    shown = [line for line in lines if "\n    -> " in line]
    assert shown == [f"{sampled[k][2][0].question}\n    -> {sampled[k][1][0]}" for k in (1, 3, 5, 6)]


def test_any_token_of_the_vocabulary_may_be_the_end(monkeypatch):
    monkeypatch.setattr(train, "turn_end", lambda tokenizer: None)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=10), generation_config=SimpleNamespace(eos_token_id=[0, 9, 10, -1]))
    tokenizer = SimpleNamespace(eos_token_id=3)
    assert train.end_tokens(model, tokenizer) == [0, 3, 9]


def test_two_processes_with_the_same_answers_take_the_step_of_one(tmp_path, monkeypatch, data):
    caught, update = [], train.update

    def watched(config, accelerator, policy, optimizer, batch):
        caught.append((config, accelerator, copy.deepcopy(policy), batch))
        return update(config, accelerator, policy, optimizer, batch)

    monkeypatch.setattr(train, "update", watched)
    train.train(train.Config(data=str(data), updates=1, batch_size=64, group_size=8, max_new_tokens=30, eval_problems=2, seed=3), tmp_path, Accelerator(cpu=True), lambda *text: None)
    config, accelerator, policy, batch = caught[0]

    class Two:
        """The first of two processes whose batches are equal: sums over both are twice its own, means are its own."""
        num_processes = 2

        def __getattr__(self, name):
            return getattr(accelerator, name)

        def reduce(self, tensor, how):
            return 2 * tensor if how == "sum" else tensor

    stepped = []
    for one in (accelerator, Two()):
        model = copy.deepcopy(policy)
        found = update(replace(config, max_grad_norm=1e9), one, model, torch.optim.SGD(model.parameters(), lr=1.0), batch)
        stepped.append((torch.cat([value.flatten() for value in model.state_dict().values()]), found))
    start = torch.cat([value.flatten() for value in policy.state_dict().values()])
    assert not torch.equal(stepped[0][0], start) and torch.allclose(stepped[0][0], stepped[1][0], atol=1e-6)


def test_a_process_without_right_answers_takes_part_with_a_gradient_of_zero(tmp_path, monkeypatch, data):
    """The other one has three right answers, and waits for an exchange of gradients."""
    caught, update = [], train.update
    monkeypatch.setattr(train, "update", lambda *given: caught.append(given) or update(*given))
    train.train(train.Config(data=str(data), method="kl_correct", updates=1, batch_size=8, max_new_tokens=8, eval_problems=2), tmp_path, Accelerator(cpu=True), lambda *text: None)
    config, accelerator, policy, optimizer, batch = caught[0]

    class Other:
        num_processes = 2

        def __getattr__(self, name):
            return getattr(accelerator, name)

        def reduce(self, tensor, how):
            return tensor + 3

    steps, backward = [], accelerator.backward
    monkeypatch.setattr(accelerator, "backward", lambda loss: steps.append(loss.item()) or backward(loss))
    found = update(config, Other(), policy, optimizer, batch | dict(rewards=torch.zeros(8)))
    assert steps == [0.0] and found["trained"] == found["correct"] == 3 and found["grad_norm"] == 0


@each_model
def test_every_layer_of_the_cache_has_room_for_more_tokens(model, monkeypatch):
    started, read_once = [], train.read_once
    monkeypatch.setattr(train, "read_once", lambda *given: started.append(read_once(*given)) or started[-1])
    train.generate(model, PROMPTS, PROMPT_MASK, 2, 3, 1.0, [2], torch.Generator().manual_seed(0))
    assert {type(layer) for layer in started[0].past_key_values.layers} == {train.RoomyLayer}


def test_parts_hold_answers_of_similar_length_without_their_padding():
    lengths, prompts = torch.tensor([5, 1, 7, 2, 6, 3, 4]), torch.tensor([1, 4, 2, 3, 2, 2, 1])
    mask, prompt_mask = (torch.arange(9) < lengths[:, None]).float(), (torch.arange(6) >= 6 - prompts[:, None]).long()
    ids = torch.arange(63).view(7, 9)
    batch = dict(prompt_ids=prompt_mask * 8, prompt_mask=prompt_mask, completion_ids=ids, completion_mask=mask, advantages=lengths / 10)
    found = list(train.parts_by_length(batch, 3))
    assert [rows.tolist() for rows, _ in found] == [[1, 3, 5], [6, 0, 4], [2]]
    for rows, part in found:
        width, asked = int(lengths[rows].max()), int(prompts[rows].max())
        assert torch.equal(part["completion_ids"], ids[rows, :width]) and torch.equal(part["completion_mask"], mask[rows, :width])
        assert torch.equal(part["prompt_mask"], prompt_mask[rows, 6 - asked:]) and part["prompt_ids"].shape == part["prompt_mask"].shape
        assert torch.equal(part["advantages"], lengths[rows] / 10)


def test_processes_share_the_problems_and_never_a_random_stream():
    prompts, config = [f"prompt {k}" for k in range(50)], train.Config(batch_size=16, group_size=2)
    alone, _ = train.choose(config, SimpleNamespace(num_processes=1, process_index=0), prompts, 7)
    both = [train.choose(config, SimpleNamespace(num_processes=2, process_index=rank), prompts, 7) for rank in (0, 1)]
    assert both[0][0] + both[1][0] == alone and len(set(alone)) == 8
    assert both[0][1].initial_seed() + 1 == both[1][1].initial_seed()
    assert sorted(train.choose(config, SimpleNamespace(num_processes=1, process_index=0), prompts[:8], 7)[0]) == prompts[:8]          # each once
    assert train.choose(config, SimpleNamespace(num_processes=1, process_index=0), prompts[:4], 7)[0]
    assert train.choose(config, SimpleNamespace(num_processes=1, process_index=0), prompts, 8)[0] != alone


def test_no_correct_answer_skips_the_update_and_says_so(tmp_path, data):
    (tmp_path / "d").mkdir()
    for name in ("train", "test"):
        (tmp_path / "d" / f"{name}.jsonl").write_text(json.dumps(dict(question="Ana has 20 apples.", answer="#### 123456789")) + "\n")
    process = call(train, *TINY[:-1], "--method", "kl_batch", "--data", tmp_path / "d", "--out", tmp_path / "o", "--updates", "2")
    assert process.returncode == 0, process.stderr
    rows = (tmp_path / "o" / "metrics.csv").read_text().splitlines()
    assert [dict(zip(rows[0].split(","), row.split(",")))["trained"] for row in rows[1:]] == ["0", "0"]
    from safetensors.torch import load_file
    old, new = (load_file(path / "model.safetensors") for path in (FOLDER / "weights" / "base", tmp_path / "o" / "policy"))
    assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.long
def test_a_gradient_that_is_not_finite_stops_with_the_checkpoint_intact(tmp_path, monkeypatch, data):
    original, calls = train.batch_loss, []

    def poisoned(*arguments):
        calls.append(1)
        return original(*arguments) * (math.nan if len(calls) == 3 else 1.0)
    monkeypatch.setattr(train, "batch_loss", poisoned)
    process = call(train, *TINY, "--method", "kl_correct", "--batch-size", "64", "--data", data, "--out", tmp_path / "o")
    assert_one_line_error(process, "not finite", "--lr")
    monkeypatch.undo()
    assert call(train, "--quiet", "--resume", tmp_path / "o").returncode == 0
    assert len((tmp_path / "o" / "metrics.csv").read_text().splitlines()) == 7


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_run_with_another_model(kind, tmp_path, monkeypatch, data):
    """Another shape, another tokenizer without a chat format; told the format by --instruction."""
    _, tokenizer = train.load_policy(train.Config())
    tokenizer.chat_template = None
    model = MODELS[kind]
    type(model)(type(model.config)(**(model.config.to_dict() | dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)))).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    process = call(train, "--model", "m", "--instruction", "End with ####.", *TINY, "--updates", "1", "--data", data, "--out", "o")
    assert process.returncode == 0, process.stderr
    monkeypatch.chdir("/")
    assert call(evaluation, "--weights", tmp_path / "o", "--samples", "2", "--max-new-tokens", "20").returncode == 0


def test_pass_at_k_by_enumeration():
    right = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]) > 0
    for k in (1, 2, 4, 5):
        wanted = np.mean([np.mean([any(row[list(some)]) for some in itertools.combinations(range(5), k)]) for row in right])
        assert evaluation.pass_at(right, k) == pytest.approx(wanted)


@pytest.mark.long
def test_shipped_policy_is_better_than_the_base_on_unseen_problems(tmp_path):
    results = {}
    for name in ("base", "policy"):
        process = call(evaluation, "--weights", FOLDER / "weights" / name, "--limit", "200", "--samples", "8", "--json", tmp_path / "e.json")
        assert process.returncode == 0, process.stderr
        results[name] = json.loads((tmp_path / "e.json").read_text())
    base, policy = results["base"], results["policy"]
    assert set(base) == KEYS and base["problems"] == 200
    assert 0.30 < base["greedy_accuracy"] < 0.65 and base["pass_at_8"] > base["sampled_accuracy"] + 0.2
    assert policy["sampled_accuracy"] > base["sampled_accuracy"] + 0.12 and policy["greedy_accuracy"] > base["greedy_accuracy"] + 0.05


def test_prompt_answers_one_problem():
    process = call(evaluation, "--prompt", "Ana has 20 apples. Ana picks 7 more apples. Ana gives 5 apples to a neighbor. How many apples does Ana have now?")
    assert process.returncode == 0 and "</think>" in process.stdout and "####" in process.stdout, process.stderr


@pytest.mark.parametrize("arguments, words", [
    (["--group-size", "1"], ["--group-size", "2"]), (["--lr", "0"], ["--lr"]), (["--temperature", "0"], ["--temperature"]), (["--method", "ppo"], ["kl_batch"]), (["--half-tokens", "some"], ["confident"]),
    (["--batch-size", "6"], ["--batch-size", "--group-size"]), (["--preset", "gsm8k_1"], ["gsm8k_0p5_0"]), (["--model", "no/such/model"], ["no/such/model", "loaded"]), (["--data", "nowhere"], ["nowhere"]),
    (["--max-new-tokens", "500"], ["context"]), (["--break", "x"], ["train-on-wrong"]), (["--break", "train-on-wrong"], ["kl_batch"]), (["--updatez", "1"], ["--help"]), (["--updates", "x"], ["--help"]),
    (["--resume", "nowhere"], ["nowhere", "config.json"]), (["--resume", ".", "--preset", "gsm8k_0"], ["--device"]), (["--ent-coef", "nan"], ["--ent-coef"])])
def test_trainer_refuses_bad_values(arguments, words, tmp_path):
    assert_one_line_error(call(train, *arguments, "--quiet", *([] if "--resume" in arguments else ["--out", tmp_path / "out"]), cwd=tmp_path), *words)


GOOD = json.dumps(dict(question="1+1?", answer="1+1=2\n#### 2"))


@pytest.mark.parametrize("content, words", [
    ("", ["line 1", "JSON"]), (GOOD + "\n\n{", ["line 3", "JSON"]), ("{", ["line 1", "JSON"]), ("[" * 100_000, ["line 1", "JSON"]), ('{"question": "a"}', ["answer"]), ('{"answer": "#### 2"}', ["question"]), ("[1]", ["question"]),
    ('{"question": 1, "answer": "#### 2"}', ["question"]), (json.dumps(dict(question="a", answer="2")), ["line 1", "####"]), (GOOD + "\n" + json.dumps(dict(question="a", answer="#### two")), ["line 2", "number", "two"]),
    (json.dumps(dict(question="a", answer="####")), ["number"]), ('{"question": "\\ud800", "answer": "#### 2"}', ["JSON"]), (json.dumps(dict(question="why " * 400, answer="#### 2")), ["context", "why"]), (b"\xff\xfe", ["UnicodeDecodeError"])])
def test_trainer_refuses_malformed_data_and_leaves_no_results(content, words, tmp_path):
    (tmp_path / "d").mkdir()
    for name in ("train", "test"):
        (tmp_path / "d" / f"{name}.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_one_line_error(call(train, "--data", tmp_path / "d", "--quiet", "--out", tmp_path / "o"), *words)
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"config.json", ".in_use"}           # --out may be used again


@pytest.mark.parametrize("arguments", [["--weights", "nowhere"], ["--samples", "0"], ["--json", "no/such/x.json"], ["--run", "nowhere"], ["--data", "nowhere"], ["--prompt", "why " * 300],
                                       ["--limit", "-1"], ["--samples", "4", "--json", "e.json"], ["--weights", "latest"]])
def test_eval_refuses_bad_values(arguments, tmp_path):
    if arguments == ["--weights", "latest"] and list(FOLDER.glob("runs/*/train.json")):
        pytest.skip("there is a run")
    assert_one_line_error(call(evaluation, *arguments, cwd=tmp_path))


@pytest.mark.parametrize("arguments", [[], ["--compare", "nowhere"], ["--compare", "{run}", "--figure", "."]])
def test_study_refuses_bad_values(arguments, tmp_path):
    for name, header in (("metrics", "update,entropy,completion_length,loss\n1,1,1,1\n"), ("tests", "update,greedy_accuracy\n0,1\n")):
        (tmp_path / f"{name}.csv").write_text(header)
    assert_one_line_error(call(study, *(text.format(run=tmp_path) for text in arguments), cwd=tmp_path))
