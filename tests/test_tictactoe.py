"""Tic-Tac-Toe: rules and minimax against an independent oracle, the loss against a transcription, the proof on players that lose,
and the games a person plays."""
import builtins
import json
import math
import pickle
import random
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
train, evaluation = load("tictactoe_actorcritic/train_tictactoe.py"), load("tictactoe_actorcritic/tictactoe_eval.py")
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
    # with this variant everybody looks at the board as it is, so that fixed players stay fixed
    config = train.Config(opponent_random=0.0, broken="off-policy-symmetry")
    boards, actions, outcomes = train.play_games(Fixed(a), Fixed(b), torch.tensor(starts, dtype=torch.int8), config, torch.Generator().manual_seed(0))
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
        expected += [(*decision, result) for decision in decisions]
    got = [(tuple(board), action, outcome) for board, action, outcome in zip(boards.tolist(), actions.tolist(), outcomes.tolist())]
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
    _, _, outcomes = train.play_games(Finisher(), Finisher(), starts, train.Config(opponent_random=0.0), torch.Generator().manual_seed(0))
    assert len(outcomes) == len(wins) and (outcomes == 1).all()


@pytest.mark.parametrize("name", train.BREAKS)
def test_every_broken_variant_runs_and_leaves_its_files(name, tmp_path):
    assert call(train, "--smoke", "--quiet", "--break", name, "--out", tmp_path / "o").returncode == 0
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"best.pt", "last.pt", "config.json", "curve.png", "eval.json", "metrics.csv",
                                                                  "timing.csv", "train.json"}


def test_one_side_only_learns_only_as_first_player():
    starts = torch.zeros(64, 9, dtype=torch.int8)
    agent = train.make_agent(8)
    boards, _, _ = train.play_games(agent["actor"], agent["actor"], starts, train.Config(broken="one-side-only"), torch.Generator().manual_seed(0))
    assert ((boards != 0).sum(dim=1) % 2 == 0).all()


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
    exact = evaluation.against_random(VALUES, evaluation.greedy_table(agent, VALUES))
    played = evaluation.versus(agent, "random", 4000, VALUES, seed=1)
    for shares, side in zip(exact, ("first", "second")):
        for share, key in zip(shares, ("won", "drawn", "lost")):
            assert abs(played[side][key] - share) < 0.04
    best = evaluation.against_random(VALUES)
    assert best[0][0] == pytest.approx(0.995, abs=5e-4) and best[1][0] == pytest.approx(0.916, abs=5e-4) and best[0][2] == best[1][2] == 0


# ---- the shipped agent and the scripts ------------------------------------------------------------------------------

def test_shipped_agent_has_no_losing_line(tmp_path):
    process = run(EVAL, "--prove", "--json", tmp_path / "p.json")
    assert process.returncode == 0, process.stderr
    proof = json.loads((tmp_path / "p.json").read_text())
    for side in ("first", "second"):
        assert proof[side]["lost"] == 0 and proof[side]["worse_than_minimax"] == 0
    shares = evaluation.against_random(VALUES, evaluation.greedy_table(evaluation.load_agent(str(FOLDER / "weights")), VALUES))
    assert shares[0][0] >= 0.95 and shares[1][0] >= 0.78 and shares[0][2] == shares[1][2] == 0


@pytest.mark.parametrize("opponent", ["weak", "minimax"])
def test_shipped_agent_never_loses_to(opponent, tmp_path):
    assert call(evaluation, "--versus", opponent, "--games", 300, "--json", tmp_path / "v.json").returncode == 0
    result = json.loads((tmp_path / "v.json").read_text())
    assert result["first"]["lost"] == result["second"]["lost"] == 0 and result["first"]["games"] == 300


def test_a_short_training_learns_and_repeats_itself():
    config = train.Config(updates=60, games=512, prove_every=30)
    results = [train.train(config, lambda _: None) for _ in range(2)]
    assert results[0][2] == results[1][2] and all(torch.equal(results[0][0]["best"][n], results[1][0]["best"][n]) for n in results[0][0]["best"])
    assert results[0][1]["all_positions_worse_than_minimax"] < 0.8 * results[0][2][0]["all_worse"]        # row 0 is the untrained agent


def test_gif(tmp_path):
    from PIL import Image
    assert call(evaluation, "--gif", "--out", tmp_path / "x.gif").returncode == 0
    with Image.open(tmp_path / "x.gif") as picture:
        assert picture.n_frames >= 5


# ---- a person at the keyboard ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def agent():
    return evaluation.load_agent(str(FOLDER / "weights"))


@pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a pseudo-terminal")
def test_terminal_play_through_a_pseudo_terminal():
    import pexpect
    child = pexpect.spawn(sys.executable, [str(EVAL), "--play", "--second"], encoding="utf8", timeout=60)
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


@pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a pseudo-terminal")
@pytest.mark.parametrize("end", ["q\n", "\x03", "\x04"], ids=["q", "Ctrl-C", "Ctrl-D"])
def test_leaving_the_terminal_game_is_friendly(end):
    import pexpect
    child = pexpect.spawn(sys.executable, [str(EVAL), "--play"], encoding="utf8", timeout=60)
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
        evaluation.play_terminal(agent, person_first)
    finally:
        builtins.input, builtins.print = keep


def test_it_was_five_thousand_inputs():
    assert len(TYPED) >= 5000 or not TYPED                        # none when this test is run alone


def test_the_move_a_person_meets_is_the_move_that_was_proved(agent):
    table = evaluation.greedy_table(agent, VALUES)
    assert all(int(np.argmax(evaluation.opinion(agent, board)[0])) == table[board] for board in POSITIONS)


@given(st.lists(st.integers(-1, 9), max_size=30), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_game_is_legal_whatever_a_person_does_and_is_never_won(agent, keys, person_first):
    game = evaluation.Game(agent, person_first)
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
    window = evaluation.Window(agent, person_first=True)
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
    (["--updates", "0"], ["--updates"]), (["--break", "all"], ["no-mask"]), (["--gmaes", "5"], ["--help"])])
def test_trainer_refuses_bad_values(arguments, words, tmp_path):
    assert_one_line_error(call(train, *arguments, "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--games", "0", "--versus", "random"], ["--first", "--second", "--play"], ["--play", "--gui"], ["--versus", "nobody.pt"],
                                       ["--json", "no/such/x.json", "--prove"], ["--json", "x.json", "--play"]])
def test_eval_refuses_bad_values(arguments, tmp_path):
    assert_one_line_error(call(evaluation, *arguments, cwd=tmp_path))


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
