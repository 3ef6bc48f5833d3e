"""Exercises of lesson 5, GRPO. (Whoever solves them does not read here: the answers stand in it.)"""
import contextlib
import copy
import io
import itertools
import math
import tempfile
from pathlib import Path
from unittest import mock

import torch
from common import Blank, Bug, Case, Extend, Measure, Predict


def constants(values):
    """The same without gradients, so that they print as numbers."""
    return tuple(torch.as_tensor(value).detach() for value in values)


# ---- group_advantages -------------------------------------------------------------------------------

def mean(values):
    return sum(values) / len(values)


def std(values, off=1):
    return (sum((value - mean(values)) ** 2 for value in values) / (len(values) - off)) ** 0.5


def advantages(rewards, group_size, scale, off=1, small=1e-4, power=1, interleaved=False, over_batch=False, others=False):
    """Eq. 1 with loops; the options are typical mistakes."""
    values = rewards.tolist()
    P = len(values) // group_size
    result = [0.0] * len(values)
    for p in range(P):
        group = range(p, len(values), P) if interleaved else range(p * group_size, (p + 1) * group_size)
        for i in group:
            compared = values if over_batch else [values[j] for j in group if j != i or not others]
            spread = {"group": values if over_batch else [values[j] for j in group], "batch": values, "none": None}[scale]
            divisor = std(spread, off) ** power + small if spread else 1.0
            result[i] = (values[i] - mean(compared)) / divisor if divisor else math.nan
    return torch.tensor(result)


def with_flag(function, rewards, *rest):
    """The advantages, and whether a gradient can flow back from them to the rewards."""
    value = function(rewards.clone().requires_grad_(), *rest)
    return value, bool(getattr(value, "requires_grad", False))


def group_advantages_cases(module):
    cases = [("two prompts with three answers each", [3.0, 1.0, 2.0, 0.0, 0.5, 4.0], 3, "group"),
             ("three prompts with two answers each", [3.0, 1.0, 2.0, 0.0, 0.5, 4.0], 2, "group"),
             ("the four answers to the first prompt have equal rewards", [2.0, 2.0, 2.0, 2.0, 1.0, 0.0, 0.0, 0.5], 4, "group"),
             ("all answers are almost equally good", [0.0, 2e-4, 1e-4, 3e-4, 0.0, 6e-4], 3, "group"),
             ("scale is \"batch\"", [3.0, 1.0, 2.0, 0.0, 0.5, 4.0], 3, "batch"),
             ("scale is \"none\"", [3.0, 1.0, 2.0, 0.0, 0.5, 4.0], 3, "none")]
    cases = [Case(words, (torch.tensor(rewards), G, scale), advantages(torch.tensor(rewards), G, scale)) for words, rewards, G, scale in cases]
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5])
    return [*cases, Case("the rewards carry a gradient", (rewards, 4, "group"), (advantages(rewards, 4, "group"), False), look=with_flag)]


def keeps_the_gradient(rewards, group_size, scale):
    return rewards - rewards + advantages(rewards, group_size, scale)


GROUP_ADVANTAGES = Blank(
    name="group_advantages", minutes=15,
    asks="""How much better an answer is than the others to the same prompt (Eq. 1).

    rewards [P·G]: the G answers to a prompt side by side; group_size: G.
    scale: what the difference is divided by. "group": the std of the G rewards (Eq. 1);
    "batch": the std of all P·G rewards; "none": nothing. Both stds are unbiased, and the small
    number of Eq. 1 is added to both.
    Returns [P·G] without a gradient. A group of equal rewards gets 0.""",
    hint="Give the rewards the shape [P, G] first. Then Eq. 1 goes along dim=1; with keepdim=True a mean of shape [P, 1] fits. Flatten at the end.",
    cases=group_advantages_cases,
    wrong={"the std is the biased one: you divide the squares by their number, not by one less.":
               lambda *args: advantages(*args, off=0),
           "you compare an answer with all answers of the batch. An easy prompt then gets good marks for each of its answers, whatever they say.":
               lambda *args: advantages(*args, over_batch=True),
           "you put answers to different prompts into one group. Neighbours in `rewards` belong together.":
               lambda *args: advantages(*args, interleaved=True),
           "you subtract the mean of the OTHER answers. That is RLOO; Eq. 1 has the mean of all G.":
               lambda *args: advantages(*args, others=True),
           "you divide by the variance. What is its root?":
               lambda *args: advantages(*args, power=2),
           "the small number of Eq. 1 is missing. What happens in a group of equal rewards?":
               lambda *args: advantages(*args, small=0.0),
           "you never divide by a std.":
               lambda rewards, group_size, scale: advantages(rewards, group_size, "none"),
           "you divide by the std of the group whatever `scale` says.":
               lambda rewards, group_size, scale: advantages(rewards, group_size, "group"),
           "the numbers are right, but a gradient can flow through them. An advantage is a constant of the loss.": keeps_the_gradient})


# ---- kl_estimate -------------------------------------------------------------------------------------

NOW = torch.log(torch.tensor([[0.5, 0.2, 0.9], [0.1, 0.4, 0.3]]))             # [B = 2, L = 3]
REF = torch.log(torch.tensor([[0.25, 0.4, 0.9], [0.7, 0.4, 0.01]]))
RATIO = torch.tensor([[1.0, 1.2, 0.7], [0.9, 1.5, 1.0]])
OUTCOMES = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))                    # all four tokens of a language
OUTCOMES_REF = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
FAR, FAR_REF = torch.tensor([[-0.01, -25.0]]), torch.tensor([[-18.0, -0.01]])


def kl_of_token(d, ratio, kind):
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d, "k3-ratio": ratio * (math.exp(-d) - 1 + d)}[kind]


def slope_of_token(d, ratio, kind):
    """The derivative by log π; that of the ratio is the ratio itself."""
    return {"k1": 1.0, "k2": d, "k3": 1 - math.exp(-d), "k3-ratio": ratio * (math.exp(-d) - 1 + d + 1 - math.exp(-d))}[kind]


def each_token(function, logprobs, ref_logprobs, ratio, kind):
    return torch.tensor([[function((p - q).item(), r.item(), kind) for p, q, r in zip(*rows)] for rows in zip(logprobs, ref_logprobs, ratio)])


def value_and_slope(function, logprobs, ref_logprobs, ratio, kind):
    """The estimates, and their derivative by each log-probability, with the ratio of Eq. 2 depending on it too."""
    logprobs = logprobs.clone().requires_grad_()
    value = function(logprobs, ref_logprobs, ratio * (logprobs - logprobs.detach()).exp(), kind)
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return value, "no gradient comes back from the estimate"
    value.sum().backward()
    return value, logprobs.grad


def mean_over_tokens(function, logprobs, ref_logprobs, ratio, kind):
    """The mean of the estimate over tokens sampled from π: each token weighted with its probability."""
    return (logprobs.exp() * function(logprobs, ref_logprobs, ratio, kind)).sum()


def kl_estimate_cases(module):
    cases = [Case(f"kind is \"{kind}\": values and derivatives", (NOW, REF, RATIO, kind),
                  (each_token(kl_of_token, NOW, REF, RATIO, kind), each_token(slope_of_token, NOW, REF, RATIO, kind)), look=value_and_slope)
             for kind in ("k1", "k2", "k3", "k3-ratio")]
    cases += [Case(f"{kind}, two tokens about which the models disagree completely", (FAR, FAR_REF, torch.ones(1, 2), kind),
                   each_token(kl_of_token, FAR, FAR_REF, torch.ones(1, 2), kind)) for kind in ("k1", "k3")]
    kl = sum(p.exp().item() * (p - q).item() for p, q in zip(OUTCOMES[0], OUTCOMES_REF[0]))
    return [*cases, *[Case(f"{kind}: its mean over all four tokens of a small language must be the KL", (OUTCOMES, OUTCOMES_REF, torch.ones(1, 4), kind),
                           torch.tensor(kl), look=mean_over_tokens) for kind in ("k1", "k3")]]


def kl(logprobs, ref_logprobs, ratio, kind, sign=1, half=2, one=1.0, growth=-1, fixed_ratio=False, no_ratio=False):
    """The four estimates in one line each; the options are typical mistakes."""
    d = sign * (logprobs - ref_logprobs)
    k3 = (growth * d).exp() - one + d
    ratio = torch.ones_like(ratio) if no_ratio else ratio.detach() if fixed_ratio else ratio
    return {"k1": d, "k2": d.square() / half, "k3": k3, "k3-ratio": k3 * ratio}[kind]


KL_ESTIMATE = Blank(
    name="kl_estimate", minutes=15,
    asks="""KL(π_θ‖π_ref) per token in nats, estimated from the sampled tokens alone (Eq. 3 and the table "Which KL?").

    logprobs, ref_logprobs [B, L]: log-probabilities of the sampled tokens under π_θ and under the
    reference; ratio [B, L]: ρ of Eq. 2.
    kind: "k1", "k2", "k3" or "k3-ratio". ("wrong" is for --break wrong-kl; you may leave it out.)
    Returns [B, L], with the gradients that the table needs.""",
    hint="All four are made of d, the difference of the two log-probabilities. Which of the two comes first? Look at a token that π_θ likes more than "
         "the reference does: d must be positive there.",
    cases=kl_estimate_cases,
    wrong={"d has the wrong sign. Where π_θ gives a token more probability than the reference, d > 0.": lambda *args: kl(*args, sign=-1),
           "in k3 the sign in the exponent is wrong.": lambda *args: kl(*args, growth=1),
           "k3 lacks the −1. It must be 0 where both models agree.": lambda *args: kl(*args, one=0.0),
           "k2 lacks its factor.": lambda *args: kl(*args, half=1),
           "you weigh each token with its probability. Sampling has done that already: likely tokens come often.":
               lambda logprobs, *rest: logprobs.exp() * kl(logprobs, *rest),
           "k1 is made positive. A single estimate may be negative; only then is the mean right.":
               lambda logprobs, ref_logprobs, ratio, kind: kl(logprobs, ref_logprobs, ratio, kind).abs(),
           "k3-ratio lacks the ratio.": lambda *args: kl(*args, no_ratio=True),
           "in k3-ratio the ratio has lost its gradient.": lambda *args: kl(*args, fixed_ratio=True),
           "the values are right, but no gradient comes back: nothing would hold the policy.":
               lambda logprobs, *rest: kl(logprobs.detach(), *rest).detach()})


# ---- grpo_loss ----------------------------------------------------------------------------------------

OLD = torch.log(torch.tensor([[0.4, 0.5, 0.3, 0.8], [0.4, 0.5, 0.3, 0.8], [0.2, 0.6, 0.5, 0.9]]))          # [B = 3, L = 4]
RATIOS = torch.tensor([[1.25, 0.7, 1.1, 1.0], [1.25, 0.7, 1.1, 1.0], [1.5, 0.95, 0.6, 1.0]])
REFS = torch.log(torch.tensor([[0.25, 0.5, 0.2, 0.7], [0.3, 0.9, 0.3, 0.8], [0.2, 0.5, 0.4, 0.6]]))
ADVANTAGES = torch.tensor([1.5, -0.5, -1.0])
WHOLE = torch.full((3, 4), 1 / 12)
LENGTHS = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])                 # answers of 2, 4 and 1 tokens
WEIGHTS = LENGTHS / LENGTHS.sum(1, keepdim=True) / 3


def loss(logprobs, old_logprobs, ref_logprobs, advantages, weights, clip_eps, kl_coef, kind, gain_sign=1, kl_sign=1, choose=min, upside_down=False,
         whole_answer=False, plain_mean=False, plain_kl=False, both_sides=False, coefficient_inside=False):
    """Eq. 2 to 4 with loops over the tokens; the options are typical mistakes."""
    B, L = logprobs.shape
    policy, price, clipped_share = 0.0, 0.0, 0.0
    for i in range(B):
        for t in range(L):
            w = 1 / (B * L) if plain_mean else weights[i, t].item()
            difference = logprobs[i, t] - old_logprobs[i, t]
            if whole_answer:
                difference = sum((logprobs[i, s] - old_logprobs[i, s]) * (weights[i, s] > 0) for s in range(L))
            ratio = (-difference if upside_down else difference).exp()
            A = advantages[i].item()
            limited = 1 + clip_eps if ratio > 1 + clip_eps else 1 - clip_eps if ratio < 1 - clip_eps else ratio
            is_clipped = float(limited != ratio) if both_sides else float(limited * A < ratio * A)
            policy = policy - gain_sign * w * choose(ratio * A, limited * A)
            price = price + (1 / (B * L) if plain_kl else w) * kl(logprobs[i, t], ref_logprobs[i, t], ratio, kind)
            clipped_share += w * is_clipped
    if coefficient_inside:
        price = kl_coef * price
        return policy + kl_sign * price, policy, price, clipped_share
    return policy + kl_sign * kl_coef * price, policy, price, clipped_share


def loss_and_gradient(function, logprobs, *rest):
    """The four numbers, and the derivative of the first by each log-probability."""
    logprobs = logprobs.clone().requires_grad_()
    value = function(logprobs, *rest)
    if not isinstance(value, (tuple, list)) or len(value) != 4:
        return value
    if not isinstance(value[0], torch.Tensor) or not value[0].requires_grad:
        return *value, "no gradient comes back from the loss"
    value[0].backward()
    return *value, logprobs.grad


def grpo_loss_cases(module):
    now = (OLD.exp() * RATIOS).log()
    cases = [("first step on a batch: the policy is still the one that sampled, and still the reference", (OLD, OLD, OLD, ADVANTAGES, WHOLE, 0.2, 0.2, "k3")),
             ("second step: some ratios leave 1 ± ε", (now, OLD, REFS, ADVANTAGES, WHOLE, 0.2, 0.2, "k3")),
             ("answers of 2, 4 and 1 tokens: the weight of the padding is 0", (now, OLD, REFS, ADVANTAGES, WEIGHTS, 0.2, 0.2, "k3")),
             ("another ε, no price for the KL", (now, OLD, REFS, ADVANTAGES, WEIGHTS, 0.05, 0.0, "k1")),
             ("all advantages are 0: only the KL term remains", (now, OLD, REFS, torch.zeros(3), WEIGHTS, 0.2, 0.5, "k2"))]
    return [Case(f"{words} (the four numbers, then the gradient)", args, constants(loss_and_gradient(loss, *args)), look=loss_and_gradient) for words, args in cases]


GRPO_LOSS = Blank(
    name="grpo_loss", minutes=20,
    asks="""The loss of GRPO (Eq. 2 and 4), with kl_estimate of this file.

    logprobs [B, L]: of the answers' tokens under π_θ, the only argument with a gradient;
    old_logprobs, ref_logprobs [B, L]: under π_old and π_ref; advantages [B]: one for each answer;
    weights [B, L]: w_it, 0 where an answer is over; clip_eps: ε; kl_coef: β; kl: the form of the KL.
    Returns four scalars: the loss; its policy part; its KL part (not yet multiplied by β); and the
    share of tokens, weighted like the loss, where the clip has made the gain smaller.""",
    hint="One advantage serves all tokens of its answer: advantages[:, None]. Compute ρ from the logarithms. The sums of Eq. 4 are sums: the weights hold every division.",
    cases=grpo_loss_cases,
    wrong={"the sign of the gain is wrong. The optimizer makes the loss smaller; what happens then to an answer with A > 0?": lambda *args: loss(*args, gain_sign=-1),
           "the KL term has the wrong sign: the policy would be paid for leaving the reference.": lambda *args: loss(*args, kl_sign=-1),
           "you always take the clipped product. Eq. 4 has a minimum of two.": lambda *args: loss(*args, choose=lambda plain, limited: limited),
           "you take the larger of the two products.": lambda *args: loss(*args, choose=max),
           "nothing is clipped in the gain.": lambda *args: loss(*args, choose=lambda plain, limited: plain),
           "the ratio is upside down: which policy stands on top in Eq. 2?": lambda *args: loss(*args, upside_down=True),
           "all tokens of an answer have one ratio, that of the whole answer. Eq. 2 gives each token its own.": lambda *args: loss(*args, whole_answer=True),
           "you average over all B·L places. The weights are the average already, and padding has weight 0.": lambda *args: loss(*args, plain_mean=True),
           "the KL is averaged over all places, padding included. It has the same weights as the gain.": lambda *args: loss(*args, plain_kl=True),
           "the KL part that you return is multiplied by β already.": lambda *args: loss(*args, coefficient_inside=True),
           "you count each ratio outside of 1 ± ε as clipped. On one side the minimum takes the other product; which side depends on the sign of A.":
               lambda *args: loss(*args, both_sides=True),
           "the values are right, but the gradient is cut off: logprobs must not be detached.": lambda logprobs, *rest: loss(logprobs.detach(), *rest)})


# ---- completion_logprobs --------------------------------------------------------------------------------

def tiny_model():
    """An untrained GPT-2 with a vocabulary of 19 tokens, and large weights, so that everything it reads changes what it says."""
    from transformers import GPT2Config, GPT2LMHeadModel
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=19, n_embd=12, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3,
                                          bos_token_id=None, eos_token_id=2, pad_token_id=2)).eval()


# T = 4, B = 5, L = 3. Token 2 ends an answer and pads; it also occurs inside the third prompt
EVEN = dict(prompt_ids=torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [9, 2, 11, 12], [9, 2, 11, 12], [9, 2, 11, 12]]), prompt_mask=torch.ones(5, 4).long(),
            completion_ids=torch.tensor([[3, 4, 2], [13, 14, 2], [3, 16, 17], [18, 3, 2], [4, 4, 4]]), completion_mask=torch.ones(5, 3))
LEFT = EVEN | dict(prompt_ids=torch.tensor([[2, 2, 7, 8], [2, 2, 7, 8], [9, 2, 11, 12], [2, 10, 11, 12], [2, 2, 2, 12]]),
                   prompt_mask=torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]]))
SHORT = LEFT | dict(completion_ids=torch.tensor([[3, 2, 2], [13, 14, 2], [2, 2, 2], [18, 3, 2], [4, 4, 4]]),
                    completion_mask=torch.tensor([[1.0, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 1]]))
SINGLE = {name: values[:, :1] if name.startswith("completion") else values for name, values in LEFT.items()}
COUNT = torch.arange(1.0, 16).view(5, 3)                                     # so that each token has a gradient of its own


def token_by_token(model, batch, temperature):
    """Each token alone: the model reads the real tokens before it, without padding and without a cache."""
    B, L = batch["completion_ids"].shape
    rows = []
    for i in range(B):
        ids, row = batch["prompt_ids"][i][batch["prompt_mask"][i] == 1].tolist(), []
        for token, kept in zip(batch["completion_ids"][i].tolist(), batch["completion_mask"][i].tolist()):
            row.append((model(input_ids=torch.tensor([ids])).logits[0, -1] / temperature).log_softmax(-1)[token] if kept else torch.tensor(0.0))
            ids.append(token)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def logprobs_and_gradient(function, model, batch, temperature):
    """The log-probabilities, and the derivative of their weighted sum by the bias of the last layer norm."""
    value = function(model, batch, temperature)
    if not isinstance(value, torch.Tensor) or value.shape != batch["completion_mask"].shape:
        return value, "the shape is another one"
    if not value.requires_grad:
        return value, "no gradient comes back from the log-probabilities"
    return value, torch.autograd.grad((value * COUNT[:, :value.shape[1]]).sum(), model.transformer.ln_f.bias)[0]


def completion_logprobs_cases(module):
    model = tiny_model()
    cases = [("prompts of equal length, all answers have three tokens", EVEN, 1.0), ("shorter prompts are padded on the left", LEFT, 1.0),
             ("shorter answers are padded on the right, one has a single token", SHORT, 1.0), ("temperature 0.5", SHORT, 0.5),
             ("all answers have a single token", SINGLE, 1.0)]
    return [Case(f"{words} (the log-probabilities, then the gradient of a weighted sum)", (model, batch, T),
                 constants(logprobs_and_gradient(token_by_token, model, batch, T)), look=logprobs_and_gradient) for words, batch, T in cases]


def scored(model, batch, temperature, shift=1, positions=True, attention=True, masked=True, softmax=True):
    """One plain forward pass; the options are typical mistakes."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"].long()], dim=1)
    places = (mask.cumsum(1) - 1).clamp(min=0) if positions else None
    T, L = batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=mask if attention else None, position_ids=places).logits[:, T - shift:T - shift + L] / temperature
    chosen = (logits.log_softmax(-1) if softmax else logits).gather(-1, batch["completion_ids"][..., None])[..., 0]
    return chosen * batch["completion_mask"] if masked else chosen


COMPLETION_LOGPROBS = Blank(
    name="completion_logprobs", minutes=25,
    asks="""log π(y_t | prompt, y_<t) of every token of the answers, in nats: the terms of step 1.

    batch: a dictionary with prompt_ids, prompt_mask [B, T] (padded on the LEFT), completion_ids,
    completion_mask [B, L] (padded on the right). A mask is 1 at real tokens, the end token of an
    answer included. model(input_ids=…, attention_mask=…, position_ids=…).logits has the shape
    [B, tokens, V]; attention_mask and position_ids are of the type long.
    temperature: what the sampler has divided the logits by.
    Returns [B, L] with a gradient; 0 where completion_mask is 0.""",
    hint="One forward pass over prompt and answer, one behind the other, is enough (the trainer reads each prompt only once, which is faster). The logits at one place "
         "predict the token at the next place. Positions count real tokens: mask 0 0 1 1 1 has the positions 0 0 0 1 2.",
    cases=completion_logprobs_cases,
    wrong={"you are one place off. The logits at a token speak about the token after it.": lambda *args: scored(*args, shift=0),
           "padding on the left shifts the positions: a prompt's first real token must have position 0.": lambda *args: scored(*args, positions=False),
           "the model reads the padding too: it needs the mask of prompt and answer together.": lambda *args: scored(*args, attention=False),
           "neither positions nor mask tell the model where the padding is.": lambda *args: scored(*args, positions=False, attention=False),
           "the temperature is missing. The sampler has divided the logits by it.": lambda model, batch, temperature: scored(model, batch, 1.0),
           "you multiply by the temperature.": lambda model, batch, temperature: scored(model, batch, 1 / temperature),
           "tokens after the end of an answer are not 0.": lambda *args: scored(*args, masked=False),
           "these are logits. Log-probabilities are never positive; which function makes them?": lambda *args: scored(*args, softmax=False),
           "the values are right, but no gradient comes back: the update must not run under no_grad or with detach.": lambda *args: scored(*args).detach()})


# ---- silent bugs ------------------------------------------------------------------------------------------

def one_by_one_and_together(module):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, tokenizer = module.random_model(module.AutoModelForSequenceClassification)
    model.eval()
    answers = ["It is a long story about nothing at all.", "No.", "Yes, it is.", "A rest."]
    together = module.reward_scores(model, tokenizer, ["What is sleep?"] * 4, answers, "text")
    alone = torch.cat([module.reward_scores(model, tokenizer, ["What is sleep?"], [answer], "text") for answer in answers])
    wrong = (together - alone).abs() > 1e-4
    if not wrong.any():
        return ""
    first = int(wrong.nonzero()[0, 0])
    return f"the reward model gives the answer \"{answers[first]}\" {alone[first]:.4f} when it judges it alone, and {together[first]:.4f} when it judges four answers."


def a_token_is_missing(module):
    ends = [2, 3, 4, 5]                                # four of 19 tokens end an answer: many answers end early
    model = tiny_model()
    ids, mask, logprobs = module.generate(model, LEFT["prompt_ids"][[0, 2]], LEFT["prompt_mask"][[0, 2]], 10, 8, 1.0, ends, torch.Generator().manual_seed(1))
    for row, kept, logps in zip(ids.tolist(), mask.tolist(), logprobs.tolist()):
        length = next((t + 1 for t, token in enumerate(row) if token in ends), len(row))
        used = sum(logp != 0 for logp in logps)
        if sum(kept) != length or used != length:
            return f"the sampler wrote an answer of {length} tokens; {int(sum(kept))} of them are under the mask, {used} have a log-probability."
    return ""


def parts_differ_from_the_whole(module):
    model = tiny_model()
    batch = {name: values[[0, 2, 3, 4]] for name, values in SHORT.items()}
    right = token_by_token(model, batch, 1.0).detach()
    for size in (4, 2, 1):
        came = module.batch_logprobs(model, batch, 1.0, size)
        gap = (came - right).abs().max().item()
        if not gap < 1e-4:
            return f"with --micro-batch {size} a token's log-probability differs by {gap:.2f} nats from the one that the model gives to prompt and answer without padding."
    return ""


BUGS = [
    Bug(number=1, minutes=15,
        symptom="""The first line shows the right mean reward, -0.861. But the policy never gets better: after 12 updates the
reward is -1.09 instead of 0.66. `std` is off in the first line already: 1.118 instead of 1.456. Compare:

  python runs/exercises/grpo/bug_1.py --batch-size 64 --updates 12
  python grpo_lm/train_grpo.py --batch-size 64 --updates 12""",
        hint="The mean over the batch is right and the mean inside the groups is not. Read the answers that are printed after the first update: do you agree with their order? "
             "Follow one answer through `reward_scores`.",
        old="        scores[part] = model(**tokens).logits[:, 0].float().cpu()       # back in the old order\n",
        new="        scores[start:start + size] = model(**tokens).logits[:, 0].float().cpu()\n",
        reveal="The answers are judged in the order of their lengths, so that little padding is needed. The rewards stay in that order: each answer gets the reward of another "
               "one, often of another prompt. Sums and means over the batch do not change, so no log shows it.",
        notices=one_by_one_and_together),
    Bug(number=2, minutes=20,
        symptom="""The policy learns, but more slowly, and its answers hardly grow: after 12 updates the reward is 0.31 instead of 0.66 and
the length is 38.0 instead of 44.5. Look at the first line too: `length` is 34.7 instead of 35.6, although the same
answers are printed. Compare:

  python runs/exercises/grpo/bug_2.py --batch-size 64 --updates 12
  python grpo_lm/train_grpo.py --batch-size 64 --updates 12""",
        hint="In the first update 91 % of the answers end before the limit of 64 tokens, and the mean length is .91 too small. Which token does each of these answers have and the cut-off "
             "ones do not?",
        old="""    # How many ends stand BEFORE each token?   yes E x E -> 0 0 1 1 -> mask 1 1 0 0
    is_end = torch.isin(completion_ids, ends)                           # [B, max_tokens]
    ends_before = is_end.cumsum(dim=1) - is_end.long()                  # [B, max_tokens]
""",
        new="""    # How many ends has each answer had so far?
    is_end = torch.isin(completion_ids, ends)                           # [B, max_tokens]
    ends_before = is_end.cumsum(dim=1)                                  # [B, max_tokens]
""",
        reveal="The count includes the end token itself, so the mask is 0 there. The choice to end an answer gets no advantage: stopping too early is never punished, and stopping in time is "
               "never rewarded.",
        notices=a_token_is_missing),
    Bug(number=3, minutes=20,
        symptom="""With the default settings nothing is wrong. But --micro-batch must not change the result (section 9), and here it does.
Before the first update the policy IS the reference, so `kl` must be 0.00 and `clipped` 0.0 % in the first line. With
four answers per pass they are 6.41 and 3.4 %. Compare:

  python runs/exercises/grpo/bug_3.py --batch-size 64 --updates 1 --micro-batch 4
  python grpo_lm/train_grpo.py --batch-size 64 --updates 1 --micro-batch 4""",
        hint="With 32 answers in a part, nearly always one of them has the longest prompt of the batch. With four answers that is rare. What is done to a part in which all prompts are shorter?",
        old="""            if name.startswith("prompt_"):
                part[name] = values[:, -T:]                             # padded on the left
            elif values.dim() == 2:
                part[name] = values[:, :L]                              # padded on the right
""",
        new="""            if values.dim() == 2:
                part[name] = values[:, :T if name.startswith("prompt_") else L]
""",
        reveal="The columns of a prompt are cut off on the right. But prompts are padded on the left: the padding stays, and the end of the question goes.",
        notices=parts_differ_from_the_whole)]


# ---- predict, measure ----------------------------------------------------------------------------------------

K1 = Predict(
    name="k1", minutes=10,
    question="""`k1` is d itself: an unbiased estimate of the KL. `--kl k1 --kl-coef 0.5` puts it into the loss with a higher price than the default, `--kl k3
--kl-coef 0.2`. Both runs have 40 updates of 64 answers and the same seed. What will the column `kl` say at the end?""",
    choices={"a": "Less than with the default: a nat costs 0.5 instead of 0.2.",
             "b": "About the same: both estimates have the same mean.",
             "c": "More than twice as much as with the default.",
             "d": "Nothing: d may be negative, so the loss falls without end and the run stops."},
    command="python grpo_lm/train_grpo.py --kl k1 --kl-coef 0.5 --batch-size 64 --updates 40",
    answer="c",
    explanation="""With seed 1 `kl` ends at 31.66 nats. The same command without the two flags of the KL ends at 4.40. On held-out prompts the KL is 42.46 against 2.81. The reward
model likes it, +2.04 standard deviations against +1.57, and gold is ruined: 1.73 against 5.36 (base model 2.66). The gradient of d is ∇log π, and its mean over tokens sampled from π is 0: on average
k1 holds nothing, and a higher price only adds noise. As a value, k1 is right. As a loss it is no KL. `--kl reward` makes good use of the same d: there it multiplies
∇log π instead of being differentiated (STUDY.md, "Which KL, which normalisation").""",
    hint="A loss acts through its gradient only. What is the derivative of d by log π, and what is its mean over sampled tokens (the zero rule)?")

# The script with 5 added to what the reward model says
PLUS_FIVE = ("python -c \"import sys; sys.path.insert(0, 'grpo_lm'); import train_grpo as t; score = t.reward_scores; "
             "t.reward_scores = lambda *a: score(*a) + 5; t.main()\" --break no-group-mean --batch-size 64 --updates 12 --seed 5")

SHIFT = Measure(
    name="shift", minutes=15,
    question="""A constant that is added to all rewards cancels in Eq. 1. With --break no-group-mean nothing cancels: the reward itself is the advantage. The command
adds 5 to every reward, so nearly all are positive and every sampled answer is pushed up. Take a seed of your own, 5 or above. Bring back `length` from the
last line of the table; in the first line it is about 35 tokens.

Before you run it: the zero rule says that a constant does not change the expected gradient, as long as all answers count the same. What is the weight of
a token in the default loss (step 5)? Which answers gain from it when every advantage is about 5?""",
    command=PLUS_FIVE,
    values=(22.0, 27.4, 27.8, 29.4, 25.3),
    explanation="""The answers get shorter, and nothing is learned: the reward of held-out answers rises by -0.30, -0.11, +0.04, -0.10 and -0.32 standard deviations (seeds 0 to
4). A token has the weight 1/(B·|y|). So a constant c in the rewards adds c·E[1/|y| ∇log π(y)] to the gradient, which is the gradient of c·E[1/|y|]: short answers are paid. Seed 1 for
comparison, 12 updates each: without the 5, length 47.1 and a gain of +1.03; with the 5 and the group mean (no --break) 44.5 and +1.08, the same as without the 5; with the 5, without the group
mean, but with --loss-norm constant, 41.0 and +0.69: no weight depends on a length any more, and what remains of the damage is the noise.""",
    hint="It is the column `length` in the line of update 12, with --break no-group-mean in the command.")


# ---- extend: RLOO -----------------------------------------------------------------------------------------------

def leave_one_out(rewards, group_size):
    """Each reward minus the mean of the others of its group, with loops."""
    values = rewards.tolist()
    starts = [i - i % group_size for i in range(len(values))]
    return torch.tensor([values[i] - mean([values[j] for j in range(start, start + group_size) if j != i]) for i, start in enumerate(starts)])


def rounded(values):
    return [round(value, 4) for value in values.tolist()]


def compares_with_the_others(module):
    for words, rewards, G in (("four answers", [2.0, 0.0, 1.0, 1.0], 4), ("two prompts with three answers", [3.0, 1.0, 2.0, 0.0, 0.5, 4.0], 3),
                              ("three prompts with two answers", [3.0, 1.0, 2.0, 0.0, 0.5, 4.0], 2), ("equal rewards", [2.0, 2.0, 2.0], 3),
                              ("rewards far from 0", [501.0, 500.0, 499.0, 500.5], 4)):
        rewards = torch.tensor(rewards, requires_grad=True)
        came, expected = module.leave_one_out_advantages(rewards, G), leave_one_out(rewards, G)
        assert came.shape == expected.shape, f"{words}: the shape is {list(came.shape)}, expected {list(expected.shape)}."
        assert torch.allclose(came, expected, atol=1e-3), f"{words}, rewards {rewards.tolist()}: expected {rounded(expected)}, {rounded(came)} came."
        assert not came.requires_grad, "A gradient can flow back to the rewards."


def the_expected_gradient_is_exact(module):
    """Answers of two tokens, two tokens in the language: all groups of three answers, each with its probability."""
    logits = torch.tensor([[0.3, -0.2], [0.5, 0.1], [-0.4, 0.6]], dtype=torch.float64, requires_grad=True)       # first token; second after 0; second after 1
    table, answers = logits.log_softmax(1), [(0, 0), (0, 1), (1, 0), (1, 1)]
    logprobs = {(a, b): torch.stack([table[0, a], table[1 + a, b]]) for a, b in answers}
    reward = dict(zip(answers, (1.0, -0.5, 0.3, 2.0)))
    exact, = torch.autograd.grad(sum(logprobs[y].sum().exp() * reward[y] for y in answers), logits, retain_graph=True)
    total = torch.zeros_like(logits)
    for group in itertools.product(answers, repeat=3):
        rows = torch.stack([logprobs[y] for y in group])
        A = module.leave_one_out_advantages(torch.tensor([reward[y] for y in group], dtype=torch.float64), 3)
        loss = module.grpo_loss(rows, rows.detach(), rows.detach(), A, torch.full((3, 2), 1 / 3, dtype=torch.float64), 0.2, 0.0, "k3")[0]
        total -= torch.autograd.grad(loss, logits, retain_graph=True)[0] * rows.detach().sum().exp()
    factor = (total * exact).sum() / exact.square().sum()
    assert torch.allclose(total, exact), f"The mean gradient over all groups of three answers is {factor:.3f} times the gradient of J, expected 1."


def the_flag_is_known(module):
    default = getattr(module.Config(), "advantages", None)
    assert default == "group", f"Config().advantages is {default!r}, expected 'group'."
    words = io.StringIO()
    with mock.patch("sys.argv", ["train_grpo.py", "--advantages", "rloo"]), contextlib.redirect_stderr(words):
        try:
            came = module.new_run(*module.parse_args()).advantages
        except SystemExit:
            came = words.getvalue().strip()
        assert came == "rloo", f"--advantages rloo gives the configuration {came!r}."
        try:
            module.check(module.Config(advantages="mean"))
        except SystemExit:
            return
    raise AssertionError("--advantages mean is not refused.")


def batches_of(module, **changes):
    """(configuration, the batches that two tiny updates are trained on)."""
    config = module.Config(**(dict(model="random", reward_model="random", prompt="What is sleep?", updates=2, batch_size=8, group_size=4, max_new_tokens=12, lr=0.02) | changes))
    seen, update = [], module.update

    def spy(*args):
        seen.append({name: values.clone() for name, values in next(arg for arg in args if isinstance(arg, dict)).items()})
        return update(*args)
    with tempfile.TemporaryDirectory() as place, mock.patch.object(module, "update", spy):
        module.train(config, Path(place), module.Accelerator(cpu=True), log=lambda *words: None)
    return config, seen


def must_be(module, expected, **changes):
    """A run's advantages must be those that `expected` makes of its rewards."""
    config, batches = batches_of(module, **changes)
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changes.items())
    for number, batch in enumerate(batches, 1):
        rewards = batch["rewards"]
        if config.kl == "reward":
            rewards = rewards - config.kl_coef * (batch["old_logprobs"] - batch["ref_logprobs"]).sum(dim=1)
        right, came = expected(rewards, config.group_size), batch["advantages"]
        assert torch.allclose(came, right, atol=1e-4), (f"With {flags or 'default flags'} the first advantages of update {number} are "
                                                        f"{rounded(came[:4])}, expected {rounded(right[:4])}.")


def training_follows_the_flag(module):
    must_be(module, leave_one_out, advantages="rloo")
    must_be(module, leave_one_out, advantages="rloo", scale_rewards="batch")


def the_kl_is_part_of_the_reward(module):
    must_be(module, leave_one_out, advantages="rloo", kl="reward", kl_coef=0.5)


def grpo_is_as_before(module):
    must_be(module, lambda rewards, G: advantages(rewards, G, "group"))
    must_be(module, lambda rewards, G: advantages(rewards, G, "none"), advantages="group", scale_rewards="none", kl="reward")


RLOO = Extend(
    name="rloo", minutes=45,
    asks="""Step 2 of the derivation has two baselines: the mean of the group (GRPO) and the mean of the other answers (RLOO,
lesson 6). Add the second one. Write

  leave_one_out_advantages(rewards, group_size)
                          rewards [P·G], the G answers to a prompt side by side; returns advantages
                          [P·G] without a gradient: not divided by any std
  --advantages group|rloo
                          a field of Config, "group" by default; any other word is refused

and let `collect` follow the flag. With rloo, --scale-rewards has no effect. --kl reward must subtract the KL from the
rewards first, as it does now. Then compare, with a seed of your own:

  python runs/exercises/grpo/rloo.py --batch-size 64 --updates 12
  python runs/exercises/grpo/rloo.py --batch-size 64 --updates 12 --advantages rloo
  python runs/exercises/grpo/rloo.py --batch-size 64 --updates 12 --advantages rloo --loss-norm constant --kl reward

The last line is RLOO as lesson 6 has it. Before you run them: for G = 8, the difference from the mean of all is 7/8 of the
difference from the mean of the others. What does Adam make of such a factor? Which term of the loss does not have it?
And what does the second line change besides?""",
    hint="The sum of the others is the sum of the group minus the own reward. In `collect`, `rewards` is already what the advantages must be made of (see --kl reward). A choice of two "
         "words is one more line in Config: look at `scale_rewards`.",
    accepts={"leave_one_out_advantages compares with the others": compares_with_the_others,
             "the expected gradient is that of the mean reward J": the_expected_gradient_is_exact,
             "--advantages group|rloo is a flag": the_flag_is_known, "training follows the flag": training_follows_the_flag,
             "with --kl reward the KL is in the advantages": the_kl_is_part_of_the_reward, "GRPO stays as it was": grpo_is_as_before})

EXERCISES = [GROUP_ADVANTAGES, KL_ESTIMATE, GRPO_LOSS, COMPLETION_LOGPROBS, *BUGS, K1, SHIFT, RLOO]
