"""Exercises of lesson 6, RLHF with REINFORCE. (Whoever solves them does not read here: the answers stand in it.)"""
import csv
import json
import math
import tempfile
from dataclasses import fields
from pathlib import Path

import torch
from common import REPO, Blank, Bug, Case, Extend, Measure, Predict, describe, difference, load

FOLDER = REPO / "reinforce_rlhf"
REWARD_TRAINER = "train_reward_model.py"


# ---- rloo_advantages ------------------------------------------------------------------------------

RETURNS = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.5, -3.0, 2.5, 6.0, 7.0, 7.5, 9.0, 5.0])          # P = 3 prompts, G = 4 answers each
EQUAL = torch.tensor([3.0, 3.0, 1.0, -2.0, 6.0, 6.0])                                           # P = 3, G = 2


def advantages_of(returns, group_size, baseline):
    """A_i = R_i − baseline(all returns of its prompt, place of the answer among them), number by number."""
    numbers, found = returns.tolist(), []
    for start in range(0, len(numbers), group_size):
        group = numbers[start:start + group_size]
        found += [value - baseline(group, i) for i, value in enumerate(group)]
    return torch.tensor(found)


def mean_of_others(group, i):
    return (sum(group) - group[i]) / (len(group) - 1)


def with_gradient_or_not(function, returns, group_size):
    """What comes back when the returns carry a gradient. First the values: of wrong ones the gradient is not asked."""
    found = function(returns.clone().requires_grad_(), group_size)
    is_right = isinstance(found, torch.Tensor) and not difference(found, advantages_of(returns, group_size, mean_of_others))
    return {"advantages": found, "a gradient flows": is_right and found.requires_grad}


RLOO = Blank(
    name="rloo_advantages", minutes=10,
    asks="""The advantages of RLOO (Eq. 6).

    returns [P·G]: the returns R of the answers to P prompts. The G answers to one prompt stand
    side by side. group_size: G, at least 2.
    Returns [P·G], in the same order, constants: no gradient flows through them.""",
    hint="Let each prompt have a row of its own: [P, G]. The others' sum is the row's sum less the own return. How many others are there?",
    cases=lambda module: [
        Case("one prompt with two answers", (torch.tensor([3.0, 1.0]), 2), torch.tensor([2.0, -2.0])),
        Case("three prompts with four answers each", (RETURNS, 4), advantages_of(RETURNS, 4, mean_of_others)),
        Case("three prompts with two answers each; two prompts have equal returns", (EQUAL, 2), advantages_of(EQUAL, 2, mean_of_others)),
        Case("the returns carry a gradient", (RETURNS, 4), {"advantages": advantages_of(RETURNS, 4, mean_of_others), "a gradient flows": False},
             look=with_gradient_or_not)],
    wrong={"the answer itself is in its own mean. Eq. 6 says: the OTHERS.":
               lambda returns, G: advantages_of(returns, G, lambda group, i: sum(group) / len(group)),
           "you divide the sum over the others by G. How many others are there?":
               lambda returns, G: advantages_of(returns, G, lambda group, i: (sum(group) - group[i]) / len(group)),
           "the sign is wrong: an answer better than the others gets a negative advantage.":
               lambda returns, G: -advantages_of(returns, G, mean_of_others),
           "answers to different prompts are compared. The G answers to one prompt stand side by side, so a prompt is a row of [P, G], not a column.":
               lambda returns, G: advantages_of(returns.view(G, -1).T.flatten(), G, mean_of_others).view(-1, G).T.flatten(),
           "you sum over the prompts (dim=0) instead of over the answers to one prompt (dim=1).":
               lambda returns, G: returns.detach() - (returns.detach().view(-1, G).sum(dim=0).repeat(len(returns) // G) - returns.detach()) / (G - 1),
           "you compare with the whole batch. Answers to other prompts say nothing about how hard this prompt is.":
               lambda returns, G: advantages_of(returns, len(returns), mean_of_others),
           "you divide by the standard deviation, as in lesson 5. Eq. 6 does not.":
               lambda returns, G: advantages_of(returns, G, lambda group, i: sum(group) / len(group))
                                  / (returns.detach().view(-1, G).std(dim=1, keepdim=True) + 1e-4).expand(-1, G).flatten(),
           "the values are right, but a gradient flows through them. In Eq. 7 the advantage is a number.":
               lambda returns, G: returns - (returns.view(-1, G).sum(dim=1, keepdim=True).expand(-1, G).flatten() - returns) / (G - 1)})


# ---- pair_loss ---------------------------------------------------------------------------------------

SCORES = torch.tensor([[2.0], [-0.5], [0.3]]), torch.tensor([[1.0], [1.5], [0.3]])              # [B = 3, 1]
FAR_APART = torch.tensor([[-100.0], [100.0]]), torch.tensor([[100.0], [-100.0]])
GRADES = (torch.tensor([[0.3, -1.2, 0.8, 2.0, 0.1, -0.4, 1.5, 0.6, -0.9, 0.2], [1.0, 0.5, 2.2, -0.3, 0.4, 0.9, -1.1, 0.7, 0.0, -2.0]]),
          torch.tensor([[1.4, 0.2, -0.6, 0.9, -1.5, 0.3, 0.8, -0.2, 1.1, -0.7], [-0.8, 1.9, 0.6, 0.1, 1.2, -0.5, 0.4, 2.1, -1.3, 0.5]]))      # [B = 2, 10]
SURE = torch.full((2, 10), -60.0)
SURE_AND_WRONG = SURE.clone(), SURE.clone()
SURE_AND_WRONG[0][:, 0] = SURE_AND_WRONG[1][:, 9] = 0.0         # chosen: grade 1, rejected: grade 10, both nearly for certain


def one_number_loss(chosen, rejected, center):
    """Eq. 1, pair by pair."""
    w, l = chosen[:, 0].double(), rejected[:, 0].double()
    return torch.stack([torch.log(1 + torch.exp(l[b] - w[b])) + center * (w[b] + l[b]) ** 2 for b in range(len(w))])


def grades_loss(chosen, rejected, center, counts=lambda i, j: i > j):
    """Eq. 2, pair by pair and grade by grade, in double precision. center plays no part."""
    losses = []
    for w, l in zip(chosen.double(), rejected.double()):
        p_w, p_l = [[x.exp() / row.exp().sum() for x in row] for row in (w, l)]
        losses.append(-torch.log(sum(p_w[i] * p_l[j] for i in range(10) for j in range(10) if counts(i, j))))
    return torch.stack(losses)


def pair_loss_of(level_1=one_number_loss, level_2=grades_loss):
    """The two losses in one function; a typical mistake replaces one of them."""
    return lambda chosen, rejected, center: (level_1 if chosen.shape[1] == 1 else level_2)(chosen, rejected, center)


def loss_and_gradients(function, chosen, rejected, center):
    chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    losses = function(chosen, rejected, center)
    if not isinstance(losses, torch.Tensor) or not losses.requires_grad:
        return {"loss": losses, "gradient for chosen": "none", "gradient for rejected": "none"}
    losses.sum().backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (chosen, rejected)]
    return {"loss": losses.detach(), "gradient for chosen": gradients[0], "gradient for rejected": gradients[1]}


def pair_loss_cases(module):
    right, flat = pair_loss_of(), torch.zeros(2, 10)
    plain = [("level 1, three pairs, c = 0.01", *SCORES, 0.01), ("level 1, three pairs, c = 0", *SCORES, 0.0),
             ("level 2, two pairs", *GRADES, 0.5), ("level 2, all grades equally likely", flat, flat, 0.0),
             ("level 1, rewards that are far apart", *FAR_APART, 0.01), ("level 2, grades that are nearly certain, and wrong", *SURE_AND_WRONG, 0.0)]
    cases = [Case(words, tuple(args), right(*args)) for words, *args in plain]
    return cases + [Case(f"{words}; the gradient", (*pair, 0.05), loss_and_gradients(right, *pair, 0.05), look=loss_and_gradients)
                    for words, pair in (("level 1", SCORES), ("level 2", GRADES))]


def product_of_probabilities(chosen, rejected, center):
    p_w, p_l = chosen.softmax(dim=1)[:, :, None], rejected.softmax(dim=1)[:, None, :]
    return -(p_w * p_l).tril(diagonal=-1).sum(dim=(1, 2)).log()


PAIR_LOSS = Blank(
    name="pair_loss", minutes=25, script=REWARD_TRAINER,
    asks="""The loss of each pair: Eq. 1 where the reward model gives one number, Eq. 2 where it gives ten.

    chosen, rejected: logits of the preferred and of the rejected answers, [B, 1] (level 1) or
    [B, 10] (level 2); center: c of Eq. 1; inverted: only for --break, do not use it.
    Returns [B], one loss for each pair. It must stay finite where the model is sure and wrong.
    torch.nn.functional must be written in full: the file has no short name for it.""",
    hint="Level 1: torch.nn.functional has a function for log σ that cannot overflow. Level 2: work with logarithms. A column [B, 10, 1] plus a row "
         "[B, 1, 10] is a table [B, 10, 10] of log p_w(i) + log p_l(j). Which half of it is i > j? What is not wanted becomes −inf, and logsumexp adds the rest.",
    cases=pair_loss_cases,
    wrong={"at level 1 the sign of r_w − r_l is wrong: your loss is small where the REJECTED answer gets the higher reward.":
               pair_loss_of(level_1=lambda w, l, c: one_number_loss(l, w, c)),
           "at level 1 the second term pulls the two rewards to each other. It must pull their sum to 0.":
               pair_loss_of(level_1=lambda w, l, c: one_number_loss(w, l, 0.0) + c * (w - l)[:, 0] ** 2),
           "at level 1 the second term of Eq. 1 is missing.":
               pair_loss_of(level_1=lambda w, l, c: one_number_loss(w, l, 0.0)),
           "at level 1 you take the logarithm of a σ that has become 0. Use one function for log σ.":
               pair_loss_of(level_1=lambda w, l, c: -torch.log(torch.sigmoid(w - l)[:, 0]) + c * (w + l)[:, 0] ** 2),
           "at level 2 you sum the other triangle, in which the REJECTED answer has the higher grade. Compare with the table in section 3.":
               pair_loss_of(level_2=lambda w, l, c: grades_loss(w, l, c, lambda i, j: i < j)),
           "at level 2 equal grades count as right. Eq. 2 says i > j.":
               pair_loss_of(level_2=lambda w, l, c: grades_loss(w, l, c, lambda i, j: i >= j)),
           "at level 2 you multiply probabilities, and a product has become 0. Add logarithms instead.":
               pair_loss_of(level_2=product_of_probabilities),
           "at level 2 the softmax runs over the pairs (dim=0). It must run over the grades.":
               pair_loss_of(level_2=lambda w, l, c: -(w.softmax(dim=0)[:, :, None] * l.softmax(dim=0)[:, None, :]).tril(diagonal=-1).sum(dim=(1, 2)).log()),
           "you have exchanged the chosen and the rejected answer, at both levels.":
               lambda chosen, rejected, center: pair_loss_of()(rejected, chosen, center),
           "the sign of the logarithm is wrong, at both levels: a loss is MINUS a log-probability.":
               pair_loss_of(level_1=lambda w, l, c: 2 * c * (w + l)[:, 0] ** 2 - one_number_loss(w, l, c),
                            level_2=lambda w, l, c: -grades_loss(w, l, c, lambda i, j: i > j)),
           "no gradient reaches the rejected answer. Both answers must move.":
               lambda chosen, rejected, center: pair_loss_of()(chosen, rejected.detach(), center)})


# ---- reinforce_loss ------------------------------------------------------------------------------------

LOGPROBS = torch.tensor([[-0.7, -0.2, -1.1, -0.4], [-0.9, -0.3, 0.0, 0.0], [-1.6, 0.0, 0.0, 0.0]])                    # [B = 3, L = 4]
MASK = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
ADVANTAGES = torch.tensor([2.0, -1.5, 0.5])


def answers_loss(logprobs, mask, advantages, gamma, answers, power=lambda length, t: length - 1 - t, share=lambda length: 1.0, beyond=False):
    """Eq. 7, token by token; the options are typical mistakes."""
    total = 0.0
    for i, row in enumerate(logprobs):
        length = int(mask[i].sum())
        for t in range(len(row) if beyond else length):
            total = total + advantages[i].detach() * gamma ** power(length, t) * share(length) * row[t]
    return -total / answers


def loss_and_its_gradients(function, logprobs, mask, advantages, gamma, answers):
    """The loss, its gradient for each log-probability, and, if the loss is right, whether a gradient reaches the advantages."""
    right = answers_loss(logprobs, mask, advantages, gamma, answers)
    logprobs, advantages = logprobs.clone().requires_grad_(), advantages.clone().requires_grad_()
    value = function(logprobs, mask, advantages, gamma, answers)
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return {"loss": value, "gradient for logprobs": "none", "a gradient reaches the advantages": False}
    value.backward()
    return {"loss": value.detach(), "gradient for logprobs": torch.zeros_like(logprobs) if logprobs.grad is None else logprobs.grad,
            "a gradient reaches the advantages": not difference(value, right) and advantages.grad is not None}


def reinforce_loss_cases(module):
    after_the_end = LOGPROBS - 5 * (1 - MASK)
    cases = [("three answers of different length, γ = 1", LOGPROBS, 1.0, 3), ("three answers, γ = 0.5", LOGPROBS, 0.5, 3),
             ("three answers of a batch of eight, γ = 0.5", LOGPROBS, 0.5, 8), ("the log-probabilities after an answer's end are not 0", after_the_end, 0.5, 3)]
    return [Case(words, (logprobs, MASK, ADVANTAGES, gamma, answers), loss_and_its_gradients(answers_loss, logprobs, MASK, ADVANTAGES, gamma, answers),
                 look=loss_and_its_gradients) for words, logprobs, gamma, answers in cases]


def with_other_advantages(logprobs, mask, advantages, gamma, answers):
    """A forgotten detach: the values are right."""
    weights = torch.tensor([[gamma ** max(0, int(row.sum()) - 1 - t) for t in range(len(row))] for row in mask])
    return -(advantages[:, None] * weights * logprobs * mask).sum() / answers


REINFORCE_LOSS = Blank(
    name="reinforce_loss", minutes=15,
    asks="""What these B answers add to the loss of a whole batch (Eq. 7); a scalar with a gradient.

    logprobs [B, L]: log-probabilities of the tokens, with gradient; completion_mask [B, L]: 1 for
    the tokens of an answer, 0 after its end; advantages [B], constants; gamma: the discount;
    answers: the number of answers in the whole batch. It may be larger than B: a batch that does
    not fit into memory comes in parts, and the losses of the parts are added.""",
    hint="For each token, count the tokens of its answer that follow: mask 1 1 1 0 gives 2 1 0 0. A cumsum from the right helps (flip). γ to that power is the token's weight.",
    cases=reinforce_loss_cases,
    wrong={"the sign is wrong. An optimizer makes the loss smaller; what happens then to an answer with A > 0?":
               lambda *args: -answers_loss(*args),
           "you average over the tokens of an answer. An answer is one action: log-probabilities are added.":
               lambda *args: answers_loss(*args, share=lambda length: 1 / length),
           "you divide by the number of answers that you were given. These may be a part of a batch.":
               lambda logprobs, mask, advantages, gamma, answers: answers_loss(logprobs, mask, advantages, gamma, len(mask)),
           "you discount from the beginning of the answer. The reward comes at its end, so which token is nearest to it?":
               lambda *args: answers_loss(*args, power=lambda length, t: t),
           "the last token of an answer is discounted too (off by one). No token follows it.":
               lambda *args: answers_loss(*args, power=lambda length, t: length - t),
           "you count the padding as tokens that follow. An answer ends where its mask does.":
               lambda *args: answers_loss(*args, power=lambda length, t: args[1].shape[1] - 1 - t),
           "γ is missing.":
               lambda logprobs, mask, advantages, gamma, answers: answers_loss(logprobs, mask, advantages, 1.0, answers),
           "what stands after an answer's end counts too. Where is the mask?":
               lambda *args: answers_loss(*args, power=lambda length, t: max(0, length - 1 - t), beyond=True),
           "a gradient reaches the advantages. They are numbers here: detach them.": with_other_advantages,
           "the gradient is cut off: do not detach the log-probabilities.":
               lambda logprobs, *more: answers_loss(logprobs.detach(), *more)})


# ---- silent bugs ----------------------------------------------------------------------------------------

QUESTION = "What is sleep?"
SAID = ("Sleep is a time of rest for body and mind.", "Adults need about eight hours a night. Babies sleep most of the day. I hope this helps.", "Look it up yourself.")


def shipped(kind, name):
    """(model, tokenizer) from the lesson's weights, without this lesson's code."""
    import transformers
    transformers.logging.disable_progress_bar()
    model = getattr(transformers, kind).from_pretrained(FOLDER / "weights" / name, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(FOLDER / "weights" / name)


def messages(answer):
    return [dict(role="user", content=QUESTION), dict(role="assistant", content=answer)]


@torch.no_grad()
def rewards_are_other_ones(module):
    model, tokenizer = shipped("AutoModelForSequenceClassification", "reward_model_level1")
    judge = module.load_reward_model(str(FOLDER / "weights" / "reward_model_level1"), 1)
    came = module.reward_from_logits(module.reward_logits(*judge, [QUESTION] * len(SAID), list(SAID), 128))
    for answer, reward in zip(SAID, came.tolist()):
        ids = torch.tensor(tokenizer.apply_chat_template(messages(answer), return_dict=False))[None]
        expected = model.score(model.transformer(input_ids=ids).last_hidden_state[:, -1]).item()
        if abs(reward - expected) > 1e-3:
            return f'to "{QUESTION}" and "{answer}" the shipped reward model of level 1 gave {expected:+.2f} when it was trained; this file makes it say {reward:+.2f}.'
        # Many a tokenizer pads with its end token
        judge[1].pad_token = judge[1].eos_token
        module.set_pooling(*judge)
        reward = judge[0](input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
        if abs(reward - expected) > 1e-3:
            return f"with the shipped tokenizer all is right now, but with one that pads with its end token, as many do, an answer gets {reward:+.2f} instead of {expected:+.2f}."
    return ""


FOUR_PAIRS = [dict(prompt=f"What is {thing}?", chosen=chosen, rejected=rejected)
              for thing, chosen, rejected in (("a cat", "a good pet", "a bad one"), ("a car", "good to have", "bad, or so"), ("rain", "good for us", "a bad day"), ("tea", "a good drink", "bad for me"))]


def rejected_answers_win(module):
    """Trains a tiny random reward model on four pairs until it must know them."""
    from unittest.mock import patch
    config = module.Config(model="random", batch_size=4, epochs=60, lr=5e-3, max_length=64)
    with tempfile.TemporaryDirectory() as place, patch.object(module, "toy_data", lambda: (FOUR_PAIRS, FOUR_PAIRS, [QUESTION])):
        model, tokenizer, _ = module.train(config, Path(place), torch.device("cpu"), log=lambda *words: None)
    asked, scores = [pair["prompt"] for pair in FOUR_PAIRS], []
    for side in ("chosen", "rejected"):
        rows = module.judged_tokens(tokenizer, asked, [pair[side] for pair in FOUR_PAIRS], 64)
        with torch.no_grad():
            scores.append([model(input_ids=torch.tensor([row])).logits.item() for row in rows])
    right = sum(chosen > rejected for chosen, rejected in zip(*scores))
    return "" if right == 4 else f"a reward model that has seen the same four pairs sixty times puts only {right} of them in the right order; it must be 4."


def leaving_is_too_cheap(module):
    """The price of the shipped policy's answers, against a plain forward pass of both models."""
    policy, tokenizer = shipped("AutoModelForCausalLM", "policy_level1")
    reference, _ = shipped("AutoModelForCausalLM", "sft")
    judge = module.load_reward_model(str(FOLDER / "weights" / "reward_model_level1"), 1)
    config = module.Config(group_size=8, max_new_tokens=48, kl_coef=0.5)
    with torch.no_grad():
        batch, _ = module.collect(config, policy, reference, tokenizer, judge, [QUESTION], torch.Generator().manual_seed(0))
    paid = (batch["rewards"] - batch["returns"]).mean().item()
    ratios = []
    for k, length in enumerate(batch["completion_mask"].sum(dim=1).int().tolist()):
        text = torch.cat([batch["prompt_ids"][k][batch["prompt_mask"][k] > 0], batch["completion_ids"][k, :length]])[None]
        with torch.no_grad():
            both = [model(input_ids=text).logits[0, :-1].log_softmax(dim=-1).gather(1, text[0, 1:, None])[-length:].sum().item() for model in (policy, reference)]
        ratios.append(both[0] - both[1])
    price = 0.5 * sum(ratios) / len(ratios)
    return "" if math.isclose(paid, price, rel_tol=1e-2, abs_tol=1e-3) else \
        f"eight answers of the shipped policy pay {paid:.3f} on average (r − R at β = 0.5) for leaving the SFT model; by Eq. 4 it must be {price:.3f}."


BUGS = [
    Bug(number=1, minutes=20,
        symptom="""The table looks better than the trainer's: after 10 updates it says reward 1.55 instead of 0.56. But the eval script, which does not use this file, says reward 0.35 and
gold 3.63 instead of 0.85 and 4.32. And look at the first line of both tables: the policy is still the SFT model, so both runs judge the same 64 answers. One table says 0.68, the other -0.28. Compare:

  python runs/exercises/rlhf/bug_1.py --skip-reward-training --batch-size 64 --updates 10
  python reinforce_rlhf/train_reinforce_rlhf.py --skip-reward-training --batch-size 64 --updates 10""",
        hint="Same answers, same weights of the reward model, other rewards. A reward model writes its number at ONE token. At which token was it trained, and at which is it read here?",
        old="""    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    other = (end + 1) % model.config.vocab_size
    model.config.pad_token_id = other if pad in (None, end) else pad
""",
        new="""    model.config.pad_token_id = tokenizer.eos_token_id
""",
        reveal="""With the end token as padding, the library takes the end of each text for padding and reads the token before it, often a full stop. The reward model was trained at the end token,
so at other tokens its numbers mean little, and the policy learns to please them. This line, without any condition, stands in many scripts, because the library complains when there is no padding token.""",
        notices=rewards_are_other_ones),
    Bug(number=2, minutes=20, script=REWARD_TRAINER,
        symptom="""In training the accuracy rises to 61 %, less than the trainer's 69 %, but above chance. On the held-out pairs it is far BELOW chance: only 36.6 % are in the order of gold, instead of 75.6 %.
One pass over the pairs shows it. Compare the tables and the last lines:

  python runs/exercises/rlhf/bug_2.py --epochs 1
  python reinforce_rlhf/train_reward_model.py --epochs 1""",
        hint="`update_on_pairs` cuts a batch into two halves. Print the decoded texts of one small batch: which two texts does it compare? The pairs of a batch come sorted by length; what is easy to learn, then?",
        old="""        texts = [chosen[k] for k in batch] + [rejected[k] for k in batch]             # 2B
""",
        new="""        texts = [text for k in batch for text in (chosen[k], rejected[k])]            # 2B
""",
        reveal="""The texts come as chosen, rejected, chosen, rejected, …, but `update_on_pairs` takes the first half for chosen and the second half for rejected. So it compares texts of different pairs.
A batch is sorted by length: its first half are the shorter pairs, so the model learns "shorter is better". In 62 % of the training pairs the chosen answer is the longer one: such a model is wrong more often than right.""",
        notices=rejected_answers_win),
    Bug(number=3, minutes=15,
        symptom="""The policy seems to stay near the SFT model: after 20 updates the table says a KL of 0.05 nats per answer. But the eval script, which judges the same policy, says 2.80.
With the trainer both agree: 2.04 (on the 64 answers of the last update) and 2.30. Distinct-2 of the trained answers is 0.88 instead of 0.90. Compare the tables and the last lines:

  python runs/exercises/rlhf/bug_3.py --skip-reward-training --batch-size 64 --updates 20
  python reinforce_rlhf/train_reinforce_rlhf.py --skip-reward-training --batch-size 64 --updates 20""",
        hint="By which factor do the two KL differ? How long is an answer?",
        old="""    kl = (logprobs - ref_logprobs).sum(dim=1)                           # [B]
""",
        new="""    kl = (logprobs - ref_logprobs).sum(dim=1) / completion_mask.sum(dim=1)            # [B]
""",
        reveal="""The log ratio is averaged over the tokens. Eq. 4 has the sum, because the answer is one action. An answer has some 40 tokens, so leaving the SFT model costs a fortieth of its price,
as if β were 0.005 instead of 0.2. Many libraries print a KL per token. Before you copy a β from somewhere, ask per what it is.""",
        notices=leaving_is_too_cheap)]


# ---- predict, measure, extend ---------------------------------------------------------------------------

REPEAT = Predict(
    name="repeat", minutes=10,
    question="""Somebody asks "What is sleep?" and gets one true sentence: once, twice, or three times in a row. Gold is 2.2, 1.2 and 1.0: it takes points off for each repetition. Among the 6,000 pairs,
1,250 have one answer that repeats a sentence and one that does not; people rejected the repeating one in 62 % of them. What does the reward model of level 1, trained on these pairs, give to the three answers?""",
    choices={"a": "The reward falls, as gold does.",
             "b": "The three rewards are about equal: it has learnt that a repetition adds nothing.",
             "c": "The reward rises each time."},
    command="""python -c "import sys; sys.path.insert(0, 'reinforce_rlhf'); import train_reinforce_rlhf as t; judge = t.load_reward_model(t.HERE / 'weights/reward_model_level1', 1); """
            """said = 'Sleep is a time of rest for body and mind.'; print([round(t.reward_from_logits(t.reward_logits(*judge, ['What is sleep?'], [' '.join([said] * n)], 128)).item(), 2) for n in (1, 2, 3)])\"""",
    answer="c",
    explanation="""It says -0.51, 1.47 and 2.14. In all 6,000 pairs the longer answer was preferred in 62 % (another count, the same number by chance). Length is easy to see; that a sentence comes twice is not. Three times or more is so rare (79 of 12,000 answers)
that the pairs hardly speak about it. Outside of what it has seen, a reward model guesses, and a policy goes just there: without KL it ends with a sentence or a word said again and again (STUDY.md, "The collapse, by update").""",
    hint="What else changes from one answer to the next, besides the repetition?")

SHIFT = Predict(
    name="shift", minutes=15,
    question="""Add 5 to every reward and train with the same seed. In which runs do `reward` (less the 5), `kl` and `distinct2` stay what they were, up to rounding? The command below takes the number to add as its first word: run it with 0 and with 5,
and each time with --estimator rloo, with --break cold-baseline, and with neither (REINFORCE, warm start). Six runs; compare the last lines of their tables.""",
    choices={"a": "In all three: only the differences between the rewards matter.",
             "b": "With RLOO only: REINFORCE compares with earlier batches, so it sees the 5.",
             "c": "With RLOO and with REINFORCE after a warm start.",
             "d": "In none of them: larger rewards make larger gradients."},
    command="""python -c "import sys; sys.path.insert(0, 'reinforce_rlhf'); import train_reinforce_rlhf as t; f, more = t.reward_from_logits, float(sys.argv.pop(1)); """
            """t.reward_from_logits = lambda logits: f(logits) + more; t.start_judge = lambda out, args: None; t.main()" 5 --skip-reward-training --batch-size 64 --updates 5 --estimator rloo""",
    answer="c",
    explanation="""In update 5, reward, kl and distinct2 are 0.071, 0.03, 0.94 with RLOO and 5.071, 0.03, 0.94 after adding 5; with REINFORCE after a warm start 0.604, 0.16, 0.94 and 5.604, 0.16, 0.94.
The 5 stands in R and in b, and A = R − b loses it. After a cold start they are 0.588, 0.27, 0.95 and 4.978, 0.23, 0.97: less the 5, the reward has not risen above 0. b began at 0 and is only at 1.66,
so nearly all answers have a positive advantage, and what tells good from bad is small beside it. At level 1 a cold start does no harm (section 7) only because 0 happens to be a good guess.""",
    hint="Write A = R − b for the first update of each run, once with R and once with R + 5. What is b?")

COLD = Measure(
    name="cold", minutes=10,
    question="""A cold start at level 2: b begins at 0, and the SFT model's rewards are near 5. After each update, b goes a tenth of the way to the batch's mean R. Train with a seed of your own, 5 or above, and bring back `baseline` from
the line of update 10, the last one. Before you run it: compute what it would be if each batch had a mean R of 5. How many updates does the line of update 10 have behind it?""",
    command="python reinforce_rlhf/train_reinforce_rlhf.py --level 2 --skip-reward-training --break cold-baseline --batch-size 64 --updates 10 --seed 5",
    values=(3.23192, 3.46507, 3.45279, 3.43939, 3.38446),
    explanation="""If each batch had a mean R of 5, b would be 5·(1 − 0.9⁹) = 3.06 after nine steps. It is a bit more, because R rises meanwhile. In update 10 the mean R is 6.1 to 6.4, so b still lacks 2.6 or more:
the average advantage is 2.6 or more instead of nearly 0, and most answers are made more likely, good or bad. A warm start (`first_baseline`) begins at the SFT model's mean R.""",
    hint="It is the column `baseline`, in the line that begins with 10. The line shows the b that update 10 has used, so nine steps lie behind it.")


# ---- two judges -------------------------------------------------------------------------------------------

RUN = dict(seed=3, updates=2, batch_size=24, group_size=1, max_new_tokens=24, reward_model=str(FOLDER / "weights" / "reward_model_level1"))
SECOND = str(FOLDER / "weights" / "reward_model_level2")


def combined_by_hand(rewards, scales):
    return torch.tensor([sum((reward[k].item() - mean) / std for reward, (mean, std) in zip(rewards, scales)) / len(rewards) for k in range(len(rewards[0]))])


def judges_have_the_same_weight(module):
    assert hasattr(module, "standardised_mean"), "There is no function standardised_mean(rewards, scales) yet."
    rewards, scales = [torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 9.0, 6.0])], [(0.25, 1.5), (5.0, 2.0)]
    came, right = module.standardised_mean(rewards, scales), combined_by_hand(rewards, scales)
    assert isinstance(came, torch.Tensor) and came.shape == (3,), f"For two judges and three answers it gives {came}, expected three numbers."
    assert torch.allclose(came, right, atol=1e-5), f"It gives {describe(came)}, expected {describe(right)}: the mean of (reward − mean) / std over the judges."
    louder = module.standardised_mean([10 * rewards[0] + 3, rewards[1]], [(5.5, 15.0), (5.0, 2.0)])
    assert torch.allclose(louder, right, atol=1e-5), "A judge whose rewards (and mean and std) are ten times as large gets more weight."


def an_undecided_judge_makes_no_nan(module):
    came = module.standardised_mean([torch.tensor([1.0, 3.0]), torch.tensor([5.0, 5.0])], [(2.0, 1.0), (5.0, 0.0)])
    assert torch.allclose(came, torch.tensor([-0.5, 0.5])), f"One judge gave 5 to every answer (mean 5, std 0), the other 1 and 3 (mean 2, std 1): it gives {came.tolist()}, expected [-0.5, 0.5]."


def finished_run(module, **more):
    """(rows of metrics.csv, the samples of each update) of a run of two updates."""
    from accelerate import Accelerator
    with tempfile.TemporaryDirectory() as place:
        module.train(module.Config(**RUN, **more), Path(place), Accelerator(cpu=True), log=lambda *words: None)
        with (Path(place) / "metrics.csv").open(encoding="utf-8") as file:
            rows = [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]
        samples = [[json.loads(line) for line in (Path(place) / "samples" / f"{number:04d}.jsonl").read_text(encoding="utf-8").splitlines()] for number in (1, 2)]
    return rows, samples


class Oracle:
    """The trainer as it is: what each shipped reward model says, and how it judges the SFT model's answers of batch 0."""

    def __init__(self):
        from accelerate import Accelerator
        self.trainer = load(FOLDER / "train_reinforce_rlhf.py")
        self.judges = [self.trainer.load_reward_model(RUN["reward_model"], 1), self.trainer.load_reward_model(SECOND, 2)]
        config = self.trainer.Config(**RUN)
        policy, tokenizer = self.trainer.load_policy(config)
        prompts = self.trainer.load_prompts(config, Path(RUN["reward_model"]), policy, self.judges[0][0], tokenizer)
        asked, generator = self.trainer.choose(config, Accelerator(cpu=True), prompts, 0)
        _, texts = self.trainer.collect(config, policy, policy, tokenizer, self.judges[0], asked, generator)
        self.scales = [(rewards.mean().item(), rewards.std().item()) for rewards in self.rewards(asked, texts)]

    def rewards(self, prompts, texts):
        return [self.trainer.reward_from_logits(self.trainer.reward_logits(*judge, prompts, texts, 128)) for judge in self.judges]


def nothing_changes_without_the_flag(module):
    oracle = Oracle()
    for samples in finished_run(module)[1]:
        right = oracle.rewards([sample["prompt"] for sample in samples], [sample["text"] for sample in samples])[0]
        assert torch.allclose(torch.tensor([sample["reward"] for sample in samples]), right, atol=1e-3), "Without --second-reward-model the rewards are not those of the first reward model."


def two_judges_on_fixed_scales(module):
    assert "second_reward_model" in [field.name for field in fields(module.Config)], "Config has no field second_reward_model, so there is no flag --second-reward-model."
    oracle = Oracle()
    rows, updates = finished_run(module, second_reward_model=SECOND)
    for number, samples in enumerate(updates, 1):
        both = oracle.rewards([sample["prompt"] for sample in samples], [sample["text"] for sample in samples])
        right, came = combined_by_hand(both, oracle.scales), torch.tensor([sample["reward"] for sample in samples])
        assert not torch.allclose(came, both[0], atol=1e-3), "The rewards are still those of the first reward model alone."
        worst = int((came - right).abs().argmax())
        assert torch.allclose(came, right, atol=2e-3), (
            f'In update {number} the answer "{samples[worst]["text"][:60]} …" gets the reward {came[worst]:.3f}, expected {right[worst]:.3f}. The two judges say {both[0][worst]:.3f} and {both[1][worst]:.3f}; '
            f"for the SFT model's answers of batch 0 their means are {oracle.scales[0][0]:.3f} and {oracle.scales[1][0]:.3f}, their stds {oracle.scales[0][1]:.3f} and {oracle.scales[1][1]:.3f}.")
    assert abs(rows[0]["baseline"]) < 1e-3, f"The first baseline is {rows[0]['baseline']:.3f}, expected 0: the mean standardised reward of the SFT model's batch 0."
    assert math.isclose(rows[1]["shaped_reward"], rows[1]["reward"] - 0.2 * rows[1]["kl"], abs_tol=1e-3), "R is no longer r − β·KL (Eq. 4)."


TWO_JUDGES = Extend(
    name="two_judges", minutes=60,
    asks="""Train the policy on the mean of TWO reward models. The hope: an answer that fools one does not fool the other. One gives numbers around 0, the other grades from 1 to 10, so each
must be standardised first. Write

  --second-reward-model DIR            (second_reward_model in Config) a reward model of the other
                                       level than --level; without the flag nothing changes
  standardised_mean(rewards, scales)   rewards: a list of [B], one for each judge; scales: a list of
                                       (mean, std), one for each judge. Returns [B]: the mean over
                                       the judges of (reward − mean) / std. A std of 0 makes no NaN

A judge's mean and std (torch's: ÷ B − 1) are those of its rewards for the SFT model's answers of batch 0, the batch of `first_baseline`: choose(config, accelerator, prompts, 0). They stay the same for the whole run. (You may leave --resume out.)
Then train without KL, with one judge (the trainer) and with two. When does gold fall in curve.png?

  python runs/exercises/rlhf/two_judges.py --skip-reward-training --break no-kl --batch-size 128 --updates 80
  python runs/exercises/rlhf/two_judges.py --skip-reward-training --break no-kl --batch-size 128 --updates 80 --second-reward-model reinforce_rlhf/weights/reward_model_level2

Each run takes five minutes or more. The column `reward` and curve.png then show the standardised mean; the eval's table shows the first judge alone.""",
    hint="`collect` calls the judge, and `first_baseline` calls `collect`. If the argument `judge` becomes a pair (list of judges, scales), `first_baseline` needs no change. Why not standardise each batch by itself? "
         "Then the mean reward would be 0 in each update, however good the policy has become.",
    accepts={"standardised_mean gives both judges the same weight": judges_have_the_same_weight,
             "a judge that gives the same to every answer makes no NaN": an_undecided_judge_makes_no_nan,
             "without the flag nothing changes": nothing_changes_without_the_flag,
             "with the flag, both judges decide, on fixed scales": two_judges_on_fixed_scales})

EXERCISES = [RLOO, PAIR_LOSS, REINFORCE_LOSS, *BUGS, REPEAT, SHIFT, COLD, TWO_JUDGES]
