"""Exercises of lesson 7, correct paths only. (Whoever solves them does not read here: the answers stand in it.)"""
import contextlib
import copy
import io
import itertools
import math
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import torch
from common import Blank, Bug, Case, Extend, Measure, Predict, describe

TRAIN = "python kl_bernoulli_gsm8k/train_kl_bernoulli.py"
MINE = "python runs/exercises/kl_bernoulli"


# ---- coin -------------------------------------------------------------------------------------------

def log_sum(numbers):
    """log Σ e^z of Python floats; −∞ for none."""
    top = max(numbers, default=0.0)
    return top + math.log(sum(math.exp(z - top) for z in numbers)) if numbers else -math.inf


def coin_by_hand(logits, total, ids, naive=False):
    """Eq. 1 and its derivatives in Python's 64-bit floats, one row at a time."""
    logp, log1mp, by_logp, by_log1mp = [], [], [], []
    for row, y in zip(logits.tolist(), ids.tolist()):
        everything, others = log_sum(row), log_sum(row[:y] + row[y + 1:])
        logp.append(row[y] - everything)
        log1mp.append(others - everything)
        by_logp.append([(j == y) - math.exp(z - everything) for j, z in enumerate(row)])
        by_log1mp.append([(j != y) * math.exp(z - others) - math.exp(z - everything) for j, z in enumerate(row)])
    return {"log p": torch.tensor(logp), "log(1 − p)": torch.tensor(log1mp),
            "the derivative of log p by the logits": torch.tensor(by_logp), "the derivative of log(1 − p) by the logits": torch.tensor(by_log1mp)}


def coin_and_derivatives(function, logits, total, ids, naive):
    """Both logarithms, and their derivatives by the logits."""
    logits = logits.clone().requires_grad_()
    value = function(logits, logits.logsumexp(dim=-1), ids, naive)
    if not isinstance(value, tuple) or len(value) != 2 or not all(isinstance(x, torch.Tensor) and x.shape == ids.shape for x in value):
        raise TypeError(f"two tensors of the shape {list(ids.shape)} are expected, {describe(value)} came")
    slopes = []
    for one in value:
        slope = torch.autograd.grad(one.sum(), logits, retain_graph=True, allow_unused=True)[0] if one.requires_grad else None
        slopes.append(torch.zeros_like(logits) if slope is None else slope)
    return {"log p": value[0], "log(1 − p)": value[1],
            "the derivative of log p by the logits": slopes[0], "the derivative of log(1 − p) by the logits": slopes[1]}


def coin_cases(module):
    inputs = [("probabilities .7, .2, .1; the second token was sampled", torch.tensor([[0.7, 0.2, 0.1]]).log(), [1]),
              ("two tokens in the worked example of section 3, the second and the first one", torch.tensor([[2.0, 1.0, 0.0, 0.0]] * 2), [1, 0]),
              ("other logits in each row", torch.tensor([[0.5, -1.0, 2.0, 0.0], [3.0, 1.0, -2.0, 1.5], [1.0, 1.0, 1.0, 1.0]]), [2, 3, 0]),
              ("logits 17, 0, 0: p rounds to 1", torch.tensor([[17.0, 0.0, 0.0]]), [0]),
              ("logits 60, 0, 0; the first token, then the second one was sampled", torch.tensor([[60.0, 0.0, 0.0]] * 2), [0, 1])]
    cases = []
    for words, logits, ids in inputs:
        ids = torch.tensor(ids)
        cases.append(Case(words, (logits, logits.logsumexp(dim=-1), ids, False), coin_by_hand(logits, None, ids), look=coin_and_derivatives))
    return cases


def picked(logits, ids):
    return torch.stack([row[y] for row, y in zip(logits, ids)])


def other_logits(logits, ids):
    return torch.stack([torch.cat([row[:y], row[y + 1:]]) for row, y in zip(logits, ids)])


COIN = Blank(
    name="coin", minutes=15,
    asks="""A coin for each row of logits. Heads is the token in ids; tails is any other token (Eq. 1).

    logits [n, V], with gradient; total [n], the logsumexp of each row; ids [n];
    naive: only for --break naive-log1mp, the check leaves it False.
    Returns (log p, log(1 - p)), both [n]. They and their gradients are finite and exact in
    fp32, also where p rounds to 1.""",
    hint="Section 3, `The logarithm of 1 − p`: 1 − p is what the other tokens have together. So no step may make the number p itself. Which value of a logit removes its token from a logsumexp?",
    cases=coin_cases,
    wrong={"log(1 − p) comes from p here. Where p rounds to 1, nothing is left of 1 − p. What do the logits of the other tokens say?":
               lambda logits, total, ids, naive: (picked(logits, ids) - total, torch.log1p(-(picked(logits, ids) - total).exp())),
           "p is kept a little below 1, so that the logarithm is finite. But the value is wrong there, and its gradient is 0.":
               lambda logits, total, ids, naive: (picked(logits, ids) - total, torch.log1p(-(picked(logits, ids) - total).exp().clamp(max=1 - 1e-6))),
           "a small number stands under the logarithm, so that it is finite. But where 1 − p is smaller than that number, the value is wrong.":
               lambda logits, total, ids, naive: (picked(logits, ids) - total, (1 - (picked(logits, ids) - total).exp() + 1e-8).log()),
           "the sampled token is still among the others: log(1 − p) is 0 everywhere.":
               lambda logits, total, ids, naive: (picked(logits, ids) - total, logits.logsumexp(-1) - total),
           "the sampled token's logit became 0. But e^0 = 1, so it still has a share in the sum.":
               lambda logits, total, ids, naive: (picked(logits, ids) - total, logits.scatter(-1, ids[:, None], 0.0).logsumexp(-1) - total),
           "log(1 − p) is not divided by the sum over all tokens: it may be above 0.":
               lambda logits, total, ids, naive: (picked(logits, ids) - total, other_logits(logits, ids).logsumexp(-1)),
           "the coin of the most likely token is computed. Heads is the token in ids.":
               lambda logits, total, ids, naive: (logits.max(-1).values - total, other_logits(logits, logits.argmax(-1)).logsumexp(-1) - total),
           "no gradient comes back from log(1 − p). Eq. 3 needs it.":
               lambda logits, total, ids, naive: (picked(logits, ids) - total, (other_logits(logits, ids).logsumexp(-1) - total).detach())})


# ---- sequence_weights -----------------------------------------------------------------------------------

LENGTHS = (4, 2, 1, 3, 4, 1)                                                # B = 6 answers of at most L = 5 tokens
SOME_RIGHT = (1.0, 0.0, 1.0, 0.0, 1.0, 0.0)
ONE_RIGHT = (0.0, 1.0, 0.0, 1.0, 1.0, 1.0)                                  # groups of 3: one right answer; all right


def weights_by_hand(config, rewards, mask, sequences, correct, N=None, per_answer=None, padded=True, std=False, whole=False, limit=None):
    """Eq. 4 and 5 with loops; the options are typical mistakes."""
    B, L = mask.shape
    G, right = config.group_size, rewards.tolist()
    result = torch.zeros(B, L)
    for i in range(B):
        n = mask[i].sum().item()
        if config.method == "dr_grpo":
            group = right if whole else right[i // G * G:i // G * G + G]
            mean = sum(group) / len(group)
            share = (right[i] - mean) / (sequences * (limit or config.max_new_tokens))
            if std:
                spread = (sum((r - mean) ** 2 for r in group) / (len(group) - 1)) ** 0.5
                share = share / (spread + 1e-4)
            if per_answer == "dr_grpo":
                share = share * (limit or config.max_new_tokens) / n
        else:
            divisor = N if N is not None else sequences if config.method == "kl_batch" else max(1, correct)
            share = math.nan if divisor == 0 else right[i] / divisor            # what 0/0 is in torch
            if per_answer != "kl":
                share = share / n
        for t in range(L):
            if t < n or not padded:
                result[i, t] = share
    return result


def sequence_weights_cases(module):
    mask = (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).float()
    batch, correct, half, group = [SimpleNamespace(method=method, group_size=G, max_new_tokens=10)
                                   for method, G in (("kl_batch", 1), ("kl_correct", 1), ("fixed_half", 1), ("dr_grpo", 3))]
    some, one = torch.tensor(SOME_RIGHT), torch.tensor(ONE_RIGHT)
    inputs = [("kl_correct, all answers are in this process", (correct, some, mask, 6, 3)),
              ("kl_batch, all answers are in this process", (batch, some, mask, 6, 3)),
              ("kl_correct, another process has as many answers, two of them right", (correct, some, mask, 12, 5)),
              ("fixed_half, another process has as many answers, four of them right", (half, one, mask, 12, 8)),
              ("kl_correct, no answer is right anywhere", (correct, torch.zeros(6), mask, 6, 0)),
              ("dr_grpo, groups of three, all answers are equally long", (group, some, torch.ones(6, 5), 6, 3)),
              ("dr_grpo, groups of three; in the second one all answers are right", (group, one, mask, 6, 4)),
              ("dr_grpo, another process has as many answers", (group, some, mask, 12, 5))]
    return [Case(words, args, weights_by_hand(*args)) for words, args in inputs]


SEQUENCE_WEIGHTS = Blank(
    name="sequence_weights", minutes=20,
    asks="""The factor of each token's loss: what stands in front of log p in Eq. 5, without its minus sign
    (method "dr_grpo"), and in front of the token's loss in Eq. 4 (all other methods). The entropy is not in it.

    config.method, config.group_size (G), config.max_new_tokens (L_max);
    rewards [B], 1 or 0; the G answers to a problem stand side by side;
    mask [B, L], 1 at the tokens of an answer, 0 after its end; each answer has a token;
    sequences, correct: how many answers the WHOLE batch has, over all processes, and how
    many of them are right. This process has only B of them. correct may be 0.
    Returns [B, L], 0 where the mask is 0.""",
    hint="First two cases: dr_grpo or not. Then ask of each: what is divided by, the length of the answer or one constant? All answers or the right ones? "
         "centred_rewards is still in the file.",
    cases=sequence_weights_cases,
    wrong={"all methods of Eq. 4 divide by the number of all answers. Two of the three divide by another number.":
               lambda *args: weights_by_hand(*args, N=args[3]),
           "all methods of Eq. 4 divide by the number of right answers. One of the three divides by another number.":
               lambda *args: weights_by_hand(*args, N=max(1, args[4])),
           "you count the answers, or the right ones, of this process only. The whole batch's numbers are among the arguments.":
               lambda config, rewards, mask, sequences, correct: weights_by_hand(config, rewards, mask, len(rewards), int(rewards.sum())),
           "without a right answer you divide by 0.":
               lambda *args: weights_by_hand(*args, N=None if args[0].method in ("kl_batch", "dr_grpo") else args[4]),
           "Dr. GRPO divides by the length of each answer: that is what it does not do. A long wrong answer would be punished less per token.":
               lambda *args: weights_by_hand(*args, per_answer="dr_grpo"),
           "Eq. 4 takes the mean over the tokens of an answer; here a long answer counts more than a short one.":
               lambda *args: weights_by_hand(*args, per_answer="kl"),
           "places after the end of an answer have a weight too. Where is the mask?":
               lambda *args: weights_by_hand(*args, padded=False),
           "the mean of the rewards is taken over the whole batch. Only answers to the same problem are compared.":
               lambda *args: weights_by_hand(*args, whole=True),
           "the advantages are divided by the standard deviation of the group, as in GRPO. Dr. GRPO does not do that.":
               lambda *args: weights_by_hand(*args, std=True),
           "L_max is the longest answer of this batch here. It changes from batch to batch; Eq. 5 has a constant.":
               lambda *args: weights_by_hand(*args, limit=args[2].shape[1])})


# ---- result_of ------------------------------------------------------------------------------------------

def said_number(function, text, thinks):
    """What the function reads, in words: a number as text, or "no number"."""
    value = function(text, thinks)
    if value is None:
        return "no number"
    return str(Fraction(value)) if isinstance(value, (int, float, Fraction)) and not isinstance(value, bool) else f"the {type(value).__name__} {value!r}"


ANSWERS = [("a thought, then the result", "7+8=15\n</think>\n#### 15", True, "15"),
           ("no thought was opened", "7+8=15\n#### 15", False, "15"),
           ("a number with a comma", "6*180=1080\n</think>\n#### 1,080", True, "1080"),
           ("the answer opens the thought itself", "<think>7+8=15</think>#### 15", False, "15"),
           ("a thought that never ends", "7+8=15\n#### 15", True, "no number"),
           ("#### stands in the thought only", "7+8=15\n#### 15\n</think>\nSo it is 15", True, "no number"),
           ("no ####, but a number", "7+8=15\n</think>\n15", True, "no number"),
           ("nothing after ####", "7+8=15\n</think>\n####", True, "no number"),
           ("a word after the number", "</think>\n#### 15 apples", True, "no number"),
           ("two times ####", "</think>\n#### 15\nNo, wait.\n#### 16", True, "16"),
           ("two thoughts", "#### 14</think>\n#### 15\n<think>No.</think>\n#### 16", True, "16"),
           ("after the result a new thought begins, which never ends", "</think>\n#### 15\n<think>or is it 16?", True, "no number"),
           ("the second thought never ends, but has a result in it", "</think>\n#### 15\n<think>No.\n#### 16", True, "no number")]


def plain_number(text):
    """The numbers that occur in ANSWERS."""
    return Fraction(text.strip().replace(",", "")) if re.fullmatch(r"\s*\d[\d,]*\s*", text) else None


def read_answer(text, thinks, closed=True, needs_mark=True, first=False, only_number=True, must_close=False):
    """The number after the last ####, by cutting the text at its marks; the options are typical mistakes."""
    pieces = re.split(r"(</?think>)", text)
    open_thought = thinks
    for mark in pieces[1::2]:
        open_thought = mark == "<think>"
    if closed and open_thought or must_close and "</think>" not in text:
        return None
    said = pieces[-1].split("####")
    if len(said) == 1 and needs_mark:
        return None
    end = said[min(1, len(said) - 1)] if first else said[-1]
    found = re.search(r"\d[\d,]*", end)
    return plain_number(end) if only_number else found and plain_number(found[0])


RESULT_OF = Blank(
    name="result_of", minutes=15,
    asks="""The number that an answer gives as its result: the program that judges reads only this.

    text: an answer, such as "7+8=15\\n</think>\\n#### 15";
    thinks: whether the prompt has already opened a thought, so that the text begins inside it.
    A thought may also be opened and closed in the text: THOUGHT finds the marks, and group 1
    of a match is "/" in a closing mark.
    Returns what number_of makes of all that stands after the last "####"; None without "####".
    Only what stands after the last thought counts; None if a thought is still open at the end.""",
    hint="Two questions, one after the other. Is a thought open at the end? The last mark decides, and `thinks` if there is none. What stands after the last mark? THOUGHT.split cuts a text at its marks.",
    cases=lambda module: [Case(words, (text, thinks), wanted, look=said_number) for words, text, thinks, wanted in ANSWERS],
    wrong={"you take the last number of the text, wherever it stands. A number in the working is no result.":
               lambda text, thinks: plain_number((re.findall(r"\d[\d,]*", text) or ["?"])[-1]),
           "a thought that is still open at the end does not stop you. Where do you use `thinks`, and the last mark?":
               lambda text, thinks: read_answer(text, thinks, closed=False),
           "the first #### counts. An answer may correct itself: the last one does.":
               lambda text, thinks: read_answer(text, thinks, first=True),
           "you look for a number after ####. Use all that stands there: with a word it is no number.":
               lambda text, thinks: read_answer(text, thinks, only_number=False),
           "a number without #### counts too.":
               lambda text, thinks: read_answer(text, thinks, needs_mark=False),
           "you always ask for </think>. An answer to a prompt that opened no thought does not need it.":
               lambda text, thinks: read_answer(text, thinks, must_close=True),
           "you return the text, or None for it. number_of makes a number of it.":
               lambda text, thinks: str(read_answer(text, thinks))})


# ---- pass_at ----------------------------------------------------------------------------------------------

def pass_by_counting(right, k, good=any):
    """All choices of k of the n answers to each problem: the share with a right one, then the mean over problems."""
    shares = []
    for row in right.tolist():
        choices = list(itertools.combinations(row, k))
        shares.append(sum(map(good, choices)) / len(choices))
    return sum(shares) / len(shares)


def pass_at_cases(module):
    table = np.array([[True, False, False, False], [False, False, False, False], [True, True, False, True]])       # P = 3 problems, n = 4
    wide = np.array([[True] + [False] * 9, [True, False] * 5])                                                    # P = 2, n = 10
    inputs = [("one problem, one of four answers is right, k = 2", np.array([[False, False, True, False]]), 2), ("k = 1", table, 1), ("k = 2", table, 2),
              ("k = 3; one problem has fewer than 3 wrong answers", table, 3), ("k = n", table, 4), ("ten answers to each problem, k = 8", wide, 8)]
    return [Case(words, (right, k), pass_by_counting(right, k)) for words, right, k in inputs]


PASS_AT = Blank(
    name="pass_at", minutes=15, script="kl_bernoulli_eval.py",
    asks="""Pass@k without bias: choose k of the n answers to a problem, without putting any back. What is the
    chance that at least one of them is right? The mean over the problems.

    right [P, n]: a NumPy array of True and False; k: from 1 to n.
    Returns a float. All choices count equally, so it does not depend on the order of the answers.""",
    hint="It is easier to say when a choice fails. How many choices of k of the n answers are there, and how many hold wrong answers only? `math.comb` counts choices; it is 0 if k is too large.",
    cases=pass_at_cases,
    wrong={"you take k answers with replacement, 1 − (1 − share of right ones)^k. The same wrong answer may then be chosen twice.":
               lambda right, k: float(np.mean(1 - (1 - right.mean(axis=1)) ** k)),
           "only the first k answers to each problem are used. The others are data too.":
               lambda right, k: float(right[:, :k].any(axis=1).mean()),
           "a problem counts as soon as any of its n answers is right. k does not matter then.":
               lambda right, k: float(right.any(axis=1).mean()),
           "it is the chance that all k answers are right. At least one is enough.":
               lambda right, k: pass_by_counting(right, k, all),
           "you count the wrong answers of all problems together. Each problem has a chance of its own.":
               lambda right, k: 1 - math.comb(int((~right).sum()), k) / math.comb(right.size, k),
           "it is the chance to fail.": lambda right, k: 1 - pass_by_counting(right, k)})


# ---- silent bugs ----------------------------------------------------------------------------------------------

def tiny_model():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32, initializer_range=0.3,
                                      pad_token_id=None, eos_token_id=2, bos_token_id=None)).eval()


def made_up_batch(rewards, seed=0, T=3, L=5):
    """A batch as collect() makes one: answers of 1 to L tokens to prompts without padding."""
    B, g = len(rewards), torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, L + 1, (B,), generator=g)
    lengths[0] = L
    return dict(prompt_ids=torch.randint(3, 40, (B, T), generator=g), prompt_mask=torch.ones(B, T, dtype=torch.long),
                completion_ids=torch.randint(3, 40, (B, L), generator=g), completion_mask=(torch.arange(L) < lengths[:, None]).float(),
                old_logprobs=torch.zeros(B, L), rewards=torch.tensor(rewards))


def settings(module, **changes):
    return module.Config(**(dict(max_grad_norm=1e9, max_new_tokens=8, group_size=1, micro_batch=8) | changes))


def gradient_of_update(module, config, model, batch, accelerator=None):
    """(the gradient that update() leaves in the weights, what it returns); the weights stay."""
    from accelerate import Accelerator
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.zero_grad()
    terms = module.update(config, accelerator or Accelerator(cpu=True), model, optimizer, batch)
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]), terms


def gradient_by_hand(model, batch, loss_of):
    """The gradient of the sum of loss_of(i, logits [n, V], ids [n]) over the answers, each read alone."""
    total = 0.0
    for i, mask in enumerate(batch["completion_mask"]):
        n = int(mask.sum())
        ids = torch.cat([batch["prompt_ids"][i], batch["completion_ids"][i, :n]])
        logits = model(input_ids=ids[None]).logits[0, -n - 1:-1]
        total = total + loss_of(i, logits, ids[-n:])
    slopes = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if slope is None else slope.flatten() for p, slope in zip(model.parameters(), slopes)])


def close(one, two):
    return ((one - two).norm() <= 1e-3 * two.norm() + 1e-7).item()


def updates_are_alike(module):
    config, here = module.Config(batch_size=64, group_size=4, seed=3), SimpleNamespace(num_processes=1, process_index=0)
    problems = list(range(1000))
    asked, streams = zip(*[module.choose(config, here, problems, number) for number in (1, 2, 1)])
    numbers = [torch.rand(4, generator=stream).tolist() for stream in streams]
    if set(asked[0]) == set(asked[1]):
        return "updates 1 and 2 ask the very same problems, although there are a thousand to choose from."
    if numbers[0] == numbers[1]:
        return "updates 1 and 2 sample with the same random numbers."
    if asked[0] != asked[2] or numbers[0] != numbers[2]:
        return "update 1, done a second time, asks other problems or samples with other random numbers; a resumed run needs the same ones."
    other, stream = module.choose(module.Config(batch_size=64, group_size=4, seed=4), here, problems, 1)
    return "seeds 3 and 4 ask the same problems." if set(other) == set(asked[0]) else ""


def some_answers_do_not_teach(module):
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]              # the third group has nothing to compare
    model, batch = tiny_model(), made_up_batch(rewards)
    advantages = [.75, -.25, -.25, -.25, .25, .25, .25, -.75] + [0.0] * 4
    config = settings(module, method="dr_grpo", group_size=4)
    mine, terms = gradient_of_update(module, config, model, batch)
    if terms["trained"] != 8:
        return f"8 of the 12 answers in a batch are in groups with right and wrong ones; `trained` says {terms['trained']}."
    right = gradient_by_hand(model, batch, lambda i, logits, ids: -advantages[i] * logits.log_softmax(-1).gather(-1, ids[:, None]).sum() / (12 * 8))
    return "" if close(mine, right) else "with groups of four, the gradient is not that of Eq. 5."


class TwoProcesses:
    """Two threads that exchange numbers as two processes do; all else comes from a real Accelerator."""

    def __init__(self):
        from accelerate import Accelerator
        self.real, self.barrier, self.slots = Accelerator(cpu=True), threading.Barrier(2, timeout=20), [None, None]

    def seen_by(self, rank):
        def gather(tensor):
            self.slots[rank] = tensor.detach().clone()
            self.barrier.wait()
            both = list(self.slots)
            self.barrier.wait()
            return torch.stack(both) if tensor.dim() == 0 else torch.cat(both)

        def reduce(tensor, reduction="sum", scale=1.0):
            self.slots[rank] = tensor.detach().clone()
            self.barrier.wait()
            total = self.slots[0] + self.slots[1]
            self.barrier.wait()
            return total / 2 if reduction == "mean" else total

        real = self.real
        return SimpleNamespace(num_processes=2, process_index=rank, is_main_process=rank == 0, device=real.device, reduce=reduce, gather=gather, gather_for_metrics=gather,
                               unwrap_model=real.unwrap_model, no_sync=real.no_sync, autocast=real.autocast, backward=real.backward,
                               clip_grad_norm_=real.clip_grad_norm_, wait_for_everyone=self.barrier.wait)


def two_processes_are_not_one(module):
    batch = made_up_batch([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0])                     # three right answers, then one
    halves = [{name: values[:4] for name, values in batch.items()}, {name: values[4:] for name, values in batch.items()}]
    for method in ("kl_correct", "kl_batch"):
        config = settings(module, method=method)
        whole, terms = gradient_of_update(module, config, tiny_model(), batch)
        world = TwoProcesses()
        models = [tiny_model() for _ in halves]
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(gradient_of_update, module, config, model, half, world.seen_by(rank)) for rank, (model, half) in enumerate(zip(models, halves))]
            (first, one), (second, two) = [job.result() for job in jobs]
        both = (first + second) / 2                                                      # what two real processes do with their gradients
        for name in ("loss", "trained", "correct"):
            for rank, said in enumerate((one, two)):
                if not math.isclose(said[name], terms[name], rel_tol=1e-3):
                    return (f"eight answers were shared by two processes ({method}). Process {rank} reports {name} = {said[name]:.4g}; "
                            f"one process with all eight answers reports {terms[name]:.4g}.")
        if not close(both, whole):
            return f"eight answers were shared by two processes ({method}). Their gradient has the length {both.norm():.4g}, or another direction; that of one process has {whole.norm():.4g}."
    return ""


BUGS = [
    Bug(number=1, minutes=15,
        symptom=f"""Training seems to go very well: the share of right sampled answers rises to 72 % in 20 updates. But greedy answers to new problems do not follow:
53.0 % in the last line, and the trainer reaches 61.5 % there, with 23 to 55 % in the column `right`. Compare both columns:

  {MINE}/bug_1.py --updates 20 --batch-size 64 --seed 0
  {TRAIN} --updates 20 --batch-size 64 --seed 0""",
        hint="The policy gets better and better at something that does not help with new problems. Print the first question of each update.",
        old="    rng = np.random.default_rng([config.seed, number])", new="    rng = np.random.default_rng(config.seed)",
        reveal="The generator starts anew with the same seed in every update. So each update asks the same 16 problems with the same random numbers, and the policy learns these by heart.",
        notices=updates_are_alike),
    Bug(number=2, minutes=20,
        symptom=f"""Accuracy rises as it should. But the first line has `trained` 44 and loss +0.0020, and the trainer has 80 and −0.0064, with the same answers and 25.0 %
of them right. What is trained here is no longer Dr. GRPO. (`--data data` and `--eval-problems 20` only make the tests short.)

  {MINE}/bug_2.py --updates 1 --batch-size 256 --seed 0 --data data --eval-problems 20
  {TRAIN} --updates 1 --batch-size 256 --seed 0 --data data --eval-problems 20""",
        hint="In a group with right and wrong answers all four have an advantage. Which of them are in `kept`? Print their rewards.",
        old="    matters = weights.abs() + abs(config.ent_coef) * entropy_weights            # [B, L]",
        new="    matters = weights + abs(config.ent_coef) * entropy_weights                  # [B, L]",
        reveal="Without `abs`, an answer with a negative weight does not matter. All wrong answers are left out: they no longer lower anything, and the baseline is no baseline any more, it only scales the right answers.",
        notices=some_answers_do_not_teach),
    Bug(number=3, minutes=20,
        symptom=f"""One process trains as the trainer does. Two processes do not: in the first line loss and gradient are 0.0095 and 0.397, and the trainer has 0.0047 and
0.198. `right` and `trained` agree. (Where torchrun does not start on your machine, the check still plays two processes.)

  torchrun --standalone --nproc_per_node 2 {MINE.split()[1]}/bug_3.py --device cpu --method kl_correct --batch-size 64 --updates 1 --seed 0 --data data --eval-problems 20
  torchrun --standalone --nproc_per_node 2 {TRAIN.split()[1]} --device cpu --method kl_correct --batch-size 64 --updates 1 --seed 0 --data data --eval-problems 20""",
        hint="Each process has half of the answers. Which numbers must belong to the whole batch? metrics.csv has two columns that the console does not show.",
        old='    correct = int(accelerator.reduce(rewards.sum(), "sum"))', new="    correct = int(rewards.sum())",
        reveal="Each process divides by its own number of right answers, about half of all. So the sum is about twice too large, and a process with few right answers gives each of them more weight. "
               "Column `correct` of metrics.csv shows it: 8, and 16 in the trainer. kl_batch and dr_grpo do not use this number.",
        notices=two_processes_are_not_one)]


# ---- predict, measure ---------------------------------------------------------------------------------------

FAVOURITES = Predict(
    name="favourites", minutes=15,
    question="""With --temperature 0.001 nearly every sampled token is the favourite, so all answers to one problem are the same. Training divides the logits by the
same temperature. About a third of the answers are right. Run one update with --method kl_correct, fixed_half and dr_grpo, and look at `trained`, `gradient`
and `greedy`. (--data data and --eval-problems 20 only make the tests short; before training 8 of these 20 answers are right.) Which method still finds something
to learn?""",
    choices={"a": "kl_correct only: it is the one that learns from right answers alone.", "b": "fixed_half only.",
             "c": "dr_grpo only: it is the one that uses the wrong answers too.", "d": "kl_correct and fixed_half: both have right answers to learn from.", "e": "None of them."},
    command=f"{TRAIN} --updates 1 --batch-size 256 --seed 0 --data data --eval-problems 20 --temperature 0.001 --method kl_correct",
    answer="b",
    explanation="""kl_correct trains on 94 right answers with the gradient 0.000: p = P at every token, and the two coins are the same. dr_grpo has `trained` 0 and no gradient (nan): four
answers that are alike have the same reward, so nothing is left of r − mean r. fixed_half has the gradient 3769. (The size says little: a logit that is divided by .001 has a
gradient that is a thousand times larger.) Its derivative is p − ½, about +½ at each token, and a step goes against it. So it pushes right answers down: of the 20 greedy
answers 6 are right after this single update, with the other two methods 8 as before.""",
    hint="Section 3, `Its gradient`: put p = P into the table with the three targets. And what is r − mean r, if four answers are the same?")

MIXED = Measure(
    name="mixed_groups", minutes=15,
    question="""Dr. GRPO learns from groups that have right and wrong answers. Train one update with a seed of your own, 5 or above, and bring back `trained`, of 512 answers. Before
you run it: the base solves a third of the problems at T = 1. If every answer to every problem were right with the chance 1/3, how many of the 128 groups of four
would have both, and how many answers are that? (--data data and --eval-problems 20 only make the tests short.)""",
    command=f"{TRAIN} --updates 1 --data data --eval-problems 20 --seed 5",
    values=(172, 208, 216, 224, 180),
    explanation="""With the same chance everywhere, 1 − (2/3)^4 − (1/3)^4 = 79 % of the groups would have both: 404 answers. Five seeds have 200 on average, 39 %. So problems are not equally hard: the base
solves some nearly always and some hardly ever, and neither kind teaches anything. STUDY.md, `On a real model`, has the other end: where nothing is solved, nothing is learned.""",
    hint="It is the column `trained` of the line with update 1. 79 % would be the share of groups with both if all problems were equally hard.")


# ---- extend ---------------------------------------------------------------------------------------------------

def need(module, *names):
    for name in names:
        assert hasattr(module, name), f"The file has no {name}."


def target_by_hand(p, rest, target):
    """KL of the coin τ and the coin p, with 1 − p given as `rest`; 0·log 0 is 0."""
    return sum(share * math.log(share / chance) for share, chance in ((target, p), (1 - target, rest)) if share)


def loss_has_the_values_of_a_kl(module):
    need(module, "target_loss")
    logits = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 3.0, -1.0, 0.0], [9.0, 0.0, 0.0, 0.0], [25.0, 0.0, 0.0, 0.0]])
    ids = torch.tensor([1, 2, 0, 0])
    for target in (0.9, 0.5, 0.2, 1.0, 0.0):
        logits.requires_grad_().grad = None
        terms = module.token_terms(logits, ids)
        came = module.target_loss(terms.logp, terms.log1mp, target)
        assert isinstance(came, torch.Tensor) and came.shape == (4,), f"target_loss gives no tensor [n] for τ = {target}."
        for k, (row, y) in enumerate(zip(logits.tolist(), ids.tolist())):
            everything = log_sum(row)
            right = target_by_hand(math.exp(row[y] - everything), math.exp(log_sum(row[:y] + row[y + 1:]) - everything), target)
            assert math.isclose(came[k].item(), right, rel_tol=1e-4, abs_tol=1e-4), f"target_loss gives {came[k].item():.4f} for τ = {target}, p = {math.exp(row[y] - everything):.4f}; expected {right:.4f}."
        came.sum().backward()
        slope = logits.grad.gather(1, ids[:, None])[:, 0]
        for k, p in enumerate(logits.detach().softmax(-1).gather(1, ids[:, None])[:, 0].tolist()):
            assert math.isclose(slope[k].item(), p - target, abs_tol=1e-3), f"The derivative by the token's logit is {slope[k].item():.4f} for τ = {target}, p = {p:.4f}; expected p − τ = {p - target:.4f}."


def flag_of_target(module, *words):
    """The Config of a command line, or None if the script refuses it; what argparse prints is swallowed."""
    before, sys.argv = sys.argv, ["mine.py", *words]
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return module.new_run(*module.parse_args())
    except SystemExit:
        return None
    finally:
        sys.argv = before


def command_line_knows_it(module):
    config = flag_of_target(module, "--method", "fixed_target", "--target", "0.7")
    assert config is not None, "The script refuses --method fixed_target --target 0.7."
    assert config.method == "fixed_target" and getattr(config, "target", None) == 0.7, "--target 0.7 does not become config.target."
    assert config.group_size == 1, f"The method compares no answers, so --group-size should be 1 like that of kl_correct; it is {config.group_size}."
    config = flag_of_target(module, "--method", "fixed_target")
    assert config is not None and config.target == 0.9, "Without --target, τ should be 0.9."
    for wrong in ("1.5", "-0.1", "many"):
        assert flag_of_target(module, "--method", "fixed_target", "--target", wrong) is None, f"--target {wrong} is not refused."


def update_uses_it(module):
    batch = made_up_batch([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    model, found = tiny_model(), []
    for target in (0.9, 0.3):
        def loss_of(i, logits, ids):
            if not batch["rewards"][i]:
                return logits.sum() * 0
            p = logits.double().softmax(-1).gather(1, ids[:, None])[:, 0]
            return (-target * p.log() - (1 - target) * (1 - p).log()).mean() / 3
        mine, terms = gradient_of_update(module, settings(module, method="fixed_target", target=target), model, batch)
        right = gradient_by_hand(model, batch, loss_of).float()
        found.append(mine)
        assert terms["trained"] == 3, f"3 of 6 answers are right; update says that it trained on {terms['trained']}."
        if len(found) == 2 and close(*found):
            raise AssertionError("The gradient of update is the same with τ = 0.9 and τ = 0.3: the flag is read, but not used.")
        assert close(mine, right), (f"With τ = {target} the gradient of update has the length {mine.norm():.4f}, or another direction; expected {right.norm():.4f}: "
                                    "the mean over the tokens of each right answer, divided by the number of right answers.")


def other_methods_stay(module):
    logits = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 3.0, -1.0, 0.0]])
    terms = module.token_terms(logits, torch.tensor([1, 1]))
    for changes, right in ((dict(method="kl_correct"), (0.3421, 0.0)), (dict(method="kl_batch"), (0.3421, 0.0)), (dict(method="dr_grpo"), (1.4938, 0.1114)),
                           (dict(method="fixed_half"), (0.0, 0.4873)), (dict(method="fixed_half", half_tokens="all"), (0.1809, 0.4873))):
        came = module.token_losses(settings(module, **changes), terms)
        assert torch.allclose(came, torch.tensor(right), atol=1e-3), f"token_losses of {changes} gives {came.tolist()}, expected {list(right)}."


FIXED_TARGET = Extend(
    name="fixed_target", minutes=60,
    asks="""Add the method `fixed_target`: the target for p is a fixed number τ, as in `Its gradient` in section 3. It learns from right answers only, with the weights of Eq. 4, where N
is the number of right answers. Write

  target_loss(logp, log1mp, target)     the loss of each token [n]: KL of the coins τ and p;
                                        also for τ = 1 (it is −log p) and τ = 0
  --method fixed_target --target τ      τ from 0 to 1, 0.9 if the flag is omitted

Then compare τ = 0.9 and τ = 1 with the table `All methods on equal terms` in STUDY.md. Predict first: which way do entropy and greedy accuracy go? At τ = 1
the loss is the plain log-likelihood of right answers. (A few minutes each; `--seed 0` is the first of the table's three.)

  python runs/exercises/kl_bernoulli/fixed_target.py --method fixed_target --updates 30 --batch-size 256 --seed 0 --target 0.9""",
    hint="METHODS, Config and token_losses have to know it; sequence_weights already does the right thing for a method that it does not know. Each field of Config is a flag, and `low` and `high` "
         "are checked. math.log(0) is an error: a share of 0 has no term.",
    accepts={"target_loss is the KL of two coins": loss_has_the_values_of_a_kl, "the command line knows the method and its flag": command_line_knows_it,
             "update learns with this loss": update_uses_it, "the other methods are as before": other_methods_stay})

EXERCISES = [COIN, SEQUENCE_WEIGHTS, RESULT_OF, PASS_AT, *BUGS, FAVOURITES, MIXED, FIXED_TARGET]
