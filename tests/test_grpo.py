"""GRPO: losses, gradients and advantages against TRL and enumeration; the sampler against the model's own distribution; processes, resume, bad input."""
import copy
import csv
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator

from conftest import REPO, assert_one_line_error, call, load, run, without_device

FOLDER = REPO / "grpo_lm"
TRAIN, EVAL, ANSWERS, STUDY = (FOLDER / name for name in ("train_grpo.py", "grpo_eval.py", "make_answers.py", "study.py"))
train, evaluation, base_models = load("grpo_lm/train_grpo.py"), load("grpo_lm/grpo_eval.py"), load("grpo_lm/make_base_models.py")
torch.set_num_threads(1)
WORLD = json.loads((FOLDER / "world.json").read_text(encoding="utf8"))
SIZES = dict(vocab_size=40, pad_token_id=0, eos_token_id=2, bos_token_id=None)


def random_models(**extra):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    decoder = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, **SIZES)
    return {"qwen2": Qwen2ForCausalLM(Qwen2Config(**decoder)).eval(), "llama": LlamaForCausalLM(LlamaConfig(**decoder)).eval(),
            "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, **SIZES)).eval()}


MODELS = random_models()
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
PROMPTS = torch.tensor([[0, 0, 5, 6], [7, 2, 9, 10], [0, 11, 12, 13]])             # the second one contains the end token
PROMPT_MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
ROWS = [[10, 11, 2], [12, 13, 14, 15, 2], [16, 2]]


def byte_tokenizer():
    """A token per byte, 0 ends and pads: a fast tokenizer, which saves what it is told (that there is no padding token, for instance)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocabulary = {"<|end|>": 0, **{c: k + 1 for k, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def tiny_judge(labels=1):
    """An untrained classifier for byte_tokenizer()."""
    from transformers import GPT2Config, GPT2ForSequenceClassification
    return GPT2ForSequenceClassification(GPT2Config(vocab_size=257, n_embd=16, n_layer=1, n_head=2, n_positions=256, num_labels=labels, bos_token_id=None,
                                                    eos_token_id=0, pad_token_id=0)).eval()


def logprobs_of(model, prompt_ids, prompt_mask, completion_ids, completion_mask, temperature):
    return train.completion_logprobs(model, dict(prompt_ids=prompt_ids, prompt_mask=prompt_mask, completion_ids=completion_ids, completion_mask=completion_mask), temperature)


def a_batch(seed=0, B=8, T=4, L=6):
    """A batch as collect() makes one, with unequal lengths, in two groups of four."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, L + 1, (B,), generator=g)
    lengths[0] = L
    mask = (torch.arange(L) < lengths[:, None]).float()
    prompt_mask = (torch.arange(T) >= torch.randint(0, T, (B,), generator=g)[:, None]).long()
    prompt_mask[0] = 1
    return dict(prompt_ids=torch.randint(3, 40, (B, T), generator=g), prompt_mask=prompt_mask, completion_ids=torch.randint(3, 40, (B, L), generator=g), completion_mask=mask,
                old_logprobs=(-3.5 + 0.3 * torch.randn(B, L, generator=g)) * mask, ref_logprobs=(-3.5 + 0.3 * torch.randn(B, L, generator=g)) * mask,
                advantages=torch.randn(B, generator=g))


def gradient_of(model, config, batch):
    """(gradient of all weights, what update() reports), without moving the weights."""
    accelerator = Accelerator(cpu=True)
    terms = train.update(config, accelerator, model, torch.optim.SGD(model.parameters(), lr=0.0), batch)
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in model.parameters()]), terms


def config(**changes):
    return train.Config(**(dict(max_grad_norm=1e9, max_new_tokens=6, group_size=4, micro_batch=8) | changes))


# ---- scoring and sampling -------------------------------------------------------------------------------------------

@each_model
def test_padded_logprobs_equal_a_token_by_token_loop(model):
    completion_ids, completion_mask = base_models.pad(ROWS, 0)
    got = logprobs_of(model, PROMPTS, PROMPT_MASK, completion_ids, completion_mask.float(), 0.7)
    for i, row in enumerate(ROWS):
        ids = PROMPTS[i][PROMPT_MASK[i] == 1][None]
        for t, token in enumerate(row):
            wanted = (model(input_ids=ids).logits[0, -1].double() / 0.7).log_softmax(-1)[token].item()
            assert got[i, t].item() == pytest.approx(wanted, abs=1e-4)
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert (got[i, len(row):] == 0).all()
    wide = torch.nn.functional.pad(completion_ids, (0, 3), value=2), torch.nn.functional.pad(completion_mask.float(), (0, 3))
    torch.testing.assert_close(logprobs_of(model, PROMPTS, PROMPT_MASK, *wide, 0.7)[:, :5], got, atol=1e-5, rtol=0)
    batch = dict(prompt_ids=PROMPTS, prompt_mask=PROMPT_MASK, completion_ids=completion_ids, completion_mask=completion_mask.float())
    torch.testing.assert_close(train.batch_logprobs(model, batch, 0.7, 2), got, atol=1e-5, rtol=0)


@each_model
def test_sampled_logprobs_equal_scoring_and_masks_end_at_the_first_end(model):
    ends = [2, 3, 4, 5, 6]                                        # a model may have several
    ids, mask, logprobs = train.generate(model, PROMPTS, PROMPT_MASK, 20, 12, 0.8, ends, torch.Generator().manual_seed(0))
    again = logprobs_of(model, PROMPTS.repeat_interleave(20, 0), PROMPT_MASK.repeat_interleave(20, 0), ids, mask, 0.8)
    torch.testing.assert_close(again, logprobs, atol=1e-4, rtol=0)
    assert ids.shape[1] == int(mask.sum(1).max())
    for row, m in zip(ids, mask):
        n = int(m.sum())
        assert (m[:n] == 1).all() and (m[n:] == 0).all() and not any(t in ends for t in row[:n - 1].tolist()) and (row[n - 1].item() in ends or n == 12)


@each_model
def test_samples_follow_the_models_own_distribution_whatever_its_generation_settings_say(model):
    model.generation_config.top_k, model.generation_config.temperature, model.generation_config.do_sample = 3, 0.1, True
    n = 3000
    ids, mask, _ = train.generate(model, PROMPTS[2:], PROMPT_MASK[2:], n, 2, 1.3, [2], torch.Generator().manual_seed(0))
    first = (model(input_ids=PROMPTS[2:, 1:]).logits[0, -1] / 1.3).softmax(-1).detach()
    chi = lambda counts, wanted: ((counts - counts.sum() * wanted).square() / (counts.sum() * wanted)).sum().item()
    limit = 39 + 5 * math.sqrt(2 * 39)
    assert chi(torch.bincount(ids[:, 0], minlength=40), first) < limit
    common = first.argmax().item() if first.argmax() != 2 else first.topk(2).indices[1].item()
    follow = ids[(ids[:, 0] == common)][:, 1]                     # and so does the second token
    second = (model(input_ids=torch.cat([PROMPTS[2:, 1:], torch.tensor([[common]])], 1)).logits[0, -1] / 1.3).softmax(-1).detach()
    assert chi(torch.bincount(follow, minlength=40), second) < limit


def test_end_tokens_of_a_model_with_several():
    model, tokenizer = train.random_model(train.AutoModelForCausalLM)
    model.generation_config.eos_token_id = [7, 9]
    assert train.end_tokens(model, tokenizer) == [tokenizer.eos_token_id, 7, 9]


# ---- advantages, KL, loss -------------------------------------------------------------------------------------------

def test_advantages_examples_and_conventions():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5, 2.0, 2.0, 2.0, 2.0], requires_grad=True)
    got = train.group_advantages(rewards, 4, "group")
    first = rewards[:4].detach()
    torch.testing.assert_close(got[:4], (first - first.mean()) / (first.std() + 1e-4))
    assert [round(a, 2) for a in got[:4].tolist()] == [1.31, -0.78, -0.78, 0.26]                    # the docstring's example
    assert not got.requires_grad and (got[4:] == 0).all()
    odd = torch.full((6,), 0.1)                                   # the mean of six equal floats may be off by a bit
    for scale in ("group", "batch", "none"):
        assert (train.group_advantages(odd, 3, scale) == 0).all()
    whole = train.group_advantages(rewards, 4, "batch")
    torch.testing.assert_close(whole[:4], (first - first.mean()) / (rewards.detach().std() + 1e-4))
    swapped = train.group_advantages(torch.cat([rewards[4:], rewards[:4]]), 4, "group")             # other prompts change nothing
    torch.testing.assert_close(swapped[4:], got[:4])


def test_gradients_of_the_kl_estimators_by_enumeration():
    """Six outcomes, the expectation under π taken exactly: k1 teaches nothing, k2 and k3·ratio are right, k3 is a little off, p·d is wrong."""
    g = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(6, generator=g, dtype=torch.float64, requires_grad=True), torch.randn(6, generator=g, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    exact, = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    found = {}
    for kind in ("k1", "k2", "k3", "k3-ratio", "wrong"):
        estimate = train.kl_estimate(logp, ref, (logp - logp.detach()).exp(), kind)
        if kind in ("k1", "k3"):                                  # unbiased as values
            assert (logp.exp() * estimate).sum().item() == pytest.approx((logp.exp() * (logp - ref)).sum().item())
        found[kind], = torch.autograd.grad((logp.detach().exp() * estimate).sum(), logits, retain_graph=True)
    assert found["k1"].abs().max() < 1e-12
    torch.testing.assert_close(found["k2"], exact)
    torch.testing.assert_close(found["k3-ratio"], exact)
    cosine = torch.nn.functional.cosine_similarity(found["k3"], exact, dim=0)
    assert 0.9 < cosine < 0.9999999
    assert not torch.allclose(found["wrong"], exact, rtol=0.1)
    # k1 in the reward: REINFORCE with the reward −d has the exact gradient of −KL
    policy, = torch.autograd.grad((logp.detach().exp() * (ref - logp).detach() * logp).sum(), logits)
    torch.testing.assert_close(-policy, exact)


def test_the_clip_acts_on_the_right_side_only():
    one = torch.ones(1, 1)
    for ratio, advantage, moves in ((1.5, 1.0, False), (0.5, 1.0, True), (1.5, -1.0, True), (0.5, -1.0, False), (1.1, 1.0, True)):
        logprobs = torch.full((1, 1), math.log(ratio), requires_grad=True)
        loss, _, _, clipped = train.grpo_loss(logprobs, torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([advantage]), one, 0.2, 0.0, "k3")
        loss.backward()
        assert (logprobs.grad.item() != 0) == moves and (clipped.item() == 1) == (not moves)


def test_the_worked_example_of_the_readme():
    """Four rewards, then one token of the best answer and the same token of the worst."""
    advantages = train.group_advantages(torch.tensor([2.0, 0.0, 1.0, 1.0]), 4, "group")
    assert advantages.tolist() == pytest.approx([1.2246, -1.2246, 0, 0], abs=1e-4)
    weight = train.token_weights(torch.ones(4, 5), "sequence", 4, 20, 64)[:1, :1]                  # one of 5 tokens, one of 4 answers
    assert weight.item() == pytest.approx(1 / 20)
    now, old, ref = (torch.full((1, 1), math.log(p)) for p in (0.5, 0.4, 0.25))
    for advantage, gain, clipped, wanted in ((advantages[:1], 1.4695, True, -0.0715), (advantages[1:2], -1.5307, False, 0.0785)):
        loss, policy_loss, kl_loss, share = train.grpo_loss(now, old, ref, advantage, weight, 0.2, 0.2, "k3")
        assert policy_loss.item() == pytest.approx(-gain / 20, abs=1e-5) and kl_loss.item() == pytest.approx(0.1931 / 20, abs=1e-5)
        assert loss.item() == pytest.approx(wanted, abs=5e-5) and (share.item() > 0) == clipped


def test_loss_is_zero_while_the_gradient_is_not():
    """What puzzles everybody: at the first step the loss of GRPO is 0 (the mean advantage), and yet it teaches."""
    model, batch = MODELS["gpt2"], a_batch()
    batch["advantages"] = train.group_advantages(torch.randn(8, generator=torch.Generator().manual_seed(1)), 4, "group")
    batch["old_logprobs"] = train.batch_logprobs(model, batch, 1.0, 8)
    gradient, terms = gradient_of(model, config(kl_coef=0.0), batch)
    assert abs(terms["policy_loss"]) < 1e-6 and gradient.norm() > 0.01 and terms["clip_ratio"] == 0


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_accumulation_and_order_do_not_change_the_gradient(norm):
    model, batch = MODELS["llama"], a_batch()
    whole, terms = gradient_of(model, config(loss_norm=norm), batch)
    for size in (1, 2, 3, 4):
        parts, again = gradient_of(model, config(loss_norm=norm, micro_batch=size), batch)
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)
        assert again["policy_loss"] == pytest.approx(terms["policy_loss"], abs=1e-6)
    shuffled = {key: value[torch.randperm(8, generator=torch.Generator().manual_seed(0))] for key, value in batch.items()}
    torch.testing.assert_close(gradient_of(model, config(loss_norm=norm), shuffled)[0], whole, atol=1e-6, rtol=1e-4)
    direct = logprobs_of(model, batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], 1.0)
    mask, ratio = batch["completion_mask"], (direct - batch["old_logprobs"]).exp()
    per_token = -torch.minimum(ratio * batch["advantages"][:, None], ratio.clamp(0.8, 1.2) * batch["advantages"][:, None]) \
        + 0.2 * ((batch["ref_logprobs"] - direct).exp() - 1 - (batch["ref_logprobs"] - direct))
    wanted = {"sequence": ((per_token * mask).sum(1) / mask.sum(1)).mean(), "token": (per_token * mask).sum() / mask.sum(), "constant": (per_token * mask).sum() / (8 * 6)}[norm]
    assert terms["policy_loss"] + 0.2 * terms["kl_loss"] == pytest.approx(wanted.item(), abs=1e-5)


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_groups_of_equal_rewards_teach_nothing(norm):
    """Without a KL term the gradient is that of the other groups, whatever the answers of such a group say; and it is 0 if all groups are such."""
    model, batch = MODELS["gpt2"], a_batch()
    batch["advantages"] = train.group_advantages(torch.tensor([1.0, 1, 1, 1, 0, 1, 0, 0]), 4, "group")
    full, _ = gradient_of(model, config(loss_norm=norm, kl_coef=0.0), batch)
    assert full.norm() > 0
    other = batch | dict(completion_ids=torch.cat([torch.randint(3, 40, (4, 6), generator=torch.Generator().manual_seed(9)), batch["completion_ids"][4:]]))
    torch.testing.assert_close(gradient_of(model, config(loss_norm=norm, kl_coef=0.0), other)[0], full, atol=1e-7, rtol=1e-5)
    rest = {key: value[4:] for key, value in batch.items()}
    weights = train.token_weights(batch["completion_mask"], norm, 8, batch["completion_mask"].sum(), 6)[4:]
    alone = train.token_weights(rest["completion_mask"], norm, 4, rest["completion_mask"].sum(), 6)
    share = (weights.sum() / alone.sum()).item()                  # what the four other answers weigh in the whole batch
    torch.testing.assert_close(share * gradient_of(model, config(loss_norm=norm, kl_coef=0.0), rest)[0], full, atol=1e-7, rtol=1e-4)
    batch["advantages"] = torch.zeros(8)
    assert gradient_of(model, config(loss_norm=norm, kl_coef=0.0), batch)[0].abs().max() == 0


@each_model
def test_a_prompt_read_once_gives_the_gradient_of_a_plain_forward_pass(model):
    """Three different prompts in any order, an empty answer among them; then nothing but empty answers."""
    batch, order = a_batch(), torch.tensor([2, 0, 1, 1, 0, 2, 0, 2])
    batch["prompt_ids"], batch["prompt_mask"] = PROMPTS[order], PROMPT_MASK[order]
    batch["completion_mask"][3, 1:] = 0
    empty = {key: value[:, :1] if key in ("completion_ids", "completion_mask", "old_logprobs", "ref_logprobs") else value for key, value in batch.items()}
    for case in (batch, empty):
        mask = torch.cat([case["prompt_mask"], case["completion_mask"].long()], dim=1)
        ids, T = torch.cat([case["prompt_ids"], case["completion_ids"]], dim=1), case["prompt_ids"].shape[1]
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, T - 1:-1]
        plain = logits.log_softmax(-1).gather(-1, case["completion_ids"][..., None])[..., 0] * case["completion_mask"]
        shared = train.completion_logprobs(model, case, 1.0)
        torch.testing.assert_close(shared, plain, atol=1e-5, rtol=0)
        wanted, got = (torch.cat([g.flatten() for g in torch.autograd.grad((x * case["advantages"][:, None]).sum(), list(model.parameters()))]) for x in (plain, shared))
        assert (got - wanted).norm() < 1e-5 * wanted.norm()


def test_dropout_is_removed_even_in_layers_that_drop_out_by_themselves():
    from transformers import OPTConfig, OPTForCausalLM
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, dropout=0.5, **SIZES)).eval()
    batch = a_batch()
    whole, _ = gradient_of(model, config(), batch)
    model.train()
    assert (gradient_of(model, config(), batch)[0] - whole).abs().max() > 1e-3
    train.remove_dropout(model)
    torch.testing.assert_close(gradient_of(model, config(), batch)[0], whole, atol=1e-6, rtol=1e-4)


def test_the_policy_has_dropout_only_if_that_is_what_is_to_be_broken():
    def probabilities(name):
        model, _ = train.load_policy(train.Config(broken=name))
        assert not model.training
        return {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert probabilities("") == {0.0} and probabilities("dropout-on") == {0.1}


def test_update_epochs_leave_ratio_one_only_at_first():
    model, tokenizer = train.random_model(train.AutoModelForCausalLM)
    train.remove_dropout(model)
    judge = train.load_reward_model(train.Config(model="random"))
    settings = config(max_new_tokens=8, lr=0.05, kl_coef=0.0)
    optimizer, accelerator = torch.optim.AdamW(model.parameters(), lr=0.05), Accelerator(cpu=True)
    reference, _ = train.random_model(train.AutoModelForCausalLM)
    reference.load_state_dict(model.state_dict())
    batch, texts = train.collect(settings, accelerator, model.eval(), reference.eval(), tokenizer, judge, ["What?", "Why is it so?"],
                                 torch.Generator().manual_seed(0))
    torch.testing.assert_close(train.batch_logprobs(model, batch, 1.0, 3), batch["old_logprobs"], atol=1e-4, rtol=0)          # ratio 1 before the first step,
    torch.testing.assert_close(batch["ref_logprobs"], batch["old_logprobs"], atol=1e-4, rtol=0)                     # and KL 0
    train.update(settings, accelerator, model, optimizer, batch)
    assert (train.batch_logprobs(model, batch, 1.0, 3) - batch["old_logprobs"]).abs().max() > 1e-3
    assert train.update(train.replace(settings, update_epochs=4), accelerator, model, optimizer, batch)["clip_ratio"] > 0


def test_policy_gradient_of_a_toy_by_enumeration():
    """Two tokens, two steps: the expected gradient of the loss, over all groups of two answers, is the enumerated one."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, generator=g, dtype=torch.float64, requires_grad=True)               # first token; second after 0; second after 1
    answers = [(a, b) for a in (0, 1) for b in (0, 1)]
    value = {answer: r for answer, r in zip(answers, (1.0, -0.5, 0.3, 0.0))}
    table = logits.log_softmax(1)
    logp = {(a, b): torch.stack([table[0, a], table[1 + a, b]]) for a, b in answers}
    exact, = torch.autograd.grad(sum(logp[y].sum().exp() * value[y] for y in answers), logits, retain_graph=True)
    total = torch.zeros_like(logits)
    for pair in itertools.product(answers, repeat=2):
        lp = torch.stack([logp[y] for y in pair])
        advantages = train.group_advantages(torch.tensor([value[y] for y in pair], dtype=torch.float64), 2, "none")
        mask = torch.ones(2, 2, dtype=torch.float64)
        loss = train.grpo_loss(lp, lp.detach(), lp.detach(), advantages, train.token_weights(mask, "constant", 2, 4, 1), 0.2, 0.0, "k3")[0]
        gradient, = torch.autograd.grad(loss, logits, retain_graph=True)
        total -= gradient * lp.detach().sum().exp()
    torch.testing.assert_close(total, exact / 2)                  # the group mean contains the answer itself: (G − 1)/G of the gradient


# ---- TRL as an oracle -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trl_setup(tmp_path_factory):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ["<pad>", "<unk>", "<end>", *(f"w{i}" for i in range(37))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")
    directory = tmp_path_factory.mktemp("trl")
    MODELS["qwen2"].save_pretrained(directory / "m")
    fast.save_pretrained(directory / "m")

    def trainer(**changes):
        from transformers import Qwen2ForCausalLM
        from trl import GRPOConfig, GRPOTrainer
        settings = dict(output_dir=str(directory / "o"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", per_device_train_batch_size=4,
                        num_generations=4, max_completion_length=6, temperature=1.0, disable_dropout=True, save_strategy="no")
        made = GRPOTrainer(model=Qwen2ForCausalLM.from_pretrained(directory / "m", dtype=torch.float32), processing_class=fast,
                           reward_funcs=lambda completions, **_: [1.0, 0.0, 0.0, 0.5][:len(completions)],
                           train_dataset=Dataset.from_dict(dict(prompt=["w1 w2 w3"] * 8)), args=GRPOConfig(**(settings | changes)))
        made.model.train()
        made.current_gradient_accumulation_steps = 1
        return made
    return trainer


@pytest.mark.parametrize("norm, loss_type", [("sequence", "grpo"), ("token", "bnpo"), ("token", "dapo"), ("constant", "dr_grpo")])
@pytest.mark.parametrize("kl", [None, "k3", "k3-ratio"])
def test_loss_and_gradient_equal_trl(norm, loss_type, kl, trl_setup):
    beta = 0.04 if kl else 0.0
    trainer = trl_setup(loss_type=loss_type, beta=beta, epsilon=0.2, use_bias_correction_kl=kl == "k3-ratio")
    batch = a_batch(3, B=4)
    inputs = dict(prompt_ids=batch["prompt_ids"], prompt_mask=batch["prompt_mask"], completion_ids=batch["completion_ids"], completion_mask=batch["completion_mask"].long(),
                  advantages=batch["advantages"], num_items_in_batch=batch["completion_mask"].sum())
    batch["old_logprobs"] = train.batch_logprobs(MODELS["qwen2"], batch, 1.0, 4) + 0.15 * torch.randn(4, 6, generator=torch.Generator().manual_seed(7)) * batch["completion_mask"]
    inputs |= dict(old_per_token_logps=batch["old_logprobs"]) | (dict(ref_per_token_logps=batch["ref_logprobs"]) if kl else {})
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    theirs = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    ours, terms = gradient_of(MODELS["qwen2"], config(loss_norm=norm, kl_coef=beta, kl=kl or "k3", micro_batch=3), batch)
    assert terms["policy_loss"] + beta * terms["kl_loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_trl(scale, trl_setup):
    trainer = trl_setup(scale_rewards=scale)
    fixed = [[5, 6, 7, 2], [8, 9, 2], [10, 11, 12, 13, 14, 15], [16, 2]]
    trainer._generate_single_turn = lambda *_, **__: ([list(row) for row in fixed], None)
    theirs = trainer._generate_and_score_completions([dict(prompt="w1 w2 w3")] * 4)["advantages"]
    torch.testing.assert_close(train.group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.5]), 4, scale), theirs)


# ---- rewards --------------------------------------------------------------------------------------------------------

def test_rewards_in_a_batch_equal_single_ones_and_the_prompt_is_read_once():
    model, tokenizer = train.load_reward_model(train.Config())
    prompts = ["What is sleep?", "Describe glass.", "Tell me about chess."]
    answers = ["Sleep is a time of rest for body and mind. I hope this helps.", "", "It is what it is. Nobody asked you."]
    batched = train.reward_scores(model, tokenizer, prompts, answers, "auto")
    for prompt, answer, value in zip(prompts, answers, batched):
        assert train.reward_scores(model, tokenizer, [prompt], [answer], "auto").item() == pytest.approx(value.item(), abs=1e-4)
    assert batched[0] > batched[2]
    seen = []
    original = type(tokenizer).__call__

    class Spy(type(tokenizer)):
        def __call__(self, *texts, **kwargs):
            seen.append(texts)
            return original(tokenizer, *texts, **kwargs)
    spy = Spy(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<|pad|>", eos_token="<|end|>", sep_token="<|sep|>")
    train.reward_scores(model, spy, prompts[:1], answers[:1], "auto")
    assert seen == [(prompts[:1], answers[:1])]                   # a pair: this tokenizer puts a separator between
    train.reward_scores(model, spy, prompts[:1], answers[:1], "text")
    assert seen[1] == ([f"{prompts[0]} {answers[0]}"],)
    spy.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    train.reward_scores(model, spy, prompts[:1], answers[:1], "auto")
    assert seen[2] == ([f"[user]{prompts[0]}[assistant]{answers[0]}"],)


def test_a_reward_model_without_padding_token_scores_batches_like_singles(tmp_path):
    model, tokenizer = tiny_judge(), byte_tokenizer()
    tokenizer.pad_token = None
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    judge = train.load_reward_model(train.Config(reward_model=str(tmp_path / "rm")))
    answers = ["a", "a longer answer", "x" * 40]
    got = train.reward_scores(*judge, ["Why?"] * 3, answers, "auto")
    for answer, value in zip(answers, got):
        assert train.reward_scores(*judge, ["Why?"], [answer], "auto").item() == pytest.approx(value.item(), abs=1e-5)


@pytest.mark.parametrize("text, score", [
    ("", 1.0), ("Sleep is a time of rest for body and mind.", 2.2), ("Sleep is a time of rest for body and mind. I hope this helps.", 4.2),
    ("Sleep is a time of rest for body and mind. Also, dreams come mostly in light phases. Rested drivers make fewer mistakes.", 5.6),
    ("Rested drivers make fewer mistakes. Sleep is a time of rest for body and mind.", 3.4),                 # the wrong order
    ("Sleep is a time of rest for body and mind. Sleep is a time of rest for body and mind. Sleep is a time of rest for body and mind.", 1.0),
    ("Adults need about eight hours a night. Babies sleep most of the day. Chess is a game for two players.", 3.4),
    ("Adults need about eight hours a night. Babies sleep most of", 1.2), ("Babies sleep most of the day. Look it up yourself.", 1.0)])
def test_gold_scores_by_hand(text, score):
    assert evaluation.gold_score(WORLD, "What is sleep?", text) == pytest.approx(score)
    assert evaluation.gold_score(WORLD, "What is a car?", text) is None


def test_the_world_is_as_promised():
    statements = [s for topic in WORLD["topics"] for kind in base_models.KINDS for s in topic[kind]]
    assert len(WORLD["topics"]) >= 24 and len(statements) == len(set(statements)) == 9 * len(WORLD["topics"])
    seen, held_out = base_models.split_prompts(WORLD)
    assert not set(seen) & set(held_out) and {"Explain why regular exercise is important.", "Describe the water cycle.", "What is machine learning?"} <= set(seen)
    rng = np.random.default_rng(0)
    gold = [evaluation.gold_score(WORLD, "What is glass?", base_models.write_answer(WORLD, WORLD["topics"][-1], rng)) for _ in range(500)]
    assert 2 < np.std(gold) and min(gold) == 1 and max(gold) > 9
    for name in ("train", "held_out"):
        lines = (FOLDER / "weights" / f"prompts_{name}.txt").read_text().splitlines()
        assert lines == (seen if name == "train" else held_out)


# ---- whole runs -----------------------------------------------------------------------------------------------------

TINY = ["--updates", "12", "--batch-size", "8", "--group-size", "4", "--max-new-tokens", "12", "--device", "cpu", "--quiet"]
KEYS = {"base", "trained", "win_rate", "win_rate_low", "win_rate_high", "kl"}


@pytest.mark.long
def test_a_run_leaves_what_the_readme_promises_and_the_reference_alone(tmp_path):
    before = (FOLDER / "weights" / "base" / "model.safetensors").read_bytes()
    out = tmp_path / "o"
    process = run(TRAIN, *TINY[:-1], "--save-every", "6", "--out", out)
    assert process.returncode == 0, process.stderr
    for words in ("answers to", "best first", "    [", "win rate", "seconds", f"--weights {out} --show 3"):
        assert words in process.stdout, words
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert len(rows) == 12 and abs(float(rows[0]["kl"])) < 1e-4 and float(rows[-1]["kl"]) != 0 and "gold" not in rows[0]
    assert set(json.loads((out / "eval.json").read_text())) == KEYS and (out / "curve.png").stat().st_size > 10_000
    # The samples: what was rewarded in each update
    files = sorted((out / "samples").iterdir())
    assert [file.name for file in files] == [f"{k:04d}.jsonl" for k in range(1, 13)]
    for row, file in zip(rows, files):
        answers = [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()]
        assert len(answers) == 8 and all(set(answer) == {"prompt", "text", "reward"} for answer in answers)
        assert [answer["prompt"] for answer in answers[:4]] == [answers[0]["prompt"]] * 4
        assert np.mean([answer["reward"] for answer in answers]) == pytest.approx(float(row["reward"]), abs=1e-4)
    gold = evaluation.gold_curve(out, WORLD)
    assert list(gold) == list(range(1, 13)) and all(1 <= value <= 10 for value in gold.values())
    # The next step works as it was printed
    command = next(line for line in process.stdout.splitlines() if "Look at the answers: " in line).split("Look at the answers: ")[1]
    process = subprocess.run(command + f" --samples 2 --json {tmp_path / 'e.json'}", shell=True, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert process.returncode == 0 and "trained  [" in process.stdout, process.stderr
    result = json.loads((tmp_path / "e.json").read_text())
    assert set(result) == KEYS and {"reward", "reward_std", "gold", "length", "group_distinct2"} == set(result["base"])
    process = run(STUDY, "--trajectory", out)
    assert process.returncode == 0 and len((out / "trajectory.csv").read_text().splitlines()) == 4, process.stderr
    assert (FOLDER / "weights" / "base" / "model.safetensors").read_bytes() == before


@pytest.mark.long
def test_the_judge_of_a_run_repeats_itself_and_needs_a_finished_one(tmp_path):
    out = tmp_path / "o"
    assert run(TRAIN, *TINY, "--updates", "1", "--out", out).returncode == 0
    files = {name: (out / name).read_bytes() for name in ("eval.json", "curve.png")}
    for name in files:
        (out / name).unlink()
    process = run(EVAL, "--run", out)
    assert process.returncode == 0 and ("BETTER" in process.stdout or "NOT THERE" in process.stdout) and "of training" in process.stdout, process.stderr
    assert {name: (out / name).read_bytes() for name in files} == files
    process = run(EVAL, "--run", out, "--quiet", "--seed", "5")
    assert process.returncode == 0 and process.stdout == "" and (out / "eval.json").read_bytes() != files["eval.json"]
    (out / "train.json").unlink()
    assert_one_line_error(run(EVAL, "--run", out), "--run", "finished run")


@pytest.mark.long
def test_latest_passes_over_smoke_runs_and_a_lone_trainer_says_that_nobody_judges(tmp_path):
    for name in ("train_grpo.py", "world.json"):
        shutil.copy(FOLDER / name, tmp_path)
    shutil.copytree(FOLDER / "weights", tmp_path / "weights")
    here = tmp_path / "train_grpo.py"
    assert_one_line_error(run(here, "--resume", "latest"), "latest")
    process = run(here, *TINY[:-1], "--updates", "2", "--seed", "3")
    assert process.returncode == 0 and "nothing judges" in process.stdout, process.stderr
    assert run(here, "--smoke", "--device", "cpu").returncode == 0
    real, smoke = sorted((tmp_path / "runs").iterdir(), key=lambda path: path.name.endswith("_smoke"))
    assert real.name.endswith("_seed3") and smoke.name.endswith("_seed1_smoke") and not (smoke / "eval.json").exists()
    os.utime(smoke / "checkpoint.pt")
    for name in ("grpo_eval.py", "make_answers.py"):
        shutil.copy(FOLDER / name, tmp_path)
    process = run(here, "--resume", "latest", "--device", "cpu")
    assert process.returncode == 0 and str(real) in process.stdout and (real / "eval.json").exists(), process.stderr
    before = (real / "eval.json").read_bytes()
    (real / "eval.json").unlink()
    assert run(tmp_path / "grpo_eval.py", "--run", "latest", "--quiet").returncode == 0 and (real / "eval.json").read_bytes() == before
    assert run(tmp_path / "grpo_eval.py", "--weights", "latest", "--samples", "8", "--seed", "3", "--json", tmp_path / "e.json").returncode == 0
    assert (tmp_path / "e.json").read_bytes() == before


def test_what_a_batch_is_described_by():
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]])
    old = torch.tensor([[-1.0, -2, 0], [-1, -1, -1], [-4, 0, 0], [-0.5, -0.5, 0]])
    batch = dict(completion_mask=mask, rewards=torch.tensor([1.0, 3.0, 2.0, 2.0]), old_logprobs=old, ref_logprobs=old - 0.25 * mask)
    row = train.describe(train.Config(group_size=2, max_new_tokens=3), Accelerator(cpu=True), batch)
    assert row == pytest.approx(dict(reward=2.0, reward_std=2 ** 0.5 / 2, frac_reward_zero_std=0.5, kl=0.5, entropy=11 / 8, completion_length=2.0, cut_off_ratio=0.25))


def test_the_longest_prompt_and_an_answer_may_fill_the_context():
    tokenizer, policy, question = byte_tokenizer(), MODELS["gpt2"], "x" * 30
    judge = tiny_judge(), lambda text: tokenizer(text)
    room = min(map(train.context_of, (policy, judge[0]))) - train.prompt_tokens(tokenizer, [question])[0].shape[1]
    assert train.load_prompts(train.Config(prompt=question, max_new_tokens=room), policy, tokenizer, judge) == [question]
    with pytest.raises(SystemExit):
        train.load_prompts(train.Config(prompt=question, max_new_tokens=room + 1), policy, tokenizer, judge)


@pytest.mark.parametrize("more, sep, template, kind", [(1, "[SEP]", None, "pair"), (0, "[SEP]", None, "text"), (1, None, None, "text"), (1, "[SEP]", "{{ messages }}", "chat")])
def test_the_form_in_which_a_reward_model_reads_is_guessed_from_its_tokenizer(more, sep, template, kind):
    tokenizer = SimpleNamespace(chat_template=template, sep_token=sep, num_special_tokens_to_add=lambda pair: 2 + more * pair)
    assert train.guess_reward_input(tokenizer) == kind


def test_a_prompt_ends_without_the_end_token_that_some_tokenizers_add():
    class Tokenizer:
        chat_template, eos_token_id, added = None, 2, [2]

        def __call__(self, text):
            return dict(input_ids=[len(word) + 10 for word in text.split()] + self.added)

    for Tokenizer.added in ([], [2]):
        ids, mask = train.prompt_tokens(Tokenizer(), ["a bb ccc", "dd"])
        assert ids.tolist() == [[11, 12, 13], [2, 2, 12]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_training_loop_keeps_its_books(tmp_path, monkeypatch):
    batches, checkpoints, modes, collect, save_checkpoint, update = [], [], [], train.collect, train.save_checkpoint, train.update
    monkeypatch.setattr(train, "collect", lambda *given: batches.append((collect(*given), given[-2])) or batches[-1][0])
    monkeypatch.setattr(train, "save_checkpoint", lambda out, model, optimizer, state: checkpoints.append(state["update"]) or save_checkpoint(out, model, optimizer, state))
    monkeypatch.setattr(train, "update", lambda config, accelerator, policy, *rest: modes.append(policy.training) or update(config, accelerator, policy, *rest))
    lines, config, accelerator = [], train.Config(updates=12, batch_size=8, group_size=4, max_new_tokens=8, save_every=5, seed=3), Accelerator(cpu=True)
    policy, _, result = train.train(config, tmp_path, accelerator, lines.append)
    assert checkpoints == [10, 12] and result["updates"] == 12 and 0 < result["train_seconds"] < 60 and modes == [False] * 12
    assert sorted(path.name for path in tmp_path.glob("policy-*")) == ["policy-0005", "policy-0010"]
    with (tmp_path / "metrics.csv").open(encoding="utf8") as file:
        rows = [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    assert [row["update"] for row in rows] == list(range(1, 13)) and len((tmp_path / "timing.csv").read_text().splitlines()) == 13
    for number, (row, ((batch, texts), asked)) in enumerate(zip(rows, batches), 1):
        assert {name: row[name] for name in ("reward", "kl", "entropy", "completion_length")} == pytest.approx(
            {name: value for name, value in train.describe(config, accelerator, batch).items() if name in ("reward", "kl", "entropy", "completion_length")}, rel=1e-4, abs=1e-5)
        samples = [json.loads(line) for line in (tmp_path / "samples" / f"{number:04d}.jsonl").read_text().splitlines()]
        assert [sample["text"] for sample in samples] == texts and [sample["prompt"] for sample in samples] == [prompt for prompt in asked for _ in range(4)]
        assert [sample["reward"] for sample in samples] == pytest.approx(batch["rewards"].tolist(), abs=1e-4)
    assert [line for line in lines if line.startswith("    answers to")] == [f'    answers to "{batches[k][1][0]}", best first' for k in (0, 9)]
    assert len({tuple(asked) for _, asked in batches}) > 1                     # other prompts each time


def test_any_token_of_the_vocabulary_may_be_the_end(monkeypatch):
    monkeypatch.setattr(train, "turn_end", lambda tokenizer: None)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=10), generation_config=SimpleNamespace(eos_token_id=[0, 9, 10, -1]))
    tokenizer = SimpleNamespace(eos_token_id=3)
    assert train.end_tokens(model, tokenizer) == [0, 3, 9]


def test_two_processes_with_the_same_answers_take_the_step_of_one(tmp_path, monkeypatch):
    caught, update = [], train.update

    def watched(config, accelerator, policy, optimizer, batch):
        caught.append((config, accelerator, copy.deepcopy(policy), batch))
        return update(config, accelerator, policy, optimizer, batch)

    monkeypatch.setattr(train, "update", watched)
    train.train(train.Config(updates=1, batch_size=8, group_size=4, max_new_tokens=8, seed=3), tmp_path, Accelerator(cpu=True), lambda *text: None)
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


def test_processes_share_the_prompts_and_never_a_random_stream():
    prompts, config = [f"prompt {k}" for k in range(50)], train.Config(batch_size=16, group_size=2)
    alone, _ = train.choose(config, SimpleNamespace(num_processes=1, process_index=0), prompts, 7)
    both = [train.choose(config, SimpleNamespace(num_processes=2, process_index=rank), prompts, 7) for rank in (0, 1)]
    assert both[0][0] + both[1][0] == alone and len(set(alone)) == 8
    assert both[0][1].initial_seed() + 1 == both[1][1].initial_seed()
    assert sorted(train.choose(config, SimpleNamespace(num_processes=1, process_index=0), prompts[:8], 7)[0]) == prompts[:8]          # each once
    assert train.choose(config, SimpleNamespace(num_processes=1, process_index=0), prompts, 7)[0] == alone
    assert train.choose(config, SimpleNamespace(num_processes=1, process_index=0), prompts[:4], 7)[0] and train.choose(config, SimpleNamespace(num_processes=1, process_index=0), prompts, 8)[0] != alone


def test_the_reference_is_frozen(tmp_path, monkeypatch):
    kept = {}

    def deepcopy(model, memo=None):
        if not isinstance(model, torch.nn.Module) or memo is not None:
            return original(model, memo)
        kept["reference"] = original(model)
        kept["before"] = {name: tensor.clone() for name, tensor in kept["reference"].state_dict().items()}
        return kept["reference"]
    original = train.copy.deepcopy
    monkeypatch.setattr(train.copy, "deepcopy", deepcopy)
    policy, _, _ = train.train(train.Config(updates=2, batch_size=8, group_size=4, max_new_tokens=8), tmp_path, Accelerator(cpu=True), lambda *text: None)
    after = kept["reference"].state_dict()
    assert all(torch.equal(after[name], kept["before"][name]) for name in after)
    assert any(not torch.equal(tensor, after[name]) for name, tensor in policy.state_dict().items())


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_resume_equals_the_uninterrupted_run(how, tmp_path):
    assert run(TRAIN, *TINY, "--out", tmp_path / "whole").returncode == 0
    process = subprocess.Popen([sys.executable, str(TRAIN), *TINY, "--out", str(tmp_path / "stopped")], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "stopped" / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(how)
    error = process.communicate()[1]
    if how == signal.SIGINT:
        assert process.returncode == 130 and "--resume" in error and "Traceback" not in error
    assert run(TRAIN, "--quiet", "--resume", tmp_path / "stopped").returncode == 0
    samples = [f"samples/{k:04d}.jsonl" for k in range(1, 13)]
    for name in ("metrics.csv", "eval.json", "config.json", "curve.png", "policy/model.safetensors", *samples):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
    assert len(list((tmp_path / "stopped" / "samples").iterdir())) == 12
    assert len((tmp_path / "stopped" / "timing.csv").read_text().splitlines()) == 13


@pytest.mark.parametrize("flags", [["--lr", "0.3"], ["--updates", "12"], ["--out", "x"], ["--smoke"], ["--preset", "gpt2"], ["--break", "no-kl"]])
def test_resume_refuses_what_belongs_to_a_new_run(flags, tmp_path):
    assert_one_line_error(call(train, "--resume", tmp_path, *flags), "--resume", "--device")


WORKER = """
import sys, torch
sys.path.insert(0, {folder!r}); sys.path.insert(0, {tests!r})
import test_grpo as t, train_grpo as train
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == int(sys.argv[2])
model = t.MODELS["gpt2"]
policy, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
batch = t.a_batch(5)
batch["advantages"][:4] = 0.0
half = {{key: value[4 * accelerator.process_index:][:4] for key, value in batch.items()}} if accelerator.num_processes == 2 else batch
for norm, kl in (("sequence", 0.0), ("token", 0.0), ("constant", 0.05), ("token", 0.05)):
    terms = train.update(t.config(loss_norm=norm, kl_coef=kl, micro_batch=3), accelerator, policy, optimizer, half)
    if accelerator.is_main_process:
        torch.save((torch.cat([p.grad.flatten() for p in model.parameters()]), terms), sys.argv[1] + norm + str(kl))
accelerator.wait_for_everyone()
accelerator.end_training()
import os; os._exit(0)            # on a busy machine a thread of gloo may still run, and the interpreter would abort on its way out
"""


@pytest.mark.long
def test_two_processes_have_the_gradient_of_one(tmp_path):
    """Unequal lengths, and one process all of whose groups have equal rewards."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(folder=str(FOLDER), tests=str(REPO / "tests")))
    for n in ("1", "2"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n, str(script), str(tmp_path / f"p{n}_"), n]      # `accelerate launch --cpu` starts one process whatever it is told
        process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert process.returncode == 0, process.stderr[-3000:]
    for path in tmp_path.glob("p1_*"):
        (one, terms), (two, again) = (torch.load(tmp_path / path.name.replace("p1_", p), weights_only=True) for p in ("p1_", "p2_"))
        torch.testing.assert_close(two, one, atol=1e-6, rtol=1e-4)
        for key in ("policy_loss", "kl_loss", "clip_ratio", "grad_norm"):
            assert again[key] == pytest.approx(terms[key], abs=1e-5), key


@pytest.mark.long
def test_two_processes_train_together(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(TRAIN), *without_device(TINY), "--updates", "2", "--kl-coef", "0", "--out", str(tmp_path / "o")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr[-2000:]
    assert json.loads((tmp_path / "o" / "train.json").read_text())["result"]["updates"] == 2
    assert set(json.loads((tmp_path / "o" / "eval.json").read_text())) == KEYS
    answers = (tmp_path / "o" / "samples" / "0002.jsonl").read_text().splitlines()
    assert len(answers) == 4                                      # the half of the first process
    assert_one_line_error(call(train, "--resume", tmp_path / "o", "--quiet", "--device", "cpu"), "another number of processes")


SHARDED = """
import sys
sys.path.insert(0, {folder!r})
import train_grpo as train
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType

def sharded(*_, **__):            # accelerate shards on GPUs only, unless its state is told that this is a sharded run
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False)
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    return accelerator

original, parts = train.update, []
def update(config, accelerator, policy, *rest):
    parts[:] = [(tuple(p.to_local().shape), tuple(p.shape)) for p in policy.parameters()]
    return original(config, accelerator, policy, *rest)

train.Accelerator, train.update = sharded, update
if "--resume" not in sys.argv:
    train.start_judge = lambda *_: None
train.main()
assert all(own[0] == -(-whole[0] // 2) for own, whole in parts[:3]), parts        # the first process has half of the rows of every weight
import os; os._exit(0)
"""


@pytest.mark.long
def test_a_policy_sharded_by_fsdp2_trains_like_a_whole_one(tmp_path):
    """Two processes with half of every weight each: same samples, rewards and final weights as two with all of it. They need different numbers of sampling steps, which would
    hang if sampling had to exchange weights."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED.format(folder=str(FOLDER)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--updates", "2", "--batch-size", "8", "--group-size", "2", "--micro-batch", "2", "--max-new-tokens", "60", "--lr", "1e-4", "--save-every", "1", "--quiet"]
    for name, program in (("whole", TRAIN), ("sharded", script)):
        process = subprocess.run([*torchrun, str(program), *flags, "--out", str(tmp_path / name)], capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert process.returncode == 0, process.stderr[-3000:]
    one, two = (list(csv.DictReader((tmp_path / name / "metrics.csv").open())) for name in ("whole", "sharded"))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two):
        assert {key: float(value) for key, value in a.items()} == pytest.approx({key: float(value) for key, value in b.items()}, rel=1e-3, abs=1e-5)
    for directory in ("policy-0001", "policy"):
        a, b = (safetensors.torch.load_file(tmp_path / name / directory / "model.safetensors") for name in ("whole", "sharded"))
        assert a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)
    assert not (tmp_path / "sharded" / "checkpoint.pt").exists()
    process = subprocess.run([*torchrun, str(script), "--resume", str(tmp_path / "whole")], capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.returncode and "no --resume" in process.stderr


@pytest.mark.long
@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "llama"])
def test_a_run_with_another_model_and_a_prompt_without_gold(kind, tmp_path, monkeypatch):
    """Another shape, no chat template, padding by the end token, a reward model with another tokenizer."""
    tokenizer = byte_tokenizer()
    model = MODELS[kind]
    model = type(model)(type(model.config)(**(model.config.to_dict() | dict(vocab_size=len(tokenizer), eos_token_id=0))))
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    process = call(train, "--model", "m", "--prompt", "Describe a car.", *TINY, "--updates", "2", "--out", "o")
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "o" / "eval.json").read_text())
    assert result["base"]["gold"] is None and 0 <= result["win_rate"] <= 1
    monkeypatch.chdir("/")
    (tmp_path / "p.txt").write_text("Describe a car.\n")
    process = run(EVAL, "--weights", tmp_path / "o", "--prompts", tmp_path / "p.txt", "--samples", "2", "--show", "1")
    assert process.returncode == 0 and "by reward" in process.stdout and "Describe a car." in process.stdout, process.stderr


@pytest.mark.parametrize("name", train.BREAKS)
def test_every_broken_variant_runs(name, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "start_judge", lambda *_: None)
    process = call(train, *TINY[:-1], "--updates", "1", "--break", name, "--out", tmp_path / "o")
    assert process.returncode == 0 and f"BROKEN: {name}" in process.stdout, process.stderr


def test_what_the_broken_variants_break():
    """The tokens after the end and those of the prompt enter the loss; the reward itself is the advantage; the KL term goes, or is a wrong one."""
    model, tokenizer = train.load_policy(train.Config())
    judge = train.load_reward_model(train.Config())
    batches = {}
    for name in ("", "no-eos-mask", "prompt-in-loss", "no-group-mean"):
        settings = train.Config(broken=name, group_size=4, max_new_tokens=64)
        batches[name], _ = train.collect(settings, Accelerator(cpu=True), model, model, tokenizer, judge, ["What is sleep?", "Give a short introduction to the water cycle."],
                                         torch.Generator().manual_seed(0))
    right, eos, prompt = batches[""], batches["no-eos-mask"], batches["prompt-in-loss"]
    assert eos["completion_mask"].all() and not right["completion_mask"].all() and torch.equal(eos["completion_ids"], right["completion_ids"])
    assert prompt["completion_mask"].sum() == right["completion_mask"].sum() + right["prompt_mask"][:, 1:].sum()
    inside = prompt["old_logprobs"][:, right["prompt_ids"].shape[1] - 1:]
    torch.testing.assert_close(inside, right["old_logprobs"], atol=1e-3, rtol=0)     # the answers themselves are scored as before
    assert torch.equal(batches["no-group-mean"]["advantages"], right["rewards"]) and abs(right["advantages"].view(2, 4).mean(dim=1)).max() < 1e-6
    assert all(train.broken_config(train.Config(broken=name)) == train.Config(broken=name) for name in ("", "no-eos-mask", "no-group-mean"))
    assert train.broken_config(train.Config(broken="no-kl")).kl_coef == 0 and train.broken_config(train.Config(broken="wrong-kl")).kl == "wrong"


@pytest.mark.long
def test_a_nan_stops_with_the_last_checkpoint_intact(tmp_path, monkeypatch):
    original, calls = train.reward_scores, []

    def poisoned(*arguments, **settings):
        calls.append(1)
        scores = original(*arguments, **settings)
        return scores * math.nan if len(calls) == 11 else scores
    monkeypatch.setattr(train, "reward_scores", poisoned)
    process = call(train, *TINY, "--out", tmp_path / "o")
    assert_one_line_error(process, "not finite", "--lr")
    monkeypatch.undo()
    assert call(train, "--quiet", "--resume", tmp_path / "o").returncode == 0
    assert len((tmp_path / "o" / "metrics.csv").read_text().splitlines()) == 13


def test_shipped_policy_beats_the_base_and_its_reward_model_is_what_its_card_says(tmp_path):
    process = run(EVAL, "--samples", "4", "--json", tmp_path / "e.json")
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["win_rate"] > 0.75 and result["trained"]["gold"] > result["base"]["gold"] + 1
    assert result["trained"]["reward"] > result["base"]["reward"] + 1.3 * result["base"]["reward_std"]
    card = json.loads((FOLDER / "weights" / "reward_model" / "train.json").read_text())
    model, tokenizer = train.load_reward_model(train.Config())
    topic_of = {t.format(name=topic["name"]): topic for topic in WORLD["topics"] for t in WORLD["templates"]}
    pairs = base_models.preference_pairs(WORLD, [(p, topic_of[p]) for p in base_models.split_prompts(WORLD)[1]], 500, np.random.default_rng(99))
    share, low, high = base_models.accuracy(model, tokenizer, pairs, by_gold=True)
    assert low < card["accuracy_by_gold"][0] < high


@pytest.mark.long
def test_chat_answers_and_ends():
    def talk(script, *flags):
        process = subprocess.run([sys.executable, str(script), "--chat", *flags], input="What is sleep?\n" + "why " * 300 + "\n\nnot read\n", capture_output=True, text=True,
                                 timeout=120)
        assert process.returncode == 0 and "too long" in process.stdout and len(process.stdout.split()) > 25, process.stderr
        return process.stdout.splitlines()
    likeliest = talk(EVAL, "--top-k", "1")
    assert likeliest == talk(ANSWERS, "--top-k", "1", "--seed", "7") and len(likeliest) == 3
    model, tokenizer = train.load_model(train.AutoModelForCausalLM, FOLDER / "weights" / "policy")
    ids = train.prompt_tokens(tokenizer, ["What is sleep?"])[0]
    while ids[0, -1] != tokenizer.eos_token_id and ids.shape[1] < 100:           # --top-k 1 leaves the likeliest token, at every place
        ids = torch.cat([ids, model.eval()(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).endswith(likeliest[1])
    assert talk(EVAL, "--seed", "1") != talk(EVAL, "--seed", "2")


@pytest.mark.parametrize("arguments, words", [
    (["--group-size", "1"], ["--group-size", "from 2"]), (["--lr", "0"], ["--lr"]), (["--temperature", "0"], ["--temperature"]), (["--kl", "k4"], ["k3-ratio"]),
    (["--kl-coef", "-1"], ["--kl-coef"]), (["--model", "no/such/model"], ["no/such/model", "loaded"]), (["--reward-model", "no/such/rm"], ["no/such/rm", "loaded"]),
    (["--prompts", "nowhere.txt"], ["nowhere.txt"]), (["--prompt", "why " * 200], ["context"]),
    (["--max-new-tokens", "500"], ["context"]), (["--break", "x"], ["wrong-kl"]), (["--scale-rewards", "x"], ["batch"]), (["--updatez", "1"], ["--help"]),
    (["--resume", "nowhere"], ["nowhere", "config.json"]), (["--break", "wrong-kl", "--kl", "reward"], ["wrong-kl"]), (["--batch-size", "12"], ["multiple", "--group-size 8"]),
    (["--break", "wrong-kl", "--kl-coef", "0"], ["wrong-kl"]), (["--seed", "-1"], ["--seed", "from 0"]),
    (["--seed", str(2**31)], ["--seed", "to 2,147,483,647"])])
def test_trainer_refuses_bad_values(arguments, words, tmp_path):
    assert_one_line_error(call(train, *arguments, "--quiet", *([] if "--resume" in arguments else ["--out", tmp_path / "out"]), cwd=tmp_path), *words)


def test_trainer_refuses_what_cannot_serve(tmp_path):
    (tmp_path / "empty.txt").write_text("\n  \n")
    assert_one_line_error(call(train, "--prompts", tmp_path / "empty.txt", "--quiet", "--out", tmp_path / "o1"), "empty")
    tokenizer = byte_tokenizer()
    tiny_judge(labels=3).save_pretrained(tmp_path / "three")
    tokenizer.save_pretrained(tmp_path / "three")
    assert_one_line_error(call(train, "--reward-model", tmp_path / "three", "--quiet", "--out", tmp_path / "o2"), "3 logits")
    train.random_model(train.AutoModelForCausalLM)[0].save_pretrained(tmp_path / "mute")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "mute")
    assert_one_line_error(call(train, "--model", tmp_path / "mute", "--quiet", "--out", tmp_path / "o3"), "an end token")
    (tmp_path / "o4").mkdir()
    (tmp_path / "o4" / "kept.txt").write_text("mine")
    assert_one_line_error(call(train, "--quiet", "--out", tmp_path / "o4"), "is not empty")
    assert [path.name for path in (tmp_path / "o4").iterdir()] == ["kept.txt"]


@pytest.mark.parametrize("arguments", [["--weights", "nowhere"], ["--samples", "0"], ["--prompts", "nowhere"], ["--json", "no/such/x.json"], ["--json", "."],
                                       ["--chat", "--top-p", "0"], ["--prompts", "long.txt"], ["--run", "nowhere"], ["--show", "-1"]])
def test_eval_refuses_bad_values(arguments, tmp_path):
    (tmp_path / "long.txt").write_text("why " * 300)
    assert_one_line_error(run(EVAL, *arguments, cwd=tmp_path))


@pytest.mark.parametrize("script, arguments", [(STUDY, ["--trajectory", "nowhere"]), (STUDY, []), (ANSWERS, []), (ANSWERS, ["--out", "no/such/x.jsonl", "--weights", "random"])],
                         ids=["study-trajectory", "study", "answers", "answers-out"])
def test_other_scripts_refuse_bad_values(script, arguments, tmp_path):
    assert_one_line_error(run(script, *arguments, cwd=tmp_path))
