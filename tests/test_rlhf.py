"""REINFORCE for RLHF: losses, gradients and advantages against TRL and enumeration; the sampler against the model's own distribution; data, processes, resume, bad input."""
import ast
import copy
import csv
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings, strategies as st

from conftest import REPO, assert_one_line_error, call, load, run, without_device

FOLDER = REPO / "reinforce_rlhf"
TRAIN, REWARD, EVAL = FOLDER / "train_reinforce_rlhf.py", FOLDER / "train_reward_model.py", FOLDER / "reinforce_rlhf_eval.py"
train, reward, evaluation = load("reinforce_rlhf/train_reinforce_rlhf.py"), load("reinforce_rlhf/train_reward_model.py"), load("reinforce_rlhf/reinforce_rlhf_eval.py")
answers, study, base_models = load("reinforce_rlhf/make_answers.py"), load("reinforce_rlhf/study.py"), load("reinforce_rlhf/make_base_models.py")
torch.set_num_threads(1)
WORLD = evaluation.load_world()
SIZES = dict(vocab_size=40, pad_token_id=0, eos_token_id=2, bos_token_id=None)
DECODER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, **SIZES)


def random_models():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    return {"qwen2": Qwen2ForCausalLM(Qwen2Config(**DECODER)).eval(), "llama": LlamaForCausalLM(LlamaConfig(**DECODER)).eval(),
            "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, **SIZES)).eval()}


MODELS = random_models()
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
PROMPTS = torch.tensor([[0, 0, 5, 6], [7, 2, 9, 10], [0, 11, 12, 13]])             # the second one contains the end token
PROMPT_MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
ROWS = [[10, 11, 2], [12, 13, 12, 5, 2], [16, 2]]
turn = lambda role, content: dict(role=role, content=content)
MESSAGES = [turn("user", "Hi."), turn("assistant", "Hello."), turn("user", "Why?")]
PAIR = dict(prompt="What is sleep?", chosen="Sleep is a time of rest for body and mind.", rejected="Nobody asked you.")


def a_batch(seed=0, B=8, T=4, L=6):
    """(batch, advantages), with unequal lengths."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, L + 1, (B,), generator=g)
    lengths[0] = L
    mask = (torch.arange(L) < lengths[:, None]).float()
    prompt_mask = (torch.arange(T) >= torch.randint(0, T, (B,), generator=g)[:, None]).long()
    prompt_mask[0] = 1
    return dict(prompt_ids=torch.randint(3, 40, (B, T), generator=g), prompt_mask=prompt_mask, completion_ids=torch.randint(3, 40, (B, L), generator=g),
                completion_mask=mask), torch.randn(B, generator=g)


def gradient_of(model, config, batch, advantages):
    """(gradient of all weights, loss), without moving the weights."""
    terms = train.update(config, Accelerator(cpu=True), model, torch.optim.SGD(model.parameters(), lr=0.0), batch | dict(advantages=advantages))
    return flat_gradient(model), terms["loss"]


def flat_gradient(model):
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in model.parameters()])


def config(**changes):
    return train.Config(**(dict(max_grad_norm=1e9, max_new_tokens=6, group_size=4, micro_batch=8) | changes))


def rows_of(path):
    with path.open(encoding="utf8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def byte_tokenizer():
    """A token per byte, no chat template, and the end token pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocabulary = {"<|end|>": 0, **{sign: k + 1 for k, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def byte_model():
    """(random GPT-2, byte_tokenizer)."""
    from transformers import GPT2Config, GPT2LMHeadModel
    tokenizer = byte_tokenizer()
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256, bos_token_id=None, eos_token_id=0,
                                      pad_token_id=0)).eval(), tokenizer


def sft_model():
    return train.load_policy(train.Config())


@pytest.fixture(autouse=True)
def no_judge(monkeypatch):
    """Runs inside this process are not judged, which saves starting two processes; those started as processes are."""
    for module in (train, reward):
        monkeypatch.setattr(module, "start_judge", lambda out, args: None)


# ---- scoring and sampling ------------------------------------------------------------------------------------------

def penalised(ids, logits, penalty):
    """The library's own penalty, as an oracle; ids [1, n] without padding."""
    from transformers import RepetitionPenaltyLogitsProcessor
    return RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone()) if penalty != 1 else logits


@each_model
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_padded_logprobs_equal_a_token_by_token_loop(model, penalty):
    completion_ids, completion_mask = train.pad_right(ROWS, 0)
    batch = dict(prompt_ids=PROMPTS, prompt_mask=PROMPT_MASK, completion_ids=completion_ids, completion_mask=completion_mask.float())
    got = train.completion_logprobs(model, batch, 0.7, penalty)
    for i, row in enumerate(ROWS):
        ids = PROMPTS[i][PROMPT_MASK[i] == 1][None]
        for t, token in enumerate(row):
            wanted = (penalised(ids, model(input_ids=ids).logits[:, -1].detach(), penalty)[0].double() / 0.7).log_softmax(-1)[token].item()
            assert got[i, t].item() == pytest.approx(wanted, abs=1e-4)
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert (got[i, len(row):] == 0).all()
    # More padding on either side, filled with tokens that a penalty would notice, changes nothing
    pad = torch.nn.functional.pad
    padded = dict(prompt_ids=pad(PROMPTS, (3, 0), value=12), prompt_mask=pad(PROMPT_MASK, (3, 0)), completion_ids=pad(completion_ids, (0, 3), value=2),
                  completion_mask=pad(completion_mask.float(), (0, 3)))
    wide = train.completion_logprobs(model, padded, 0.7, penalty)
    torch.testing.assert_close(wide[:, :5], got, atol=1e-5, rtol=0)
    assert (wide[:, 5:] == 0).all()
    torch.testing.assert_close(train.batch_logprobs(model, batch, 0.7, penalty, 2), got, atol=1e-5, rtol=0)


@each_model
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_prompt_read_once_gives_the_gradient_of_a_plain_forward_pass(model, penalty):
    """Three different prompts in any order, an empty answer among them; then nothing but empty answers."""
    batch, advantages = a_batch()
    order = torch.tensor([2, 0, 1, 1, 0, 2, 0, 2])
    batch["prompt_ids"], batch["prompt_mask"] = PROMPTS[order], PROMPT_MASK[order]
    batch["completion_mask"][3, 1:] = 0
    empty = batch | dict(completion_ids=batch["completion_ids"][:, :1], completion_mask=batch["completion_mask"][:, :1])
    for case in (batch, empty):
        mask = torch.cat([case["prompt_mask"], case["completion_mask"].long()], dim=1)
        ids, T = torch.cat([case["prompt_ids"], case["completion_ids"]], dim=1), case["prompt_ids"].shape[1]
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, T - 1:-1]
        for t in range(logits.shape[1]):
            seen = train.seen_tokens(ids[:, :T + t], mask[:, :T + t], logits.shape[2])
            logits = torch.cat([logits[:, :t], train.penalise(logits[:, t], seen, penalty)[:, None], logits[:, t + 1:]], dim=1)
        plain = logits.log_softmax(-1).gather(-1, case["completion_ids"][..., None])[..., 0] * case["completion_mask"]
        shared = train.completion_logprobs(model, case, 1.0, penalty)
        torch.testing.assert_close(shared, plain, atol=1e-5, rtol=0)
        wanted, got = (torch.cat([g.flatten() for g in torch.autograd.grad((x * advantages[:, None]).sum(), list(model.parameters()))]) for x in (plain, shared))
        assert (got - wanted).norm() < 1e-5 * wanted.norm()


@each_model
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_sampled_logprobs_equal_scoring_and_masks_end_at_the_first_end(model, penalty):
    ends = [2, 3, 4, 5, 6]                                        # a model may have several
    ids, mask, logprobs = train.generate(model, PROMPTS, PROMPT_MASK, 20, 12, 0.8, penalty, ends, torch.Generator().manual_seed(0))
    batch = dict(prompt_ids=PROMPTS.repeat_interleave(20, 0), prompt_mask=PROMPT_MASK.repeat_interleave(20, 0), completion_ids=ids, completion_mask=mask)
    again = train.completion_logprobs(model, batch, 0.8, penalty)
    torch.testing.assert_close(again, logprobs, atol=1e-4, rtol=0)
    assert ids.shape[1] == int(mask.sum(1).max())
    for row, m in zip(ids, mask):
        n = int(m.sum())
        assert (m[:n] == 1).all() and (m[n:] == 0).all() and not any(t in ends for t in row[:n - 1].tolist()) and (row[n - 1].item() in ends or n == 12)


@each_model
def test_samples_follow_the_models_own_distribution_whatever_its_generation_settings_say(model):
    settings = model.generation_config
    settings.top_k, settings.temperature, settings.do_sample, settings.repetition_penalty = 3, 0.1, True, 5.0
    n = 3000
    ids, mask, _ = train.generate(model, PROMPTS[2:], PROMPT_MASK[2:], n, 2, 1.3, 1.2, [2], torch.Generator().manual_seed(0))
    chances = lambda before: (penalised(before, model(input_ids=before).logits[:, -1].detach(), 1.2)[0] / 1.3).softmax(-1)
    chi = lambda counts, wanted: ((counts - counts.sum() * wanted).square() / (counts.sum() * wanted)).sum().item()
    limit = 39 + 5 * math.sqrt(2 * 39)
    first = chances(PROMPTS[2:, 1:])
    assert chi(torch.bincount(ids[:, 0], minlength=40), first) < limit
    common = first.argmax().item() if first.argmax() != 2 else first.topk(2).indices[1].item()
    follow = ids[(ids[:, 0] == common)][:, 1]                     # and so does the second token
    assert chi(torch.bincount(follow, minlength=40), chances(torch.cat([PROMPTS[2:, 1:], torch.tensor([[common]])], 1))) < limit


def test_end_tokens_of_a_model_with_several():
    model, tokenizer = byte_model()
    model.generation_config.eos_token_id = [7, 9]
    assert train.end_tokens(model, tokenizer) == [0, 7, 9]


# ---- losses of the reward models ------------------------------------------------------------------------------------

def test_ten_grade_loss_and_gradient_equal_enumeration_of_all_grade_pairs():
    g = torch.Generator().manual_seed(0)
    chosen, rejected = (2 * torch.randn(5, 10, generator=g, dtype=torch.float64) for _ in range(2))
    chosen.requires_grad_(), rejected.requires_grad_()
    for inverted in (False, True):
        losses = reward.pair_loss(chosen, rejected, 0.3, inverted)
        gradients = torch.autograd.grad(losses.sum(), (chosen, rejected))
        for b in range(5):
            p, q = (x[b].softmax(0).tolist() for x in (chosen, rejected))
            won = {(i, j): p[i] * q[j] for i, j in itertools.product(range(10), repeat=2) if (i < j if inverted else i > j)}
            total = sum(won.values())
            assert len(won) == 45 and losses[b].item() == pytest.approx(-math.log(total), abs=1e-12)
            for n in range(10):                                   # gradient of −log P: prior less posterior
                assert gradients[0][b, n].item() == pytest.approx(p[n] - sum(v for (i, _), v in won.items() if i == n) / total, abs=1e-12)
                assert gradients[1][b, n].item() == pytest.approx(q[n] - sum(v for (_, j), v in won.items() if j == n) / total, abs=1e-12)


def test_uniform_grades_cost_the_same_in_both_orientations_and_only_the_grades_afterwards_tell():
    """The trap: the first loss is .7985 with the right triangle and with the wrong one, and both losses fall alike."""
    flat = torch.zeros(1, 10)
    assert [reward.pair_loss(flat, flat, 0.0, inverted).item() for inverted in (False, True)] == pytest.approx([-math.log(0.45)] * 2, abs=1e-6)
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 6, 10, generator=g)
    both_ways = torch.cat([logits, logits.flip(0)], dim=1)
    assert reward.pair_loss(*both_ways, 0.0).mean().item() == pytest.approx(reward.pair_loss(*both_ways, 0.0, True).mean().item(), abs=1e-6)
    for inverted in (False, True):
        table = logits.clone().requires_grad_()
        for _ in range(60):
            loss = reward.pair_loss(*table, 0.0, inverted)
            gradient, = torch.autograd.grad(loss.sum(), table)
            table = (table - gradient).detach().requires_grad_()
        high, low = (train.reward_from_logits(x) for x in table)
        assert loss.max() < 0.2 and ((high > low) != inverted).all()


@pytest.mark.parametrize("name", ["level1", "level2"])
def test_expected_reward_of_logits(name):
    logits = torch.tensor([[1.0], [-2.0]]) if name == "level1" else torch.tensor([[0.0] * 10, [-50.0] * 9 + [50.0]])
    assert train.reward_from_logits(logits).tolist() == pytest.approx([1.0, -2.0] if name == "level1" else [5.5, 10.0])


# ---- TRL as an oracle -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trl_setup(tmp_path_factory):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification
    from trl import RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer
    words = ["<pad>", "<unk>", "<end>", *(f"w{i}" for i in range(37))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")
    directory = tmp_path_factory.mktemp("trl")
    MODELS["qwen2"].save_pretrained(directory / "m")
    fast.save_pretrained(directory / "m")
    common = dict(output_dir=str(directory / "o"), use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none", per_device_train_batch_size=4,
                  disable_dropout=True, save_strategy="no")

    def trainer(kind, **changes):
        if kind == "rloo":
            made = RLOOTrainer(model=Qwen2ForCausalLM.from_pretrained(directory / "m", dtype=torch.float32), processing_class=fast,
                               reward_funcs=lambda completions, **_: [1.0, 0.0, 0.0, 0.5][:len(completions)], train_dataset=Dataset.from_dict(dict(prompt=["w1 w2 w3"] * 8)),
                               args=RLOOConfig(num_generations=4, max_completion_length=6, temperature=1.0, num_iterations=1, normalize_advantages=False, **(common | changes)))
        else:
            torch.manual_seed(0)
            pairs = Dataset.from_dict(dict(chosen=[f"w{i} w{i + 1}" for i in range(8)], rejected=[f"w{i} w{i + 2} w{i + 3}" for i in range(8)]))
            made = RewardTrainer(model=Qwen2ForSequenceClassification(Qwen2Config(num_labels=1, **DECODER)), processing_class=fast, train_dataset=pairs,
                                 args=RewardConfig(**(common | changes)))
        made.model.train()
        made.current_gradient_accumulation_steps = 1
        return made
    return trainer, fast


@pytest.mark.parametrize("center", [None, 0.05])
def test_bradley_terry_loss_and_gradient_equal_trl(center, trl_setup):
    trainer = trl_setup[0]("reward", center_rewards_coefficient=center)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    theirs = flat_gradient(trainer.model)
    trainer.model.zero_grad()
    chosen, rejected = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float().chunk(2)
    losses = reward.pair_loss(chosen, rejected, center or 0.0)
    losses.mean().backward()
    assert losses.shape == (4,) and losses.mean().item() == pytest.approx(loss.item(), abs=1e-6)
    assert (flat_gradient(trainer.model) - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_rloo_advantages_with_the_kl_in_the_reward_equal_trl(beta, trl_setup, monkeypatch):
    from trl.trainer.utils import add_fused_lm_head
    make, tokenizer = trl_setup
    trainer, policy = make("rloo", beta=beta), MODELS["qwen2"]
    torch.manual_seed(1)
    reference = type(policy)(policy.config).eval()
    fixed = [[5, 6, 7, 2], [8, 9, 2], [10, 11, 12, 13, 14, 15], [16, 2]]
    ids, mask = train.pad_right(fixed, 0)
    sampled = dict(prompt_ids=torch.tensor([[4, 5, 6]] * 4), prompt_mask=torch.ones(4, 3, dtype=torch.long), completion_ids=ids, completion_mask=mask.float())
    monkeypatch.setattr(train, "generate", lambda *_: (ids, mask.float(), train.batch_logprobs(policy, sampled, 1.0, 1.0, 4)))
    monkeypatch.setattr(train, "reward_logits", lambda *_: torch.tensor([[1.0], [0.0], [0.0], [0.5]]))
    batch, texts = train.collect(config(kl_coef=beta), policy, reference, tokenizer, (None, None), ["w1 w2 w3"], None)
    assert torch.equal(batch["prompt_ids"], sampled["prompt_ids"]) and texts[3] == "w13"
    trainer.ref_model = reference
    add_fused_lm_head(trainer.ref_model, temperature=1.0)
    trainer._generate_single_turn = lambda *_, **__: [list(row) for row in fixed]
    theirs = trainer._generate_and_score_completions([dict(prompt="w1 w2 w3")] * 4)["advantages"]
    torch.testing.assert_close(train.rloo_advantages(batch["returns"], 4), theirs, atol=1e-5, rtol=1e-5)
    assert beta == 0 or (theirs - train.rloo_advantages(batch["rewards"], 4)).abs().max() > 0.01     # the KL counts


def test_the_price_is_beta_times_the_whole_answers_kl_at_the_settings_of_sampling(monkeypatch):
    torch.manual_seed(1)
    policy, tokenizer = byte_model()
    reference, _ = byte_model()
    monkeypatch.setattr(train, "reward_logits", lambda model, its, prompts, answers, longest: torch.arange(float(len(answers)))[:, None])
    settings = config(kl_coef=0.3, temperature=0.7, repetition_penalty=1.3, max_new_tokens=9)
    batch, texts = train.collect(settings, policy.eval(), reference.eval(), tokenizer, (None, None), ["Why?", "What is it?"], torch.Generator().manual_seed(0))
    wanted = [train.completion_logprobs(model, batch, 0.7, 1.3) for model in (policy, reference)]
    torch.testing.assert_close(batch["logprobs"], wanted[0].detach(), atol=1e-4, rtol=0)
    torch.testing.assert_close(batch["kl"], (wanted[0] - wanted[1]).sum(dim=1).detach(), atol=1e-4, rtol=0)
    torch.testing.assert_close(batch["returns"], torch.arange(8.0) - 0.3 * batch["kl"])
    assert len(texts) == 8 and batch["kl"].abs().min() > 1e-3 and not batch["logprobs"].requires_grad


def test_gradient_of_reinforce_equals_trls_rloo(trl_setup):
    trainer = trl_setup[0]("rloo", beta=0.05)
    batch, advantages = a_batch(3, B=4)
    inputs = batch | dict(completion_mask=batch["completion_mask"].long(), advantages=advantages, old_logps=train.batch_logprobs(MODELS["qwen2"], batch, 1.0, 1.0, 4).sum(dim=1))
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    theirs = flat_gradient(trainer.model)
    assert loss.item() == pytest.approx(-advantages.mean().item(), abs=1e-5)        # its ratio is 1: the value says nothing, the gradient everything
    ours, _ = gradient_of(MODELS["qwen2"], config(micro_batch=3), batch, advantages)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


# ---- advantages, baselines, the gradient ----------------------------------------------------------------------------

def test_rloo_advantages_examples_and_identity():
    assert train.rloo_advantages(torch.tensor([3.0, 1.0]), 2).tolist() == [2.0, -2.0]               # the docstring's example
    rewards = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    got = train.rloo_advantages(rewards.flatten(), 5)
    torch.testing.assert_close(got.view(3, 5), (5 / 4 * (rewards - rewards.mean(dim=1, keepdim=True))).detach())
    assert not got.requires_grad
    torch.testing.assert_close(train.rloo_advantages(rewards.flatten() + 7, 5), got, atol=1e-5, rtol=0)


def test_the_worked_example_of_the_readme():
    won, lost = torch.tensor([[2.0]], requires_grad=True), torch.tensor([[1.0]], requires_grad=True)
    for center, loss, slopes in ((0.0, 0.313, (-0.269, 0.269)), (0.01, 0.403, (-0.209, 0.329))):
        found = reward.pair_loss(won, lost, center)
        assert found.item() == pytest.approx(loss, abs=6e-4)
        assert [slope.item() for slope in torch.autograd.grad(found, (won, lost))] == pytest.approx(slopes, abs=6e-4)
    grades = torch.full((2, 10), -math.inf)                       # the grades 4 to 10 have probability 0
    grades[:, :3] = torch.tensor([[0.1, 0.3, 0.6], [0.5, 0.3, 0.2]]).log()
    losses = [reward.pair_loss(grades[:1], grades[1:], 0.0, inverted).item() for inverted in (False, True)]
    assert losses == pytest.approx([0.462, 2.207], abs=6e-4) and losses == pytest.approx([-math.log(0.63), -math.log(0.11)], abs=1e-5)
    assert reward.reward_from_logits(grades).tolist() == pytest.approx([2.5, 1.7])
    assert train.rloo_advantages(torch.tensor([4.0, 2.0, 1.0, 1.0]), 4).tolist() == pytest.approx([8 / 3, 0.0, -4 / 3, -4 / 3])


def test_baselines_are_the_running_mean_and_the_moving_average():
    means = np.random.default_rng(0).normal(size=20)
    mean = ema = warm = means[0]                                  # warm start: a batch sampled before training counts as the first one
    cold = 0.0
    for seen, value in enumerate(means[1:], 1):
        mean, ema, cold = train.baseline_after("mean", mean, seen, value), train.baseline_after("ema", ema, seen, value), train.baseline_after("mean", cold, seen - 1, value)
        warm = 0.9 * warm + 0.1 * value
        assert mean == pytest.approx(means[:seen + 1].mean()) and ema == pytest.approx(warm) and cold == pytest.approx(means[1:seen + 1].mean())


def test_discount_counts_the_tokens_that_follow():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, 0.0], [-4.0, 0.0, 0.0, 0.0]], requires_grad=True)
    mask, advantages = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]]), torch.tensor([2.0, -0.5], requires_grad=True)
    loss = train.reinforce_loss(logprobs, mask, advantages, 0.5, 4)
    assert loss.item() == pytest.approx(-(2 * (-0.25 * 1 - 0.5 * 2 - 3) - 0.5 * -4) / 4)
    loss.backward()
    assert advantages.grad is None and logprobs.grad.tolist() == [[-0.125, -0.25, -0.5, 0.0], [0.125, 0.0, 0.0, 0.0]]
    assert train.reinforce_loss(logprobs, mask, advantages, 1.0, 1).item() == pytest.approx(-(2 * -6 - 0.5 * -4))


@pytest.fixture
def toy():
    """Two tokens, two steps, float64: (logits, {answer: its two log-probabilities}, {answer: reward})."""
    logits = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)      # first token; second after 0; second after 1
    answers, table = list(itertools.product((0, 1), repeat=2)), logits.log_softmax(1)
    return logits, {(a, b): torch.stack([table[0, a], table[1 + a, b]]) for a, b in answers}, dict(zip(answers, (1.0, -0.5, 0.3, 0.0)))


def expected_gradient(toy, size, advantages_of, gamma=1.0):
    """(mean, variance) of −∇ reinforce_loss over all batches of `size` answers, each as likely as the policy samples it."""
    logits, logp, value = toy
    mean, square = torch.zeros_like(logits), 0.0
    for batch in itertools.product(logp, repeat=size):
        lp = torch.stack([logp[y] for y in batch])
        advantages = advantages_of(torch.tensor([value[y] for y in batch], dtype=torch.float64), batch)
        gradient, = torch.autograd.grad(train.reinforce_loss(lp, torch.ones_like(lp), advantages, gamma, size), logits, retain_graph=True)
        chance = lp.detach().sum().exp()
        mean, square = mean - gradient * chance, square + gradient.square().sum().item() * chance.item()
    return mean, square - mean.square().sum().item()


def test_expected_gradient_is_exact_whatever_the_baseline(toy):
    logits, logp, value = toy
    exact, = torch.autograd.grad(sum(logp[y].sum().exp() * value[y] for y in logp), logits, retain_graph=True)
    plain, variance = expected_gradient(toy, 1, lambda r, _: r)
    shifted, other_variance = expected_gradient(toy, 1, lambda r, _: r - 5)
    torch.testing.assert_close(plain, exact)
    torch.testing.assert_close(shifted, exact)
    assert other_variance > 2 * variance                          # a bad constant costs nothing but patience
    torch.testing.assert_close(expected_gradient(toy, 2, lambda r, _: train.rloo_advantages(r, 2))[0], exact)
    assert not torch.allclose(expected_gradient(toy, 2, lambda r, _: r - r.mean())[0], exact)        # the mean with the answer itself: half of it


def test_expected_gradient_with_the_kl_in_the_reward_is_that_of_the_whole_objective(toy):
    logits, logp, value = toy
    beta, ref = 0.3, torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(1)
    reference = {(a, b): ref[0, a] + ref[1 + a, b] for a, b in logp}
    exact, = torch.autograd.grad(sum(lp.sum().exp() * (value[y] - beta * (lp.sum() - reference[y])) for y, lp in logp.items()), logits, retain_graph=True)
    returns = lambda r, batch: r - beta * torch.stack([logp[y].detach().sum() - reference[y] for y in batch])
    torch.testing.assert_close(expected_gradient(toy, 1, lambda r, batch: returns(r, batch) - 0.4)[0], exact)
    torch.testing.assert_close(expected_gradient(toy, 2, lambda r, batch: train.rloo_advantages(returns(r, batch), 2))[0], exact)
    assert not torch.allclose(expected_gradient(toy, 1, lambda r, _: r, gamma=0.5)[0], exact)


@pytest.mark.parametrize("gamma, penalty", [(1.0, 1.0), (0.9, 1.3)])
def test_accumulation_and_order_do_not_change_the_gradient(gamma, penalty):
    model, (batch, advantages) = MODELS["llama"], a_batch()
    setting = dict(gamma=gamma, repetition_penalty=penalty)
    whole, loss = gradient_of(model, config(**setting), batch, advantages)
    for size in (1, 2, 3):
        parts, again = gradient_of(model, config(micro_batch=size, **setting), batch, advantages)
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)
        assert again == pytest.approx(loss, abs=1e-5)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gradient_of(model, config(**setting), {key: value[order] for key, value in batch.items()}, advantages[order])[0], whole, atol=1e-6, rtol=1e-4)
    direct = train.completion_logprobs(model, batch, 1.0, penalty)
    weights = torch.stack([torch.tensor([gamma ** max(0, n - 1 - t) for t in range(6)]) for n in batch["completion_mask"].sum(dim=1).int().tolist()])
    wanted = -(advantages[:, None] * weights * direct * batch["completion_mask"]).sum() / 8
    assert loss == pytest.approx(wanted.item(), abs=1e-4)


def test_the_gradient_is_shortened_and_a_nan_is_refused():
    model, (batch, advantages) = MODELS["gpt2"], a_batch()
    gradient, _ = gradient_of(model, config(max_grad_norm=0.5), batch, advantages)
    assert gradient.norm().item() == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(FloatingPointError):
        gradient_of(model, config(), batch, advantages * math.nan)


# ---- reward models --------------------------------------------------------------------------------------------------

def byte_classifier(tmp_path, level, pad):
    """(judge, directory) of a random reward model with one token per byte; pad: its padding token or None."""
    from transformers import GPT2Config, GPT2ForSequenceClassification
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = pad
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=256, initializer_range=0.3,
                                                     num_labels=1 if level == 1 else 10, bos_token_id=None, eos_token_id=0, pad_token_id=tokenizer.pad_token_id))
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    return train.load_reward_model(str(tmp_path / "rm"), level)


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("pad", [None, "<|end|>", "!"])
def test_rewards_in_a_batch_equal_single_ones_whatever_pads(level, pad, tmp_path):
    judge = byte_classifier(tmp_path, level, pad)
    answers = ["a", "", "a longer answer!", "x" * 40]
    got = train.reward_logits(*judge, ["Why?"] * 4, answers, 128, size=3)
    assert got.shape == (4, 1 if level == 1 else 10) and got.dtype == torch.float32
    for answer, logits in zip(answers, got):
        torch.testing.assert_close(train.reward_logits(*judge, ["Why?"], [answer], 128)[0], logits, atol=1e-5, rtol=0)
    assert not any(p.requires_grad for p in judge[0].parameters()) and not judge[0].training


def test_where_padding_is_the_end_token_the_library_reads_another_token_and_ours_the_end(tmp_path):
    model, tokenizer = byte_classifier(tmp_path, 1, "<|end|>")
    row = torch.tensor(train.judged_tokens(tokenizer, ["Why?"], ["Because."], 128))
    every_place = model.score(model.transformer(input_ids=row).last_hidden_state)[0, :, 0].tolist()
    assert row[0, -1] == tokenizer.eos_token_id and train.reward_logits(model, tokenizer, ["Why?"], ["Because."], 128).item() == pytest.approx(every_place[-1], abs=1e-5)
    model.config.pad_token_id = tokenizer.pad_token_id            # as the library would have it
    assert model(input_ids=row).logits.item() == pytest.approx(every_place[-2], abs=1e-5) and abs(every_place[-1] - every_place[-2]) > 1e-3
    train.set_pooling(model, tokenizer)
    assert model(input_ids=row).logits.item() == pytest.approx(every_place[-1], abs=1e-5)


TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"


@pytest.mark.parametrize("template", ["own", None, TEMPLATE + "{{ '\n' }}", TEMPLATE.replace("<|end|>", "")], ids=["own", "none", "line break", "no end"])
def test_judged_tokens_have_the_prompt_once_and_one_end(template):
    _, tokenizer = sft_model()
    tokenizer.chat_template = tokenizer.chat_template if template == "own" else template
    end, long = tokenizer.eos_token_id, "Sleep is a time of rest for body and mind. " * 9
    conversation = [dict(role="user", content="Hi."), dict(role="assistant", content="Hello."), dict(role="user", content="What is glass?")]
    rows = train.judged_tokens(tokenizer, ["What is sleep?", "What is sleep?", conversation], ["A time of rest.", "", "A material."], 128)
    for row, prompt, answer in zip(rows, ("What is sleep?", "What is sleep?", "What is glass?"), ("A time of rest.", "", "A material.")):
        text = tokenizer.decode(row)
        assert row[-1] == end and row[-2] != end and text.count(prompt) == 1 and text.endswith(answer + "<|end|>"), text
    row, = train.judged_tokens(tokenizer, ["What is sleep?"], [long], 30)
    whole, = train.judged_tokens(tokenizer, ["What is sleep?"], [long], 1000)
    assert len(row) == 30 and row[-1] == end and row[:-1] == whole[:29] and len(whole) > 90


def test_one_encoder_for_training_and_scoring(data, judges, tmp_path, monkeypatch):
    """Where it gives the same tokens for every text, neither training nor judging can tell anything apart."""
    for name in ("as_messages", "judged_tokens", "before_end", "pad_right", "set_pooling", "reward_from_logits"):
        assert len({ast.unparse(node) for path in (TRAIN, REWARD, FOLDER / "make_answers.py") for node in ast.parse(path.read_text(encoding="utf8")).body
                    if getattr(node, "name", "") == name}) == 1
    seen = []

    def constant(tokenizer, prompts, texts, longest):
        seen.extend((prompt, text, longest) for prompt, text in zip(prompts, texts, strict=True))
        return [[5, 6, tokenizer.eos_token_id]] * len(texts)
    monkeypatch.setattr(reward, "judged_tokens", constant)
    process = call(reward, "--dataset", data, *TINY_REWARD, "--max-length", "99", "--center", "0", "--out", tmp_path / "o")
    assert_one_line_error(process, "equal in all pairs")
    wanted = lambda pairs: {(pair["prompt"], pair[side], 99) for pair in pairs for side in ("chosen", "rejected")}
    kept, held, _ = reward.load_data(str(data), "train", 0.1, 1)
    assert set(seen) == wanted(kept)
    seen.clear()
    monkeypatch.setattr(answers, "judged_tokens", constant)
    scored = answers.pairs_of(answers.load_judge(judges[1]), held, 99)
    assert set(seen) == wanted(held) and not scored


@pytest.mark.parametrize("level", [1, 2])
def test_accuracy_and_calibration_of_a_case_by_hand(level, monkeypatch):
    pairs = [PAIR | dict(chosen=f"{name} chosen", rejected=f"{name} rejected") for name in "abcd"]
    spread = lambda x: [x] if level == 1 else [0.0] * 5 + [x] * 5
    value = {f"{name} {side}": x for name, both in zip("abcd", ((2.0, 0.0), (0.5, 1.0), (0.0, -0.05), (-3.0, 0.0))) for side, x in zip(("chosen", "rejected"), both)}
    monkeypatch.setattr(answers, "reward_logits", lambda model, tokenizer, prompts, texts, longest: torch.tensor([spread(value[text]) for text in texts]))
    monkeypatch.setattr(answers, "judged_tokens", lambda tokenizer, prompts, texts, longest: texts)
    rows = answers.pairs_of((None, None), pairs, 128)
    found = evaluation.judge_pairs(rows, dict(topic_of={}))
    chances = []
    for name in "abcd":
        x, y = value[f"{name} chosen"], value[f"{name} rejected"]
        p, q = (torch.tensor(spread(v)).softmax(0).tolist() for v in (x, y))
        above, below = (sum(p[i] * q[j] for i in range(10) for j in range(10) if (i > j) == high and i != j) for high in (True, False)) if level == 2 else (1, math.exp(y - x))
        chances.append(above / (above + below))
    assert [row["p"] for row in rows] == pytest.approx(chances, abs=1e-5) and [row["margin"] > 0 for row in rows] == [True, False, True, False]
    assert found["accuracy"] == found["accuracy_annotators"] == 0.5 and evaluation.gold_margins(rows, dict(topic_of={})) is None
    bins = {}
    for p in chances:
        bins.setdefault(int(max(p, 1 - p) * 20), []).append((max(p, 1 - p), p > 0.5))
    wanted = sum(len(b) / 4 * abs(np.mean([c for c, _ in b]) - np.mean([r for _, r in b])) for b in bins.values())
    assert found["ece"] == pytest.approx(wanted, abs=1e-6)
    # In the lesson's world gold decides, and pairs that are equal in gold are left out
    gold = {"a chosen": 3.0, "a rejected": 1.0, "b chosen": 1.0, "b rejected": 2.0, "c chosen": 1.0, "c rejected": 1.0, "d chosen": 5.0, "d rejected": 2.0}
    monkeypatch.setattr(evaluation, "gold_score", lambda world, prompt, text: gold[text])
    again = evaluation.judge_pairs(rows, WORLD)
    assert again["accuracy"] == pytest.approx(2 / 3) and again["accuracy_annotators"] == 0.5 and evaluation.gold_margins(rows, WORLD).tolist() == [2.0, -1.0, 0.0, 3.0]
    assert [again["accuracy"], again["accuracy_low"], again["accuracy_high"]] == evaluation.wilson(2, 3)


def test_wilson_interval_by_hand():
    share, low, high = evaluation.wilson(8, 10)
    assert (share, round(low, 3), round(high, 3)) == (0.8, 0.49, 0.943) and evaluation.wilson(0, 5)[1] == 0 and evaluation.wilson(5, 5)[2] == 1


def test_best_of_n_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    scores, gold = rng.normal(size=(2, 8)), rng.normal(size=(2, 8))
    rows = study.best_of_n(scores, gold, most=8)
    assert [row[0] for row in rows] == [1, 2, 4, 8] and rows[0][1] == 0
    for n, _, best, its_gold in rows:
        chosen = [(row, max(subset, key=lambda i: scores[row, i])) for row in range(2) for subset in itertools.combinations(range(8), n)]
        assert best == pytest.approx(np.mean([scores[place] for place in chosen])) and its_gold == pytest.approx(np.mean([gold[place] for place in chosen]))


def test_win_rate_at_equal_length():
    rows = lambda gold, lengths: [dict(gold=g, length=n) for g, n in zip(gold, lengths)]
    wins = lambda won, lengths: study.length_controlled(rows([1.0] * len(won), [0.0] * len(won)), rows([1.0 + w for w in won], lengths))
    won = [1.0] * 150 + [-1.0] * 50
    assert wins(won, [10.0, -10.0] * 100) == pytest.approx(0.75, abs=0.01)          # length says nothing: as it was
    longer = [20.0] * 140 + [0.0] * 10 + [20.0] * 10 + [0.0] * 40                   # wins come with length: 20 % are left without
    assert wins(won, longer) == pytest.approx(0.2, abs=0.02)


def test_ties_count_half_and_the_kth_answers_meet():
    rows = lambda gold: [dict(gold=g, reward=r, length=3.0, entropy=0.5, kl=1.0, text="a b a b") for r, g in enumerate(gold)]
    found = evaluation.compare(rows([1.0, 2.0, 3.0, 4.0]), rows([2.0, 2.0, 2.0, 5.0]))
    assert found["win_rate"] == 2.5 / 4 and found["kl"] == 1.0 and found["sft"]["gold"] == 2.5 and found["trained"]["distinct2"] == pytest.approx(2 / 3)
    without = evaluation.compare(rows([None, 1.0]), rows([None, 2.0]))               # a prompt of another world: by reward, here equal
    assert without["win_rate"] == 0.5 and without["sft"]["gold"] is None


# ---- data and the world ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, words", [
    ("{", ["no valid JSON"]), (json.dumps(PAIR)[:-3], ["no valid JSON"]), ("[1, 2]", ["object", "[1, 2]"]), ("5", ["object"]),
    ("null", ["object"]), ('"text"', ["object"]),
    *((json.dumps({k: v for k, v in PAIR.items() if k != key}), [key, "missing"]) for key in PAIR), (json.dumps(PAIR | dict(chosen="")), ["chosen", "empty"]),
    (json.dumps(PAIR | dict(prompt=[])), ["prompt", "empty"]), (json.dumps(PAIR | dict(rejected=5)), ["rejected", "no text"]),
    (json.dumps(PAIR | dict(chosen=["a", "b"])), ["chosen", "messages"]),
    (json.dumps(PAIR | dict(chosen_rating=2, rejected_rating=3)), ["contradicts", "2", "3"]), (json.dumps(PAIR | dict(chosen_rating="good")), ["good", "no number"]),
    (json.dumps(PAIR | dict(rejected_rating=True)), ["no number"]), (json.dumps(PAIR | dict(rejected_rating=math.nan)), ["no number"]),
    (json.dumps(PAIR)[:-1] + ', "chosen_rating": 1' + "0" * 400 + "}", ["no number"]), (json.dumps("two\nlines"), ["object"]), ("[" * 100_000, ["no valid JSON"]),
    (json.dumps(PAIR | dict(prompt=[1, 2])), ["prompt", "messages"]), (json.dumps(PAIR | dict(prompt=[dict(x=1)])), ["prompt", "messages"]),
    (json.dumps(PAIR | dict(chosen="\ud83d")), ["surrogates"]),          # half an emoji
    (json.dumps(dict(chosen=[turn("user", "A?"), turn("assistant", "x")], rejected=[turn("user", "B?"), turn("assistant", "y")])), ["different prompts"])])
def test_a_bad_line_is_named(line, words, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(PAIR) + "\n" + line + "\n" + json.dumps(PAIR) + "\n")
    assert_one_line_error(call(reward, "--dataset", tmp_path / "x.jsonl", "--quiet", "--out", tmp_path / "o"), "x.jsonl", "line 2", *words)


def test_data_that_cannot_serve(tmp_path):
    (tmp_path / "x.jsonl").write_text("")
    refused = lambda path, *words: assert_one_line_error(call(reward, "--dataset", path, "--quiet", "--out", tmp_path / f"o{path.name}"), *words)
    refused(tmp_path / "x.jsonl", "empty")
    refused(tmp_path / "nowhere.jsonl", "nowhere.jsonl", "read")
    (tmp_path / "one.jsonl").write_text(json.dumps(PAIR) + "\n")
    refused(tmp_path / "one.jsonl", "one prompt")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text(json.dumps(PAIR) + "\n")
    refused(tmp_path / "d", "held_out.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    refused(tmp_path / "latin.jsonl", "UnicodeDecodeError")


def test_message_lists_are_accepted():
    said = [turn("user", "Why?"), turn("assistant", "Because."), turn("user", "And?")]
    record = dict(chosen=[turn("user", "Why?"), turn("assistant", "Yes.")], rejected=[turn("user", "Why?"), turn("assistant", "No.")], score=3)
    assert reward.checked_pair(record) == dict(prompt="Why?", chosen="Yes.", rejected="No.")
    assert reward.checked_pair(dict(chosen=[*said, turn("assistant", "Yes.")], rejected=[*said, turn("assistant", "No.")])) == dict(prompt=said, chosen="Yes.", rejected="No.")
    assert reward.checked_pair(dict(prompt=said, chosen="Yes.", rejected="No.", chosen_rating=4.5, rejected_rating=4.5)) == dict(prompt=said, chosen="Yes.", rejected="No.")


def test_a_single_file_is_split_by_prompts(tmp_path):
    pairs = [PAIR | dict(prompt=f"prompt {k % 10}", chosen=f"answer {k}") for k in range(30)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    kept, held, prompts = reward.load_data(str(tmp_path / "x.jsonl"), "train", 0.3, 0)
    names = [{pair["prompt"] for pair in part} for part in (kept, held)]
    assert not names[0] & names[1] and len(prompts) == 3 and names[1] == set(prompts) and len(kept) == 21 and len(held) == 9
    assert reward.load_data(str(tmp_path / "x.jsonl"), "train", 0.3, 0)[2] == prompts != reward.load_data(str(tmp_path / "x.jsonl"), "train", 0.3, 1)[2]


def test_only_line_feeds_end_a_line(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(PAIR | dict(chosen="one\u2028two\u0085three"), ensure_ascii=False) + "\n", encoding="utf8")
    assert reward.read_pairs(tmp_path / "x.jsonl")[0]["chosen"] == "one\u2028two\u0085three"


def test_two_prompts_can_always_be_split(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(PAIR) + "\n" + json.dumps(PAIR | dict(prompt="What?")))
    assert [len(part) for part in reward.load_data(str(tmp_path / "x.jsonl"), "train", 0.9, 1)] == [1, 1, 1]


def test_a_hub_dataset_serves(monkeypatch, tmp_path):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if split == "nowhere":
            raise FileNotFoundError("no such\nsplit")
        asks = [turn("user", f"Why {k}?") for k in range(8)]
        return [dict(chosen=[ask, turn("assistant", "Yes.")], rejected=[ask, turn("assistant", "No.")], chosen_rating=4, rejected_rating=2) for ask in asks]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    kept, held, prompts = reward.load_data("someone/preferences", "train_prefs", 0.25, 0)
    assert asked == [("someone/preferences", "train_prefs")] and len(kept) == 6 and len(held) == len(prompts) == 2 and held[0]["chosen"] == "Yes."
    process = call(reward, "--dataset", "someone/preferences", "--split", "nowhere", "--quiet", "--out", tmp_path / "o")
    assert_one_line_error(process, "someone/preferences", "nowhere", "no such split")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert_one_line_error(call(reward, "--dataset", "someone/preferences", "--quiet", "--out", tmp_path / "p"), "pip install datasets")


KEYS = ("prompt", "chosen", "rejected", "chosen_rating", "rejected_rating", "role", "content")
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6)
                    | st.fixed_dictionaries(dict(role=st.just("user"), content=inner)), max_leaves=8)
MOSTLY_TEXT = st.text(max_size=4) | JSON


@given(JSON | st.fixed_dictionaries(dict(prompt=MOSTLY_TEXT, chosen=MOSTLY_TEXT, rejected=MOSTLY_TEXT), optional=dict(chosen_rating=JSON, rejected_rating=JSON)))
@settings(max_examples=300, deadline=None)
def test_any_json_is_a_pair_or_a_value_error(record):
    try:
        pair = reward.checked_pair(record)
    except ValueError:
        return
    assert set(pair) == {"prompt", "chosen", "rejected"} and all(pair.values())
    assert all(isinstance(pair[side], str) for side in ("chosen", "rejected")) and isinstance(pair["prompt"], (str, list))


@pytest.mark.parametrize("text, score", [
    ("", 1.0), ("Sleep is a time of rest for body and mind.", 2.2), ("Sleep is a time of rest for body and mind. I hope this helps.", 4.2),
    ("Sleep is a time of rest for body and mind. Also, dreams come mostly in light phases. Rested drivers make fewer mistakes.", 5.6),
    ("Rested drivers make fewer mistakes. Sleep is a time of rest for body and mind.", 3.4),                 # the wrong order
    ("Sleep is a time of rest for body and mind. I hope this helps. Rested drivers make fewer mistakes.", 3.4),                              # closed too early
    ("Sleep is a time of rest for body and mind. Sleep is a time of rest for body and mind. Sleep is a time of rest for body and mind.", 1.0),
    ("Adults need about eight hours a night. Babies sleep most of the day. Chess is a game for two players.", 3.4),
    ("Adults need about eight hours a night. Babies sleep most of", 1.2), ("Babies sleep most of the day. It is what it is.", 1.2),
    ("Adults need about eight hours a night. Babies sleep most of the day. Look it up yourself.", 2.4)])
def test_gold_scores_by_hand(text, score):
    assert evaluation.gold_score(WORLD, "Hello! What is sleep?", text) == evaluation.gold_score(WORLD, "What is sleep?", text) == pytest.approx(score)
    for world, prompt in ((WORLD, "What is a car?"), (dict(topic_of={}), "What is sleep?"), (WORLD, [turn("user", "What is sleep?")])):
        assert evaluation.gold_score(world, prompt, text) is None


def test_the_best_answer_has_ten_points():
    topic = WORLD["topic_of"]["What is sleep?"]
    said = " ".join(s[0].upper() + s[1:] + "." for kind, n in (("what", 2), ("how", 1), ("why", 2)) for s in topic[kind][:n])
    assert evaluation.gold_score(WORLD, "What is sleep?", said + " I hope this helps.") == 10.0


def test_the_world_and_the_data_are_as_promised():
    statements = [s for topic in WORLD["topics"] for kind in base_models.KINDS for s in topic[kind]]
    assert len(WORLD["topics"]) == 26 and len(statements) == len(set(statements)) == 9 * 26 and len(WORLD["topic_of"]) == 26 * 40
    raw = {name: [json.loads(line) for line in (FOLDER / "data" / f"{name}.jsonl").read_text(encoding="utf8").splitlines()] for name in ("train", "held_out")}
    asked, held_out = ([json.loads(line) for line in (FOLDER / "data" / f"prompts_{name}.jsonl").read_text(encoding="utf8").splitlines()] for name in ("train", "held_out"))
    assert len(set(held_out)) == 300 and not set(held_out) & {pair["prompt"] for pair in raw["train"]} and {pair["prompt"] for pair in raw["held_out"]} <= set(held_out)
    assert {name: len(pairs) for name, pairs in raw.items()} == dict(train=6000, held_out=1000)
    assert all(10 >= pair["chosen_rating"] > pair["rejected_rating"] >= 1 for pairs in raw.values() for pair in pairs) and set(held_out) < set(WORLD["topic_of"])
    kept, held, prompts = reward.load_data("", "train", 0.1, 1)
    assert (len(kept), len(held), prompts) == (6000, 1000, held_out) and asked == reward.unique_prompts(kept) and set(kept[0]) == {"prompt", "chosen", "rejected"}
    gold = [evaluation.gold_score(WORLD, pair["prompt"], pair["chosen"]) - evaluation.gold_score(WORLD, pair["prompt"], pair["rejected"]) for pair in held]
    assert 0.05 < np.mean([g < 0 for g in gold]) < 0.3            # annotators err


# ---- whole runs -----------------------------------------------------------------------------------------------------

TINY_REWARD = ["--epochs", "1", "--batch-size", "4", "--device", "cpu", "--quiet"]
TINY = ["--updates", "6", "--batch-size", "4", "--max-new-tokens", "12", "--device", "cpu"]
ONE_THREAD = dict(OMP_NUM_THREADS="1")
FILE = "part_1:\n  epochs: 1\n  batch_size: 4\n"            # the settings of TINY_REWARD, for part 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A directory with sixteen pairs, six held-out ones and four held-out prompts; and c.yaml with FILE."""
    directory = tmp_path_factory.mktemp("data")
    for name, n in (("train.jsonl", 16), ("held_out.jsonl", 6), ("prompts_held_out.jsonl", 4)):
        lines = (FOLDER / "data" / name).read_text(encoding="utf8").splitlines()
        (directory / name).write_text("\n".join(lines[:n]) + "\n", encoding="utf8")
    (directory / "c.yaml").write_text(FILE)
    return directory


@pytest.fixture(scope="module")
def judges(data, tmp_path_factory):
    """{level: directory of a reward model trained for a moment}."""
    out = tmp_path_factory.mktemp("judges")
    patch = pytest.MonkeyPatch()
    patch.setattr(reward, "start_judge", lambda out, args: None)
    for level in ("1", "2"):
        process = call(reward, *TINY_REWARD, "--dataset", data, "--level", level, "--out", out / level)
        assert process.returncode == 0 and not process.stdout, process.stderr
        assert {path.name for path in (out / level).iterdir()} == {".in_use", "config.json", "train.json", "reward_model", "metrics.csv", "timing.csv", "data"}
        assert {path.name for path in (out / level / "data").iterdir()} == {"held_out.jsonl", "prompts_train.jsonl", "prompts_held_out.jsonl"}
        assert json.loads((out / level / "train.json").read_text())["command"].startswith("python train_reward_model.py")
        assert [row["loss"] for row in rows_of(out / level / "metrics.csv")][0] == pytest.approx(0.69 if level == "1" else 0.7985, abs=0.15)
    patch.undo()
    return {level: out / str(level) / "reward_model" for level in (1, 2)}


@pytest.fixture(scope="module")
def tiny(judges):
    """Flags of a run of a second."""
    return ["--reward-model", str(judges[1]), *TINY, "--quiet"]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """(directory, process) of a run of both parts, as a reader would start it."""
    out = tmp_path_factory.mktemp("whole") / "o"
    process = run(TRAIN, *TINY, "--updates", "12", "--save-every", "4", "--dataset", data, "--config", data / "c.yaml", "--out", out, env=ONE_THREAD)
    assert process.returncode == 0, process.stderr
    return out, process


RESULT = {"sft", "trained", "win_rate", "win_rate_low", "win_rate_high", "kl"}


@pytest.mark.long
def test_a_run_leaves_what_the_readme_promises(whole):
    out, process = whole
    for words in ("reward model · ", "accuracy", "held-out pairs in the order of gold", "REINFORCE · ", "distinct2", "answers to", "win rate", "policy, tables and samples are in",
                  "Look at the answers:"):
        assert words in process.stdout, words
    for name in ("config.json", "metrics.csv", "timing.csv", "curve.png", "eval.json", "train.json", "checkpoint.pt", "samples/0012.jsonl", "policy/model.safetensors",
                 "policy-0004/config.json", "policy-0008/tokenizer.json", "reward_model_run/reward_model/config.json", "reward_model_run/metrics.csv",
                 "reward_model_run/eval.json", "reward_model_run/curve.png", "reward_model_run/config.json"):
        assert (out / name).exists(), name
    assert not list(out.rglob("*.part"))
    result = json.loads((out / "eval.json").read_text())
    assert set(result) == RESULT and set(result["sft"]) == set(result["trained"]) == {"reward", "gold", "length", "distinct2", "entropy"}
    assert 0 <= json.loads((out / "reward_model_run" / "eval.json").read_text())["accuracy"] <= 1
    rows = rows_of(out / "metrics.csv")
    assert [row["update"] for row in rows] == list(range(1, 13)) and abs(rows[0]["kl"]) < 1e-3 < abs(rows[-1]["kl"]) and not any("gold" in name for name in rows[0])
    for row in rows:
        assert row["shaped_reward"] == pytest.approx(row["reward"] - 0.2 * row["kl"], abs=1e-4) and row["completion_length"] <= 12
    samples = [json.loads(line) for line in (out / "samples" / "0001.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and set(samples[0]) == {"prompt", "text", "reward"}
    command = json.loads((out / "train.json").read_text())["command"]
    assert command.startswith("python train_reinforce_rlhf.py") and "--updates 12" in command


@pytest.mark.long
def test_the_next_step_works_as_printed(whole):
    line = next(line for line in whole[1].stdout.splitlines() if "Look at the answers: " in line)
    words = shlex.split(line.split("Look at the answers: ")[1])
    process = subprocess.run(words, capture_output=True, text=True, cwd="/", env=os.environ | ONE_THREAD)
    assert process.returncode == 0 and process.stdout.count("trained  [") == 3, process.stderr


@pytest.mark.long
def test_the_eval_script_judges_a_run(whole, judges, tmp_path):
    out, _ = whole
    before = (out / "eval.json").read_bytes(), (out / "curve.png").read_bytes()
    process = run(EVAL, "--run", out, "--json", tmp_path / "e.json")
    assert process.returncode == 0 and "win rate" in process.stdout, process.stderr
    assert before == ((out / "eval.json").read_bytes(), (out / "curve.png").read_bytes()) and (tmp_path / "e.json").read_bytes() == before[0]
    result = json.loads(before[0])
    assert 0 <= result["win_rate_low"] <= result["win_rate"] <= result["win_rate_high"] <= 1
    process = run(EVAL, "--weights", out / "policy-0004", "--prompt", "What is sleep?")
    assert process.returncode == 0 and "SFT      [" in process.stdout and "gold" in process.stdout and "grades" not in process.stdout, process.stderr
    process = run(EVAL, "--weights", out, "--reward-model", judges[2], "--samples", "1", "--show", "1")
    assert process.returncode == 0 and process.stdout.count("grades 1 … 10") == 2, process.stderr
    process = run(EVAL, "--reward-model", judges[1], "--reward-model-report")
    assert process.returncode == 0 and "of 6 held-out pairs" in process.stdout, process.stderr


@pytest.mark.long
def test_the_eval_script_judges_what_training_never_saw(whole, judges):
    """Prompts and pairs come from the run of the reward model; the lesson's only where it has none."""
    own = whole[0] / "reward_model_run" / "reward_model"
    _, config = answers.find_policy(str(whole[0]))
    assert answers.find_reward_model(whole[0] / "policy", config) == own and answers.find_data(own) == own.parent / "data"
    asked, held = (answers.read_rows(own.parent / "data", name) for name in ("prompts_train", "prompts_held_out"))
    assert len(held) == 4 and not set(asked) & set(held)
    shipped = FOLDER / "weights" / "reward_model_level1"
    _, config = answers.find_policy(str(FOLDER / "weights" / "policy_level1"))
    assert answers.find_reward_model(FOLDER / "weights" / "policy_level1", config) == shipped and answers.find_data(shipped) == FOLDER / "data"
    assert answers.find_data(shipped, judges[1]) == judges[1].parent / "data" and answers.length_of(judges[1], 7) == 128 and answers.length_of(shipped.parent / "x" / "y", 7) == 7


def test_variance_with_few_prompts(judges, monkeypatch):
    monkeypatch.setattr(study, "ESTIMATORS", {"REINFORCE, b = 0": 1, "RLOO, G = 4": 4})
    model, tokenizer = sft_model()
    judge = train.load_reward_model(judges[1], 1)
    found = study.gradient_variance(model, sft_model()[0], tokenizer, judge, ["What is sleep?", "What is glass?"], train.Config(), 2, answers=8)
    assert set(found) == set(study.ESTIMATORS) and all(noise > 0 for noise, _ in found.values())


# ---- part 1 as a process of part 2 ----------------------------------------------------------------------------------

@pytest.fixture
def started(monkeypatch):
    """The commands that part 2 starts; nothing is really run."""
    commands = []

    def fake(command, **_):
        commands.append(command)
        return types.SimpleNamespace(returncode=0)
    monkeypatch.setattr(train.subprocess, "run", fake)
    return commands


def test_part_1_gets_this_runs_settings_and_part_2_stops_if_told(started, data, tmp_path):
    process = call(train, "--level", "2", "--seed", "7", "--max-length", "90", "--dataset", data, "--config", data / "c.yaml", "--only-reward-model", "--device", "cpu", "--quiet",
                   "--out", tmp_path / "o")
    assert process.returncode == 0 and len(started) == 1, process.stderr
    python, script, *flags = started[0]
    assert python == sys.executable and Path(script) == REWARD and "--smoke" not in flags
    flags.remove("--quiet")
    assert dict(zip(flags[0::2], flags[1::2])) == {"--out": str(tmp_path / "o" / "reward_model_run"), "--device": "cpu", "--level": "2", "--seed": "7", "--max-length": "90", "--dataset": str(data),
                     "--config": str(data / "c.yaml")}
    assert not (tmp_path / "o" / "metrics.csv").exists() and (tmp_path / "o" / "config.json").exists()


@pytest.mark.long
def test_only_reward_model_trains_it_and_resume_goes_on_with_part_2(data, tmp_path):
    out = tmp_path / "o"
    process = run(TRAIN, *TINY, "--dataset", data, "--config", data / "c.yaml", "--only-reward-model", "--quiet", "--out", out, env=ONE_THREAD)
    assert process.returncode == 0 and not process.stdout, process.stderr
    made = (out / "reward_model_run" / "reward_model" / "model.safetensors").read_bytes()
    assert {path.name for path in out.iterdir()} == {".in_use", "config.json", "reward_model_run"}
    process = call(train, "--quiet", "--resume", out)
    assert process.returncode == 0 and len(rows_of(out / "metrics.csv")) == 6, process.stderr
    assert (out / "reward_model_run" / "reward_model" / "model.safetensors").read_bytes() == made


def test_what_an_interrupted_part_1_has_left_is_made_again(started, tmp_path):
    out = tmp_path / "o"
    assert call(train, *TINY, "--only-reward-model", "--quiet", "--out", out).returncode == 0
    (out / "reward_model_run").mkdir()
    (out / "reward_model_run" / "metrics.csv").write_text("half")
    assert call(train, "--only-reward-model", "--quiet", "--resume", out).returncode == 0
    assert len(started) == 2 and started[0][3] == started[1][3] and not (out / "reward_model_run").exists()


def test_an_error_of_part_1_ends_part_2(data, tmp_path):
    process = run(TRAIN, *TINY, "--dataset", tmp_path / "nowhere.jsonl", "--quiet", "--out", tmp_path / "o")
    assert_one_line_error(process, "train_reward_model.py", "nowhere.jsonl", "read")
    assert not (tmp_path / "o" / "metrics.csv").exists()


def test_skip_reward_training_takes_the_shipped_one_or_the_one_named(started, judges, data, monkeypatch, tmp_path):
    config = parsed(monkeypatch, "--skip-reward-training", "--level", "2")
    assert config.reward_model == str(FOLDER / "weights" / "reward_model_level2")
    (tmp_path / "c.yaml").write_text(f"reward_model: {judges[1]}\n")
    assert parsed(monkeypatch, "--skip-reward-training", "--config", tmp_path / "c.yaml").reward_model == str(judges[1])
    process = call(train, *TINY, "--updates", "1", "--skip-reward-training", "--config", tmp_path / "c.yaml", "--quiet", "--out", tmp_path / "o")
    assert process.returncode == 0 and not started, process.stderr
    asked = {json.loads(line)["prompt"] for line in (tmp_path / "o" / "samples" / "0001.jsonl").read_text().splitlines()}
    assert asked <= {json.loads(line) for line in (judges[1].parent / "data" / "prompts_train.jsonl").read_text().splitlines()}
    assert parsed(monkeypatch, "--skip-reward-training", "--reward-model", judges[1]).reward_model == str(judges[1])


@pytest.mark.parametrize("flags", [["--baseline", "ema"], ["--baseline", "mean"], ["--break", "cold-baseline"], ["--break", "cold-baseline", "--baseline", "mean"]],
                         ids=" ".join)
def test_the_baseline_starts_at_what_is_usual(flags, tiny, tmp_path, monkeypatch):
    """One batch of the SFT model's answers before the first update; with --break cold-baseline none, and 0. The reference never changes."""
    means, weights, original = [], [], train.collect

    def spy(config, policy, reference, *arguments):
        batch, texts = original(config, policy, reference, *arguments)
        means.append(batch["returns"].mean().item())
        weights.append([torch.cat([p.detach().flatten() for p in model.parameters()]).clone() for model in (policy, reference)])
        return batch, texts
    monkeypatch.setattr(train, "collect", spy)
    process = call(train, *tiny, *flags, "--out", tmp_path / "o")
    assert process.returncode == 0, process.stderr
    baselines, b = [row["baseline"] for row in rows_of(tmp_path / "o" / "metrics.csv")], 0.0 if "--break" in flags else means.pop(0)
    for k, (baseline, mean) in enumerate(zip(baselines, means, strict=True), 1):
        assert baseline == pytest.approx(b, abs=1e-4)
        b = b + (mean - b) / (k + 1) if "mean" in flags else 0.9 * b + 0.1 * mean
    assert all(torch.equal(reference, weights[0][0]) for _, reference in weights) and not torch.equal(weights[0][0], weights[-1][0])


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_resume_equals_the_uninterrupted_run(how, whole, tmp_path):
    out = tmp_path / "stopped"
    own = whole[0] / "reward_model_run" / "reward_model"
    flags = [*TINY, "--updates", "12", "--save-every", "4"]
    process = subprocess.Popen([sys.executable, str(TRAIN), *flags, "--reward-model", str(own), "--quiet", "--out", str(out)], stderr=subprocess.PIPE, text=True,
                               env=os.environ | ONE_THREAD, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))          # a job in the background ignores it
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(how)
    error = process.communicate()[1]
    assert process.returncode == (130 if how == signal.SIGINT else -9), error
    if how == signal.SIGINT:
        assert "--resume" in error and "Traceback" not in error
    process = call(train, "--quiet", "--resume", out)
    assert process.returncode == 0, process.stderr
    for name in ("metrics.csv", "samples/0012.jsonl", "policy-0008/model.safetensors", "policy/model.safetensors"):
        assert (whole[0] / name).read_bytes() == (out / name).read_bytes(), name
    assert_one_line_error(call(train, "--resume", out, "--lr", "0.3"), "--resume", "--device")


@pytest.mark.long
def test_resume_takes_the_latest_run_but_no_smoke_run(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HERE", tmp_path)
    for name in ("20250101-000000_seed1", "20250102-000000_seed1_smoke"):
        shutil.copytree(whole[0], tmp_path / "runs" / name)
    monkeypatch.setattr(sys, "argv", [str(TRAIN), "--resume", "latest"])
    given, args = train.parse_args()
    assert train.resumed_run(given, args).updates == 12 and args.out == tmp_path / "runs" / "20250101-000000_seed1"


@pytest.mark.long
def test_a_damaged_run_is_refused(whole, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "o")
    (out / "checkpoint.pt").write_bytes(b"x" * 100)
    assert_one_line_error(call(train, "--quiet", "--resume", out), "checkpoint.pt", "damaged")
    stored = json.loads((out / "config.json").read_text())
    for changed, words in ((stored | dict(lr="x"), ["lr", "float"]), (stored | dict(foo=1), ["config.json"]), ([], ["config.json"])):
        (out / "config.json").write_text(json.dumps(changed))
        assert_one_line_error(call(train, "--quiet", "--resume", out), *words)


WORKER = """
import sys, torch
sys.path.insert(0, {tests!r})
import test_rlhf as t
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
model = t.MODELS["gpt2"]
policy, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
batch, advantages = t.a_batch(5)
mine = slice(4 * accelerator.process_index, 4 * accelerator.process_index + 4)
part = {{key: value[mine] for key, value in (batch | dict(advantages=advantages)).items()}}
terms = t.train.update(t.config(micro_batch=3, gamma=0.9), accelerator, policy, optimizer, part)
if accelerator.is_main_process:
    torch.save((t.flat_gradient(model), terms["loss"], terms["grad_norm"]), sys.argv[1])
accelerator.wait_for_everyone()
accelerator.end_training()
import os; os._exit(0)            # on a busy machine a thread of gloo may still run, and the interpreter would abort on its way out
"""


def launch(*command):
    """On two processes. torchrun, because `accelerate launch --cpu` starts one process whatever --num_processes says."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, command)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | ONE_THREAD)
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.long
def test_two_processes_have_the_gradient_of_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER.format(tests=str(REPO / "tests")))
    launch(tmp_path / "worker.py", tmp_path / "two")
    two, loss, norm = torch.load(tmp_path / "two", weights_only=True)
    one, wanted = gradient_of(MODELS["gpt2"], config(micro_batch=3, gamma=0.9), *a_batch(5))
    torch.testing.assert_close(two, one, atol=1e-6, rtol=1e-4)
    assert loss == pytest.approx(wanted, abs=1e-5) and norm == pytest.approx(one.norm().item(), abs=1e-4)


SPY = """
import json, os, sys
sys.path.insert(0, {tests!r})
from conftest import load
train = load("reinforce_rlhf/train_reinforce_rlhf.py")
original, start = train.collect, train.start_reward_model
def spy(config, policy, reference, tokenizer, judge, prompts, generator):
    batch, texts = original(config, policy, reference, tokenizer, judge, prompts, generator)
    with open({out!r} + os.environ["RANK"], "a") as file:
        print(json.dumps([prompts, texts]), file=file)
    return batch, texts
def started(*arguments):
    open({out!r} + "-part1-" + os.environ["RANK"], "x").close()
    start(*arguments)
train.collect, train.start_reward_model, train.start_judge = spy, started, lambda *arguments: None
train.main()
"""


@pytest.mark.long
def test_two_processes_train_together_on_their_own_prompts_and_one_makes_the_reward_model(data, judges, tmp_path):
    (tmp_path / "spy.py").write_text(SPY.format(tests=str(REPO / "tests"), out=str(tmp_path / "asked")))
    launch(tmp_path / "spy.py", *without_device(TINY), "--updates", "2", "--dataset", data, "--config", data / "c.yaml", "--quiet", "--out", tmp_path / "o")
    assert json.loads((tmp_path / "o" / "train.json").read_text())["result"]["updates"] == 2 and (tmp_path / "o" / "policy").is_dir()
    assert [path.name for path in tmp_path.glob("asked-part1-*")] == ["asked-part1-0"]
    for mine, its in zip(*([json.loads(line) for line in (tmp_path / f"asked{rank}").read_text().splitlines()] for rank in (0, 1)), strict=True):
        assert len(mine[0]) == len(its[0]) == 2 and not set(mine[0]) & set(its[0]) and set(mine[1]) != set(its[1])
    one, two = judges[1].parent, tmp_path / "o" / "reward_model_run"          # the same run, whoever starts it
    assert (one / "metrics.csv").read_bytes() == (two / "metrics.csv").read_bytes()
    assert (one / "reward_model" / "model.safetensors").read_bytes() == (two / "reward_model" / "model.safetensors").read_bytes()
    assert_one_line_error(call(train, "--quiet", "--resume", tmp_path / "o"), "another number of processes")


@pytest.mark.long
@pytest.mark.parametrize("kind, level", [("qwen2", "1"), ("llama", "2")])
def test_a_run_with_another_model_and_prompts_without_gold(kind, level, tmp_path, monkeypatch):
    """Another shape, no chat template, padding by the end token, relative paths, a conversation among the prompts."""
    tokenizer = byte_tokenizer()
    model = type(MODELS[kind])(type(MODELS[kind].config)(**(MODELS[kind].config.to_dict() | dict(vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=None))))
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(PAIR | dict(prompt=prompt)) + "\n" for prompt in ("Describe a car.", "Describe a bus.", MESSAGES, "Describe a bike.")))
    monkeypatch.chdir(tmp_path)
    assert call(reward, *TINY_REWARD, "--model", "m", "--dataset", "x.jsonl", "--level", level, "--out", "r").returncode == 0
    process = call(train, *TINY, "--model", "m", "--reward-model", "r/reward_model", "--updates", "1", "--level", level, "--estimator", "rloo", "--group-size", "2",
                   "--repetition-penalty", "1.1", "--quiet", "--out", "o")
    assert process.returncode == 0, process.stderr
    assert "baseline" not in rows_of(tmp_path / "o" / "metrics.csv")[0]
    process = run(EVAL, "--run", tmp_path / "o", "--samples", "1", cwd="/")
    assert process.returncode == 0 and "by reward" in process.stdout, process.stderr
    process = run(EVAL, "--run", tmp_path / "r", cwd="/")
    assert process.returncode == 0 and "in the order of the annotators" in process.stdout, process.stderr
    assert json.loads((tmp_path / "o" / "eval.json").read_text())["sft"]["gold"] is None and (tmp_path / "o" / "curve.png").exists()


def test_a_nan_stops_with_the_last_checkpoint_intact(tiny, tmp_path, monkeypatch):
    original, calls = train.collect, []

    def poisoned(*arguments):
        calls.append(1)
        batch, texts = original(*arguments)
        return batch | dict(returns=batch["returns"] * (math.nan if len(calls) == 12 else 1)), texts
    monkeypatch.setattr(train, "collect", poisoned)
    assert_one_line_error(call(train, *tiny, "--updates", "12", "--out", tmp_path / "o"), "not finite", "--lr")
    assert len(rows_of(tmp_path / "o" / "metrics.csv")) == 10
    monkeypatch.undo()
    monkeypatch.setattr(train, "start_judge", lambda out, args: None)
    assert call(train, "--quiet", "--resume", tmp_path / "o").returncode == 0
    rows = rows_of(tmp_path / "o" / "metrics.csv")
    assert len(rows) == 12 and all(math.isfinite(value) for row in rows for value in row.values())


def test_a_reward_model_that_bursts_is_refused(data, tmp_path):
    process = call(reward, *TINY_REWARD, "--dataset", data, "--lr", "1e8", "--out", tmp_path / "o")
    assert_one_line_error(process, "not finite", "--lr")
    assert not (tmp_path / "o" / "reward_model").exists()


# ---- what is broken on purpose --------------------------------------------------------------------------------------

def test_what_a_batch_is_described_by():
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]])
    logprobs = torch.tensor([[-1.0, -2, 0], [-1, -1, -1], [-4, 0, 0], [-0.5, -0.5, 0]])
    batch = dict(completion_mask=mask, logprobs=logprobs, rewards=torch.tensor([1.0, 3, 2, 2]), kl=torch.tensor([0.0, 1, 2, 1]), returns=torch.tensor([1.0, 2, 0, 1]))
    row = train.describe(train.Config(max_new_tokens=3), Accelerator(cpu=True), batch, ["a b a b", "c d", "", "e"])
    assert row == pytest.approx(dict(reward=2.0, kl=1.0, shaped_reward=1.0, distinct2=3 / 4, entropy=11 / 8, completion_length=2.0, cut_off_ratio=0.25))


@pytest.mark.parametrize("estimator, group", [("reinforce", 1), ("rloo", 2)])
def test_the_training_loop_keeps_its_books(estimator, group, judges, tmp_path, monkeypatch):
    batches, advantages, checkpoints, collect, update, save_checkpoint = [], [], [], train.collect, train.update, train.save_checkpoint
    monkeypatch.setattr(train, "collect", lambda *given: batches.append(collect(*given)) or batches[-1])
    monkeypatch.setattr(train, "update", lambda config, accelerator, policy, optimizer, batch: advantages.append(batch["advantages"].clone()) or update(config, accelerator, policy, optimizer, batch))
    monkeypatch.setattr(train, "save_checkpoint", lambda out, model, optimizer, state: checkpoints.append(state["update"]) or save_checkpoint(out, model, optimizer, state))
    config = train.Config(reward_model=str(judges[1]), updates=12, batch_size=4, group_size=group, estimator=estimator, max_new_tokens=8, save_every=5, seed=3)
    lines = []
    _, _, result = train.train(config, tmp_path, Accelerator(cpu=True), lines.append)
    assert checkpoints == [10, 12] and result["updates"] == 12 and sorted(path.name for path in tmp_path.glob("policy-*")) == ["policy-0005", "policy-0010"]
    rows = rows_of(tmp_path / "metrics.csv")
    assert [row["update"] for row in rows] == list(range(1, 13)) and len((tmp_path / "timing.csv").read_text().splitlines()) == 13
    assert sum(line.startswith("    answers to") for line in lines) == 2
    returns = [batch["returns"] for batch, _ in batches]
    if estimator == "rloo":
        assert all(torch.allclose(a, train.rloo_advantages(r, 2)) for a, r in zip(advantages, returns)) and "baseline" not in rows[0]
        return
    baseline, first = returns[0].mean().item(), returns.pop(0)               # of the SFT model, before the first update
    assert len(returns) == 12 and first.shape == (4,)
    for row, one, advantage in zip(rows, returns, advantages):
        assert row["baseline"] == pytest.approx(baseline, rel=1e-4) and torch.allclose(advantage, one - baseline, atol=1e-4)
        baseline = 0.9 * baseline + 0.1 * one.mean().item()


def test_the_training_loop_of_the_reward_model_keeps_its_books(tmp_path, monkeypatch):
    rates, terms, lines, update = [], [], [], reward.update_on_pairs

    def watched(config, model, optimizer, *batch):
        rates.append(optimizer.param_groups[0]["lr"])
        terms.append(update(config, model, optimizer, *batch))
        return terms[-1]

    monkeypatch.setattr(reward, "update_on_pairs", watched)
    config = reward.Config(model="random", epochs=25, batch_size=4, seed=3)
    _, _, result = reward.train(config, tmp_path, torch.device("cpu"), lines.append)
    rows, clock = rows_of(tmp_path / "metrics.csv"), rows_of(tmp_path / "timing.csv")
    assert len(rows) == len(clock) == len(terms) == result["updates"] > 20 and 0 < result["train_seconds"] == pytest.approx(sum(row["seconds"] for row in clock), rel=1e-2)
    assert [row["update"] for row in rows] == [row["update"] for row in clock] == list(range(1, len(rows) + 1))
    assert rates == pytest.approx([reward.step_size(config.lr, number, len(rows)) for number in range(1, len(rows) + 1)])
    for row, rate, one in zip(rows, rates, terms):
        assert row["lr"] == pytest.approx(rate, rel=1e-4) and all(row[name] == pytest.approx(value, rel=1e-3, abs=1e-5) for name, value in one.items())
    assert not any("left out" in line for line in lines)                     # no answers are equal
    assert len(lines) == 2 + len(rows) // (len(rows) // 10)                  # what there is, headings, ten lines or so


@pytest.mark.parametrize("number, share", [(1, 0.2), (3, 0.6 * (0.5 + 0.5 * math.cos(math.pi * 0.02))), (5, 0.5 + 0.5 * math.cos(math.pi * 0.04)), (51, 0.5), (101, 0.0)])
def test_the_reward_models_step_size_rises_and_then_falls_like_a_cosine(number, share):
    assert reward.step_size(3.0, number, 100) == pytest.approx(3 * share)


@pytest.mark.parametrize("level", [1, 2])
def test_an_update_of_the_reward_model_reports_what_it_saw_and_limits_its_gradient(level, tmp_path):
    model, tokenizer = byte_classifier(tmp_path, level, None)
    model.requires_grad_(True)
    texts = train.judged_tokens(tokenizer, ["Why?"] * 6, ["a", "bb", "c?", "a longer one", "e", "f!"], 128)
    ids, mask = reward.pad_right(texts, model.config.pad_token_id)
    logits = model(input_ids=ids, attention_mask=mask).logits.detach()
    chosen, rejected = train.reward_from_logits(logits).chunk(2)
    config = reward.Config(level=level, max_grad_norm=0.01)
    terms = reward.update_on_pairs(config, model, torch.optim.SGD(model.parameters(), lr=1.0), ids, mask, False)
    assert terms["loss"] == pytest.approx(reward.pair_loss(*logits.chunk(2), config.center).mean().item(), rel=1e-4)
    assert terms["margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    assert terms["mean_reward"] == pytest.approx(torch.cat([chosen, rejected]).mean().item(), rel=1e-4)
    assert terms["accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_the_reward_models_console_shows_means_of_the_last_updates():
    rows, clock = [dict(update=k, loss=float(k)) for k in range(1, 6)], [dict(update=k, seconds=10.0 * k) for k in range(1, 6)]
    assert reward.recent(rows, clock, 2) == dict(update=5, loss=4.5, seconds=45.0)


def test_a_pair_is_as_long_as_its_longer_answer_and_what_is_random_follows_the_seed(tmp_path, monkeypatch):
    seen, load_model = [], reward.load_model
    monkeypatch.setattr(reward, "load_model", lambda *given: seen.append(torch.initial_seed()) or load_model(*given))      # an untrained model is random
    monkeypatch.setattr(reward, "encode", lambda *_: ([[1, 2, 3], [1]], [[1], [1, 2]]))
    monkeypatch.setattr(reward, "sample_batches", lambda lengths, *_: seen.append(lengths.tolist()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reward.train(reward.Config(model="random", seed=5), tmp_path, torch.device("cpu"))
    assert seen == [5, [3, 2]]


def test_what_no_kl_changes_and_nothing_else_does():
    config = train.Config(kl_coef=0.3)
    assert train.broken_config(config) == config
    assert train.broken_config(replace(config, broken="no-kl")) == replace(config, broken="no-kl", kl_coef=0.0)
    assert train.broken_config(replace(config, broken="cold-baseline")) == replace(config, broken="cold-baseline")


@pytest.mark.parametrize("texts, share", [(["a b"], 1), (["a b", "a b"], 1), (["a b a b"], 2 / 3), (["a a a a a"], 1 / 4), (["a"], 0), ([""], 0), (["a b c", "a a a"], 3 / 4)])
def test_distinct2_examples(texts, share):
    assert train.distinct2(texts) == pytest.approx(share)


def test_two_processes_with_the_same_answers_take_the_step_of_one(tmp_path, monkeypatch, judges):
    caught, update = [], train.update

    def watched(config, accelerator, policy, optimizer, batch):
        caught.append((config, accelerator, copy.deepcopy(policy), batch))
        return update(config, accelerator, policy, optimizer, batch)

    monkeypatch.setattr(train, "update", watched)
    train.train(train.Config(reward_model=str(judges[1]), updates=1, batch_size=4, group_size=1, max_new_tokens=8, seed=3), tmp_path, Accelerator(cpu=True), lambda *text: None)
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


@each_model
def test_every_layer_of_the_cache_has_room_for_more_tokens(model, monkeypatch):
    started, read_once = [], train.read_once
    monkeypatch.setattr(train, "read_once", lambda *given: started.append(read_once(*given)) or started[-1])
    train.generate(model, PROMPTS, PROMPT_MASK, 2, 3, 1.0, 1.0, [2], torch.Generator().manual_seed(0))
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


def test_processes_share_the_prompts_and_never_a_random_stream():
    prompts, config = [f"prompt {k}" for k in range(50)], train.Config(batch_size=16, group_size=2)
    alone, _ = train.choose(config, types.SimpleNamespace(num_processes=1, process_index=0), prompts, 7)
    both = [train.choose(config, types.SimpleNamespace(num_processes=2, process_index=rank), prompts, 7) for rank in (0, 1)]
    assert both[0][0] + both[1][0] == alone and len(set(alone)) == 8
    assert both[0][1].initial_seed() + 1 == both[1][1].initial_seed()
    assert sorted(train.choose(config, types.SimpleNamespace(num_processes=1, process_index=0), prompts[:8], 7)[0]) == prompts[:8]          # each once
    assert train.choose(config, types.SimpleNamespace(num_processes=1, process_index=0), prompts[:4], 7)[0]
    assert train.choose(config, types.SimpleNamespace(num_processes=1, process_index=0), prompts, 8)[0] != alone


@pytest.mark.parametrize("name", train.BREAKS)
def test_every_broken_variant_runs(name, tiny, tmp_path):
    process = call(train, *tiny[:-1], "--updates", "1", "--break", name, "--out", tmp_path / "o")
    assert process.returncode == 0 and f"BROKEN: {name}" in process.stdout, process.stderr
    assert json.loads((tmp_path / "o" / "config.json").read_text())["broken"] == name
    row, = rows_of(tmp_path / "o" / "metrics.csv")
    assert (row["baseline"] == 0) == (name == "cold-baseline") and (name != "no-kl" or row["shaped_reward"] == row["reward"])


@pytest.mark.parametrize("broken", [[], ["--break", "upper-triangle"]], ids=["right", "broken"])
def test_the_upper_triangle_raises_the_rejected_while_the_loss_falls(broken, tmp_path):
    lines = "".join(f"{line}\n" for line in (FOLDER / "data" / "train.jsonl").read_text(encoding="utf8").splitlines()[:8])
    (tmp_path / "train.jsonl").write_text(lines)
    (tmp_path / "held_out.jsonl").write_text(lines)
    process = call(reward, "--level", "2", "--dataset", tmp_path, "--epochs", "25", "--batch-size", "8", "--lr", "1e-3", *broken, "--device", "cpu", "--quiet", "--out", tmp_path / "o")
    assert process.returncode == 0, process.stderr
    losses = [row["loss"] for row in rows_of(tmp_path / "o" / "metrics.csv")]
    assert len(losses) == 25 and losses[0] == pytest.approx(0.7985, abs=0.1) and losses[-1] < 0.3
    rows = answers.pairs_of(answers.load_judge(tmp_path / "o" / "reward_model"), reward.read_pairs(tmp_path / "train.jsonl"), 128)
    assert evaluation.judge_pairs(rows, dict(topic_of={}))["accuracy"] == (0.0 if broken else 1.0)


def test_batches_hold_similar_lengths_and_each_pair_once_an_epoch():
    lengths = np.random.default_rng(0).integers(5, 60, size=100)
    batches = reward.sample_batches(lengths, 8, 2, 3)
    assert len(batches) == 2 * 12 and all(len(batch) == 8 for batch in batches)
    for epoch in (batches[:12], batches[12:]):
        numbers = np.concatenate(epoch)
        assert len(set(numbers.tolist())) == 96
        for pool in (epoch[:8], epoch[8:]):                       # eight batches at a time are sorted
            assert (np.diff(np.concatenate([lengths[batch] for batch in pool])) >= 0).all()
    assert [b.tolist() for b in batches] == [b.tolist() for b in reward.sample_batches(lengths, 8, 2, 3)] != [b.tolist() for b in reward.sample_batches(lengths, 8, 2, 4)]


# ---- settings: file, flags, what is refused -------------------------------------------------------------------------

def another(f):
    """A valid value that is not the default."""
    if f.type is str:
        return f.name
    options = (f.default / 2, f.default + 0.5) if f.type is float else (f.default - 1, f.default + 1)
    return next(value for value in options if value >= f.metadata.get("low", 0) and value != f.default)


def parsed(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [str(TRAIN), *map(str, flags)])
    return train.new_run(*train.parse_args())


def parsed_reward(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [str(REWARD), *map(str, flags)])
    return reward.parse_args()


FULL = """
model: m
dataset: d
device: cpu
max_length: 90
seed: 7
part_1: {split: part, lr: 1e-5, batch_size: 3, epochs: 2, out: made/rm, center: 0.5, validation_split: 0.25}
part_2: {lr: 3e-6, batch_size: 12, updates: 5, kl_coef: 0.05, gamma: 0.5, temperature: 0.7, repetition_penalty: 1.5,
         max_new_tokens: 33, micro_batch: 4, save_every: 25, out: made/here}
"""


def test_every_key_of_a_config_file_arrives(tmp_path, monkeypatch):
    for name in ("m", "d"):
        (tmp_path / name).mkdir()
    (tmp_path / "c.yaml").write_text(FULL)
    monkeypatch.chdir(tmp_path)
    found = parsed(monkeypatch, "--config", "c.yaml")
    wanted = dict(model=str(tmp_path / "m"), dataset=str(tmp_path / "d"), max_length=90, seed=7, lr=3e-6, batch_size=12,
                  updates=5, kl_coef=0.05, gamma=0.5, temperature=0.7, repetition_penalty=1.5, max_new_tokens=33, micro_batch=4, save_every=25, config=str(tmp_path / "c.yaml"))
    assert {name: getattr(found, name) for name in wanted} == wanted
    args = train.parse_args()[1]
    assert (args.out, args.device) == (Path("made/here"), "cpu")
    found, args = parsed_reward(monkeypatch, "--config", tmp_path / "c.yaml")
    wanted = dict(model="m", dataset="d", split="part", max_length=90, seed=7, lr=1e-5, batch_size=3, epochs=2, center=0.5, validation_split=0.25)
    assert {name: getattr(found, name) for name in wanted} == wanted and (args.out, args.device) == (Path("made/rm"), "cpu")


def test_flags_come_before_smoke_smoke_before_the_file_and_the_file_before_the_defaults(tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("seed: 7\nmax_length: 90\npart_1:\npart_2:\n  lr: 1e-5\n  gamma: 1\n  temperature: 0.5\n  updates: 99\n")
    found = parsed(monkeypatch, "--config", tmp_path / "c.yaml", "--temperature", "0.25", "--seed", "8")
    assert (found.seed, found.max_length, found.lr, found.gamma, found.temperature, found.kl_coef) == (8, 90, 1e-5, 1.0, 0.25, train.Config().kl_coef)
    assert parsed(monkeypatch, "--config", tmp_path / "c.yaml").seed == 7 and parsed(monkeypatch).seed == train.Config().seed
    assert [parsed(monkeypatch, "--config", tmp_path / "c.yaml", *more).updates for more in ([], ["--smoke"], ["--smoke", "--updates", "3"])] == [99, 2, 3]
    sizes = [parsed(monkeypatch, *flags).group_size for flags in ([], ["--estimator", "rloo"], ["--estimator", "rloo", "--group-size", "2"])]
    assert sizes == [1, 4, 2]
    assert parsed(monkeypatch, "--preset", "smollm2").model == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_config_files_are_read(path, monkeypatch):
    assert isinstance(parsed(monkeypatch, "--config", path), train.Config) and isinstance(parsed_reward(monkeypatch, "--config", path)[0], reward.Config)


@pytest.mark.parametrize("text, words", [
    ("sead: 1", ["--sead"]), ("part_2:\n  gama: 1", ["--gama"]), ("part_2: x", ["keys and values"]),
    ("seed: 1.5", ["seed", "int", "1.5"]),
    ("seed: true", ["seed", "int"]), ("seed:", ["seed"]), ("part_2:\n  gamma: high", ["gamma", "float", "high"]),
    ("part_2:\n  gamma: true", ["gamma"]),
    ("device: 5", ["--device", "cpu"]), ("device: tpu", ["--device", "cpu"]), ("part_2:\n  gamma: 2", ["--gamma", "to 1,"]), ("- 1\n- 2", ["keys and values"]),
    ("a: b: c", ["keys and values"]),
    ("", ["keys and values"]), ("model: [1]", ["cannot be loaded"]), ("\x00", ["keys and values"])])
def test_bad_config_files_are_refused(text, words, judges, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    assert_one_line_error(call(train, "--config", tmp_path / "c.yaml", "--reward-model", judges[1], "--quiet", "--out", tmp_path / "o"), *words)


@pytest.mark.parametrize("text, words", [("sead: 1", ["--sead"]), ("part_1:\n  epoch: 1", ["--epoch"]), ("part_1: x", ["keys and values"]), ("seed: 1.5", ["seed", "int"]),
                                         ("- 1", ["keys and values"]), ("part_1:\n  lr: 0", ["--lr", "from 1e-12"])])
def test_bad_config_files_are_refused_in_part_1(text, words, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    assert_one_line_error(call(reward, "--config", tmp_path / "c.yaml", "--quiet", "--out", tmp_path / "o"), *words)


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize("arguments, words", [
    (["--estimator", "rloo", "--group-size", "1"], ["--group-size"]), (["--estimator", "rloo", "--batch-size", "6"], ["--batch-size 6", "--group-size 4"]),
    (["--level", "3"], ["--level", "1, 2"]), (["--reward-model", "no/such/rm"], ["no/such/rm", "loaded"]),
    (["--skip-reward-training", "--only-reward-model"], ["--skip-reward-training", "not allowed"]),
    (["--break", "x"], ["cold-baseline"]), (["--break", "cold-baseline", "--estimator", "rloo"], ["cold-baseline"]),
    (["--resume", "nowhere"], ["config.json"]), (["--resume", "."], ["config.json"]), (["--resume", ".", "--smoke"], ["--resume"]), (["--resume", ".", "--lr", "1"], ["--resume"]),
    (["--resume", ".", "--skip-reward-training"], ["--resume"]), (["--lr", "0"], ["--lr", "from 1e-12"]),
    (["--temperature", "0"], ["--temperature"]), (["--kl-coef", "-1"], ["--kl-coef"]), (["--kl-coef", "nan"], ["--kl-coef"]),
    (["--repetition-penalty", "0.5"], ["--repetition-penalty"]),
    (["--gamma", "1.5"], ["--gamma"]), (["--stepz", "1"], ["--help"]), (["--lr", "fast"], ["--lr", "--help"]),
    (["--max-new-tokens", "500", "--skip-reward-training"], ["--max-new-tokens", "--max-length"]),
    (["--model", "no/such/model", "--skip-reward-training"], ["no/such/model", "loaded"]), (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    pytest.param(["--device", "cuda"], ["--device", "cuda", "cpu"], marks=needs_no_gpu)])
def test_trainer_refuses_bad_values(arguments, words, tmp_path):
    assert_one_line_error(call(train, *arguments, "--quiet", *([] if "--resume" in arguments else ["--out", tmp_path / "out"]), cwd=tmp_path), *words)


@pytest.mark.parametrize("arguments, words", [
    (["--level", "3"], ["--level", "1, 2"]), (["--break", "x"], ["upper-triangle"]), (["--break", "upper-triangle"], ["--level 2"]), (["--lr", "0"], ["--lr", "from 1e-12"]),
    (["--validation-split", "1"], ["--validation-split", "to 0.9"]), (["--epochs", "0"], ["--epochs"]), (["--stepz", "1"], ["--help"]), (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    (["--model", "no/such/model"], ["no/such/model", "loaded"]), (["--max-length", "300"], ["--max-length", "context"]),
    pytest.param(["--device", "cuda"], ["--device", "cuda", "cpu"], marks=needs_no_gpu)])
def test_reward_trainer_refuses_bad_values(arguments, words, tmp_path):
    assert_one_line_error(call(reward, *arguments, "--quiet", "--out", tmp_path / "out", cwd=tmp_path), *words)


def test_trainer_refuses_what_cannot_serve(judges, tiny, tmp_path):
    refused = lambda *arguments: call(train, *tiny, *arguments, "--out", tmp_path / f"o{len(list(tmp_path.iterdir()))}")
    assert_one_line_error(refused("--level", "2"), "--level 2", "10 logits")
    assert_one_line_error(refused("--reward-model", FOLDER / "weights" / "sft"), "score.weight")
    assert_one_line_error(refused("--max-length", "14"), "no prompt", "--max-length")
    assert_one_line_error(refused("--max-length", "300"), "--max-length", "context")
    policy, tokenizer = byte_model()
    tokenizer.eos_token = None
    policy.save_pretrained(tmp_path / "mute")
    tokenizer.save_pretrained(tmp_path / "mute")
    assert_one_line_error(refused("--model", tmp_path / "mute"), "an end token")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert_one_line_error(call(train, *tiny, "--out", tmp_path / "full"), "--out", "is not empty")
    assert_one_line_error(call(reward, *TINY_REWARD, "--out", tmp_path / "full"), "--out", "is not empty")
    assert_one_line_error(call(train, *tiny, "--out", tmp_path / "full" / "x" / "y"), "Not a directory")


def test_prompts_that_leave_no_room_are_left_out(judges):
    _, tokenizer = sft_model()
    policy, data = MODELS["gpt2"], judges[1].parent / "data" / "prompts_train.jsonl"
    length = {prompt: train.prompt_tokens(tokenizer, [prompt])[0].shape[1] for prompt in map(json.loads, data.read_text().splitlines())}
    longest = sorted(length.values())[len(length) // 2]
    kept = train.load_prompts(train.Config(max_length=longest + 12, max_new_tokens=12), judges[1], policy, policy, tokenizer)
    assert kept == [prompt for prompt, n in length.items() if n <= longest] and 0 < len(kept) < len(length)


SFT = FOLDER / "weights" / "sft"


@pytest.mark.parametrize("arguments, words", [
    (["--samples", "0"], ["--samples"]), (["--json", "no/such/x.json"], ["--json"]), (["--json", "."], ["--json"]),
    (["--stepz"], ["--help"]), (["--level", "3"], ["--level"]), (["--show", "-1"], ["--show"]), (["--run", "nowhere"], ["nowhere"])])
def test_eval_refuses_bad_values(arguments, words, tmp_path):
    assert_one_line_error(call(evaluation, *arguments, cwd=tmp_path), *words)


@pytest.mark.parametrize("arguments, words", [
    (["--weights", "nowhere"], ["nowhere", "config.json"]), (["--weights", SFT, "--reward-model", "no/such/rm"], ["no/such/rm", "loaded"]),
    (["--weights", SFT, "--reward-model", SFT], ["score.weight"]), (["--samples", "0"], ["--samples"])])
def test_making_of_answers_refuses_bad_values(arguments, words, tmp_path):
    assert_one_line_error(call(answers, *arguments, "--out", tmp_path / "a.jsonl", cwd=tmp_path), *words)
    assert not (tmp_path / "a.jsonl").exists()


# ---- what is shipped ------------------------------------------------------------------------------------------------

@pytest.mark.long
def test_shipped_policy_beats_the_sft_model_and_the_reward_models_are_good(tmp_path):
    process = run(EVAL, "--samples", "1", "--json", tmp_path / "e.json", env=ONE_THREAD)
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["win_rate"] > 0.75 and result["trained"]["gold"] > result["sft"]["gold"] + 1
    for level in (1, 2):
        rows = answers.pairs_of(answers.load_judge(FOLDER / "weights" / f"reward_model_level{level}"), answers.read_rows(FOLDER / "data", "held_out"), 128)
        assert evaluation.judge_pairs(rows, WORLD)["accuracy"] >= 0.78
