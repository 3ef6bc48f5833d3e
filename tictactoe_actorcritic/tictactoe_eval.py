"""Judges the Tic-Tac-Toe agent: the proof, and matches against other players.

    python tictactoe_eval.py                    proves the shipped agent, plays 10,000 games a
                                                side against a random player
    python tictactoe_eval.py --prove            only the proof: every game that can happen
    python tictactoe_eval.py --versus minimax   10,000 games a side against perfect play; also
                                                random, weak, or another weights file
    python tictactoe_eval.py --run latest       what the trainer does at its end: eval.json,
                                                curve.png, the verdict
    python play_tictactoe.py                    you against it

Keys of --prove --json FILE and of eval.json: first and second, each with lost, drawn, won (complete
games over all replies) and worse_than_minimax (positions that can occur, in which the move gives
something away); all_positions_worse_than_minimax (of 4,520). Without --prove, --json FILE also
holds versus_random, as below.
Keys of --versus NAME --json FILE: first and second, each with won, drawn, lost (shares, 0-1), and
games (on each side).
Shapes: n boards of 9 squares. A board is shown from the mover's side: +1 the mover's stones, −1 the
other's, 0 empty.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "matplotlib==3.11.2"]
# ///
import argparse
import csv
import io
import json
import math
import os
import random
import shlex
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
REMEDY = "train one with train_tictactoe.py, or omit --weights for the shipped agent"
OPPONENTS = ("random", "weak", "minimax")


# ---- the same code as in train_tictactoe.py ---------------------------------------------------

LINES = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8],      # rows            0 1 2
                      [0, 3, 6], [1, 4, 7], [2, 5, 8],      # columns         3 4 5
                      [0, 4, 8], [2, 4, 6]])                # diagonals       6 7 8


def outcome_if_over(board):
    """−1 if the player who moved last has a line (the mover has lost), 0 if the board is full, None
    if the game goes on. board: tuple of 9 from the mover's side."""
    if any(board[a] + board[b] + board[c] == -3 for a, b, c in LINES.tolist()):
        return -1
    return 0 if all(board) else None


def legal_squares(board):
    return [square for square in range(9) if board[square] == 0]


def after(board, square):
    """The board after the mover has taken a square, seen by the next mover. Tuples of 9."""
    moved = board[:square] + (1,) + board[square + 1:]
    return tuple(-mark for mark in moved)


def make_agent(hidden):
    """Two networks on 18 inputs [n, 18]: "actor" -> logits [n, 9], "critic" -> value [n, 1]."""
    def network(outputs):
        return nn.Sequential(nn.Linear(18, hidden), nn.ReLU(),
                             nn.Linear(hidden, hidden), nn.ReLU(),
                             nn.Linear(hidden, outputs))
    return nn.ModuleDict(dict(actor=network(9), critic=network(1)))


def encode(boards):
    """[n, 9] of −1, 0, +1 -> [n, 18] of 0 and 1: where are my stones, where are the other's?"""
    return torch.cat([boards == 1, boards == -1], dim=-1).float()


def legal_logits(actor, boards):
    """[n, 9] logits with −inf on taken squares, so that softmax gives them exactly 0 (Eq. 1)."""
    return actor(encode(boards)).masked_fill(boards != 0, -math.inf)


def minimax(board, values):
    """Value of a position for the mover under best play (Eq. 7). Fills the dictionary `values`."""
    if board not in values:
        value = outcome_if_over(board)
        if value is None:
            # Eq. 7  a good position for the next mover is a bad one for me: the sign changes
            value = max(-minimax(after(board, square), values) for square in legal_squares(board))
        values[board] = value
    return values[board]


def minimax_values():
    """{position: value} for all 5,478 positions that can occur."""
    values = {}
    minimax((0,) * 9, values)
    return values


def open_positions(values):
    """The 4,520 positions in which the game goes on."""
    return [board for board in values if outcome_if_over(board) is None]


@torch.no_grad()
def greedy_table(actor, values):
    """{position: the actor's most probable square} for all 4,520 positions."""
    positions = open_positions(values)
    boards = torch.tensor(positions, dtype=torch.int8)                  # [4520, 9]
    squares = legal_logits(actor, boards).argmax(dim=-1)                # [4520]
    return dict(zip(positions, squares.tolist()))


def play_out(board, my_turn, table, counts, visited):
    """Plays out every game from a board: one move for the agent, every reply for the opponent."""
    over = outcome_if_over(board)
    if over == 0:
        counts["drawn"] += 1
    elif over == -1:                                  # the player to move has lost
        counts["lost" if my_turn else "won"] += 1
    elif my_turn:
        visited.add(board)
        play_out(after(board, table[board]), False, table, counts, visited)
    else:
        for square in legal_squares(board):
            play_out(after(board, square), True, table, counts, visited)


def prove(actor, values):
    """Follows the greedy policy through every reply, as first and as second player.

    values: minimax_values(). Returns {"first": …, "second": …, "all_positions_worse_than_minimax":
    n}. Each side has the number of complete games `lost`, `drawn`, `won`, and `worse_than_minimax`:
    positions that can occur while it plays its own moves, and in which its move is a mistake. The
    number n counts the mistakes in all 4,520 positions.
    """
    table = greedy_table(actor, values)
    worse = {board for board, square in table.items()
             if -values[after(board, square)] < values[board]}
    proof = {}
    for side in ("first", "second"):
        counts = dict(lost=0, drawn=0, won=0)
        visited = set()
        play_out((0,) * 9, side == "first", table, counts, visited)
        proof[side] = counts | dict(worse_than_minimax=len(visited & worse))
    return proof | dict(all_positions_worse_than_minimax=len(worse))


def faults(proof):
    """(lost lines, errors that can occur, errors anywhere); the best weights have least, the first
    number deciding, then the second, then the third."""
    first, second = proof["first"], proof["second"]
    return (first["lost"] + second["lost"],
            first["worse_than_minimax"] + second["worse_than_minimax"],
            proof["all_positions_worse_than_minimax"])


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes a file beside its target and moves it into place: nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, path)


# ---- loading ----------------------------------------------------------------------------------

def newest_run(needed):
    """The newest directory in runs/ with a file of that name; runs of --smoke do not count."""
    found = [path for path in HERE.glob(f"runs/*/{needed}") if "_smoke" not in path.parent.name]
    if not found:
        fail(f"latest: no run in {HERE / 'runs'} has a {needed} yet")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def load_agent(weights):
    """The agent in a file, in a run directory, in the newest run ("latest"), or an untrained one
    ("random").

    Weights are read with weights_only=True: a file that carries code is refused, not run.
    """
    if weights == "random":
        torch.manual_seed(0)
        return make_agent(256)
    path = newest_run("best.pt") if weights == "latest" else Path(weights)
    try:
        path = path / "best.pt" if path.is_dir() else path
        if not path.exists():
            fail(f"there are no weights at {path}; {REMEDY}")
        # A pipe would never end; and torch.load does not look at the checksums in the file
        assert path.is_file() and zipfile.ZipFile(path).testzip() is None
        with warnings.catch_warnings(action="ignore"):        # a refused file is reported below
            state = dict(torch.load(path, map_location="cpu", weights_only=True))
        agent = make_agent(hidden=state["actor.0.weight"].shape[0])
        agent.load_state_dict(state)
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise ValueError("a weight is not a number")
    except Exception:                 # torch raises many kinds; the remedy is one
        fail(f"{path} was not opened: it is damaged, of another network, or holds something else "
             f"than tensors; {REMEDY}")
    return agent


# ---- judging ----------------------------------------------------------------------------------

def proof_table(proof):
    """What prove() found, as lines for the console."""
    lines = [f"{'':8} {'lost':>6} {'drawn':>6} {'won':>6}   complete games over all replies; "
             "moves worse than minimax in reachable positions"]
    for side in ("first", "second"):
        p = proof[side]
        lines.append(f"{side:8} {p['lost']:6d} {p['drawn']:6d} {p['won']:6d}   "
                     f"{p['worse_than_minimax']}")
    lines.append("In all 4,520 positions, reachable or not: "
                 f"{proof['all_positions_worse_than_minimax']} moves worse than minimax.")
    return "\n".join(lines)


def judge_run(out, quiet):
    """Judges the best weights of a finished run: eval.json and curve.png go into its directory."""
    # A pipe in a file's place would never end
    assert all((out / name).is_file() for name in ("config.json", "train.json", "metrics.csv"))
    config = json.loads((out / "config.json").read_text(encoding="utf8"))
    result = json.loads((out / "train.json").read_text(encoding="utf8"))["result"]
    with (out / "metrics.csv").open(encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    proof = prove(load_agent(out)["actor"], minimax_values())
    write(out / "eval.json", json.dumps(proof, indent=1) + "\n")
    plot_curve(out / "curve.png", rows, config)
    if quiet:
        return
    lost, worse, anywhere = faults(proof)
    verdict = "PROVED: no line of play loses" if lost == 0 else f"NOT perfect: {lost} losing lines"
    verdict += (f"; {worse} reachable positions and {anywhere} of all 4,520 played worse than "
                "minimax")
    if result["perfect_at"]:
        verdict += (f"; first perfect at update {result['perfect_at']}, "
                    f"{result['perfect_seconds']:.0f} s")
    print(verdict)
    print(f"{result['train_seconds']:.0f} s of training, {result['proof_seconds']:.0f} s of proofs")
    words = [sys.executable, str(HERE / "play_tictactoe.py"), "--weights", str(out)]
    print(f"Look at curve.png, then try to win: {shlex.join(words)}")


def plot_curve(path, rows, config):
    """The errors that the proofs of a run found, and below them entropy and the critic's loss."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.style.use("petroff10")        # colours that colour-blind eyes can tell apart
    proofs = [row for row in rows if row["all_worse"]]
    updates = [int(row["update"]) for row in proofs]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=[2, 1],
                                         layout="constrained")
    for key, colour, label in (
            ("first_lost", "C0", "losing lines as first player"),
            ("second_lost", "C1", "losing lines as second player"),
            ("all_worse", "C2", "positions of 4,520 played worse than minimax")):
        top.plot(updates, [int(row[key]) for row in proofs], color=colour, marker=".", label=label)
    top.set_yscale("symlog", linthresh=1)
    top.axhline(0, color="C8", linestyle="--", label="target: 0")
    broken = f"   BROKEN: {config['broken']}" if config["broken"] else ""
    top.set(ylabel="count", ylim=(-0.3, None),
            title=f"Tic-Tac-Toe by self-play, seed {config['seed']}{broken}")
    top.legend(fontsize=9)
    for key, colour in (("entropy", "C5"), ("critic_loss", "C4")):
        series = np.array([float(row[key]) for row in rows[1:]])    # row 0 is the untrained agent
        smooth = [series[max(0, update - 100):update].mean() for update in updates[1:]]
        bottom.plot(range(1, len(series) + 1), series, color=colour, alpha=0.25)
        bottom.plot(updates[1:], smooth, color=colour, linewidth=2, label=key)
    bottom.set(xlabel="updates", ylim=(0, None))
    bottom.legend(fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    write(path, picture.getvalue())


# ---- matches ----------------------------------------------------------------------------------

def opponents_move(name, board, values, rng):
    """The square that one of OPPONENTS takes. random: any; weak: wins, else blocks, else any;
    minimax: any of the best."""
    squares = legal_squares(board)
    if name == "weak":
        others = tuple(-mark for mark in board)
        for mine in (board, others):                  # first my own line, then the other's
            for square in squares:
                if outcome_if_over(after(mine, square)) == -1:
                    return square
    if name == "minimax":
        squares = [square for square in squares if -values[after(board, square)] == values[board]]
    return rng.choice(squares)


def versus(actor, name, games, values, seed=0):
    """Plays `games` games on each side, with greedy moves.

    name: one of OPPONENTS, or a weights file. Returns {"first": …, "second": …}, each with won,
    drawn, lost (shares) and games.
    """
    rng = random.Random(seed)
    mine = greedy_table(actor, values)
    theirs = None if name in OPPONENTS else greedy_table(load_agent(name)["actor"], values)
    result = {}
    for side in ("first", "second"):
        counts = dict(won=0, drawn=0, lost=0)
        for _ in range(games):
            board = (0,) * 9
            my_turn = side == "first"
            while outcome_if_over(board) is None:
                if my_turn:
                    square = mine[board]
                elif theirs:
                    square = theirs[board]
                else:
                    square = opponents_move(name, board, values, rng)
                board = after(board, square)
                my_turn = not my_turn
            if outcome_if_over(board) == 0:
                counts["drawn"] += 1
            else:                                     # the player to move has lost
                counts["lost" if my_turn else "won"] += 1
        result[side] = {key: count / games for key, count in counts.items()} | dict(games=games)
    return result


def versus_line(result, name):
    sides = [f"as {side} player won {r['won']:.1%}, drawn {r['drawn']:.1%}, lost {r['lost']:.1%} "
             f"of {r['games']:,}" for side, r in result.items()]
    return f"against {name}: " + "; ".join(sides)


# ---- command line -----------------------------------------------------------------------------

def write_or_fail(flag, path, content):
    try:
        write(path, content)
    except OSError as problem:
        fail(f"{flag} {path} cannot be written ({problem.strerror}); choose another file")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    what = parser.add_argument_group("which agent")
    what.add_argument("--weights", default=str(HERE / "weights"), metavar="PATH|DIR|latest|random",
                      help="which agent (default: the shipped one)")
    what.add_argument("--run", metavar="DIR|latest",
                      help="judge a finished run: eval.json and curve.png go into its directory")
    judging = parser.add_argument_group("judging")
    judging.add_argument("--prove", action="store_true", help="enumerate every game")
    judging.add_argument("--versus", metavar="random|weak|minimax|WEIGHTS",
                         help="play many games against an opponent")
    judging.add_argument("--games", type=int, default=10_000, help="on each side (default 10,000)")
    judging.add_argument("--seed", type=int, default=0, help="of the opponent's moves (default 0)")
    judging.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--smoke", action="store_true", help="proves an untrained agent")
    machine.add_argument("--quiet", action="store_true", help="no output but errors")
    args = parser.parse_args()
    modes = (args.run, args.prove, args.versus is not None, args.smoke)
    if sum(map(bool, modes)) > 1:
        fail("--run, --prove, --versus and --smoke do different things; give one of them")
    if not 1 <= args.games <= 10**7:
        fail(f"--games must be in 1 … 10000000, not {args.games}")
    if args.json and args.run:
        fail("--run writes eval.json itself; --json goes with --prove, --versus or neither")
    if args.json and (os.path.isdir(args.json) or not os.path.isdir(args.json.absolute().parent)):
        fail(f"--json {args.json} must be a file in a directory that exists")
    return args


def judge(agent, args):
    """The figures that were asked for: (lines for the console, dictionary for --json)."""
    values = minimax_values()
    if args.versus is not None:
        # Two greedy players: one game on each side says it all
        games = args.games if args.versus in OPPONENTS else 1
        result = versus(agent["actor"], args.versus, games, values, args.seed)
        return versus_line(result, args.versus), result
    result = prove(agent["actor"], values)
    text = proof_table(result)
    if not (args.prove or args.smoke):
        matches = versus(agent["actor"], "random", args.games, values, args.seed)
        text += "\n" + versus_line(matches, "a random player")
        result["versus_random"] = matches
    return text, result


def main():
    args = parse_args()
    torch.set_num_threads(1)
    if args.run:
        out = newest_run("train.json") if args.run == "latest" else Path(args.run)
        try:
            return judge_run(out, args.quiet)
        except Exception as problem:  # Python raises many kinds; the remedy is one
            fail(f"--run {out} is no finished run of train_tictactoe.py ({problem!r})")
    agent = load_agent("random" if args.smoke else args.weights)
    text, result = judge(agent, args)
    if not args.quiet:
        print(text)
    if args.json:
        write_or_fail("--json", args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")          # a Windows pipe may not know every character
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted")
    except BrokenPipeError:                           # the reader of our output (head) is gone
        os._exit(1)
    except (OSError, MemoryError, UnicodeError) as problem:   # a file, the disk, memory
        fail(str(problem) or "out of memory")
