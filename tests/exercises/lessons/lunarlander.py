"""Exercises of lesson 3, PPO on LunarLander. (Whoever solves them does not read here: the answers stand in it.)"""
import csv
import math
import tempfile
from pathlib import Path

import torch
from common import Blank, Bug, Case, Extend, Measure, Predict, judge_blank


def column(*numbers):
    """One lander: a tensor [T, 1]."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None]


# ---- compute_gae ----------------------------------------------------------------------------------

def gae(rewards, values, next_values, terminated, truncated, gamma, lam, worthless=("terminated",), cut=("terminated", "truncated"), late=0,
        decay=lambda gamma, lam: gamma * lam, next_row=False, target=lambda advantage, value: advantage + value):
    """Eq. 2 as the sum Σ (γλ)^l δ_{t+l} that it stands for, number by number; the options are typical mistakes."""
    T, N = rewards.shape
    flags = dict(terminated=terminated, truncated=truncated)
    advantages, returns = torch.zeros(T, N), torch.zeros(T, N)
    for i in range(N):
        for t in range(T):
            total, weight = 0.0, 1.0
            for k in range(t, T):
                following = values[k + 1, i].item() if next_row and k + 1 < T else next_values[k, i].item()
                if any(flags[name][k, i] for name in worthless):
                    following = 0.0
                total += weight * (rewards[k, i].item() + gamma * following - values[k, i].item())
                weight *= decay(gamma, lam)
                if k + late < T and any(flags[name][k + late, i] for name in cut):
                    break
            advantages[t, i], returns[t, i] = total, target(total, values[t, i].item())
    return advantages, returns


def gae_forwards(rewards, values, next_values, terminated, truncated, gamma, lam):
    deltas, _ = gae(rewards, values, next_values, terminated, truncated, gamma, 0.0)
    advantages, before = [], torch.zeros(rewards.shape[1])
    for t in range(len(rewards)):
        before = deltas[t] + gamma * lam * (1 - torch.maximum(terminated[t], truncated[t])) * before
        advantages.append(before)
    return torch.stack(advantages), torch.stack(advantages) + values


def gae_cases(module):
    torch.manual_seed(0)
    T, N = 5, 3
    rewards, values, next_values = torch.randn(T, N), torch.randn(T, N), 3 + torch.randn(T, N)
    terminated, truncated = torch.zeros(T, N), torch.zeros(T, N)
    terminated[1, 0] = truncated[2, 1] = terminated[4, 1] = truncated[4, 2] = truncated[1, 2] = 1
    going_on = (terminated + truncated)[:-1] == 0                 # within a flight, V(s_{t+1}) is one number that stands in two places
    next_values[:-1][going_on] = values[1:][going_on]
    nothing = column(0, 0, 0)
    inputs = {
        "one lander; the batch ends in the middle of its flight":
            (column(1, -1, 2, 0), column(3, 2, 1, 4), column(2, 1, 4, 5), column(0, 0, 0, 0), column(0, 0, 0, 0), 0.9, 0.5),
        "the worked example: row 1 is truncated, and row 2 is the first step of the next flight, which crashes":
            (column(1, -1, -1), column(3, 2, 4), column(2, 10, 6), column(0, 0, 1), column(0, 1, 0), 0.9, 0.5),
        "a crash in row 1; row 2 belongs to the next flight": (column(1, -1, -1), column(3, 2, 4), column(2, 10, 6), column(0, 1, 0), nothing, 0.9, 0.5),
        "the lander crashes in the last of its 1,000 steps: both flags are 1":
            (column(1, -1, -1), column(3, 2, 4), column(2, 4, 6), column(0, 0, 1), column(0, 0, 1), 0.9, 0.5),
        "three landers, five steps, both kinds of ends": (rewards, values, next_values, terminated, truncated, 0.9, 0.8),
        "the same with λ = 0": (rewards, values, next_values, terminated, truncated, 0.9, 0.0),
        "the same with γ = λ = 1": (rewards, values, next_values, terminated, truncated, 1.0, 1.0)}
    return [Case(words, args, gae(*args)) for words, args in inputs.items()]


COMPUTE_GAE = Blank(
    name="compute_gae", minutes=20,
    asks="""Advantages of a batch that cuts through flights, and the critic's targets (Eq. 1-3).

    rewards, values, next_values, terminated, truncated: all [T, N], T steps of N landers.
    values[t] = V(s_t). next_values[t] = V of the observation that step t led to, before any reset.
    terminated, truncated: 0.0 or 1.0, how step t ended the flight. gamma, gae_lambda: numbers.
    After the last row of the batch nothing is known: A of the row after it counts as 0.
    Returns (advantages, returns), both [T, N].""",
    hint="Eq. 2 needs A of the next row, so begin at the last row and go backwards. A flight can end in two ways, and there are two places where an end "
         "matters: the value of what follows, and the A of the next row. The last table of step 4 says which end matters where.",
    cases=gae_cases,
    wrong={"a flight whose time is over counts as a crash: its future is worth 0. Look at Eq. 1 again: which end is in it?":
               lambda *args: gae(*args, worthless=("terminated", "truncated")),
           "the future of a lander that has crashed is worth something. What can it still earn?":
               lambda *args: gae(*args, worthless=()),
           "the advantage of the next flight runs into the last row of the old one. Which flag of Eq. 2 is missing?":
               lambda *args: gae(*args, cut=()),
           "the trace is cut at a crash only. After a time limit, too, the next row is another flight.":
               lambda *args: gae(*args, cut=("terminated",)),
           "you look at the end of the next row instead of the own row (off by one).":
               lambda *args: gae(*args, late=1),
           "γ is missing in Eq. 2. It stands in both equations.":
               lambda *args: gae(*args, decay=lambda gamma, lam: lam),
           "λ is missing in Eq. 2.":
               lambda *args: gae(*args, decay=lambda gamma, lam: gamma),
           "you take V(s_{t+1}) from the next row of `values`. At an end, that row is the start of another flight.":
               lambda *args: gae(*args, next_row=True),
           "you take V(s_{t+1}) from the next row of `values`, and 0 in the last row. The batch may end in the middle of a flight.":
               lambda rewards, values, next_values, *others: gae(rewards, values, torch.cat([values[1:], torch.zeros_like(values[:1])]), *others),
           "you go forwards in time: the advantage of a step then contains what came before it.": gae_forwards,
           "the advantages are right. The returns are not: they must estimate the whole return, not what is better than expected.":
               lambda *args: gae(*args, target=lambda advantage, value: advantage),
           "the sign in Eq. 3 is wrong.":
               lambda *args: gae(*args, target=lambda advantage, value: advantage - value)})


# ---- ppo_loss --------------------------------------------------------------------------------------

def minimum_of(ratio, clipped, advantage):
    return min(ratio * advantage, clipped * advantage)


def ppo(logprobs, old_logprobs, advantages, entropy, values, returns, clip_eps, vf_coef, ent_coef,
        gain=minimum_of, ratio_of=lambda new, old: torch.exp(new - old), policy_sign=-1, half=0.5, entropy_sign=-1, mean=True, watched=torch.detach):
    """Eq. 4-7 row by row; the options are typical mistakes."""
    B = len(logprobs)
    gains, errors, kls, outside = [], [], [], 0
    for b in range(B):
        ratio = ratio_of(logprobs[b], old_logprobs[b])
        clipped = ratio if 1 - clip_eps <= ratio <= 1 + clip_eps else ratio.new_tensor(1 + clip_eps if ratio > 1 else 1 - clip_eps)
        gains.append(gain(ratio, clipped, advantages[b]))
        errors.append((values[b] - returns[b]) ** 2)
        kls.append(ratio - 1 - torch.log(ratio))
        outside += abs(ratio.item() - 1) > clip_eps
    count = B if mean else 1
    policy_loss = policy_sign * sum(gains) / count
    value_loss = half * sum(errors) / count
    bonus = sum(entropy[b] for b in range(B)) / count
    loss = policy_loss + vf_coef * value_loss + entropy_sign * ent_coef * bonus
    terms = dict(policy_loss=policy_loss, value_loss=value_loss, entropy=bonus, approx_kl=sum(kls) / count, clipfrac=torch.tensor(outside / count))
    return loss, {name: watched(term) for name, term in terms.items()}


def loss_and_gradients(function, logprobs, old_logprobs, advantages, entropy, values, returns, *coefficients):
    """The loss, its derivatives, what is watched, and whether that carries a gradient."""
    inputs = dict(logprobs=logprobs, entropy=entropy, values=values)
    for tensor in inputs.values():
        tensor.requires_grad_()
    came = function(logprobs, old_logprobs, advantages, entropy, values, returns, *coefficients)
    if not isinstance(came, tuple) or len(came) != 2 or not isinstance(came[1], dict):
        raise TypeError("ppo_loss must return two things: the loss and a dictionary")
    loss, terms = came
    if not isinstance(loss, torch.Tensor) or loss.dim():
        raise TypeError("the loss must be a tensor with one number in it")
    gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True) if loss.requires_grad else [None] * 3
    attached = [name for name, term in terms.items() if isinstance(term, torch.Tensor) and term.requires_grad]
    return {"the loss": loss.detach(), "the dictionary": {name: torch.as_tensor(term).detach() for name, term in terms.items()},
            **{f"the gradient by {name}": torch.zeros_like(inputs[name]) if gradient is None else gradient for name, gradient in zip(inputs, gradients)},
            "in the dictionary, with a gradient": ", ".join(sorted(attached)) or "nothing"}


def loss_cases(module):
    def rows(words, probs, old_probs, advantages, logarithms=False):
        B = len(probs)
        logprobs, old = (torch.tensor(numbers) if logarithms else torch.tensor(numbers).log() for numbers in (probs, old_probs))
        entropy, values, returns = torch.linspace(1.3, 0.4, B), torch.linspace(3.0, -1.0, B), torch.linspace(5.5, 0.5, B)
        args = (logprobs, old, torch.tensor(advantages), entropy, values, returns, 0.2, 0.5, 0.01)
        right = loss_and_gradients(ppo, *[arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args])
        return Case(words, args, right, look=loss_and_gradients)

    return [rows("the worked example: the ratio is 1.4, A = 2.5", [0.35], [0.25], [2.5]),
            rows("the worked example: the ratio is 1.4, A = −5", [0.35], [0.25], [-5.0]),
            rows("three rows whose ratio is 1, as in the first minibatch", [0.2, 0.5, 0.7], [0.2, 0.5, 0.7], [1.0, -2.0, 0.5]),
            rows("six rows: A > 0, then A < 0, each with the ratios 0.5, 1.1 and 2", [0.1, 0.22, 0.4, 0.1, 0.22, 0.4], [0.2] * 6, [2.0, 3.0, 4.0, -2.0, -3.0, -4.0]),
            rows("two very improbable actions: log π is −120", [-120.0, -119.5], [-119.9, -119.6], [1.5, -0.5], logarithms=True)]


PPO_LOSS = Blank(
    name="ppo_loss", minutes=25,
    asks="""The loss of a minibatch (Eq. 4-7), and what to watch.

    logprobs, entropy, values [B]: of the present networks, with gradient.
    old_logprobs [B]: of the policy that flew. advantages, returns [B]: data.
    clip_eps, vf_coef, ent_coef: ε, c_v, c_e.
    Returns (loss, terms): a scalar with gradient, and a dictionary of scalar tensors without one:
    "policy_loss" (Eq. 5), "value_loss" (Eq. 6, without its weight), "entropy" (its mean),
    "approx_kl" (the mean of ρ − 1 − log ρ, an estimate of the KL divergence that is never negative),
    "clipfrac" (the share of the rows whose ratio is outside 1 ± ε).""",
    hint="Eq. 4 is a quotient, and you have logarithms: what becomes of a quotient? `clamp` is the clip, `torch.minimum` takes the smaller one of two "
         "numbers, row by row. Then compare your rows with the table of step 7.",
    cases=loss_cases,
    wrong={"the sign of Eq. 5 is wrong. The optimizer makes the loss smaller: what happens then to an action with A > 0?":
               lambda *args: ppo(*args, policy_sign=1),
           "you take the larger one of the two products. Eq. 5 is careful: it believes the smaller one.":
               lambda *args: ppo(*args, gain=lambda ratio, clipped, advantage: max(ratio * advantage, clipped * advantage)),
           "only the clipped product counts. Look at the case A < 0, ρ > 1 + ε in the table of step 7: the gradient must stay.":
               lambda *args: ppo(*args, gain=lambda ratio, clipped, advantage: clipped * advantage),
           "nothing is clipped.":
               lambda *args: ppo(*args, gain=lambda ratio, clipped, advantage: ratio * advantage),
           "the minimum is of the ratios, and A comes after it. A negative factor reverses the order: where does A belong?":
               lambda *args: ppo(*args, gain=lambda ratio, clipped, advantage: min(ratio, clipped) * advantage),
           "the ratio is upside down.":
               lambda *args: ppo(*args, ratio_of=lambda new, old: torch.exp(old - new)),
           "you divide two probabilities. Those of improbable actions are 0 for the computer, and 0/0 is not a number.":
               lambda *args: ppo(*args, ratio_of=lambda new, old: torch.exp(new) / torch.exp(old)),
           "no gradient goes through the ratio, so the actor learns nothing from Eq. 5.":
               lambda *args: ppo(*args, ratio_of=lambda new, old: torch.exp(new - old).detach()),
           "the ½ of Eq. 6 is missing.":
               lambda *args: ppo(*args, half=1.0),
           "the entropy is punished. Which sign has it in Eq. 7?":
               lambda *args: ppo(*args, entropy_sign=1),
           "you sum over the rows. The equations have means: a larger minibatch must not make larger steps.":
               lambda *args: ppo(*args, mean=False),
           "the loss is right, but what is only watched still carries a gradient, and with it the whole computation stays in memory.":
               lambda *args: ppo(*args, watched=lambda term: term)})


# ---- logprobs_and_entropy -----------------------------------------------------------------------------

def of_the_policy(actor, obs, actions, logprob_of=None, entropy_of=None):
    """Both, one observation after the other; the options are typical mistakes."""
    logits = actor(obs).double()
    places = [tuple(place) for place in torch.cartesian_prod(*[torch.arange(size) for size in actions.shape]).reshape(-1, actions.dim()).tolist()]
    logprobs, entropies = [], []
    for place in places:
        z, a = logits[place], int(actions[place])
        highest = max(z[b].item() for b in range(4))
        log_total = highest + torch.log(sum(torch.exp(z[b] - highest) for b in range(4)))
        logs = [z[b] - log_total for b in range(4)]
        logprobs.append(logprob_of(z, logs, a) if logprob_of else logs[a])
        entropies.append(entropy_of(z, logs, a) if entropy_of else -sum(torch.exp(log) * log for log in logs))
    return torch.stack(logprobs).reshape(actions.shape).float(), torch.stack(entropies).reshape(actions.shape).float()


def over_axis(axis):
    def mistake(actor, obs, actions):
        logs = torch.log_softmax(actor(obs), dim=axis)
        return logs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), -(logs.exp() * logs).sum(-1)
    return mistake


def log_of_softmax(actor, obs, actions):
    probs = torch.softmax(actor(obs), dim=-1)
    return probs.log().gather(-1, actions.unsqueeze(-1)).squeeze(-1), -(probs * probs.log()).sum(-1)


def both_and_gradient(function, actor, obs, actions):
    came = function(actor, obs, actions)
    if not isinstance(came, tuple) or len(came) != 2:
        raise TypeError("two tensors must come back: the log-probabilities and the entropy")
    if not all(isinstance(one, torch.Tensor) for one in came):
        raise TypeError("both results must be tensors")
    names, found = ("the log-probabilities", "the entropy"), {}
    for name, one in zip(names, came):
        gradient = torch.autograd.grad(one.sum(), actor[-1].bias, retain_graph=True, allow_unused=True)[0] if one.requires_grad else None
        found |= {name: one.detach(), f"the gradient of {name}, by the bias of the logits": torch.zeros(4) if gradient is None else gradient}
    return found


def policy_cases(module):
    torch.manual_seed(2)

    def case(words, shape, scale):
        actor = torch.nn.Sequential(torch.nn.Linear(8, 4))
        with torch.no_grad():
            actor[0].weight.mul_(scale)
        args = (actor, torch.randn(*shape, 8), torch.randint(0, 4, shape))
        return Case(words, args, both_and_gradient(of_the_policy, *args), look=both_and_gradient)

    return [case("a minibatch: obs [5, 8], actions [5]", (5,), 3.0),
            case("a batch: obs [3, 2, 8], actions [3, 2]", (3, 2), 3.0),
            case("a single observation: obs [1, 8], actions [1]", (1,), 1.0),
            case("a policy that is nearly sure: logits of several hundred", (3,), 900.0)]


LOGPROBS_AND_ENTROPY = Blank(
    name="logprobs_and_entropy", minutes=10,
    asks="""What Eq. 4 and Eq. 7 need from the actor: log π(a|s) of the actions, and the entropy of π(·|s) in nats.

    actor: a network, from observations to logits [.., 4], one for each action;
    obs [.., 8]; actions [..]: whole numbers 0 to 3. Here .. is [T, N] in prepare and [B] in update.
    Returns two tensors [..], both with gradient.""",
    hint="A softmax makes probabilities of logits, and PyTorch has one that gives their logarithms at once. `gather` takes the number of the chosen action "
         "out of each row; it wants an index with as many axes as the tensor. The entropy is an expected value over all four actions.",
    cases=policy_cases,
    wrong={"you take the logits themselves. They are not normalised: the probabilities must sum to 1.":
               lambda *args: of_the_policy(*args, logprob_of=lambda z, logs, a: z[a]),
           "you return probabilities. Their logarithm is missing.":
               lambda *args: of_the_policy(*args, logprob_of=lambda z, logs, a: torch.exp(logs[a])),
           "you take the logarithm of a softmax. Where a probability is 0 for the computer, its logarithm is −∞, and 0·(−∞) is not a number.": log_of_softmax,
           "you normalise over the first axis. Which axis holds the four actions?": over_axis(0),
           "you normalise over axis 1. That is right for a minibatch [B, 4], but not for [T, N, 4]. Count from the end.": over_axis(1),
           "the sign of the entropy is wrong: it is never negative here.":
               lambda *args: of_the_policy(*args, entropy_of=lambda z, logs, a: sum(torch.exp(log) * log for log in logs)),
           "the entropy uses the chosen action only. It is an expected value over all four.":
               lambda *args: of_the_policy(*args, entropy_of=lambda z, logs, a: -logs[a]),
           "the four logarithms count equally in the entropy. Each must be weighted with its probability.":
               lambda *args: of_the_policy(*args, entropy_of=lambda z, logs, a: -sum(logs) / 4),
           "the gradient is cut off. The actor is to learn from both.":
               lambda *args: tuple(one.detach() for one in of_the_policy(*args))})


# ---- silent bugs ----------------------------------------------------------------------------------------

def quiet(*words):
    pass


def batch_of(module, steps=16, landers=3, seed=4):
    """A new agent and a batch of its flights."""
    torch.manual_seed(seed)
    agent = module.make_agent(8)
    envs = module.SyncVectorEnv([module.make_env] * landers, autoreset_mode=module.AutoresetMode.SAME_STEP)
    obs, _ = envs.reset(seed=seed)
    batch, _ = module.collect(envs, obs, agent["actor"], steps, torch.Generator().manual_seed(seed))
    return agent, batch


def short_training(module, **settings):
    """The rows of metrics.csv, and the last weights."""
    with tempfile.TemporaryDirectory() as place:
        module.train(module.Config(**settings), Path(place), torch.device("cpu"), log=quiet)
        with (Path(place) / "metrics.csv").open(encoding="utf-8") as file:
            return list(csv.DictReader(file)), torch.load(Path(place) / "last.pt", weights_only=True)


def no_flight_is_long(module):
    rows, _ = short_training(module, updates=20, num_envs=3, num_steps=16, minibatch_size=24, update_epochs=1, eval_every=20, eval_episodes=1, hidden=8)
    if rows[-1]["length_mean"] == "nan":
        return "in 20 batches of 16 steps each lander flies 320 steps, and an untrained lander crashes after about 90. But no flight has ended."
    return ""


def critic_is_fitted_to_something_else(module):
    agent, batch = batch_of(module)
    config = module.Config(update_epochs=1, minibatch_size=48)
    with torch.no_grad():
        values, next_values = agent["critic"](batch["obs"]).squeeze(-1), agent["critic"](batch["next_obs"]).squeeze(-1)
        _, returns = gae(batch["rewards"] * config.reward_scale, values, next_values, batch["terminated"], batch["truncated"], config.gamma, config.gae_lambda)
        expected = 0.5 * (values - returns).square().mean().item()
    came = module.update(agent, torch.optim.SGD(agent.parameters(), lr=0.0), batch, config, torch.Generator().manual_seed(0))["value_loss"]
    if math.isclose(came, expected, rel_tol=1e-3):
        return ""
    return f"in an update with one minibatch `value_loss` is {came:.4f}. Eq. 6, computed row by row from the same batch and weights, gives {expected:.4f}."


def short_flights(module):
    """An environment whose observation says (number of the flight, step, 0 …). After three steps a flight is truncated."""
    class ShortFlights(module.gym.Env):
        observation_space, action_space = module.gym.spaces.Box(-9, 9, (8,), module.np.float32), module.gym.spaces.Discrete(4)
        flight, t = -1, 0

        def observation(self):
            return module.np.array([self.flight, self.t] + 6 * [0], module.np.float32)

        def reset(self, *, seed=None, options=None):
            self.flight, self.t = self.flight + 1, 0
            return self.observation(), {}

        def step(self, action):
            self.t += 1
            return self.observation(), 1.0, False, self.t == 3, {}

    return ShortFlights


def flights_run_together(module):
    torch.manual_seed(0)
    envs = module.SyncVectorEnv([short_flights(module)] * 2, autoreset_mode=module.AutoresetMode.SAME_STEP)
    obs, _ = envs.reset(seed=0)
    batch, _ = module.collect(envs, obs, module.make_agent(8)["actor"], 5, torch.Generator().manual_seed(0))
    came = [tuple(int(number) for number in row) for row in batch["next_obs"][:, 0, :2].tolist()]
    if came == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]:
        return ""
    return f"flights of three steps, whose observation is (flight, step): the steps of the batch lead to {came}. Which observation is missing, and what stands in its place?"


BUGS = [
    Bug(number=1, minutes=10,
        symptom="""No error, and `expl.var` is better than ever. But from update 13 on, `return` and `length` do not change in any digit: they
say −23.9 and 112 up to the end. The unchanged script ends with 72.0 and 659. Compare:

  python runs/exercises/lunarlander/bug_1.py --updates 25 --seed 0
  python lunarlander_ppo/train_lunarlander.py --updates 25 --seed 0""",
        hint="How many steps has a batch? Which flights can end at all, if `length` is the length of those that have ended?",
        old="""        if (number - 1) % config.eval_every == 0:
            obs, so_far = new_flights(envs, config, number)
""",
        new="""        obs, so_far = new_flights(envs, config, number)
""",
        reveal="""Each batch begins with new flights, so every flight is abandoned after 128 steps, and nobody ever sees a landing. While the landers crash at once
nothing is missing. Once they stay in the air for more than 128 steps, no flight ends, and `return` and `length` stand still. The critic has an easy life: all it sees are the
first 128 steps.""",
        notices=no_flight_is_long),
    Bug(number=2, minutes=20,
        symptom="""No error, and the lander seems to learn: `return` rises from −168 to 54 in 25 updates, with the unchanged script to 72. But
`expl.var` stays between −0.06 and 0.06 all the time. In the unchanged script it is above 0.9 from update 13 on. Compare:

  python runs/exercises/lunarlander/bug_2.py --updates 25 --seed 0
  python lunarlander_ppo/train_lunarlander.py --updates 25 --seed 0""",
        hint="What do the rows of Eq. 6 compare? Print the shapes on both sides of that minus, in a real update.",
        old="""            values = agent["critic"](part["obs"]).squeeze(-1)           # [B]
""",
        new="""            values = agent["critic"](part["obs"])                       # [B]
""",
        reveal="""The critic's output keeps its last axis. [B, 1] minus [B] is [B, B] in PyTorch: every value is compared with the return of every row, and what fits
all of them best is the mean of the returns. So the critic says the same number everywhere, and no error is raised.""",
        notices=critic_is_fitted_to_something_else),
    Bug(number=3, minutes=20,
        symptom="""For 14 updates, both tables agree in every digit (the clock aside). Then `expl.var` falls: in updates 17 to 24 it lies between
0.69 and 0.93, with the unchanged script between 0.977 and 0.994. `return` ends at 71.9 instead of 72.0. Compare:

  python runs/exercises/lunarlander/bug_3.py --updates 25 --seed 0
  python lunarlander_ppo/train_lunarlander.py --updates 25 --seed 0""",
        hint="In the beginning all flights are terminated, most of them by a crash, and Eq. 1 ignores what follows. Which flights end otherwise, and not before `length` has grown? "
             "What should the critic value after their last step?",
        old="""        next_obs_buffer[t] = obs
        for i in np.flatnonzero(terminated | truncated):
            next_obs_buffer[t, i] = infos["final_obs"][i]
""",
        new="""        next_obs_buffer[t] = obs
""",
        reveal="""The vector environment resets a finished lander within the same step and returns the first observation of the new flight. Without the two lines,
Eq. 1 values that start instead of the last observation of the old flight. At a crash the factor 1 − terminated hides the mistake. When time is up, the old flight is credited with
the value of a fresh start. The critic cannot foresee when that will happen, so `expl.var` falls.""",
        notices=flights_run_together)]


# ---- predict, measure ---------------------------------------------------------------------------------

FIRST_STEP = Predict(
    name="first_step", minutes=10,
    question="""A batch has 8,192 rows. With --minibatch-size 8192 and --update-epochs 1, each batch gives one single gradient step. The learning rate is ten times
the default, so that this step is not small. What will the columns `kl` and `clip` say (an estimate of the KL divergence from the policy that flew; the share of the ratios outside 1 ± ε)?
And does the lander learn?""",
    choices={"a": "Both columns are 0 in every row, and the policy stays as it is.",
             "b": "Both columns are 0 in every row, and the policy changes all the same.",
             "c": "Both are small, but above 0: one step changes the policy a little.",
             "d": "Both are larger than usual, because one step on all rows is a large step."},
    command="python lunarlander_ppo/train_lunarlander.py --update-epochs 1 --minibatch-size 8192 --lr 0.02 --updates 20 --seed 0",
    answer="b",
    explanation="""Both columns come from the forward pass, before the gradient step of the same minibatch. With one step per batch, the weights at that moment are
those that flew. So every ratio is 1, whatever the learning rate. The step comes afterwards: in 20 updates with seed 0, `entropy` falls from 1.386 to 1.123, and `return` rises from −168
to −38 in row 17. (In row 20 it is −72 again.) (The greedy flights of this run are bad, about −1,700: a large step is not always a good one.) Eq. 5 then has the
gradient of lesson 2. The run is also a test of any PPO program: if `kl` is not 0 here,
`old_logprobs` belong to other rows or to other weights.""",
    hint="Both columns are computed in ppo_loss. Does that happen before or after `optimizer.step()`? Whose are the weights at that moment?")

OUT_OF_TIME = Predict(
    name="out_of_time", minutes=15,
    question="""A lander hovers. At step 99 and at step 999 it may see the same observation. With --break truncation-is-death, what follows step 1,000 is
worth 0 to it, as if it had crashed. Train 25 updates; near the end most flights run out of time. What do you see in the table, compared with the same command without --break?""",
    choices={"a": "`return` falls below −100: hovering is punished like a crash.",
             "b": "`expl.var` stays as it was: the critic learns that nothing follows step 1,000.",
             "c": "`expl.var` falls as soon as flights run out of time: the critic cannot tell when.",
             "d": "Nothing: the two tables are the same in every digit."},
    command="python lunarlander_ppo/train_lunarlander.py --break truncation-is-death --updates 25 --seed 0",
    answer="c",
    explanation="""Seed 0: the tables agree in every digit for 14 updates. In rows 17 to 24, `expl.var` lies between 0.86 and 0.96, with the unchanged script between 0.977
and 0.994. Seed 1: between 0.82 and 0.95 in rows 17 to 24, unchanged between 0.95 and 0.99. The observation has place, velocity, angle and legs, but not the time. So the critic has one value for
a hovering lander, at step 99 and at step 999. But the targets just before step 1,000 are others: what follows counts 0 there. The critic can only learn a mean of both, which is wrong
at any step. `return` does not suffer: after 25 updates it is 78.9 and 76.0 (seeds 0 and 1), unchanged 72.0 and 71.5. Section 7 has the same for five seeds.""",
    hint="Which eight numbers are in an observation? The docstring of train_lunarlander.py lists them. Look for the time.")

GRADIENT_STEPS = Measure(
    name="gradient_steps", minutes=15,
    question="""With --target-kl 0.003, `update` leaves a batch after the pass in which the last minibatch's `approx_kl` exceeds 0.003. Without it, each batch gets
64 gradient steps. Train 25 updates with a seed of your own, 5 or above. How many gradient steps does a batch get on average? Before you run it: will the short batches be the early or
the late ones? The column `gradient_steps` of metrics.csv has the numbers; this prints their mean:

  python -c "import csv; n = [int(row['gradient_steps']) for row in csv.DictReader(open('runs/kl_5/metrics.csv'))]; print(n, sum(n) / len(n))\"""",
    command="python lunarlander_ppo/train_lunarlander.py --target-kl 0.003 --updates 25 --seed 5 --out runs/kl_5",
    values=(26.24, 24.32, 24.96, 25.6, 26.88),
    explanation="""(The column `kl` is the mean over the steps of a batch; the limit looks at the last minibatch.) The short batches are the early ones: there, one pass of 16 steps is mostly enough to exceed 0.003. Later the learning rate is lower. So 60 % of the
gradient steps are saved, and the result suffers: the greedy mean after 25 updates is −151, −337, −139, −456 and −193 (seeds 0 to 4), while all 64 steps give 243 and 184 (seeds 0 and 1).
Reusing a batch is what PPO is for; see `one-epoch` in section 7. A limit of 0.01 leaves more: 50.6, 55.0, 49.9, 53.8 and 59.5 gradient steps per batch (seeds 0 to 4).""",
    hint="It is the mean over the 25 rows of metrics.csv, a number between 16 (one pass each) and 64 (four passes each).")


# ---- extend ---------------------------------------------------------------------------------------------

def numbers(values):
    return ", ".join(f"{float(value):.3f}" for value in values)


def equals(came, expected):
    return came.shape == expected.shape and torch.allclose(came, expected, rtol=1e-4, atol=1e-5)


def the_environment_is_continuous(module):
    space = module.make_env().action_space
    assert getattr(space, "shape", None) == (2,), f"make_env() has the action space {space}."


def the_actor_is_gaussian(module):
    agent = module.make_agent(16)
    mean = agent["actor"](torch.zeros(5, 3, 8))
    assert mean.shape == (5, 3, 2), f'make_agent(16)["actor"] gives the shape {list(mean.shape)} for [5, 3, 8]; expected is [5, 3, 2], the means.'
    assert agent["critic"](torch.zeros(5, 3, 8)).shape == (5, 3, 1), "The critic has changed."
    log_std = getattr(agent["actor"], "log_std", None)
    assert isinstance(log_std, torch.nn.Parameter) and log_std.shape == (2,), f'agent["actor"].log_std must be an nn.Parameter of shape [2], not {log_std!r}.'
    assert any(parameter is log_std for parameter in agent.parameters()), "log_std is not among agent.parameters(), so the optimizer never sees it."


def policy_and_actions(module, *shape):
    """An actor with two different standard deviations, observations, and actions near the means."""
    torch.manual_seed(3)
    actor = module.make_agent(16)["actor"]
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        actor.log_std.copy_(torch.tensor([-1.2, 0.7]))
    obs = torch.randn(*shape, 8)
    return actor, obs, (actor(obs) + torch.randn(*shape, 2)).detach()


def log_probability_is_that_of_torch(module):
    for shape in ((5,), (4, 3)):
        actor, obs, actions = policy_and_actions(module, *shape)
        right = torch.distributions.Independent(torch.distributions.Normal(actor(obs), actor.log_std.exp()), 1)
        logprobs, entropy = module.logprobs_and_entropy(actor, obs, actions)
        for name, came, expected in (("log-probability", logprobs, right.log_prob(actions)), ("entropy", entropy, right.entropy())):
            assert came.shape == expected.shape, f"For actions {list(actions.shape)}, the {name} has the shape {list(came.shape)}; expected is {list(expected.shape)}."
            assert equals(came, expected), f"The {name} of the first action is {came.flatten()[0]:.4f}; torch.distributions says {expected.flatten()[0]:.4f}."


def log_std_gets_a_gradient(module):
    actor, obs, actions = policy_and_actions(module, 5)
    right = torch.distributions.Independent(torch.distributions.Normal(actor(obs), actor.log_std.exp()), 1)
    logprobs, entropy = module.logprobs_and_entropy(actor, obs, actions)
    for name, came, expected in (("log-probabilities", logprobs, right.log_prob(actions)), ("entropy", entropy, right.entropy())):
        assert came.requires_grad, f"The {name} carries no gradient."
        mine, theirs = (torch.autograd.grad(one.sum(), actor.log_std, retain_graph=True, allow_unused=True)[0] for one in (came, expected))
        assert mine is not None and equals(mine, theirs), f"The gradient of the {name} by log_std is {mine if mine is None else numbers(mine)}; that of torch.distributions is {numbers(theirs)}."


def target_practice(module):
    """Flights of one step. The reward is −|a − (0.5, −0.5)|², the action clipped to [-1, 1] as LunarLander does it."""
    class TargetPractice(module.gym.Env):
        observation_space = module.gym.spaces.Box(-1, 1, (8,), module.np.float32)
        action_space = module.gym.spaces.Box(-1, 1, (2,), module.np.float32)

        def reset(self, *, seed=None, options=None):
            return module.np.zeros(8, module.np.float32), {}

        def step(self, action):
            clipped = module.np.clip(module.np.asarray(action, float), -1, 1)
            return module.np.zeros(8, module.np.float32), -float((clipped[0] - 0.5) ** 2 + (clipped[1] + 0.5) ** 2), True, False, {}

    return TargetPractice


def on_the_range(module, function):
    """Calls a function while make_env makes target practice."""
    usual = module.make_env
    module.make_env = target_practice(module)
    try:
        return function()
    finally:
        module.make_env = usual


def reward_of(actions):
    return -(actions.clamp(-1, 1) - torch.tensor([0.5, -0.5])).square().sum(-1)


def collect_samples_the_gaussian(module):
    actor, _, _ = policy_and_actions(module, 1)

    def go(seed):
        envs = module.SyncVectorEnv([module.make_env] * 10, autoreset_mode=module.AutoresetMode.SAME_STEP)
        obs, _ = envs.reset(seed=0)
        return module.collect(envs, obs, actor, 400, torch.Generator().manual_seed(seed))[0]

    batch = on_the_range(module, lambda: go(0))
    actions = batch["actions"]
    assert actions.shape == (400, 10, 2) and actions.is_floating_point(), f"Actions have the shape {list(actions.shape)} and the type {actions.dtype}; expected are [400, 10, 2] and floats."
    mean, std = actor(torch.zeros(8)).detach(), actor.log_std.detach().exp()
    found = actions.flatten(0, 1)
    assert found[:, 1].abs().max() > 1, "With a standard deviation of 2, no action lies outside [-1, 1]: store the action as it was sampled. The environment clips it."
    assert torch.allclose(found.std(0), std, rtol=0.1), f"4,000 actions have the standard deviations {numbers(found.std(0))}; those of the policy are {numbers(std)}."
    assert torch.allclose(found.mean(0), mean, atol=0.15), f"4,000 actions have the means {numbers(found.mean(0))}; those of the policy are {numbers(mean)}."
    assert abs(torch.corrcoef(found.T)[0, 1]) < 0.1, "The actions of the two engines go together: each needs its own noise."
    assert abs(torch.corrcoef(torch.stack([actions[1:, :, 0].flatten(), actions[:-1, :, 0].flatten()]))[0, 1]) < 0.1, "Actions of neighbouring steps go together: each step needs its own noise."
    assert torch.allclose(batch["rewards"], reward_of(actions), atol=1e-3), "The environment has got other actions than the batch says."
    assert torch.equal(on_the_range(module, lambda: go(0))["actions"], actions), "The same generator gives other actions: all noise must come from it, or a resumed run differs."


def greedy_flights_take_the_mean(module):
    actor, _, _ = policy_and_actions(module, 1)
    returns, _, _ = on_the_range(module, lambda: module.fly(actor, [1, 2, 3], greedy=True))
    expected = reward_of(actor(torch.zeros(8)).detach()).item()
    assert abs(returns - expected).max() < 1e-3, f"Flights of one step with greedy=True earn {numbers(returns)}; the mean of the Gaussian earns {expected:.4f}."
    returns, _, _ = on_the_range(module, lambda: module.fly(actor, [1, 2, 3], greedy=False))
    assert returns.std() > 1e-3, "With greedy=False, three flights earn the same: no noise is in the action."
    torch.manual_seed(99)
    again, _, _ = on_the_range(module, lambda: module.fly(actor, [1, 2, 3], greedy=False))
    assert (again == returns).all(), "The same seeds give other flights: the noise of fly, too, must come from its generator."


def the_ratio_starts_at_one(module):
    agent, batch = batch_of(module)
    for passes in (1, 2):
        terms = module.update(agent, torch.optim.Adam(agent.parameters(), lr=0.02), batch, module.Config(update_epochs=passes, minibatch_size=48),
                              torch.Generator().manual_seed(0))
        if passes == 1:
            assert abs(terms["approx_kl"]) < 1e-6 and terms["clipfrac"] == 0, \
                f"Before the first gradient step the ratio must be 1, but approx_kl is {terms['approx_kl']:.6f} and clipfrac {terms['clipfrac']:.2f}."
        else:
            assert terms["approx_kl"] > 1e-6, "After a gradient step the ratio is still 1."


def advantages_and_loss_stay(module):
    for blank in (COMPUTE_GAE, PPO_LOSS):
        right, words = judge_blank(blank, getattr(module, blank.name), blank.cases(module))
        assert right, f"{blank.name} needs no change, and is wrong now. {words}"


def it_hits_the_target(module):
    settings = dict(updates=40, num_envs=16, num_steps=16, minibatch_size=64, lr=0.02, reward_scale=1.0, ent_coef=0.0, hidden=16, eval_every=40, eval_episodes=2)
    rows, weights = on_the_range(module, lambda: short_training(module, **settings))
    distance = (-float(rows[-1]["eval_mean"])) ** 0.5
    assert distance < 0.25, f"On a task whose best action is (0.5, -0.5), the mean is {distance:.2f} away from it after 40 batches; at the beginning it is 0.7."
    found = [value for name, value in weights.items() if name.endswith("log_std")]
    assert found and bool((found[0] < -0.3).all()), f"On that task noise only costs. But log_std does not fall: it is {numbers(found[0]) if found else 'not among the saved weights'}."


def a_short_training_runs(module):
    rows, weights = short_training(module, updates=3, num_envs=4, num_steps=32, minibatch_size=32, eval_every=3, eval_episodes=2, hidden=16)
    assert len(rows) == 3 and all(bool(value.isfinite().all()) for value in weights.values()), "After three updates in LunarLander a weight is not a number."
    assert all(float(row["approx_kl"]) > 0 for row in rows), "In three updates the policy does not move: approx_kl is 0."


CONTINUOUS = Extend(
    name="continuous", minutes=60,
    asks="""Let the engines have any power between off and full. An action is now two numbers (main engine, side engines), sampled from a
Gaussian. The environment is gym.make("LunarLander-v3", continuous=True); it clips both numbers to [-1, 1] by itself. Keep these names:

  make_env()            the continuous lander
  make_agent(hidden)    "actor": from observations [.., 8] to the means [.., 2]. Its attribute
                        log_std is an nn.Parameter of shape [2]: learned, and the same in
                        every state. "critic": as it was
  collect, fly          sample from the Gaussian, with noise from their generator. The batch
                        holds the actions [T, N, 2] as they were sampled, not clipped. With
                        greedy=True, fly takes the mean
  logprobs_and_entropy  actions [.., 2]; two tensors [..]. log π of an action is the sum over
                        its two numbers; the entropy comes from a formula, not from samples

compute_gae, ppo_loss, prepare and update need no change. Then train it:

  python runs/exercises/lunarlander/continuous.py --updates 75

The sample solution reached 270 and 277 in the column `greedy` (seeds 0 and 1; the discrete lander of section 7 after as many steps: 256 to 275), but only 150
and 155 in `return`. What does --ent-coef 0 change, and why? At the very end lunarlander_eval.py refuses the weights, because it knows the discrete actor only: the column `greedy`
is your result.""",
    hint="Write logprobs_and_entropy first and compare it with torch.distributions.Normal. A class for the actor, an nn.Module with the network and log_std in "
         "it, keeps the rest short: actor(obs) still works. A sample is mean + std · noise. STUDY.md has a sketch.",
    accepts={"make_env is continuous": the_environment_is_continuous, "the actor says the means, and has log_std": the_actor_is_gaussian,
             "log-probability and entropy are those of torch.distributions": log_probability_is_that_of_torch,
             "log_std is learned from both": log_std_gets_a_gradient, "collect samples the Gaussian": collect_samples_the_gaussian,
             "greedy flights take the mean": greedy_flights_take_the_mean, "the ratio is 1 before the first step": the_ratio_starts_at_one,
             "compute_gae and ppo_loss stay": advantages_and_loss_stay, "a short training in LunarLander runs": a_short_training_runs,
             "it learns to hit a target": it_hits_the_target})

EXERCISES = [COMPUTE_GAE, LOGPROBS_AND_ENTROPY, PPO_LOSS, *BUGS, FIRST_STEP, OUT_OF_TIME, GRADIENT_STEPS, CONTINUOUS]
