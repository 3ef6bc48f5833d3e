"""Actor-critic self-play on Tic-Tac-Toe: learn against your own past, then prove that nobody can beat you.

    python train_tictactoe.py             about a minute; expect: 0 losing lines, 0 moves worse than minimax
    python train_tictactoe.py --help      every hyperparameter, with the symptom of a wrong value

The algorithm
    repeat
        draw an opponent from the pool of frozen earlier selves
        play 4,096 games against it, nine in ten from a random position, the learner to move first in half of
        them; the opponent blunders now and then                                                               play_games
        outcome z in {+1, 0, -1} for every move of the learner; A = z - V(s)                   Eq. 2, 3
        one Adam step on  actor loss + critic loss - entropy bonus                             Eq. 4-6         actor_critic_loss
        every 25 updates: play out every game that can happen; every 100: add a copy to the pool   Eq. 7       prove

The equations (README.md explains them)
    Eq. 1   π(a|s) = softmax of the logits of the legal moves            an illegal move has probability exactly 0
    Eq. 2   z_t = outcome of the game for the learner, +1, 0 or −1       the Monte-Carlo return: only the end is rewarded, γ = 1
    Eq. 3   A_t = z_t − V(s_t)                                           better or worse than the critic expected
    Eq. 4   L_actor = −mean log π(a_t|s_t)·A_t                           A is data: no gradient into the critic here
    Eq. 5   L_critic = ½·mean (V(s_t) − z_t)²
    Eq. 6   L = L_actor + c_v·L_critic − c_e·mean entropy
    Eq. 7   v(s) = max over legal a of −v(s after a)                     minimax: what is good for the next mover is bad for me

New since lesson 1 (CartPole): a custom environment; a critic; two players; masked actions; and a proof instead of a win rate.
Deliberately left out: search, replay, bootstrapping (a game has at most nine moves), --resume (a run takes a minute).

Sources: Williams 1992; Sutton & Barto, Reinforcement Learning, 2nd ed., 5.3 (exploring starts) and 13.4: strictly they call this REINFORCE
with a learnt baseline and reserve "actor-critic" for critics that are bootstrapped from, as the next lesson's is. Shapes: B games or rows, 9 squares numbered 0-8 line by line.
Every board is shown from the mover's side: +1 the mover's stones, −1 the other's, 0 empty.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "numpy==2.4.6", "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
import argparse
import copy
import csv
import io
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
BREAKS = ("no-mask", "latest-opponent-only", "no-exploring-opponent", "one-side-only", "off-policy-symmetry")


def hp(default, help, **rule):
    """A hyperparameter: its default, the text that `--help` shows, and the range of its values (above, low, high)."""
    return field(default=default, metadata={"help": help, **rule})


@dataclass
class Config:
    seed: int = hp(1, "seeds the weights, the games and the opponents; same seed, same run", low=0)
    updates: int = hp(1500, "gradient steps. Too low: losing lines are left", low=1)
    games: int = hp(4096, "B, games per update. Too low: a lucky game teaches a bad move. Too high: few updates a minute", low=2, high=1_000_000)
    lr: float = hp(3e-3, "α, Adam's step size, annealed to 0. Too high: entropy drops at once and mistakes freeze. Too low: losing lines left", above=0)
    ent_coef: float = hp(0.1, "c_e, entropy bonus, annealed to 0. Too low: stops looking for better moves. Too high: never commits", low=0)
    vf_coef: float = hp(0.5, "c_v, weight of the critic's loss; it matters only through the joint clipping: Adam ignores a constant factor", low=0)
    max_grad_norm: float = hp(0.5, "gradient norm above which the step is shortened", above=0)
    opponent_random: float = hp(0.1, "share of the opponent's moves that are random. 0: rare replies never occur. 1: traps beat sound play", low=0, high=1)
    exploring_starts: float = hp(0.9, "share of games that start from a position drawn from all 4,520. 0: unusual positions stay unlearned", low=0, high=1)
    pool: int = hp(20, "frozen earlier selves kept as opponents (a default run makes 16, the untrained one included). 1: may go round in circles", low=1)
    hidden: int = hp(128, "units in each of the two hidden layers. Too low: cannot hold all positions", low=1, high=65536)
    pool_every: int = hp(100, "updates between additions to the pool", low=1)
    prove_every: int = hp(25, "updates between proofs", low=1)
    broken: str = hp("", "remove one ingredient and watch: " + ", ".join(BREAKS), flag="--break", choices=BREAKS)


# ---- the game -------------------------------------------------------------------------------------------------------

LINES = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 4, 8], [2, 4, 6]])
# The eight ways to look at the same board: four rotations, each also mirrored. Square i of view k is square VIEWS[k, i] of the board.
SQUARES = torch.arange(9).view(3, 3)
VIEWS = torch.stack([view.reshape(9) for turns in range(4) for view in (torch.rot90(SQUARES, turns), torch.rot90(SQUARES, turns).T)])   # [8, 9]


def has_line(boards):
    """Whether the +1 stones fill a line. boards [B, 9] -> [B] bool."""
    return (boards[:, LINES].sum(dim=-1) == 3).any(dim=-1)


class TicTacToeEnv(gym.Env):
    """Tic-Tac-Toe as a Gymnasium environment. One step is one ply; whoever is to move sees the board from their own side.

    Observation: [3, 3] int8, +1 the mover's stones, −1 the other's, 0 empty. Action: square 0-8. Reward, for the player who has just
    moved: +1 for completing a line, −1 for an illegal move (which ends the game), else 0. info["action_mask"]: [9] int8, 1 where legal.
    """
    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 1}

    def __init__(self, render_mode=None):
        self.observation_space = gym.spaces.Box(-1, 1, (3, 3), np.int8)
        self.action_space = gym.spaces.Discrete(9)
        self.render_mode = render_mode
        self.board, self.plies = np.zeros(9, np.int8), 0          # board from the mover's side

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.board, self.plies = np.zeros(9, np.int8), 0
        return self.board.reshape(3, 3).copy(), {"action_mask": (self.board == 0).astype(np.int8)}

    def step(self, action):
        assert self.action_space.contains(int(action)), f"squares are numbered 0-8; there is none {action}"
        reward, terminated = 0.0, True
        if self.board[action] != 0:
            reward = -1.0                                         # illegal: the game is lost, the board unchanged
        else:
            self.board[action] = 1
            won = bool(has_line(torch.from_numpy(self.board)[None])[0])
            reward, terminated = float(won), won or bool((self.board != 0).all())
            self.board, self.plies = -self.board, self.plies + 1  # the other player's turn, and their view
        return self.board.reshape(3, 3).copy(), reward, terminated, False, {"action_mask": (self.board == 0).astype(np.int8)}

    def render(self):
        marks = self.board * (1 if self.plies % 2 == 0 else -1)   # +1: the first player's stones, whoever is to move
        if self.render_mode == "ansi":
            return "\n".join(" ".join(".XO"[mark] for mark in row) for row in marks.reshape(3, 3).tolist())
        if self.render_mode == "rgb_array":
            from PIL import Image, ImageDraw
            image = Image.new("RGB", (300, 300), "white")
            draw = ImageDraw.Draw(image)
            for at in (100, 200):
                draw.line((at, 0, at, 300), fill="black", width=3)
                draw.line((0, at, 300, at), fill="black", width=3)
            for square, mark in enumerate(marks.tolist()):
                x, y = square % 3 * 100, square // 3 * 100
                if mark == 1:
                    draw.line((x + 20, y + 20, x + 80, y + 80), fill=(31, 119, 180), width=8)
                    draw.line((x + 80, y + 20, x + 20, y + 80), fill=(31, 119, 180), width=8)
                elif mark == -1:
                    draw.ellipse((x + 18, y + 18, x + 82, y + 82), outline=(214, 39, 40), width=8)
            return np.array(image)


if "TicTacToe-v0" not in gym.registry:
    gym.register("TicTacToe-v0", entry_point=TicTacToeEnv)


def outcome_if_over(board):
    """−1 if the player who moved last has a line (the mover has lost), 0 if the board is full, None if the game goes on.
    board: tuple of 9 from the mover's side."""
    if any(board[a] + board[b] + board[c] == -3 for a, b, c in LINES.tolist()):
        return -1
    return 0 if all(board) else None


def after(board, square):
    """The board after the mover has taken a square, seen by the next mover. Tuples of 9."""
    return tuple(-mark for mark in board[:square] + (1,) + board[square + 1:])


def minimax_values():
    """{position: value for the mover under best play} for all 5,478 positions that can occur (Eq. 7)."""
    values = {}

    def value(board):
        if board not in values:
            over = outcome_if_over(board)
            # Eq. 7
            values[board] = over if over is not None else max(-value(after(board, a)) for a in range(9) if board[a] == 0)
        return values[board]

    value((0,) * 9)
    return values


# ---- the networks ---------------------------------------------------------------------------------------------------

def make_agent(hidden):
    """Two separate networks on 18 inputs (my stones, the other's): "actor" -> 9 logits, "critic" -> 1 value."""
    def network(outputs):
        return nn.Sequential(nn.Linear(18, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    return nn.ModuleDict(dict(actor=network(9), critic=network(1)))


def encode(boards):
    """[B, 9] of −1, 0, +1 -> [B, 18] of 0 and 1: where are my stones, where are the other's?"""
    return torch.cat([boards == 1, boards == -1], dim=-1).float()


def legal_logits(actor, boards):
    """[B, 9] logits with −inf on taken squares, so that softmax gives them exactly 0 (Eq. 1)."""
    return actor(encode(boards)).masked_fill(boards != 0, -math.inf)


# ---- the mathematics: tensors in, tensors out -----------------------------------------------------------------------

def actor_critic_loss(logits, actions, outcomes, values, vf_coef, ent_coef):
    """Actor-critic with Monte-Carlo returns (Eq. 3-6).

    logits [B, 9], −inf where illegal, with gradient; actions [B]; outcomes z [B] in {−1, 0, +1}; values [B] with gradient.
    Returns (loss, dictionary of diagnostics); all means over the B moves.
    Example: two legal moves of probability ½, one row, z = 1, V = 0: L_actor = log 2, its gradient raises the chosen logit by ½.
    """
    logprobs_all = torch.log_softmax(logits, dim=-1)                                                # [B, 9]
    logprobs = logprobs_all.gather(1, actions[:, None]).squeeze(1)                                  # [B]
    # Eq. 3  detached: the actor's loss must not teach the critic to be wrong in the actor's favour
    advantages = outcomes - values.detach()                                                         # [B]
    # Eq. 4  minus sign because the optimiser descends
    actor_loss = -(logprobs * advantages).mean()
    # Eq. 5
    critic_loss = 0.5 * (values - outcomes).square().mean()
    # p·log p with p = 0 on illegal squares would be 0·(−inf) = NaN: there the logarithm is set to 0
    entropy = -(logprobs_all.exp() * logprobs_all.masked_fill(logits == -math.inf, 0)).sum(dim=-1).mean()     # nats
    # Eq. 6
    loss = actor_loss + vf_coef * critic_loss - ent_coef * entropy
    return loss, dict(actor_loss=actor_loss.item(), critic_loss=critic_loss.item(), entropy=entropy.item())


def sample(logits, generator):
    """One action per row from softmax(logits), by Gumbel-max as in lesson 1. [B, 9] -> [B]"""
    return (logits - torch.empty_like(logits).exponential_(generator=generator).log()).argmax(dim=-1)


# ---- play, prove ----------------------------------------------------------------------------------------------------

def play_games(actor, opponent, starts, config, generator):
    """Plays one game from each start against the opponent. The learner moves at even steps in the first half of the games and at
    odd steps in the second half: it plays both sides equally often.

    starts [B, 9] int8, from the mover's side, not over. Returns (boards, actions, outcomes): the learner's decisions as it saw
    them [M, 9], [M], and how each one's game ended for the learner [M] in {−1, 0, +1}.
    """
    B = len(starts)
    half = B // 2
    boards, alive, result = starts.clone(), torch.ones(B, dtype=torch.bool), torch.zeros(B)
    everyone, rows, seen, chosen = torch.arange(B), [], [], []
    step = 0
    with torch.inference_mode():
        while alive.any():
            learners_turn = everyone < half if step % 2 == 0 else everyone >= half                  # [B]
            squares = torch.zeros(B, dtype=torch.long)
            for learning, who in ((True, actor), (False, opponent)):
                at = (alive & (learners_turn if learning else ~learners_turn)).nonzero().squeeze(1) # [n] games in which `who` is to move
                # Everyone looks at the board in a random one of its eight views, decides there, and maps the square back. The
                # decision IS a sample of π in that view, so the data stay on-policy, and every position is practised in all views.
                views = VIEWS[torch.randint(8, (len(at),), generator=generator)]                    # [n, 9]
                if config.broken == "off-policy-symmetry":
                    views = VIEWS[:1].expand(len(at), 9)
                view = boards[at].gather(1, views)                                                  # [n, 9]
                logits = legal_logits(who, view) if config.broken != "no-mask" else who(encode(view))
                if not learning and config.broken != "no-exploring-opponent":
                    blunder = torch.rand(len(at), generator=generator) < config.opponent_random     # [n]
                    logits = torch.where(blunder[:, None], torch.zeros(9).masked_fill(view != 0, -math.inf), logits)
                action = sample(logits, generator)                                                  # [n]
                squares[at] = views.gather(1, action[:, None]).squeeze(1)
                if learning:
                    keep = at < (half if config.broken == "one-side-only" else B)       # BREAK: nothing is learnt from the second half
                    rows.append(at[keep]), seen.append(view[keep]), chosen.append(action[keep])
            at = alive.nonzero().squeeze(1)
            legal = boards[at].gather(1, squares[at, None]).squeeze(1) == 0                         # [n] all true with the mask
            moved = boards[at].scatter(1, squares[at, None], 1)                                     # [n, 9]
            won = has_line(moved) & legal
            result[at] += torch.where(learners_turn[at], 1.0, -1.0) * (won.float() - (~legal).float())
            boards[at] = -moved                                   # now from the other player's side
            alive[at] = legal & ~won & ~(moved != 0).all(dim=-1)
            step += 1
    rows = torch.cat(rows)
    # Eq. 2  the outcome belongs to every move of the game, the early ones too
    return torch.cat(seen).clone(), torch.cat(chosen).clone(), result[rows]


def prove(actor, values):
    """Follows the greedy policy through every reply the opponent can make, as first and as second player.

    values: minimax_values(). Returns {"first": …, "second": …, "all_positions_worse_than_minimax": n}; each side has the number of
    complete games `lost`, `drawn`, `won`, and `worse_than_minimax`: reachable positions in which the greedy move gives something away.
    """
    positions = [board for board in values if outcome_if_over(board) is None]                       # 4,520
    with torch.no_grad():
        greedy = legal_logits(actor, torch.tensor(positions, dtype=torch.int8)).argmax(dim=-1).tolist()
    move = dict(zip(positions, greedy))
    worse = {board for board in positions if -values[after(board, move[board])] < values[board]}
    result = {}

    def follow(board, mine, counts, visited):
        over = outcome_if_over(board)
        if over is not None:
            counts["drawn" if over == 0 else "lost" if mine else "won"] += 1
        elif mine:
            visited.add(board)
            follow(after(board, move[board]), False, counts, visited)
        else:
            for square in range(9):
                if board[square] == 0:
                    follow(after(board, square), True, counts, visited)

    for name, mine in (("first", True), ("second", False)):
        counts, visited = dict(lost=0, drawn=0, won=0), set()
        follow((0,) * 9, mine, counts, visited)
        result[name] = counts | dict(worse_than_minimax=len(visited & worse))
    return result | dict(all_positions_worse_than_minimax=len(worse))


def faults(proof):
    """What the best weights have least of: lost lines, then reachable errors, then errors anywhere."""
    return (proof["first"]["lost"] + proof["second"]["lost"], proof["first"]["worse_than_minimax"] + proof["second"]["worse_than_minimax"],
            proof["all_positions_worse_than_minimax"])


# ---- the training loop ----------------------------------------------------------------------------------------------

def train(config, log=print, bar=False):
    """Returns (state_dicts of the best and the last agent, result, rows for metrics.csv, rows for timing.csv)."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    agent = make_agent(config.hidden)
    optimizer = torch.optim.Adam(agent.parameters(), lr=config.lr, fused=True)
    # The values serve the proof and the choice of the best weights, never the gradient; the keys list the exploring starts.
    values = minimax_values()
    positions = torch.tensor([board for board in values if outcome_if_over(board) is None], dtype=torch.int8)      # [4520, 9]
    pool = [copy.deepcopy(agent["actor"])]
    best, best_state, metrics, timing, seconds, proof_seconds, perfect_at = None, None, [], [], 0.0, 0.0, None
    log(f"{'update':>6} {'outcome':>7} {'entropy':>7} {'critic':>7}   {'first: lost drawn won worse':>30}   {'second: lost drawn won worse':>30} {'of 4520':>8} {'time':>6}")
    interrupted = False
    before = prove(agent["actor"], values)                        # row 0: the untrained agent
    metrics.append(dict(update=0) | {f"{side}_{key}": count for side in ("first", "second") for key, count in before[side].items()}
                   | dict(all_worse=before["all_positions_worse_than_minimax"]))
    timing.append(dict(update=0, train_seconds=0.0, proof_seconds=0.0))
    log(f"untrained: {before['first']['lost']} + {before['second']['lost']} losing lines, {before['all_positions_worse_than_minimax']} of 4,520 worse than minimax")
    try:
        for number in tqdm(range(1, config.updates + 1), disable=not bar, unit="update"):
            start = time.perf_counter()
            left = 1 - (number - 1) / config.updates              # annealing: 1 at the start, 0 at the end
            optimizer.param_groups[0]["lr"] = config.lr * left
            opponent = pool[torch.randint(len(pool), (1,), generator=generator).item()]
            if config.broken == "latest-opponent-only":
                opponent = pool[-1]                               # BREAK: yesterday's answers are forgotten
            starts = torch.zeros(config.games, 9, dtype=torch.int8)
            # BREAK: nobody leaves the beaten path (no-exploring-opponent); no glimpse of the other side either (one-side-only)
            share = 0.0 if config.broken in ("no-exploring-opponent", "one-side-only") else config.exploring_starts
            somewhere = torch.rand(config.games, generator=generator) < share
            starts[somewhere] = positions[torch.randint(len(positions), (int(somewhere.sum()),), generator=generator)]
            boards, actions, outcomes = play_games(agent["actor"], opponent, starts, config, generator)
            if config.broken == "off-policy-symmetry":            # BREAK: the stored move is turned, but π never chose it in that view
                views = VIEWS[torch.randint(8, (len(boards),), generator=generator)]
                actions = (views == actions[:, None]).int().argmax(dim=-1)
                boards = boards.gather(1, views)
            logits = legal_logits(agent["actor"], boards) if config.broken != "no-mask" else agent["actor"](encode(boards))   # BREAK
            loss, diagnostics = actor_critic_loss(logits, actions, outcomes, agent["critic"](encode(boards)).squeeze(-1), config.vf_coef,
                                                  config.ent_coef * left)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), config.max_grad_norm)
            if not torch.isfinite(grad_norm):
                fail(f"the loss or its gradient is not finite in update {number}; try a lower --lr and another --out. No weights were written")
            optimizer.step()
            seconds += time.perf_counter() - start
            if number % config.pool_every == 0:
                pool = (pool + [copy.deepcopy(agent["actor"])])[-config.pool:]
            row = dict(update=number, outcome=outcomes.mean().item(), moves=len(outcomes), **diagnostics, grad_norm=grad_norm.item())
            if number % config.prove_every == 0 or number == config.updates:
                start = time.perf_counter()
                proof = prove(agent["actor"], values)
                if best is None or faults(proof) <= best:         # the later one of equals: it has seen more games
                    best, best_state = faults(proof), copy.deepcopy(agent.state_dict())
                if faults(proof)[:2] == (0, 0) and perfect_at is None:
                    perfect_at = [number, seconds]
                proof_seconds += time.perf_counter() - start
                row |= {f"{side}_{key}": count for side in ("first", "second") for key, count in proof[side].items()}
                row |= dict(all_worse=proof["all_positions_worse_than_minimax"])
                show = lambda side: " ".join(f"{count:5d}" for count in proof[side].values())
                if number % (4 * config.prove_every) == 0 or number == config.updates:
                    log(f"{number:6d} {row['outcome']:7.3f} {row['entropy']:7.3f} {row['critic_loss']:7.3f}   {show('first'):>30}   {show('second'):>30} "
                        f"{row['all_worse']:8d} {seconds:5.0f}s")
            metrics.append(row)
            timing.append(dict(update=number, train_seconds=seconds, proof_seconds=proof_seconds))
    except KeyboardInterrupt:
        interrupted = True
    if best_state is None:
        fail("interrupted before the first proof: there are no weights to keep")
    last_state = copy.deepcopy(agent.state_dict())
    agent.load_state_dict(best_state)
    result = prove(agent["actor"], values) | dict(perfect_at=perfect_at, interrupted=interrupted, updates=len(metrics) - 1, train_seconds=seconds,
                                                  proof_seconds=proof_seconds)
    return dict(best=best_state, last=last_state), result, metrics, timing


# ---- files, plot, command line --------------------------------------------------------------------------------------

def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes a file beside its target and moves it into place, so that nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, path)


def csv_text(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows)
    return text.getvalue()


def plot_curve(path, metrics, config):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    proofs = [row for row in metrics if "all_worse" in row]
    updates = [row["update"] for row in proofs]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=[2, 1], layout="constrained")
    for side, colour in (("first", "C0"), ("second", "C1")):
        top.plot(updates, [row[f"{side}_lost"] for row in proofs], color=colour, marker=".", label=f"losing lines as {side} player")
    top.plot(updates, [row["all_worse"] for row in proofs], color="C3", marker=".", alpha=0.6, label="positions of 4,520 played worse than minimax")
    top.set_yscale("symlog", linthresh=1)
    top.axhline(0, color="C2", linestyle="--", label="target: 0")
    top.set(ylabel="count", ylim=(-0.3, None), title=f"Tic-Tac-Toe by self-play, seed {config.seed}" +
            (f"   BROKEN: {config.broken}" if config.broken else ""))
    top.legend(fontsize=8)
    for key, colour in (("entropy", "C5"), ("critic_loss", "C4")):
        series = np.array([row[key] for row in metrics[1:]])
        bottom.plot(range(1, len(series) + 1), series, color=colour, alpha=0.25)
        bottom.plot(updates[1:], [series[max(0, update - 100):update].mean() for update in updates[1:]], color=colour, linewidth=2, label=key)
    bottom.set(xlabel="updates", ylim=(0, None))
    bottom.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    write(path, picture.getvalue())


def check(config):
    for f in fields(Config):
        value, rule = getattr(config, f.name), f.metadata
        if f.type is not str and not (rule.get("above", -math.inf) < value < math.inf and rule.get("low", value) <= value <= rule.get("high", value)):
            words = [f"{word} {rule[key]:,}" for key, word in (("above", "above"), ("low", "at least"), ("high", "at most")) if key in rule]
            fail(f"--{f.name.replace('_', '-')} must be {' and '.join(words)}, not {value}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    for f in fields(Config):
        parser.add_argument(f.metadata.get("flag", "--" + f.name.replace("_", "-")), dest=f.name, type=f.type, default=f.default,
                            choices=f.metadata.get("choices"), metavar=f.type.__name__.upper() if f.default != "" else "NAME",
                            help=f.metadata["help"] + (f" (default {f.default})" if f.default != "" else ""))
    parser.add_argument("--out", type=Path, help="directory of this run (default: runs/<time>_seed<k> beside the script)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="the CPU: the networks are too small for anything else")
    parser.add_argument("--smoke", action="store_true", help="2 updates of 16 games, to see that everything runs")
    parser.add_argument("--quiet", action="store_true", help="no output but errors")
    args = parser.parse_args()
    config = Config(**{f.name: getattr(args, f.name) for f in fields(Config)})
    if args.smoke:
        config = replace(config, updates=2, games=16, prove_every=1)
    check(config)
    args.out = args.out or HERE / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}_seed{config.seed}"
    try:
        used = args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir()))
    except OSError as problem:
        fail(f"--out {args.out} cannot be used ({problem.strerror}); choose another directory")
    if used:
        fail(f"--out {args.out} exists and is not an empty directory; nothing was overwritten, choose another name")
    return config, args


def main():
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")                  # a Windows pipe may not know α
    config, args = parse_args()
    log = (lambda *text: None) if args.quiet else tqdm.write
    torch.set_num_threads(1)      # networks this small are faster on one core than shared between two
    versions = dict(python=platform.python_version(), torch=torch.__version__, gymnasium=gym.__version__, numpy=np.__version__)
    log("Self-play on Tic-Tac-Toe · " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    log(f"{sum(p.numel() for p in make_agent(config.hidden).parameters()):,} parameters · seed {config.seed} · expect: no losing line after about "
        "half a minute" + (f" · BROKEN: {config.broken}" if config.broken else ""))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        write(args.out / "config.json", json.dumps(asdict(config), indent=1) + "\n")
    except OSError as problem:
        fail(f"--out {args.out} cannot be written ({problem.strerror}); choose another directory")
    states, result, metrics, timing = train(config, log, bar=sys.stderr.isatty() and not args.quiet)
    for name, state in states.items():
        content = io.BytesIO()
        torch.save(state, content)
        write(args.out / f"{name}.pt", content.getvalue())
    write(args.out / "metrics.csv", csv_text(metrics))
    write(args.out / "timing.csv", csv_text(timing))
    proof = {key: result[key] for key in ("first", "second", "all_positions_worse_than_minimax")}
    write(args.out / "eval.json", json.dumps(proof, indent=1) + "\n")
    command = "python train_tictactoe.py" + "".join(f" {f.metadata.get('flag', '--' + f.name.replace('_', '-'))} {getattr(config, f.name)}"
                                                    for f in fields(Config) if getattr(config, f.name) != f.default)
    write(args.out / "train.json", json.dumps(dict(command=command, seed=config.seed, versions=versions, result=result), indent=1) + "\n")
    plot_curve(args.out / "curve.png", metrics, config)
    lost, worse, anywhere = faults(proof)
    log(f"{'PROVED: no line of play loses' if lost == 0 else f'NOT perfect: {lost} losing lines'}; {worse} reachable positions and {anywhere} of all 4,520 "
        f"played worse than minimax" + (f"; perfect since update {result['perfect_at'][0]}, {result['perfect_at'][1]:.0f} s" if result["perfect_at"] else ""))
    log(f"{result['train_seconds']:.0f} s of training and {result['proof_seconds']:.0f} s of proofs. Weights, metrics and curve are in {args.out}")
    log(f"Look at curve.png, then try to win: python {HERE / 'tictactoe_eval.py'} --weights {args.out} --play")
    if result["interrupted"]:
        raise SystemExit(130)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; what is complete is in the run's directory")
    except BrokenPipeError:                                       # whoever read our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1)
