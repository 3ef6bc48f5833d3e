"""Tic-Tac-Toe: rules and minimax against an independent oracle, the loss against a transcription, the proof on players that lose,
and the games a person plays."""
import builtins
import csv
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings, strategies as st

from conftest import REPO, assert_one_line_error, call, load, run

FOLDER = REPO / "tictactoe_actorcritic"
TRAIN, EVAL, WEIGHTS = FOLDER / "train_tictactoe.py", FOLDER / "tictactoe_eval.py", FOLDER / "weights" / "best.pt"
PLAY, STUDY = FOLDER / "play_tictactoe.py", FOLDER / "study.py"
train, evaluation = load("tictactoe_actorcritic/train_tictactoe.py"), load("tictactoe_actorcritic/tictactoe_eval.py")
playing, study = load("tictactoe_actorcritic/play_tictactoe.py"), load("tictactoe_actorcritic/study.py")
torch.set_num_threads(1)
VALUES = train.minimax_values()
POSITIONS = [board for board in VALUES if train.outcome_if_over(board) is None]

# ---- an oracle that shares no code: two sets of squares as bit masks ------------------------------------------------

ROWS = [0b111 << 3 * r for r in range(3)] + [0b1001001 << c for c in range(3)] + [0b100010001, 0b001010100]


def filled(bits):
    return any(bits & row == row for row in ROWS)


def oracle_value(mine, theirs, memory={}):
    """Negamax for the player with the squares `mine`, who is to move."""
    if (mine, theirs) not in memory:
        if filled(theirs):
            value = -1
        elif mine | theirs == 511:
            value = 0
        else:
            value = max(-oracle_value(theirs, mine | 1 << s) for s in range(9) if not (mine | theirs) >> s & 1)
        memory[mine, theirs] = value
    return memory[mine, theirs]


def bits(board, mark):
    return sum(1 << square for square in range(9) if board[square] == mark)


def test_the_numbers_everybody_knows():
    assert len(VALUES) == 5478 and len(POSITIONS) == 4520 and VALUES[(0,) * 9] == 0


def test_minimax_equals_the_oracle():
    assert all(value == oracle_value(bits(board, 1), bits(board, -1)) for board, value in VALUES.items())


def test_environment_equals_the_oracle_in_every_position():
    env = train.TicTacToeEnv()
    for board in POSITIONS:
        for square in range(9):
            env.board, env.plies = np.array(board, np.int8), sum(map(abs, board))
            obs, reward, terminated, truncated, info = env.step(square)
            mine, theirs = bits(board, 1), bits(board, -1)
            assert not truncated and obs.dtype == np.int8
            if (mine | theirs) >> square & 1:
                assert reward == -1 and terminated and (obs.flatten() == board).all()
                continue
            mine |= 1 << square
            assert reward == filled(mine) and terminated == (filled(mine) or mine | theirs == 511)
            assert bits(obs.flatten(), -1) == mine and bits(obs.flatten(), 1) == theirs       # now seen by the other player
            assert [not (mine | theirs) >> s & 1 for s in range(9)] == info["action_mask"].astype(bool).tolist()


def test_environment_is_a_gymnasium_environment():
    env = gym.make("TicTacToe-v0", render_mode="rgb_array")
    check_env(env.unwrapped)
    env.reset(seed=0)
    env.step(4)
    assert env.render().shape == (300, 300, 3) and (env.render() != 255).any()
    text = gym.make("TicTacToe-v0", render_mode="ansi")
    text.reset()
    text.step(0), text.step(4)
    assert text.render() == "X . .\n. O .\n. . ."


def test_the_drawing_shows_x_for_the_first_player_whoever_is_to_move():
    env = train.TicTacToeEnv(render_mode="ansi")
    env.reset()
    seen = []
    for square in (0, 4, 8):
        env.step(square)
        seen.append(env.render())
    assert seen == ["X . .\n. . .\n. . .", "X . .\n. O .\n. . .", "X . .\n. O .\n. . X"]


def test_faults_adds_up_both_sides():
    first, second = dict(lost=3, worse_than_minimax=5), dict(lost=4, worse_than_minimax=7)
    assert train.faults(dict(first=first, second=second, all_positions_worse_than_minimax=20)) == (7, 12, 20)


def test_views_are_the_eight_symmetries():
    views = [tuple(view) for view in train.VIEWS.tolist()]
    assert len(set(views)) == 8 and all(sorted(view) == list(range(9)) for view in views)
    lines = {frozenset(line) for line in train.LINES.tolist()}
    for view in views:
        assert {frozenset(view[square] for square in line) for line in lines} == lines
        inverse = tuple(view.index(square) for square in range(9))
        assert inverse in views and tuple(view[inverse[square]] for square in range(9)) == tuple(range(9))


# ---- mask, loss, sampling -------------------------------------------------------------------------------------------

def test_illegal_moves_have_probability_exactly_zero_and_no_nan_anywhere():
    torch.manual_seed(0)
    agent = train.make_agent(16)
    boards = torch.tensor(POSITIONS, dtype=torch.int8)
    logits = train.legal_logits(agent["actor"], boards)
    probabilities = logits.softmax(-1)
    assert (probabilities[boards != 0] == 0).all() and torch.allclose(probabilities.sum(-1), torch.ones(len(boards)))
    actions = train.sample(logits.detach(), torch.Generator().manual_seed(0))
    assert (boards.gather(1, actions[:, None]) == 0).all()
    outcomes = torch.randint(-1, 2, (len(boards),), generator=torch.Generator().manual_seed(1)).float()
    loss, _ = train.actor_critic_loss(logits, actions, outcomes, agent["critic"](train.encode(boards)).squeeze(-1), 0.5, 0.1)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in agent.parameters())


def test_loss_equals_a_slow_transcription():
    g = torch.Generator().manual_seed(3)
    boards = torch.tensor(POSITIONS[::300], dtype=torch.int8)
    logits = torch.randn(len(boards), 9, generator=g, dtype=torch.float64).masked_fill(boards != 0, -math.inf).requires_grad_()
    values = torch.randn(len(boards), generator=g, dtype=torch.float64, requires_grad=True)
    actions = train.sample(logits.detach(), g)
    outcomes = torch.randint(-1, 2, (len(boards),), generator=g).double()
    slow = 0
    for b in range(len(boards)):
        legal = [s for s in range(9) if boards[b, s] == 0]
        total = sum(torch.exp(logits[b, s]) for s in legal)
        p = {s: torch.exp(logits[b, s]) / total for s in legal}
        slow = slow - torch.log(p[actions[b].item()]) * (outcomes[b] - values[b].detach()) + 0.5 * 0.5 * (values[b] - outcomes[b]) ** 2 \
            + 0.1 * sum(q * torch.log(q) for q in p.values())
    slow = slow / len(boards)
    fast, _ = train.actor_critic_loss(logits, actions, outcomes, values, 0.5, 0.1)
    torch.testing.assert_close(fast, slow)
    for a, b in zip(torch.autograd.grad(fast, (logits, values), retain_graph=True), torch.autograd.grad(slow, (logits, values))):
        torch.testing.assert_close(a, torch.nan_to_num(b))


def test_the_docstrings_example_and_the_sign():
    logits = torch.full((1, 9), -math.inf)
    logits[0, [2, 7]] = 0.0
    logits.requires_grad_()
    loss, _ = train.actor_critic_loss(logits, torch.tensor([7]), torch.tensor([1.0]), torch.tensor([0.0]), 0.0, 0.0)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and logits.grad[0, 7].item() == pytest.approx(-0.5)    # descent raises it
    assert logits.grad[0, 2].item() == pytest.approx(0.5)


def test_the_worked_example_of_the_readme():
    board = (1, -1, 1, 1, -1, -1, 0, 0, 0)                        # X O X / X O O / . . ., X to move
    raw = torch.tensor([[9.0] * 6 + [0.0, math.log(2), 0.0]], requires_grad=True)
    logits = train.legal_logits(lambda _: raw, torch.tensor([board]))
    assert logits.softmax(-1)[0].tolist() == pytest.approx([0] * 6 + [0.25, 0.5, 0.25])
    sampled, outcome, value = torch.tensor([6]), torch.tensor([1.0]), torch.tensor([0.2])
    loss, terms = train.actor_critic_loss(logits, sampled, outcome, value, 0.5, 0.2)
    assert terms == pytest.approx(dict(actor_loss=1.109, critic_loss=0.32, entropy=1.040), abs=5e-4)
    assert loss.item() == pytest.approx(1.061, abs=5e-4)
    actor_loss, _ = train.actor_critic_loss(logits, sampled, outcome, value, 0.0, 0.0)
    assert torch.autograd.grad(actor_loss, raw)[0][0].tolist() == pytest.approx([0] * 6 + [-0.6, 0.4, 0.2])
    assert [-VALUES[train.after(board, square)] for square in (6, 7, 8)] == [1, 0, -1] and VALUES[board] == 1


# ---- games ----------------------------------------------------------------------------------------------------------

class Fixed(torch.nn.Module):
    """A player that always takes the first free square of a list."""

    def __init__(self, order):
        super().__init__()
        self.logits = torch.zeros(9)
        for rank, square in enumerate(order):
            self.logits[square] = 1000.0 * (9 - rank)

    def forward(self, boards):
        return self.logits.expand(len(boards), 9)


def first_free(order):
    return lambda board: next(square for square in order if board[square] == 0)


@pytest.mark.parametrize("seed", range(5))
def test_play_games_against_a_plain_loop(seed):
    rng = random.Random(seed)
    a, b = rng.sample(range(9), 9), rng.sample(range(9), 9)
    starts = [(0,) * 9] * 4 + rng.sample(POSITIONS, 60)
    rng.shuffle(starts)
    # with one view everybody looks at the board as it is, so that fixed players stay fixed
    config = train.Config(opponent_random=0.0, views=1)
    batch = train.play_games(Fixed(a), Fixed(b), torch.tensor(starts, dtype=torch.int8), config, torch.Generator().manual_seed(0))
    expected = []
    for game, board in enumerate(starts):
        step, decisions = 0, []
        while train.outcome_if_over(board) is None:
            learner = (step % 2 == 0) == (game < len(starts) // 2)
            square = first_free(a if learner else b)(board)
            if learner:
                decisions.append((board, square))
            board, step = train.after(board, square), step + 1
        over = train.outcome_if_over(board)
        last_was_learner = ((step - 1) % 2 == 0) == (game < len(starts) // 2)
        result = 0 if over == 0 else 1 if last_was_learner else -1
        expected += [(game, *decision, result) for decision in decisions]
    boards, actions, games, outcomes = (batch[name].tolist() for name in ("boards", "actions", "games", "outcomes"))
    got = [(game, tuple(board), action, outcome) for game, board, action, outcome in zip(games, boards, actions, outcomes)]
    assert sorted(got) == sorted(expected)


class Finisher(torch.nn.Module):
    """Prefers the squares that complete a line, in whatever view it is shown."""

    def forward(self, x):
        mine, logits = x[:, :9], torch.zeros(len(x), 9)
        for square in range(9):
            with_it = mine.clone()
            with_it[:, square] = 1
            wins = (with_it[:, train.LINES].sum(-1) == 3).any(-1)
            logits[wins & (mine[:, square] + x[:, 9 + square] == 0), square] = 1e4
        return logits


def test_views_map_the_move_back():
    """A player that sees how to win at once must win at once, whichever view it is shown."""
    wins = [b for b in POSITIONS if any(b[s] == 0 and train.outcome_if_over(train.after(b, s)) == -1 for s in range(9))]
    starts = torch.tensor(wins + wins, dtype=torch.int8)          # in the first half of the games the learner is to move
    batch = train.play_games(Finisher(), Finisher(), starts, train.Config(opponent_random=0.0), torch.Generator().manual_seed(0))
    assert len(batch["outcomes"]) == len(wins) and (batch["outcomes"] == 1).all()


def test_choose_moves_shows_a_view_and_maps_the_move_back():
    """The docstring's drawing, and: what was seen is the board in one of the views, and the square is the action in that view."""
    board = torch.tensor([[1, -1, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int8)
    assert board.gather(1, train.VIEWS[2:3]).tolist() == [[0, 0, 0, -1, 0, 0, 1, 0, 0]] and train.VIEWS[2, 7] == 3
    boards = torch.tensor(POSITIONS, dtype=torch.int8)
    torch.manual_seed(0)
    seen, actions, squares = train.choose_moves(train.make_agent(8)["actor"], boards, 8, 0.5, torch.Generator().manual_seed(0))
    used = set()
    for board, view, action, square in zip(POSITIONS, seen.tolist(), actions.tolist(), squares.tolist()):
        assert board[square] == 0
        fits = [k for k, squares_of in enumerate(train.VIEWS.tolist())
                if [board[s] for s in squares_of] == view and squares_of[action] == square]
        assert fits
        used.update(fits)
    assert used == set(range(8))


def test_make_moves_moves_in_the_games_it_is_given():
    boards = torch.tensor([[1, 1, 0, -1, -1, 0, 0, 0, 0]] * 3, dtype=torch.int8)
    won, over = train.make_moves(boards, torch.tensor([2, 0]), torch.tensor([2, 8]))
    assert won.tolist() == over.tolist() == [True, False]
    assert boards.tolist() == [[-1, -1, 0, 1, 1, 0, 0, 0, -1], [1, 1, 0, -1, -1, 0, 0, 0, 0], [-1, -1, -1, 1, 1, 0, 0, 0, 0]]
    full = torch.tensor([[1, -1, 1, 1, -1, -1, -1, 1, 0]], dtype=torch.int8)
    won, over = train.make_moves(full, torch.tensor([0]), torch.tensor([8]))
    assert won.tolist() == [False] and over.tolist() == [True]


def test_blunders_are_uniform_over_legal_moves():
    class Stubborn(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([1e4] + [0.0] * 8).expand(len(x), 9)
    boards = torch.zeros(40_000, 9, dtype=torch.int8)
    boards[:, 8] = -1
    _, actions, _ = train.choose_moves(Stubborn(), boards, 1, 0.25, torch.Generator().manual_seed(0))
    shares = actions.bincount(minlength=9) / len(boards)
    assert shares[8] == 0 and abs(shares[0] - (0.75 + 0.25 / 8)) < 0.01 and (shares[1:8] - 0.25 / 8).abs().max() < 0.005


def test_choose_starts_where_it_should():
    positions = torch.tensor(POSITIONS, dtype=torch.int8)
    pool = ["oldest", "middle", "newest"]
    generator = torch.Generator().manual_seed(0)
    opponents = {train.choose(train.Config(games=2), pool, positions, generator)[0] for _ in range(50)}
    assert opponents == set(pool)
    _, starts = train.choose(train.Config(games=100, exploring_starts=0.0), pool, positions, generator)
    assert not starts.any()
    _, starts = train.choose(train.Config(games=20_000, exploring_starts=0.5), pool, positions, generator)
    assert abs((starts == 0).all(dim=1).float().mean() - (0.5 + 0.5 / 9)) < 0.02      # the empty board is one of the random starts too


def test_exploring_starts_go_to_every_position_and_to_each_number_of_stones_alike():
    """A position with few stones is rare among the 4,520, and chosen as often as all that have many."""
    positions = torch.tensor(POSITIONS, dtype=torch.int8)
    _, starts = train.choose(train.Config(games=200_000), ["opponent"], positions, torch.Generator().manual_seed(0))
    assert starts.dtype == torch.int8 and set(map(tuple, starts.tolist())) == set(POSITIONS)
    stones = (starts != 0).sum(dim=1)
    shares = stones.bincount(minlength=9) / len(starts)
    assert len(shares) == 9 and (shares - 1 / 9).abs().max() < 0.004
    with_two = starts[stones == 2]                                # 72 positions, and these are alike among themselves
    counts = torch.tensor([(with_two == torch.tensor(board, dtype=torch.int8)).all(dim=1).sum() for board in POSITIONS if sum(map(abs, board)) == 2])
    assert len(counts) == 72 and (counts / counts.sum() * 72 - 1).abs().max() < 0.3


FILES = {".in_use", "best.pt", "last.pt", "config.json", "metrics.csv", "timing.csv", "train.json"}


@pytest.mark.parametrize("name", train.BREAKS)
def test_every_broken_variant_runs_and_leaves_its_files(name, tmp_path):
    assert call(train, "--smoke", "--quiet", "--break", name, "--out", tmp_path / "o").returncode == 0
    assert {path.name for path in (tmp_path / "o").iterdir()} == FILES


def test_one_side_only_learns_only_as_first_player():
    starts = torch.zeros(64, 9, dtype=torch.int8)
    agent, generator = train.make_agent(8), torch.Generator().manual_seed(0)
    config = train.broken_config(train.Config(broken="one-side-only", games=64))
    batch = train.play_games(agent["actor"], agent["actor"], starts, config, generator)
    kept = train.sabotage(batch, config, generator)
    assert config.exploring_starts == 0 and set(kept) == set(batch) and len(kept["games"]) < len(batch["games"])
    assert ((kept["boards"] != 0).sum(dim=1) % 2 == 0).all()


def test_off_policy_symmetry_turns_board_and_move_together():
    agent, generator = train.make_agent(8), torch.Generator().manual_seed(0)
    config = train.broken_config(train.Config(broken="off-policy-symmetry"))
    batch = train.play_games(agent["actor"], agent["actor"], torch.zeros(64, 9, dtype=torch.int8), config, generator)
    turned = train.sabotage(batch, config, generator)
    changed = 0
    for board, action, new_board, new_action in zip(*(part[name].tolist() for part in (batch, turned) for name in ("boards", "actions"))):
        changed += board != new_board
        assert any([board[s] for s in view] == new_board and view[new_action] == action for view in train.VIEWS.tolist())
    assert config.views == 1 and changed > 0


def test_the_other_broken_variants_are_settings():
    assert train.broken_config(train.Config(broken="latest-opponent-only")).pool == 1
    config = train.broken_config(train.Config(broken="no-exploring-opponent"))
    assert config.opponent_random == config.exploring_starts == 0
    assert train.broken_config(train.Config()) == train.Config()


@pytest.mark.parametrize("order", [range(9), (4, 0, 2, 6, 8, 1, 3, 5, 7)])
def test_the_proof_counts_the_losing_lines_of_players_that_lose(order):
    order = list(order)
    proof = train.prove(Fixed(order), VALUES)

    def count(mine, theirs, my_turn, counts, errors):
        if filled(theirs if my_turn else mine):
            counts["lost" if my_turn else "won"] += 1
        elif mine | theirs == 511:
            counts["drawn"] += 1
        elif my_turn:
            square = next(s for s in order if not (mine | theirs) >> s & 1)
            if -oracle_value(theirs, mine | 1 << square) < oracle_value(mine, theirs):
                errors.add((mine, theirs))
            count(mine | 1 << square, theirs, False, counts, errors)
        else:
            for s in range(9):
                if not (mine | theirs) >> s & 1:
                    count(mine, theirs | 1 << s, True, counts, errors)

    for side, first in (("first", True), ("second", False)):
        counts, errors = dict(lost=0, drawn=0, won=0), set()
        count(0, 0, first, counts, errors)
        assert proof[side] == counts | dict(worse_than_minimax=len(errors)) and counts["lost"] > 0
    assert proof["all_positions_worse_than_minimax"] == sum(
        -oracle_value(bits(b, -1), bits(b, 1) | 1 << first_free(order)(b)) < oracle_value(bits(b, 1), bits(b, -1)) for b in POSITIONS)


def test_matches_agree_with_the_exact_shares():
    agent = evaluation.load_agent("random")
    exact = study.against_random(VALUES, evaluation.greedy_table(agent["actor"], VALUES))
    played = evaluation.versus(agent["actor"], "random", 4000, VALUES, seed=1)
    for shares, side in zip(exact, ("first", "second")):
        for share, key in zip(shares, ("won", "drawn", "lost")):
            assert abs(played[side][key] - share) < 0.04
    best = study.against_random(VALUES)
    assert best[0][0] == pytest.approx(0.995, abs=5e-4) and best[1][0] == pytest.approx(0.916, abs=5e-4) and best[0][2] == best[1][2] == 0


# ---- the shipped agent and the scripts ------------------------------------------------------------------------------

def test_shipped_agent_has_no_losing_line(tmp_path):
    process = run(EVAL, "--prove", "--json", tmp_path / "p.json")
    assert process.returncode == 0, process.stderr
    proof = json.loads((tmp_path / "p.json").read_text())
    for side in ("first", "second"):
        assert proof[side]["lost"] == 0 and proof[side]["worse_than_minimax"] == 0
    assert proof["all_positions_worse_than_minimax"] == 0
    shares = study.against_random(VALUES, evaluation.greedy_table(evaluation.load_agent(FOLDER / "weights")["actor"], VALUES))
    assert shares[0][0] >= 0.95 and shares[1][0] >= 0.78 and shares[0][2] == shares[1][2] == 0


def test_shipped_agent_plays_none_of_the_4520_positions_worse_than_the_oracle():
    """Also those that cannot occur against it. Judged by the oracle of this file, which shares no code with the proof."""
    actor = evaluation.load_agent(FOLDER / "weights")["actor"]
    boards = torch.tensor(POSITIONS, dtype=torch.int8)
    with torch.no_grad():
        moves = train.legal_logits(actor, boards).argmax(dim=-1).tolist()
    worse = [board for board, square in zip(POSITIONS, moves)
             if -oracle_value(bits(board, -1), bits(board, 1) | 1 << square) != oracle_value(bits(board, 1), bits(board, -1))]
    assert len(POSITIONS) == 4520 and not worse


@pytest.mark.parametrize("opponent", ["weak", "minimax"])
def test_shipped_agent_never_loses_to(opponent, tmp_path):
    assert call(evaluation, "--versus", opponent, "--games", 300, "--json", tmp_path / "v.json").returncode == 0
    result = json.loads((tmp_path / "v.json").read_text())
    assert result["first"]["lost"] == result["second"]["lost"] == 0 and result["first"]["games"] == 300


def rows_of(out):
    with (out / "metrics.csv").open(encoding="utf8") as file:
        return list(csv.DictReader(file))


def test_a_short_training_learns_and_repeats_itself(tmp_path):
    config = train.Config(updates=60, games=512, eval_every=30)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        result = train.train(config, tmp_path / name, lambda _: None)
    for name in ("metrics.csv", "best.pt", "last.pt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    rows, proof = rows_of(tmp_path / "a"), train.prove(evaluation.load_agent(tmp_path / "a")["actor"], VALUES)
    assert len(rows) == 61 and [row["update"] for row in rows if row["all_worse"]] == ["0", "30", "60"] and result["updates"] == 60
    assert proof["all_positions_worse_than_minimax"] < 0.8 * int(rows[0]["all_worse"])        # row 0 is the untrained agent


def test_training_never_sees_what_the_solver_knows(tmp_path, monkeypatch):
    """With a solver that tells lies the last weights are the same, byte for byte: minimax only judges."""
    lies = {board: value for board, value in zip(VALUES, random.Random(0).choices((-1, 0, 1), k=len(VALUES)))}
    for name, values in (("truth", VALUES), ("lies", lies)):
        monkeypatch.setattr(train, "minimax_values", lambda: dict(values))
        (tmp_path / name).mkdir()
        train.train(train.Config(updates=6, games=64, hidden=16, eval_every=3, pool_every=2), tmp_path / name, lambda _: None)
    assert (tmp_path / "truth" / "last.pt").read_bytes() == (tmp_path / "lies" / "last.pt").read_bytes()
    assert [row["all_worse"] for row in rows_of(tmp_path / "truth")] != [row["all_worse"] for row in rows_of(tmp_path / "lies")]


def test_update_equals_a_plain_transcription(monkeypatch):
    def never(*_):
        raise AssertionError("sabotage() without --break")
    monkeypatch.setattr(train, "sabotage", never)
    torch.manual_seed(0)
    config = train.Config(games=32, lr=0.01, ent_coef=0.3, vf_coef=0.7, max_grad_norm=0.05)
    first, second = train.make_agent(8), train.make_agent(8)
    second.load_state_dict(first.state_dict())
    batch = train.play_games(first["actor"], first["actor"], torch.zeros(32, 9, dtype=torch.int8), config, torch.Generator().manual_seed(1))
    report = train.update(first, torch.optim.Adam(first.parameters(), lr=1.0), batch, config, 0.25, torch.Generator())
    boards, actions, outcomes = batch["boards"], batch["actions"], batch["outcomes"]
    inputs = torch.cat([boards == 1, boards == -1], dim=1).float()
    logits = second["actor"](inputs).masked_fill(boards != 0, -1e9)
    values, policy = second["critic"](inputs)[:, 0], torch.distributions.Categorical(logits=logits)
    critic = 0.5 * ((values - outcomes) ** 2).mean()
    loss = -(policy.log_prob(actions) * (outcomes - values.detach())).mean() + 0.7 * critic - 0.3 * 0.25 * policy.entropy().mean()
    optimizer = torch.optim.Adam(second.parameters(), lr=0.01 * 0.25)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(second.parameters(), 0.05)
    optimizer.step()
    assert report["outcome"] == pytest.approx(outcomes.mean().item()) and report["moves"] == len(boards) and report["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert report["entropy"] == pytest.approx(policy.entropy().mean().item(), rel=1e-4) and report["critic_loss"] == pytest.approx(critic.item(), rel=1e-4)
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(weight, second.state_dict()[name], atol=1e-6, rtol=1e-3)


def test_the_training_loop_keeps_its_books(tmp_path, monkeypatch):
    pools, shares, choose, update = [], [], train.choose, train.update
    monkeypatch.setattr(train, "choose", lambda config, pool, *rest: pools.append(list(pool)) or choose(config, pool, *rest))
    monkeypatch.setattr(train, "update", lambda *given: shares.append(given[4]) or update(*given))
    config = train.Config(seed=2, updates=7, games=16, hidden=8, eval_every=3, pool_every=2, pool=2)
    result = train.train(config, tmp_path, lambda _: None)
    assert shares == pytest.approx([(7 - k) / 7 for k in range(7)])
    assert [len(pool) for pool in pools] == [1, 1, 2, 2, 2, 2, 2]              # a frozen self is added after updates 2, 4 and 6
    assert pools[2][0] is pools[0][0] and pools[4][0] is pools[2][1] and pools[6][0] is pools[4][1]
    rows = rows_of(tmp_path)
    assert [row["update"] for row in rows] == [str(k) for k in range(8)] and [row["update"] for row in rows if row["all_worse"]] == ["0", "3", "6", "7"]
    assert len((tmp_path / "timing.csv").read_text().splitlines()) == 9 and result["updates"] == 7
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(pools[0][0].parameters(), train.make_agent(8)["actor"].parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(pools[0][0].parameters(), pools[2][1].parameters()))


def test_examine_keeps_the_best_weights_and_the_later_one_of_equals(monkeypatch):
    def proof(lost, worse, anywhere):
        side = dict(lost=lost, drawn=0, won=0, worse_than_minimax=worse)
        return dict(first=side, second=side, all_positions_worse_than_minimax=anywhere)
    agent, state, kept = train.make_agent(2), dict(best=None, best_faults=None), []
    for found in (proof(5, 0, 0), proof(1, 9, 9), proof(1, 9, 9), proof(1, 9, 10), proof(0, 3, 99), proof(2, 0, 0)):
        monkeypatch.setattr(train, "prove", lambda actor, values: found)
        before = state["best"]
        row = train.examine(agent, VALUES, state)
        kept.append(state["best"] is not before)
        assert row["first_lost"] == row["second_lost"] == found["first"]["lost"] and row["all_worse"] == found["all_positions_worse_than_minimax"]
    assert kept == [True, True, True, False, True, False]


def test_describe_finds_the_first_perfect_proof():
    perfect = dict(first_lost=0, second_lost=0, first_worse_than_minimax=0, second_worse_than_minimax=0, all_worse=9)
    rows = [dict(update=0) | perfect | dict(second_lost=3), dict(update=1), dict(update=2) | perfect, dict(update=3) | perfect]
    clock = [dict(update=number, seconds=number, proof_seconds=1.0) for number in range(4)]
    result = train.describe(dict(update=3, rows=rows, clock=clock))
    assert result == dict(updates=3, perfect_at=2, perfect_seconds=3, train_seconds=6, proof_seconds=4.0)
    assert train.describe(dict(update=0, rows=rows[:1], clock=clock[:1]))["perfect_at"] is None


# ---- the scripts as used --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a run"                # with a space: printed commands must survive it
    process = run(TRAIN, "--updates", 12, "--games", 64, "--eval-every", 5, "--out", out)
    assert process.returncode == 0, process.stderr
    return out, process


def test_the_trainer_starts_the_eval_on_its_run(short_run):
    out, process = short_run
    assert {path.name for path in out.iterdir()} == FILES | {"eval.json", "curve.png"}
    judged, rows = json.loads((out / "eval.json").read_text()), rows_of(out)
    assert judged == train.prove(evaluation.load_agent(out)["actor"], VALUES)
    assert "NOT perfect: " in process.stdout and "of all 4,520" in process.stdout
    assert len(rows) == 13 and [row["update"] for row in rows if row["first_lost"]] == ["0", "5", "10", "12"]
    command = shlex.split(process.stdout.split("try to win: ")[1])        # the printed next step works as printed
    assert subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).returncode == 0


def test_run_judges_once_more(short_run, tmp_path):
    shutil.copytree(short_run[0], tmp_path / "copy")
    judged = (tmp_path / "copy" / "eval.json").read_bytes()
    (tmp_path / "copy" / "eval.json").unlink()
    process = call(evaluation, "--run", tmp_path / "copy")
    assert process.returncode == 0 and "NOT perfect" in process.stdout and (tmp_path / "copy" / "eval.json").read_bytes() == judged


def test_alone_the_trainer_says_that_nothing_judges_the_run(tmp_path):
    shutil.copy(TRAIN, tmp_path)
    process = run(tmp_path / TRAIN.name, "--updates", 2, "--games", 16, "--out", tmp_path / "out")
    assert process.returncode == 0 and "nothing judges" in process.stdout and (tmp_path / "out" / "best.pt").exists()


def test_flags_win_over_smoke(tmp_path):
    assert call(train, "--smoke", "--updates", "1", "--out", tmp_path / "out").returncode == 0
    assert len(rows_of(tmp_path / "out")) == 2 and json.loads((tmp_path / "out" / "config.json").read_text())["games"] == 16


def test_trainer_overwrites_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert_one_line_error(call(train, "--out", tmp_path), "is not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_keeps_the_best_weights(tmp_path):
    process = subprocess.Popen([sys.executable, str(TRAIN), "--games", "16", "--updates", "100000", "--out", str(tmp_path / "out")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if re.match(r" +100 ", line):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"train.json"}
    command = shlex.split(errors.split(" with ", 1)[1])           # the printed next step works as printed
    assert subprocess.run([*command, "--games", "4"], capture_output=True).returncode == 0


def test_a_gradient_that_is_not_finite_keeps_what_there_is(tmp_path, monkeypatch):
    calls = []
    real = train.actor_critic_loss

    def sometimes(*arguments):
        calls.append(1)
        loss, terms = real(*arguments)
        return loss * (math.nan if len(calls) == 3 else 1.0), terms
    monkeypatch.setattr(train, "actor_critic_loss", sometimes)
    assert_one_line_error(call(train, "--quiet", "--games", "16", "--out", tmp_path / "out"), "not finite", "--lr")
    assert len(rows_of(tmp_path / "out")) == 3 and evaluation.load_agent(tmp_path / "out")


def test_latest_passes_over_smoke_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "HERE", tmp_path)
    assert_one_line_error(call(evaluation, "--weights", "latest"), "no run")
    for age, name in enumerate(("20260101-000000_seed1", "20260101-000001_seed1", "20260101-000002_seed1_smoke")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "best.pt").write_bytes(b"")
        os.utime(tmp_path / "runs" / name / "best.pt", (age, age))
    assert evaluation.newest_run("best.pt").name == "20260101-000001_seed1"


@pytest.mark.long
def test_gif(tmp_path):
    from PIL import Image
    process = run(STUDY, "--gif", tmp_path / "x.gif")
    assert process.returncode == 0, process.stderr
    with Image.open(tmp_path / "x.gif") as picture:
        assert picture.n_frames >= 5


def test_the_tables_and_figures_of_the_study(short_run, tmp_path):
    """On runs that exist already, since 17 trainings are too many for a test."""
    import matplotlib
    matplotlib.use("Agg")
    out, _ = short_run
    (tmp_path / "as_it_is_0").mkdir()

    class Done:
        returncode = 0

    def copied(command):
        shutil.copytree(out, command[command.index("--out") + 1], dirs_exist_ok=True)
        return Done

    keep, study.subprocess.run = study.subprocess.run, copied
    try:
        runs = {("as it is", seed): study.run_of(tmp_path, "as it is", seed) for seed in range(5)}
        runs |= {(name, seed): study.run_of(tmp_path, name, seed) for name in train.BREAKS for seed in range(3)}
    finally:
        study.subprocess.run = keep
    assert len(study.table_of_seeds(runs, VALUES)) == 9
    lines = study.table_of_variants(runs, ("as it is", *train.BREAKS), VALUES)
    assert len(lines) == 7 and {line.count("|") for line in lines} == {6}
    study.draw_losing_lines(runs, tmp_path / "a.png")
    study.draw_variants(runs, train.BREAKS, tmp_path / "b.png")
    study.draw_portrait(evaluation.load_agent(FOLDER / "weights"), VALUES, tmp_path / "c.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("a.png", "b.png", "c.png"))


# ---- a person at the keyboard ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def agent():
    return evaluation.load_agent(str(FOLDER / "weights"))


@pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a pseudo-terminal")
def test_terminal_play_through_a_pseudo_terminal():
    import pexpect
    child = pexpect.spawn(sys.executable, [str(PLAY), "--second"], encoding="utf8", timeout=60)
    child.expect("the agent begins")
    child.expect("your move> ")
    marks = lambda: [cell for line in child.before.splitlines() if "|" in line for cell in line.replace(" ", "").split("|")]
    taken = marks().index("X") + 1
    for text, answer in ((str(taken), "is taken"), ("", "Please type"), ("hello", "Please type"), ("55", "Please type"), ("u", "nothing to take back"),
                         ("?", "critic values")):
        child.sendline(text)
        child.expect(answer)
        child.expect("your move> ")
    child.setwinsize(10, 20)
    for _ in range(5):
        free = next(cell for cell in marks() if cell.isdigit())
        child.sendline(free)
        if child.expect(["your move> ", "The game is over: (you lose|a draw)"]) == 1:
            break
    child.expect("your move> ")
    child.sendline("")
    child.expect("You are X and begin")                           # sides are changed
    child.expect("your move> ")
    child.sendline("q")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a pseudo-terminal")
@pytest.mark.parametrize("end", ["q\n", "\x03", "\x04"], ids=["q", "Ctrl-C", "Ctrl-D"])
def test_leaving_the_terminal_game_is_friendly(end):
    import pexpect
    child = pexpect.spawn(sys.executable, [str(PLAY)], encoding="utf8", timeout=60)
    child.expect("your move> ")
    child.send(end)
    child.expect("Good-bye")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


TYPED = []


@given(st.lists(st.one_of(st.sampled_from([*"123456789", "u", "?", ""]), st.text(max_size=5)), min_size=25, max_size=40), st.booleans())
@settings(max_examples=250, deadline=None)
def test_thousands_of_random_inputs_never_end_in_a_traceback(agent, texts, person_first):
    waiting = iter(texts)

    def typed(prompt):
        try:
            TYPED.append(1)
            return next(waiting)
        except StopIteration:
            raise EOFError

    keep = builtins.input, builtins.print
    builtins.input, builtins.print = typed, lambda *a, **k: None
    try:
        playing.play_terminal(agent, person_first)
    finally:
        builtins.input, builtins.print = keep


def test_it_was_five_thousand_inputs():
    assert len(TYPED) >= 5000 or not TYPED                        # none when this test is run alone


def test_the_move_a_person_meets_is_the_move_that_was_proved(agent):
    table = evaluation.greedy_table(agent["actor"], VALUES)
    assert all(int(np.argmax(playing.opinion(agent, board)[0])) == table[board] for board in POSITIONS)


@given(st.lists(st.integers(-1, 9), max_size=30), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_game_is_legal_whatever_a_person_does_and_is_never_won(agent, keys, person_first):
    game = playing.Game(agent, person_first)
    game.reply()
    for key in keys:
        if game.over():
            break
        if key < 0:
            game.take_back()
        else:
            game.play(key % 9)
            game.reply()
        assert len(set(game.plies)) == len(game.plies) and (game.over() or game.persons_turn())
    assert game.over() != "you win"


def test_the_window_is_clicked_through_without_a_display(agent):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib.backend_bases import KeyEvent, MouseEvent
    window = playing.Window(agent, person_first=True)
    window.figure.canvas.draw()

    def click(square):
        x, y = window.axes.transData.transform((square % 3, square // 3))
        window.figure.canvas.callbacks.process("button_press_event", MouseEvent("button_press_event", window.figure.canvas, x, y, button=1))
        window.figure.canvas.draw()

    click(0)
    assert window.game.plies[0] == 0 and len(window.game.plies) == 2
    click(0)
    assert len(window.game.plies) == 2                            # taken: nothing happens
    window.figure.canvas.callbacks.process("key_press_event", KeyEvent("key_press_event", window.figure.canvas, "u"))
    assert window.game.plies == []
    for square in range(9):
        if not window.game.over():
            click(square)
    assert window.game.over() in ("you lose", "a draw") and "over" in window.axes.get_title()
    click(4)
    assert not window.game.person_first and len(window.game.plies) == 1
    window.figure.canvas.callbacks.process("button_press_event", MouseEvent("button_press_event", window.figure.canvas, 1, 1, button=1))


# ---- bad input ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, words", [
    (["--lr", "0"], ["--lr"]), (["--games", "1"], ["--games"]), (["--opponent-random", "2"], ["--opponent-random"]), (["--pool", "0"], ["--pool"]),
    (["--updates", "0"], ["--updates"]), (["--break", "all"], ["one-side-only"]), (["--views", "9"], ["--views"]), (["--seed", "-1"], ["--seed"]), (["--gmaes", "5"], ["--help"])])
def test_trainer_refuses_bad_values(arguments, words, tmp_path):
    assert_one_line_error(call(train, *arguments, "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--games", "0", "--versus", "random"], ["--prove", "--versus", "weak"], ["--run", "x"], ["--versus", "nobody.pt"],
                                       ["--json", "no/such/x.json", "--prove"], ["--json", "x.json", "--run", "x"]])
def test_eval_refuses_bad_values(arguments, tmp_path):
    assert_one_line_error(call(evaluation, *arguments, cwd=tmp_path))


@pytest.mark.parametrize("arguments", [["--first", "--second"], ["--weights", "nobody.pt"], ["--gui", "--first"]])
def test_play_refuses_bad_values(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    assert_one_line_error(run(PLAY, *arguments, cwd=tmp_path))


class Code:
    def __reduce__(self):
        return open, ("executed.txt", "w")


@pytest.mark.parametrize("kind", ["missing", "truncated", "shape", "text", "pickle", "zip-pickle", "empty"])
def test_eval_refuses_bad_weights(kind, tmp_path):
    path, good = tmp_path / "w.pt", WEIGHTS.read_bytes()
    if kind == "truncated":
        path.write_bytes(good[:len(good) // 2])
    elif kind == "shape":
        torch.save({"actor.0.weight": torch.zeros(8, 5)}, path)
    elif kind == "text":
        path.write_text("hello")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Code()))
    elif kind == "zip-pickle":
        torch.save(Code(), path)
    elif kind == "empty":
        path.write_bytes(b"")
    assert_one_line_error(call(evaluation, "--weights", path, "--prove", cwd=tmp_path), "shipped")
    assert not (tmp_path / "executed.txt").exists()
