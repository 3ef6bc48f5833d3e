"""SPO: losses and soft values against the closed-form optimum, log-probabilities against loops, on several kinds of models; resume; bad input."""
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
from hypothesis import given, settings, strategies as st

from conftest import REPO, assert_one_line_error, call, load, run

FOLDER = REPO / "spo_dummy"
TRAIN, EVAL = FOLDER / "train_spo.py", FOLDER / "spo_eval.py"
train, evaluation = load("spo_dummy/train_spo.py"), load("spo_dummy/spo_eval.py")
torch.set_num_threads(1)
END = 2                                                           # the end token of the random models
SIZES = dict(vocab_size=40, pad_token_id=0, eos_token_id=END, bos_token_id=None)


def random_models():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    decoder = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **SIZES)
    return {"qwen2": Qwen2ForCausalLM(Qwen2Config(**decoder)).eval(), "llama": LlamaForCausalLM(LlamaConfig(**decoder)).eval(),
            "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, **SIZES)).eval()}


MODELS = random_models()
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


# ---- the task -------------------------------------------------------------------------------------------------------

def shipped_model():
    model, tokenizer = train.load_model(train.AutoModelForCausalLM, FOLDER / "weights" / "base")
    return model.eval(), tokenizer


@pytest.mark.parametrize("text, guess", [("1", 1), ("100", 100), (" 42", None), ("42\n", None), ("0", None), ("101", None), ("042", None), ("4 2", None), ("", None), ("42.", None),
                                         ("-5", None), ("15…", None), ("٤٢", None)])
def test_what_counts_as_a_guess(text, guess):
    assert train.parse_guess(text) == guess


@given(st.integers(1, 100), st.integers(1, 100))
@settings(max_examples=100)
def test_rewards_lie_between_worst_and_right(guess, target):
    reward = train.reward_of(str(guess), target)
    assert -1 <= reward <= 0 and (reward == 0) == (guess == target) and train.reward_of("nonsense", target) == -1
    assert min(train.reward_of(text, target) for text in train.NUMBERS) == -1


# ---- log-probabilities ----------------------------------------------------------------------------------------------

@each_model
def test_sum_equals_a_token_by_token_loop_and_ignores_padding(model):
    prompt = torch.tensor([[5, 6, 7]])
    rows = [[10, 11, 2], [12, 2], [13, 14, 15, 2]]
    completions, mask = train.pad(rows, 0)
    got = train.completion_logprobs(model, prompt, completions, mask)
    for row, value in zip(rows, got):
        total, ids = 0.0, prompt
        for token in row:                                         # the end-of-turn token 2 is counted, once
            total += torch.log_softmax(model(input_ids=ids).logits[0, -1].double(), -1)[token].item()
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert value.item() == pytest.approx(total, abs=1e-4)
    wide, wide_mask = torch.nn.functional.pad(completions, (0, 5), value=0), torch.nn.functional.pad(mask, (0, 5))
    torch.testing.assert_close(train.completion_logprobs(model, prompt, wide, wide_mask), got, atol=1e-5, rtol=0)


@each_model
def test_a_batch_of_empty_answers_has_the_probability_of_the_end_token(model):
    prompt = torch.tensor([[5, 6, 7]])
    got = train.completion_logprobs(model, prompt, *train.pad([[2], [2]], 0))
    wanted = model(input_ids=prompt).logits[0, -1].log_softmax(-1)[2]
    torch.testing.assert_close(got, wanted.expand(2), atol=1e-5, rtol=0)


@each_model
def test_padding_with_the_end_token_itself_changes_nothing(model):
    prompt, rows = torch.tensor([[5, 6, 7]]), [[10, 11, 2], [12, 2]]
    results = [train.completion_logprobs(model, prompt, *train.pad(rows, pad_id)) for pad_id in (0, 2)]
    torch.testing.assert_close(*results, atol=1e-6, rtol=0)


@each_model
def test_prompt_positions_get_no_gradient_of_their_own_loss(model):
    """The gradient must equal the one of a loss written over answer positions only."""
    prompt, (completions, mask) = torch.tensor([[5, 6, 7]]), train.pad([[10, 11, 2], [12, 2]], 0)
    model.zero_grad()
    train.completion_logprobs(model, prompt, completions, mask).sum().backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ids = torch.cat([prompt.expand(2, -1), completions], 1)
    logprobs = torch.log_softmax(model(input_ids=ids).logits, -1)
    sum(logprobs[b, 2 + t, completions[b, t]] for b in range(2) for t in range(3) if mask[b, t]).backward()
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(ours[n], p.grad, atol=1e-5, rtol=1e-5)


@each_model
def test_samples_follow_the_models_own_distribution(model):
    prompt = torch.tensor([[5, 6, 7]])
    rows = train.generate(model, prompt, 4000, END, torch.Generator().manual_seed(0))
    wanted = model(input_ids=prompt).logits[0, -1].softmax(-1).detach()
    share = torch.bincount(torch.tensor([row[0] for row in rows]), minlength=40) / 4000
    chi = (4000 * (share - wanted).square() / wanted).sum().item()
    assert chi < 39 + 5 * math.sqrt(2 * 39)                       # no hidden top-k, top-p or temperature
    assert all(2 not in row[:-1] and (row[-1] == 2 or len(row) == train.MAX_NEW_TOKENS) for row in rows)


# ---- the optimum ----------------------------------------------------------------------------------------------------

def tabular(seed=0, A=12):
    g = torch.Generator().manual_seed(seed)
    ref = torch.randn(A, generator=g, dtype=torch.float64).log_softmax(-1)
    rewards = -torch.rand(A, generator=g, dtype=torch.float64)
    rewards[3] = 0.0                                              # a right answer, as every run has one
    return ref, rewards


@pytest.mark.parametrize("kind", ["squared", "cross-entropy"])
@pytest.mark.parametrize("behaviour", ["uniform", "skewed", "on-policy", "replay", "adversarial"])
def test_a_tabular_policy_converges_to_the_optimum(kind, behaviour):
    ref, rewards = tabular()
    beta = 0.3
    q0 = train.soft_value(ref, rewards, beta)
    optimum = ref.exp() * ((rewards - q0) / beta).exp()
    assert optimum.sum().item() == pytest.approx(1)
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.03)
    for step in range(3000):
        policy = logits.log_softmax(-1)
        weights = {"uniform": torch.ones(12), "skewed": torch.arange(1, 13), "on-policy": policy.detach().exp(), "replay": 1 / 12 + policy.detach().exp(),
                   "adversarial": 0.05 + (rewards < -0.3).double()}[behaviour].double()
        per_answer = torch.stack([train.spo_loss(policy[a:a + 1] - ref[a:a + 1], rewards[a:a + 1], q0, beta, kind)[0] for a in range(12)])
        optimizer.zero_grad()
        ((weights / weights.sum()) * per_answer).sum().backward()
        optimizer.step()
        if step % 100 == 0 and 0.5 * (logits.softmax(-1) - optimum).abs().sum() < 0.004:
            break
    assert 0.5 * (logits.softmax(-1) - optimum).abs().sum().item() < 0.01


def test_soft_value_against_direct_sums_and_its_limits():
    ref, rewards = tabular(1)
    for beta in (0.05, 0.5, 5.0):
        assert train.soft_value(ref, rewards, beta).item() == pytest.approx(beta * math.log((ref.exp() * (rewards / beta).exp()).sum().item()))
    assert train.soft_value(ref, rewards, 1e6).item() == pytest.approx((ref.exp() * rewards).sum().item(), abs=1e-4)
    assert train.soft_value(ref, rewards, 1e-4).item() == pytest.approx(rewards.max().item(), abs=1e-3)
    assert train.soft_value(torch.tensor([0.0]).log().new_zeros(1), torch.tensor([-1.0]), 0.001).item() == pytest.approx(-1, abs=1e-5)   # nothing underflows
    half = torch.tensor([0.5, 0.5]).log()
    assert train.soft_value(half, torch.tensor([0.0, -1.0]), 0.01).item() == pytest.approx(-0.0069, abs=1e-4)        # the docstring's example
    assert train.soft_value(half, torch.tensor([0.0, -1.0]), 1e5).item() == pytest.approx(-0.5, abs=1e-2)


def test_monte_carlo_soft_value_approaches_the_enumerated_one():
    ref, rewards = tabular(2)
    drawn = rewards[torch.multinomial(ref.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))]
    estimate = train.soft_value(torch.full_like(drawn, -math.log(len(drawn))), drawn, 0.1)
    assert estimate.item() == pytest.approx(train.soft_value(ref, rewards, 0.1).item(), abs=2e-3)


def test_cross_entropy_keeps_its_gradient_where_q_is_positive():
    for ratio in (0.5, 3.0, 30.0):
        log_ratio = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
        loss, q = train.spo_loss(log_ratio, torch.tensor([-0.5], dtype=torch.float64), 0.0, 0.1, "cross-entropy")
        loss.backward()
        assert q.item() > 0 and loss.isfinite() and log_ratio.grad.item() > 1        # descent lowers Q_T
    log_ratio = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)         # inside: the ordinary formula
    loss, _ = train.spo_loss(log_ratio, torch.tensor([-0.1], dtype=torch.float64), -0.05, 0.1, "cross-entropy")
    y, q = math.exp(-1 - 1), math.exp(-2.5 - 1)                   # reward and Q0 lowered by β
    assert loss.item() == pytest.approx(-(y * math.log(q) + (1 - y) * math.log(1 - q)))


def test_cross_entropy_is_flat_at_the_optimum_even_for_the_best_answer_and_refuses_positive_rewards():
    for reward in (0.0, -0.01, -0.7):
        log_ratio = torch.tensor([(reward + 0.1) / 0.05], dtype=torch.float64, requires_grad=True)        # Q_T = r
        train.spo_loss(log_ratio, torch.tensor([reward], dtype=torch.float64), -0.1, 0.05, "cross-entropy")[0].backward()
        assert abs(log_ratio.grad.item()) < 1e-9
    with pytest.raises(ValueError, match="at most 0"):
        train.spo_loss(torch.zeros(2), torch.tensor([0.0, 0.1]), 0.0, 0.1, "cross-entropy")


def test_the_worked_example_of_the_readme():
    """Section 3: only three answers exist, and β is .5."""
    beta, rewards = 0.5, torch.tensor([train.reward_of(text, 42) for text in ("42", "13", "100")])
    reference, policy = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.4, 0.4, 0.2])
    q0 = train.soft_value(reference.log(), rewards, beta)
    optimum = reference * ((rewards - q0) / beta).exp()           # Eq. 5
    assert q0.item() == pytest.approx(-0.4864, abs=1e-4) and optimum.tolist() == pytest.approx([0.5291, 0.2919, 0.1790], abs=1e-4)
    for kind, here, at_the_optimum in (("squared", 0.0158, 0.0), ("cross-entropy", 0.4268, 0.4174)):
        loss, claims = train.spo_loss((policy / reference).log(), rewards, q0, beta, kind)
        assert loss.item() == pytest.approx(here, abs=1e-4) and claims.tolist() == pytest.approx([-0.1398, -0.3425, -0.9445], abs=1e-4)
        assert train.spo_loss((optimum / reference).log(), rewards, q0, beta, kind)[0].item() == pytest.approx(at_the_optimum, abs=1e-4)
    kl = [(policy * (policy / other).log()).sum().item() for other in (reference, optimum)]
    assert kl == pytest.approx([0.2091, 0.0363], abs=1e-4) and 0.5 * (policy - optimum).abs().sum().item() == pytest.approx(0.1291, abs=1e-4)
    objective = (policy * rewards).sum().item() - beta * kl[0]
    assert objective == pytest.approx(-0.505, abs=1e-3) and objective == pytest.approx(q0.item() - beta * kl[1], abs=1e-6)      # step 2


@pytest.mark.parametrize("q0, tolerance", [("exact", 1e-6), ("mc", 0.02)])
def test_the_trainers_own_q0_against_enumeration(q0, tolerance):
    model, tokenizer = shipped_model()
    ref_logprobs = train.enumerate_answers(model, tokenizer)
    config = train.Config(q0=q0, q0_samples=4000, beta=0.1)
    got = train.estimate_q0(config, None, model, tokenizer, ref_logprobs, torch.Generator().manual_seed(0), lambda text: None)
    assert got == pytest.approx(train.closed_form(ref_logprobs, 42, 0.1)["q0"], abs=tolerance)


def test_evaluation_of_the_optimum_itself_is_zero():
    ref = torch.randn(100, generator=torch.Generator().manual_seed(0)).log_softmax(-1) + math.log(0.95)
    optimum = train.closed_form(ref, 42, 0.05)["pi_star"]
    result = train.evaluate(optimum[:100].log(), ref, 42, 0.05)
    assert result["tv"] < 1e-9 and abs(result["kl"]) < 1e-9 and result["mean_distance"] == pytest.approx(result["optimal_mean_distance"])
    assert train.evaluate(ref, ref, 42, 0.05)["tv"] > 0.5


# ---- behaviour, reference, files ------------------------------------------------------------------------------------

@pytest.mark.parametrize("behaviour", ["uniform", "on-policy", "replay", "adversarial"])
def test_behaviour_policies(behaviour):
    model, tokenizer = shipped_model()
    config = train.Config(behaviour=behaviour, include_invalid=0.3 if behaviour == "uniform" else 0.0)
    rows = train.behave(config, model, tokenizer, 400, np.random.default_rng(0), torch.Generator().manual_seed(0), [])
    texts = [train.answer_text(tokenizer, row) for row in rows]
    rewards = np.array([train.reward_of(text, 42) for text in texts])
    assert len(rows) == 400 and all(row.count(tokenizer.eos_token_id) == 1 and row[-1] == tokenizer.eos_token_id or
                                 tokenizer.eos_token_id not in row and len(row) == train.MAX_NEW_TOKENS for row in rows)
    invalid = np.mean([train.parse_guess(text) is None for text in texts])
    assert {"uniform": 0.2 < invalid < 0.4, "on-policy": 0.01 < invalid < 0.1, "replay": invalid < 0.06, "adversarial": invalid == 0}[behaviour]
    if behaviour == "adversarial":
        assert (rewards > -0.3).mean() < 0.06


def test_answers_end_with_one_end_token_and_decode_back():
    _, tokenizer = shipped_model()
    for row, text in zip(train.answer_tokens(tokenizer, train.NUMBERS), train.NUMBERS):
        assert row[-1] == tokenizer.eos_token_id and row.count(tokenizer.eos_token_id) == 1 and train.answer_text(tokenizer, row) == text
    assert train.parse_guess(train.answer_text(tokenizer, train.answer_tokens(tokenizer, ["42"])[0][:-1])) is None      # never-ending answer


SMALL = ["--epochs", "4", "--samples", "256", "--batch-size", "64", "--quiet"]


def test_replay_uses_the_models_own_answers_even_one_at_a_time():
    model, tokenizer = shipped_model()
    rng, generator, buffer = np.random.default_rng(0), torch.Generator().manual_seed(0), []
    marked = [(9, 9, tokenizer.eos_token_id)] * 50                # "44", put there by hand
    buffer.extend(marked)
    rows = [train.behave(train.Config(behaviour="replay"), model, tokenizer, 1, rng, generator, buffer)[0] for _ in range(60)]
    assert 10 < rows.count(marked[0]) < 45


def test_update_is_the_gradient_of_the_plain_batch(monkeypatch):
    """Equal answers scored once, and a reference asked once, must not change the gradient."""
    from accelerate import Accelerator
    model, tokenizer = shipped_model()
    reference, _ = shipped_model()
    texts = ["42", "7", "42", "100", "42", "7"]
    prompt, answers = train.prompt_tokens(tokenizer), train.answer_tokens(tokenizer, texts)
    config, known = train.Config(max_grad_norm=1e9, loss="squared", batch_size=len(texts)), {}
    with torch.no_grad():
        model.lm_head.weight += 0.05 * torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    completions, mask = train.pad(answers, tokenizer.pad_token_id)
    log_ratio = train.completion_logprobs(model, prompt, completions, mask) - train.completion_logprobs(reference, prompt, completions, mask).detach()
    rewards = torch.tensor([train.reward_of(text, 42) for text in texts])
    loss, _ = train.spo_loss(log_ratio, rewards, -0.1, 0.05, "squared")
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    monkeypatch.setattr(train, "behave", lambda *arguments: answers)
    accelerator = Accelerator(cpu=True)
    batch, seen = train.collect(config, accelerator, model, reference, tokenizer, None, None, [], known)
    got, _ = train.update(config, accelerator, model, optimizer, torch.tensor(-0.1), batch)
    assert got == pytest.approx(loss.item(), rel=1e-5) and seen == texts and len(known) == 3
    assert batch["which"].tolist() == [0, 1, 0, 2, 0, 1] and len(batch["completion_ids"]) == 3
    for parameter, gradient in zip(model.parameters(), wanted):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in reference.parameters())


@pytest.mark.long
def test_a_short_run_moves_towards_the_optimum(tmp_path):
    process = run(TRAIN, "--epochs", "2", "--samples", "25600", "--quiet", "--out", tmp_path / "a")
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "a" / "eval.json").read_text())
    assert result["tv"] < 0.5 and set(result) == {
        "tv", "kl", "invalid_mass", "mean_distance", "optimal_mean_distance", "q0", "calibration_error", "target", "beta"}
    process = run(EVAL, "--weights", tmp_path / "a", "--json", tmp_path / "e.json", "--samples", "3")
    assert process.returncode == 0 and "samples:" in process.stdout, process.stderr
    process = run(EVAL.parent / "study.py", "--weights", tmp_path / "a", "--bars", tmp_path / "b.png")
    assert process.returncode == 0 and (tmp_path / "b.png").exists(), process.stderr
    assert json.loads((tmp_path / "e.json").read_text())["tv"] == pytest.approx(result["tv"], abs=1e-5)


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_resume_after_kill_equals_the_uninterrupted_run(tmp_path):
    assert run(TRAIN, *SMALL, "--out", tmp_path / "whole").returncode == 0
    process = subprocess.Popen([sys.executable, str(TRAIN), *SMALL, "--out", str(tmp_path / "killed")])
    while not (tmp_path / "killed" / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run(TRAIN, "--quiet", "--resume", tmp_path / "killed").returncode == 0
    for name in ("metrics.csv", "eval.json", "config.json", "curve.png", "policy/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    assert_one_line_error(call(train, "--resume", tmp_path / "killed", "--beta", "0.3"), "--resume", "--device")


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("extra", [["--q0", "mc", "--behaviour", "on-policy"], ["--q0", "learned", "--patience", "2", "--lr", "1e-12"]])
def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_ends_alike(extra, tmp_path):
    arguments = [*SMALL, "--epochs", "10", *extra]
    process = subprocess.Popen([sys.executable, str(TRAIN), *arguments, "--out", str(tmp_path / "stopped")], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "stopped" / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    stopped = torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)["state"]["epoch"]
    assert process.returncode == 130 and "--resume" in error and "Traceback" not in error and stopped < 10 or "--patience" in extra
    assert run(TRAIN, *arguments, "--out", tmp_path / "whole").returncode == 0
    assert run(TRAIN, "--quiet", "--resume", tmp_path / "stopped").returncode == 0
    for name in ("metrics.csv", "eval.json", "policy/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
    if "--patience" in extra:                                     # nothing got better: stopped early, and a resumed run does not train on
        assert len((tmp_path / "whole" / "metrics.csv").read_text().splitlines()) < 10


@pytest.mark.long
def test_the_presets_trace(tmp_path):
    process = run(TRAIN, "--preset", "original", "--epochs", "2", "--samples", "12", "--out", tmp_path / "o")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    first = [line for line in lines if "first training samples" in line]
    assert len(first) == 5 and all("reward -" in line or "reward 0" in line for line in first)
    for words in ("samples of the untrained model", "Q0 from 256 samples", "within 5 % of the target", "cumulative advantage", "Q_T", "avg loss", "reward",
                  "current predictions", "best mean distance", "(change ", "samples of the trained model", "NOT at π*"):
        assert any(words in line for line in lines), words
    assert [line.split()[0] for line in lines if line[:8].strip().isdigit()] == ["1", "2"]        # the table's two rows
    order = [next(k for k, line in enumerate(lines) if words in line) for words in ("samples of the trained", "NOT at π*", "Look at")]
    assert order == sorted(order)                                 # the judge speaks last, through a pipe too


def saved_model(directory, kind):
    """A random model with the shipped digit tokenizer's words, but another shape and another chat template."""
    _, tokenizer = shipped_model()
    model = MODELS[kind]
    model = type(model)(type(model.config)(**(model.config.to_dict() | dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id))))
    tokenizer.chat_template = ("{{ '<|user|>be brief<|end|>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
                               "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
    if kind == "gpt2":
        tokenizer.pad_token = tokenizer.eos_token
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_run_with_another_model_resumes_from_another_directory(kind, tmp_path, monkeypatch):
    saved_model(tmp_path / "m", kind)
    monkeypatch.chdir(tmp_path)
    process = call(train, "--model", "m", *SMALL[:-1], "--epochs", "1", "--out", "o")
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "o" / "eval.json").exists()
    assert "--model" in json.loads((tmp_path / "o" / "train.json").read_text())["command"]
    monkeypatch.chdir("/")
    process = call(evaluation, "--weights", tmp_path / "o")
    assert process.returncode == 0 and "total variation" in process.stdout, process.stderr


def test_models_that_cannot_serve_are_refused_in_one_line(tmp_path):
    saved_model(tmp_path / "damaged", "qwen2")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"nonsense")
    assert_one_line_error(call(train, "--model", tmp_path / "damaged", "--quiet", "--out", tmp_path / "o1"), "loaded")
    for name, change, word in (("mute", dict(eos_token=None, chat_template="{{ messages[0]['content'] }}"), "an end token"), ("plain", dict(chat_template=None), "choose a chat model")):
        saved_model(tmp_path / name, "qwen2")
        _, tokenizer = train.load_model(train.AutoModelForCausalLM, tmp_path / name)
        for key, value in change.items():
            setattr(tokenizer, key, value)
        for path in (tmp_path / name).glob("*template*"):
            path.unlink()
        tokenizer.save_pretrained(tmp_path / name)
        assert_one_line_error(call(train, "--model", tmp_path / name, "--quiet", "--out", tmp_path / f"o_{name}"), word)


def test_what_the_breaks_do():
    model, tokenizer = shipped_model()
    prompt_ids, answers = train.prompt_tokens(tokenizer), train.answer_tokens(tokenizer, ["4", "42"])
    completion_ids, completion_mask = train.pad(answers, tokenizer.eos_token_id)
    batch = dict(prompt_ids=prompt_ids, completion_ids=completion_ids, completion_mask=completion_mask, ref_logprobs=torch.ones(2))
    broken = train.sabotage(batch, train.Config(broken="no-reference"), model, tokenizer)
    assert broken["ref_logprobs"].tolist() == [0, 0] and batch["ref_logprobs"].tolist() == [1, 1]
    broken = train.sabotage(batch, train.Config(broken="missing-eos"), model, tokenizer)
    assert broken["completion_mask"].tolist() == [[1, 0, 0], [1, 1, 0]]
    assert broken["ref_logprobs"][0] > broken["ref_logprobs"][1]           # "4" now includes "42"
    assert train.sabotage(batch, train.Config(broken="qzero-floor"), model, tokenizer) is batch
    ref_logprobs = train.enumerate_answers(model, tokenizer)
    optimum = train.closed_form(ref_logprobs, 42, 0.05)

    def q0(**settings):
        return train.estimate_q0(train.Config(**settings), model, model, tokenizer, ref_logprobs, torch.Generator().manual_seed(0), lambda text: None)
    assert q0(broken="qzero-mean-reward") == pytest.approx((optimum["pi_ref"] * optimum["rewards"]).sum().item())
    assert q0(broken="qzero-from-policy") == q0(q0="mc") == pytest.approx(optimum["q0"], abs=0.02)     # untrained: both are one model
    assert q0(broken="qzero-floor") == pytest.approx(q0(q0="mc"), abs=1e-6)                             # a target whose Q0 is above the floor
    assert q0(broken="qzero-floor", target=1, beta=1e-3) >= 1e-3 * math.log(1e-8)


def test_smoke_and_preset_give_way_to_flags():
    class Arguments:
        smoke, preset = True, "original"
    config = train.new_run(dict(epochs=3, beta=0.2), Arguments)
    assert (config.epochs, config.samples, config.beta, config.target) == (3, 16, 0.2, 1)


def test_latest_passes_over_smoke_runs(tmp_path, monkeypatch):
    for script in (train, evaluation):
        monkeypatch.setattr(script, "HERE", tmp_path)
    for age, name in ((30, "20260101-000000_seed1"), (20, "20260102-000000_seed1"), (10, "20260103-000000_seed1_smoke")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "train.json").write_text("{}")
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps(dict(seed=-age)))
        for path in (tmp_path / "runs" / name / "train.json", tmp_path / "runs" / name):
            os.utime(path, (time.time() - age,) * 2)
    assert_one_line_error(call(train, "--resume", "latest"), "--seed", "-20")
    assert evaluation.newest_run("train.json").name == "20260102-000000_seed1"
    with pytest.raises(SystemExit):                               # only an unfinished run has none of these
        evaluation.newest_run("no-such-file")


@pytest.mark.long
@pytest.mark.parametrize("name", train.BREAKS)
def test_every_broken_variant_runs(name, tmp_path):
    assert call(train, "--epochs", "1", "--samples", "32", "--batch-size", "16", "--quiet", "--break", name, "--out", tmp_path / "o").returncode == 0


@pytest.mark.long
def test_two_processes_train_together(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(TRAIN),      # `accelerate launch --cpu` starts one process whatever it is told
               *SMALL, "--out", str(tmp_path / "o")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr[-2000:]
    assert json.loads((tmp_path / "o" / "train.json").read_text())["result"]["answers"] == 4 * 256


def test_shipped_policy_is_at_the_optimum(tmp_path):
    process = run(EVAL, "--json", tmp_path / "e.json")
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "e.json").read_text())["tv"] <= 0.05


def test_uniform_answers_are_all_numbers_alike_and_invalid_ones_all_kinds():
    rng = np.random.default_rng(0)
    counts = np.bincount([int(text) for text in train.uniform(200_000, rng)])
    assert len(counts) == 101 and counts[0] == 0 and abs(counts[1:] / 2000 - 1).max() < 0.12
    texts = train.some_invalid(train.uniform(40_000, rng), train.Config(include_invalid=0.5), rng)
    bad = [text for text in texts if train.parse_guess(text) is None]
    assert abs(len(bad) / 40_000 - 0.5) < 0.02
    kinds = [sum(match) / len(bad) for match in zip(*[(text == "", set(text) == {"0"}, text.startswith("0") and set(text) != {"0"}, text[:1] not in ("", "0")) for text in bad])]
    assert kinds == pytest.approx([0.25] * 4, abs=0.02) and {"0", "00", "000"} <= set(bad)
    assert {len(text) for text in bad if text[:1] not in ("", "0")} == {3}       # 101 to 999
    assert train.some_invalid(["5"] * 100, train.Config(include_invalid=0.0), rng) == ["5"] * 100
    hostile = train.adversarial(20_000, 42, rng)
    near = np.mean([train.reward_of(text, 42) >= -0.3 for text in hostile])
    assert near == pytest.approx(0.05 * np.mean([train.reward_of(text, 42) >= -0.3 for text in train.NUMBERS]), abs=0.006)


@pytest.mark.parametrize("done, factor", [(0.0, 0.01), (0.05, 0.51), (0.5, 0.5), (0.99, 0.01)])
def test_the_step_size_rises_and_falls(done, factor):
    assert train.lr_factor("linear", done) == pytest.approx(factor) and train.lr_factor("constant", done) == 1.0


@pytest.mark.parametrize("distances, epochs", [([], 0), ([5.0], 0), ([5.0, 4.0], 0), ([4.0, 5.0], 1), ([4.0, 4.0, 4.0 - 1e-12], 2), ([4.0, 5.0, 3.0, 3.5], 1)])
def test_epochs_without_gain(distances, epochs):
    assert train.epochs_without_gain([dict(mean_distance=distance) for distance in distances]) == epochs


def test_the_training_loop_keeps_its_books(tmp_path, monkeypatch):
    from accelerate import Accelerator
    steps, rates, judged, collect, update, evaluate = [], [], [], train.collect, train.update, train.evaluate
    monkeypatch.setattr(train, "sabotage", lambda *_: 1 / 0)                   # not without --break
    monkeypatch.setattr(train, "collect", lambda *given: steps.append(collect(*given)) or steps[-1])
    monkeypatch.setattr(train, "evaluate", lambda *given: judged.append(evaluate(*given)) or judged[-1])

    def watched(config, accelerator, policy, optimizer, q0, batch):
        loss, q_terminal = update(config, accelerator, policy, optimizer, q0, batch)
        rates.append((optimizer.param_groups[0]["lr"], loss, q0.item()))
        return loss, q_terminal

    monkeypatch.setattr(train, "update", watched)
    lines, config = [], train.Config(epochs=2, samples=48, batch_size=16, q0="exact", lr=0.001, seed=3)
    _, _, result = train.train(config, tmp_path, Accelerator(cpu=True), lines.append)
    assert len(steps) == 6 and result["epochs"] == 2 and result["answers"] == 96 and 0 < result["train_seconds"] < 60
    assert [rate for rate, _, _ in rates] == pytest.approx([0.001 * train.lr_factor("linear", k / 6) for k in range(6)])
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), map(float, line.split(",")))) for line in lines[1:]]
    assert [row["epoch"] for row in rows] == [1, 2] and len((tmp_path / "timing.csv").read_text().splitlines()) == 3
    for row, some, their, found in zip(rows, (steps[:3], steps[3:]), (rates[:3], rates[3:]), judged):
        assert row["loss"] == pytest.approx(np.mean([loss for _, loss, _ in their]), rel=1e-4)
        assert row["reward"] == pytest.approx(np.mean([[train.reward_of(text, config.target) for text in texts] for _, texts in some]), rel=1e-4)
        assert row["q0_used"] == pytest.approx(their[0][2], rel=1e-4) and row["tv"] == pytest.approx(found["tv"], rel=1e-4)
    model, tokenizer = shipped_model()
    exact = train.closed_form(train.enumerate_answers(model, tokenizer), config.target, config.beta)["q0"]
    assert rows[0]["q0_used"] == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_ends_a_run_that_does_not_get_better(patience, tmp_path, monkeypatch):
    from accelerate import Accelerator
    monkeypatch.setattr(train, "evaluate", lambda *_: dict(tv=0.5, kl=0.5, invalid_mass=0.5, mean_distance=7.0, optimal_mean_distance=1.0))
    config = train.Config(epochs=9, samples=16, batch_size=16, patience=patience)
    _, _, result = train.train(config, tmp_path, Accelerator(cpu=True), lambda *text: None)
    assert result["epochs"] == 1 + patience                                    # the first one is the best


def test_what_is_random_follows_the_seed(tmp_path, monkeypatch):
    from accelerate import Accelerator
    monkeypatch.setattr(train, "load_policy", lambda config: 1 / (torch.initial_seed() == 5))          # an untrained model is random
    with pytest.raises(TypeError):                                              # 1.0 is no model; with another seed: ZeroDivisionError
        train.train(train.Config(seed=5), tmp_path, Accelerator(cpu=True))


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
    from accelerate import Accelerator
    policy, _, _ = train.train(train.Config(epochs=1, samples=64, batch_size=16), tmp_path, Accelerator(cpu=True), lambda *text: None)
    after = kept["reference"].state_dict()
    assert all(torch.equal(after[name], kept["before"][name]) for name in after)
    assert any(not torch.equal(tensor, after[name]) for name, tensor in policy.state_dict().items())


@pytest.mark.parametrize("arguments, words", [
    (["--target", "0"], ["--target"]), (["--target", "101"], ["--target"]), (["--beta", "0"], ["--beta"]), (["--beta", "-1"], ["--beta"]), (["--beta", "nan"], ["--beta"]),
    (["--lr", "0"], ["--lr"]), (["--loss", "huber"], ["squared"]), (["--behaviour", "kind"], ["uniform"]), (["--break", "x"], ["missing-eos"]),
    (["--model", "no/such/model/here"], ["no/such/model/here", "loaded"]), (["--break", "qzero-floor", "--q0", "learned"], ["--q0 learned"]), (["--bta", "1"], ["--help"]),
    (["--samples", "100"], ["--samples", "--batch-size"]), (["--seed", "-1"], ["--seed"]), (["--preset", "seed"], ["original"])])
def test_trainer_refuses_bad_values(arguments, words, tmp_path):
    assert_one_line_error(call(train, *arguments, "--quiet", "--out", tmp_path / "out"), *words)


@pytest.mark.parametrize("arguments", [["--weights", "nowhere"], ["--samples", "0"], ["--seed", "-1"], ["--json", "no/such/x.json"], ["--bars", "."], ["--run", "."],
                                       ["--run", "nowhere"], ["--run", "latest", "--samples", "3"]])
def test_eval_refuses_bad_values(arguments, tmp_path):
    assert_one_line_error(call(evaluation, *arguments, cwd=tmp_path))
