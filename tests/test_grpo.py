"""GRPO: losses, gradients and advantages against TRL and enumeration; the sampler against the model's own distribution; processes, resume, bad input."""
import csv
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from conftest import REPO, assert_one_line_error, call, load, run

FOLDER = REPO / "grpo_lm"
TRAIN, EVAL = FOLDER / "train_grpo.py", FOLDER / "grpo_eval.py"
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
    return train.Config(**(dict(grad_clip=1e9, max_new_tokens=6, group=4, micro_batch=8) | changes))


# ---- scoring and drawing --------------------------------------------------------------------------------------------

@each_model
def test_padded_logprobs_equal_a_token_by_token_loop(model):
    completion_ids, completion_mask = base_models.pad(ROWS, 0)
    got = train.completion_logprobs(model, PROMPTS, PROMPT_MASK, completion_ids, completion_mask.float(), 0.7)
    for i, row in enumerate(ROWS):
        ids = PROMPTS[i][PROMPT_MASK[i] == 1][None]
        for t, token in enumerate(row):
            wanted = (model(input_ids=ids).logits[0, -1].double() / 0.7).log_softmax(-1)[token].item()
            assert got[i, t].item() == pytest.approx(wanted, abs=1e-4)
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert (got[i, len(row):] == 0).all()
    wide = torch.nn.functional.pad(completion_ids, (0, 3), value=2), torch.nn.functional.pad(completion_mask.float(), (0, 3))
    torch.testing.assert_close(train.completion_logprobs(model, PROMPTS, PROMPT_MASK, *wide, 0.7)[:, :5], got, atol=1e-5, rtol=0)
    batch = dict(prompt_ids=PROMPTS, prompt_mask=PROMPT_MASK, completion_ids=completion_ids, completion_mask=completion_mask.float())
    torch.testing.assert_close(train.score(model, batch, 0.7, 2), got, atol=1e-5, rtol=0)


@each_model
def test_drawn_logprobs_equal_scoring_and_masks_end_at_the_first_end(model):
    ends = [2, 3, 4, 5, 6]                                        # a model may have several
    ids, mask, logprobs = train.generate(model, PROMPTS, PROMPT_MASK, 20, 12, 0.8, ends, torch.Generator().manual_seed(0))
    again = train.completion_logprobs(model, PROMPTS.repeat_interleave(20, 0), PROMPT_MASK.repeat_interleave(20, 0), ids, mask, 0.8)
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
    model, tokenizer, *_ = train.random_models()
    model.generation_config.eos_token_id = [7, 9]
    assert train.end_tokens(model, tokenizer) == [0, 7, 9]


def test_truncation_keeps_the_most_likely_tokens():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = lambda **k: (train.truncate(logits, k.get("top_k", 0), k.get("top_p", 1.0)) > -math.inf).tolist()[0]
    assert kept() == [True] * 4 and kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.5) == [True, False, False, False] and kept(top_p=0.51) == [True, True, False, False] and kept(top_p=0.96) == [True] * 4


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
        loss, _, _, clipped = train.grpo_loss(logprobs, torch.zeros(1, 1), None, torch.tensor([advantage]), one, 0.2, 0.0, "k3")
        loss.backward()
        assert (logprobs.grad.item() != 0) == moves and (clipped.item() == 1) == (not moves)


def test_loss_is_zero_while_the_gradient_is_not():
    """What puzzles everybody: at the first step the loss of GRPO is 0 (the mean advantage), and yet it teaches."""
    model, batch = MODELS["gpt2"], a_batch()
    batch["advantages"] = train.group_advantages(torch.randn(8, generator=torch.Generator().manual_seed(1)), 4, "group")
    batch["old_logprobs"] = train.score(model, batch, 1.0, 8)
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
    direct = train.completion_logprobs(model, batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], 1.0)
    mask, ratio = batch["completion_mask"], (direct - batch["old_logprobs"]).exp()
    per_token = -torch.minimum(ratio * batch["advantages"][:, None], ratio.clamp(0.8, 1.2) * batch["advantages"][:, None]) \
        + 0.2 * ((batch["ref_logprobs"] - direct).exp() - 1 - (batch["ref_logprobs"] - direct))
    wanted = {"sequence": ((per_token * mask).sum(1) / mask.sum(1)).mean(), "token": (per_token * mask).sum() / mask.sum(), "constant": (per_token * mask).sum() / (8 * 6)}[norm]
    assert terms["policy_loss"] + 0.2 * terms["kl_loss"] == pytest.approx(wanted.item(), abs=1e-5)


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_groups_of_equal_rewards_can_be_skipped_without_changing_the_gradient(norm):
    model, batch = MODELS["gpt2"], a_batch()
    batch["advantages"] = train.group_advantages(torch.tensor([1.0, 1, 1, 1, 0, 1, 0, 0]), 4, "group")
    skipped, terms = gradient_of(model, config(loss_norm=norm, kl_coef=0.0), batch)
    full, all_terms = gradient_of(model, config(loss_norm=norm, kl_coef=1e-30), batch)             # a KL term, however small, needs all rows
    assert terms["trained"] == 4 and all_terms["trained"] == 8
    torch.testing.assert_close(skipped, full, atol=1e-7, rtol=1e-5)
    batch["advantages"] = torch.zeros(8)
    before = [p.clone() for p in model.parameters()]
    _, terms = gradient_of(model, config(kl_coef=0.0), batch)
    assert terms["trained"] == 0 and all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


@each_model
def test_gradient_checkpointing_changes_nothing_and_leaves_dropout_off(model):
    import copy
    batch = a_batch()
    whole, _ = gradient_of(model, config(), batch)
    other = copy.deepcopy(model)
    other.activation_checkpointing_enable()
    again, _ = gradient_of(other, config(gradient_checkpointing=True), batch)
    torch.testing.assert_close(again, whole, atol=1e-6, rtol=1e-4)
    assert not any(module.training for module in other.modules())
    train.generate(other, PROMPTS, PROMPT_MASK, 2, 4, 1.0, [2], torch.Generator())          # drawing still has its cache


def test_gradient_checkpointing_without_dropout_even_in_layers_that_drop_out_by_themselves():
    from transformers import OPTConfig, OPTForCausalLM
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, dropout=0.5, **SIZES)).eval()
    batch = a_batch()
    whole, _ = gradient_of(model, config(), batch)
    model.activation_checkpointing_enable()
    for module in model.modules():                                # as train() does
        for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
            setattr(module, name, 0.0)
    for _ in range(2):
        torch.testing.assert_close(gradient_of(model, config(gradient_checkpointing=True), batch)[0], whole, atol=1e-6, rtol=1e-4)


def test_inner_epochs_leave_ratio_one_only_at_first():
    model, tokenizer, judge, judge_tokenizer = train.random_models()
    settings = config(max_new_tokens=8, lr=0.05, kl_coef=0.0)
    optimizer, accelerator = torch.optim.AdamW(model.parameters(), lr=0.05), Accelerator(cpu=True)
    reference, _, _, _ = train.random_models()
    reference.load_state_dict(model.state_dict())
    batch, texts, rewards = train.collect(settings, accelerator, model.eval(), reference.eval(), tokenizer, (judge, judge_tokenizer), ["What?", "Why is it so?"],
                                          torch.Generator().manual_seed(0))
    torch.testing.assert_close(train.score(model, batch, 1.0, 3), batch["old_logprobs"], atol=1e-4, rtol=0)          # ratio 1 before the first step,
    torch.testing.assert_close(batch["ref_logprobs"], batch["old_logprobs"], atol=1e-4, rtol=0)                     # and KL 0
    train.update(settings, accelerator, model, optimizer, batch)
    assert (train.score(model, batch, 1.0, 3) - batch["old_logprobs"]).abs().max() > 1e-3
    assert train.update(train.replace(settings, inner_epochs=4), accelerator, model, optimizer, batch)["clip_ratio"] > 0


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
        loss = train.grpo_loss(lp, lp.detach(), None, advantages, train.token_weights(mask, "constant", 2, 4, 1), 0.2, 0.0, "k3")[0]
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
    batch["old_logprobs"] = train.score(MODELS["qwen2"], batch, 1.0, 4) + 0.15 * torch.randn(4, 6, generator=torch.Generator().manual_seed(7)) * batch["completion_mask"]
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
    model, tokenizer = train.load_reward_model(str(FOLDER / "weights" / "reward_model"))
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
    _, _, model, tokenizer = train.random_models()
    tokenizer.pad_token = None
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    judge = train.load_reward_model(str(tmp_path / "rm"))
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
    assert train.gold_score(WORLD, "What is sleep?", text) == pytest.approx(score)
    assert train.gold_score(WORLD, "What is a car?", text) is None


def test_the_world_is_as_promised():
    statements = [s for topic in WORLD["topics"] for kind in base_models.KINDS for s in topic[kind]]
    assert len(WORLD["topics"]) >= 24 and len(statements) == len(set(statements)) == 9 * len(WORLD["topics"])
    seen, held_out = base_models.split_prompts(WORLD)
    assert not set(seen) & set(held_out) and {"Explain why regular exercise is important.", "Describe the water cycle.", "What is machine learning?"} <= set(seen)
    rng = np.random.default_rng(0)
    gold = [train.gold_score(WORLD, "What is glass?", base_models.write_answer(WORLD, WORLD["topics"][-1], rng)) for _ in range(500)]
    assert 2 < np.std(gold) and min(gold) == 1 and max(gold) > 9
    for name in ("train", "held_out"):
        lines = (FOLDER / "weights" / f"prompts_{name}.txt").read_text().splitlines()
        assert lines == (seen if name == "train" else held_out)


# ---- whole runs -----------------------------------------------------------------------------------------------------

TINY = ["--steps", "12", "--prompts-per-step", "2", "--group", "4", "--max-new-tokens", "12", "--eval-samples", "1", "--device", "cpu", "--quiet"]


def test_a_run_leaves_what_the_readme_promises_and_the_reference_alone(tmp_path):
    before = (FOLDER / "weights" / "base" / "model.safetensors").read_bytes()
    process = run(TRAIN, *TINY[:-1], "--save-every", "6", "--out", tmp_path / "o")
    assert process.returncode == 0, process.stderr
    for words in ("answers to", "best first", "    [", "win rate", "drawing"):
        assert words in process.stdout, words
    rows = list(csv.DictReader((tmp_path / "o" / "metrics.csv").open()))
    assert len(rows) == 12 and abs(float(rows[0]["kl"])) < 1e-4 and float(rows[-1]["kl"]) != 0
    keys = {"base", "trained", "win_rate", "win_rate_low", "win_rate_high", "kl"}
    assert set(json.loads((tmp_path / "o" / "eval.json").read_text())) == keys
    process = run(EVAL, "--weights", tmp_path / "o", "--samples", "2", "--show", "1", "--json", tmp_path / "e.json", "--figure", tmp_path / "f.png")
    assert process.returncode == 0 and (tmp_path / "f.png").exists(), process.stderr
    result = json.loads((tmp_path / "e.json").read_text())
    assert set(result) == keys and {"reward", "gold", "length", "distinct2"} <= set(result["base"])
    process = run(EVAL, "--trajectory", tmp_path / "o", "--samples", "1")
    assert process.returncode == 0 and len((tmp_path / "o" / "trajectory.csv").read_text().splitlines()) == 4, process.stderr
    assert (FOLDER / "weights" / "base" / "model.safetensors").read_bytes() == before


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
    policy, _, _ = train.train(train.Config(steps=2, prompts_per_step=2, group=4, max_new_tokens=8, eval_samples=1), tmp_path, Accelerator(cpu=True), lambda *text: None)
    after = kept["reference"].state_dict()
    assert all(torch.equal(after[name], kept["before"][name]) for name in after)
    assert any(not torch.equal(tensor, after[name]) for name, tensor in policy.state_dict().items())


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
    for name in ("metrics.csv", "eval.json", "config.json", "curve.png", "policy/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
    assert_one_line_error(call(train, "--resume", tmp_path / "stopped", "--lr", "0.3"), "lr", "0.3")


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
accelerator.end_training()                                        # else the interpreter may abort on its way out
"""


def test_two_processes_have_the_gradient_of_one(tmp_path):
    """Unequal lengths, and one process all of whose groups are skipped while the other one trains."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(folder=str(FOLDER), tests=str(REPO / "tests")))
    for n in ("1", "2"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n, str(script), str(tmp_path / f"p{n}_"), n]      # `accelerate launch --cpu` starts one process whatever it is told
        process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert process.returncode == 0, process.stderr[-3000:]
    for path in tmp_path.glob("p1_*"):
        (one, terms), (two, again) = (torch.load(tmp_path / path.name.replace("p1_", p), weights_only=True) for p in ("p1_", "p2_"))
        torch.testing.assert_close(two, one, atol=1e-6, rtol=1e-4)
        for key in ("policy_loss", "kl_loss", "clip_ratio", "trained"):
            assert again[key] == pytest.approx(terms[key], abs=1e-5), key


def test_two_processes_train_together(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(TRAIN), *TINY, "--steps", "2", "--kl-coef", "0", "--out", str(tmp_path / "o")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr[-2000:]
    assert json.loads((tmp_path / "o" / "train.json").read_text())["result"]["steps"] == 2


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "llama"])
def test_a_run_with_another_model_and_a_prompt_without_gold(kind, tmp_path, monkeypatch):
    """Another shape, no chat template, padding by the end token, a reward model with another tokenizer."""
    _, tokenizer, _, _ = train.random_models()
    model = MODELS[kind]
    model = type(model)(type(model.config)(**(model.config.to_dict() | dict(vocab_size=len(tokenizer), eos_token_id=0))))
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    process = call(train, "--model", "m", "--prompt", "Describe a car.", *TINY, "--steps", "2", "--out", "o")
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "o" / "eval.json").read_text())
    assert result["base"]["gold"] is None and 0 <= result["win_rate"] <= 1
    monkeypatch.chdir("/")
    (tmp_path / "p.txt").write_text("Describe a car.\n")
    process = call(evaluation, "--weights", tmp_path / "o", "--prompts", tmp_path / "p.txt", "--samples", "2")
    assert process.returncode == 0 and "by reward" in process.stdout, process.stderr


@pytest.mark.parametrize("name", train.BREAKS)
def test_every_broken_variant_runs(name, tmp_path):
    process = call(train, *TINY[:-1], "--steps", "1", "--break", name, "--out", tmp_path / "o")
    assert process.returncode == 0 and f"BROKEN: {name}" in process.stdout, process.stderr


def test_what_the_broken_variants_break(tmp_path):
    """The tokens behind the end and those of the prompt enter the loss; truncated samples are scored as if they were not."""
    model, tokenizer = train.load_policy(str(FOLDER / "weights" / "base"))
    judge = train.load_reward_model(str(FOLDER / "weights" / "reward_model"))
    batches = {}
    for name in ("", "no-eos-mask", "prompt-in-loss", "hidden-top-k"):
        settings = train.Config(broken=name, group=4, max_new_tokens=64)
        batches[name], _, _ = train.collect(settings, Accelerator(cpu=True), model.eval(), model, tokenizer, judge, ["What is sleep?", "Give a short introduction to the water cycle."],
                                            torch.Generator().manual_seed(0))
    right, eos, prompt = batches[""], batches["no-eos-mask"], batches["prompt-in-loss"]
    assert eos["completion_mask"].all() and not right["completion_mask"].all() and torch.equal(eos["completion_ids"], right["completion_ids"])
    assert prompt["completion_mask"].sum() == right["completion_mask"].sum() + right["prompt_mask"][:, 1:].sum()
    inside = prompt["old_logprobs"][:, right["prompt_ids"].shape[1] - 1:]
    torch.testing.assert_close(inside, right["old_logprobs"], atol=1e-3, rtol=0)     # the answers themselves are scored as before
    torch.testing.assert_close(batches["hidden-top-k"]["old_logprobs"], train.score(model, batches["hidden-top-k"], 1.0, 8), atol=1e-4, rtol=0)


def test_a_nan_stops_with_the_last_checkpoint_intact(tmp_path, monkeypatch):
    original, calls = train.reward_scores, []

    def poisoned(*arguments, **settings):
        calls.append(1)
        scores = original(*arguments, **settings)
        return scores * math.nan if len(calls) == 11 else scores
    monkeypatch.setattr(train, "reward_scores", poisoned)
    process = call(train, *TINY, "--out", tmp_path / "o")
    assert_one_line_error(process, "not finite", "step 11", "intact")
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
    model, tokenizer = train.load_reward_model(str(FOLDER / "weights" / "reward_model"))
    topic_of = {t.format(name=topic["name"]): topic for topic in WORLD["topics"] for t in WORLD["templates"]}
    pairs = base_models.preference_pairs(WORLD, [(p, topic_of[p]) for p in base_models.split_prompts(WORLD)[1]], 500, np.random.default_rng(99))
    share, low, high = base_models.accuracy(model, tokenizer, pairs, by_gold=True)
    assert low < card["accuracy_by_gold"][0] < high


def test_chat_answers_and_ends(tmp_path):
    process = subprocess.run([sys.executable, str(EVAL), "--chat"], input="What is sleep?\n" + "why " * 300 + "\n\n", capture_output=True, text=True, timeout=120)
    assert process.returncode == 0 and "too long" in process.stdout and len(process.stdout.split()) > 25, process.stderr


@pytest.mark.parametrize("arguments, words", [
    (["--group", "1"], ["--group", "at least 2"]), (["--lr", "0"], ["--lr"]), (["--temperature", "0"], ["--temperature"]), (["--kl", "k4"], ["k3-ratio"]),
    (["--kl-coef", "-1"], ["--kl-coef"]), (["--model", "no/such/model"], ["no/such/model", "loaded"]), (["--reward-model", "no/such/rm"], ["no/such/rm", "loaded"]),
    (["--prompts", "nowhere.txt"], ["nowhere.txt"]), (["--prompt", "a", "--prompts", "b"], ["exclude"]), (["--prompt", "why " * 200], ["context"]),
    (["--max-new-tokens", "500"], ["context"]), (["--break", "x"], ["wrong-kl"]), (["--scale-rewards", "x"], ["batch"]), (["--stepz", "1"], ["--help"]),
    (["--resume", "nowhere"], ["no such directory"]), (["--break", "dropout-on", "--gradient-checkpointing"], ["cache"]), (["--break", "wrong-kl", "--kl", "reward"], ["wrong-kl"]),
    (["--break", "wrong-kl", "--kl-coef", "0"], ["wrong-kl"]), (["--log-with", "wandb"], ["pip install wandb"])])
def test_trainer_refuses_bad_values(arguments, words, tmp_path):
    assert_one_line_error(call(train, *arguments, "--quiet", *([] if "--resume" in arguments else ["--out", tmp_path / "out"]), cwd=tmp_path), *words)


def test_trainer_refuses_what_cannot_serve(tmp_path):
    (tmp_path / "empty.txt").write_text("\n  \n")
    assert_one_line_error(call(train, "--prompts", tmp_path / "empty.txt", "--quiet", "--out", tmp_path / "o1"), "empty")
    policy, tokenizer, judge, _ = train.random_models()
    from transformers import GPT2ForSequenceClassification
    GPT2ForSequenceClassification(type(judge.config)(**(judge.config.to_dict() | dict(num_labels=3)))).save_pretrained(tmp_path / "three")
    tokenizer.save_pretrained(tmp_path / "three")
    assert_one_line_error(call(train, "--reward-model", tmp_path / "three", "--quiet", "--out", tmp_path / "o2"), "3 logits")
    policy.save_pretrained(tmp_path / "mute")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "mute")
    assert_one_line_error(call(train, "--model", tmp_path / "mute", "--quiet", "--out", tmp_path / "o3"), "end-of-sequence")


@pytest.mark.parametrize("arguments", [["--weights", "nowhere"], ["--samples", "0"], ["--prompts", "nowhere"], ["--json", "no/such/x.json"], ["--figure", "."],
                                       ["--top-p", "0"], ["--prompts", "long.txt"], ["--trajectory", "nowhere"], ["--base", "no/such/model"]])
def test_eval_refuses_bad_values(arguments, tmp_path):
    (tmp_path / "long.txt").write_text("why " * 300)
    assert_one_line_error(call(evaluation, *arguments, cwd=tmp_path))
