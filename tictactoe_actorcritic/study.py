"""Makes the tables and figures of the texts: trains five seeds, then every broken variant.

    python study.py runs/study      17 runs of about three minutes: tables.md and three figures
    python study.py --gif game.gif  two animated games against a random player, a few seconds

Nobody needs to read this to learn the algorithm.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "numpy==2.4.6", "matplotlib==3.11.2",
#                 "tqdm==4.70.1"]
# ///
import argparse
import csv
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
NORMAL = "as it is"
SEEDS, SEEDS_OF_VARIANTS = 5, 3
NEEDED = ("train_tictactoe.py", "tictactoe_eval.py", "play_tictactoe.py")


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


# ---- the runs ---------------------------------------------------------------------------------

def run_of(directory, name, seed):
    """One run of the trainer; returns its results, the agent, and the rows that hold a proof."""
    from tictactoe_eval import load_agent
    out = directory / f"{name.replace(' ', '_')}_{seed}"
    command = [sys.executable, str(HERE / "train_tictactoe.py"), "--quiet", "--out", str(out),
               "--seed", str(seed)]
    command += [] if name == NORMAL else ["--break", name]
    if subprocess.run(command).returncode:
        fail(f"the run in {out} failed; the study was stopped")
    with (out / "metrics.csv").open(encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    proofs = [dict(update=int(row["update"]),
                   lost=int(row["first_lost"]) + int(row["second_lost"]),
                   all_worse=int(row["all_worse"])) for row in rows if row["all_worse"]]
    result = json.loads((out / "train.json").read_text(encoding="utf8"))["result"]
    result |= json.loads((out / "eval.json").read_text(encoding="utf8"))
    return result | dict(agent=load_agent(out), entropy=float(rows[-1]["entropy"]), proofs=proofs)


# ---- exact shares against a random player -----------------------------------------------------

def shares_from(board, my_turn, table, values, memory):
    """Shares [won, drawn, lost] from a position on. table: see against_random."""
    from tictactoe_eval import after, legal_squares, outcome_if_over
    if (board, my_turn) in memory:
        return memory[board, my_turn]
    over = outcome_if_over(board)
    squares = legal_squares(board)
    if over == 0:
        shares = np.array([0.0, 1.0, 0.0])
    elif over == -1:                                  # the player to move has lost
        shares = np.array([0.0, 0.0, 1.0] if my_turn else [1.0, 0.0, 0.0])
    elif my_turn and table:
        shares = shares_from(after(board, table[board]), False, table, values, memory)
    else:
        if my_turn:
            squares = [square for square in squares
                       if -values[after(board, square)] >= min(0, values[board])]
        ways = [shares_from(after(board, square), not my_turn, table, values, memory)
                for square in squares]
        if my_turn:
            shares = max(ways, key=lambda way: way[0])
        else:
            shares = sum(ways) / len(ways)
    memory[board, my_turn] = shares
    return shares


def against_random(values, table=None):
    """Exact shares [won, drawn, lost] against a uniformly random player, as first and as second.

    table: {position: move}. Without one, the best that any never-losing player can reach: among the
    moves after which a loss cannot be forced, the one that wins most often.
    """
    memory = {}
    empty = (0,) * 9
    return (shares_from(empty, True, table, values, memory),
            shares_from(empty, False, table, values, memory))


# ---- tables -----------------------------------------------------------------------------------

def table_of_seeds(runs, values):
    from tictactoe_eval import greedy_table
    lines = ["| seed | losing lines, first + second | reachable moves worse than minimax "
             "| of all 4,520 | perfect after | training s | proofs s "
             "| random player: won as first / second | lost |",
             "|---|---|---|---|---|---|---|---|---|"]
    for seed in range(SEEDS):
        r = runs[NORMAL, seed]
        first, second = r["first"], r["second"]
        as_first, as_second = against_random(values, greedy_table(r["agent"]["actor"], values))
        perfect = "never"
        if r["perfect_at"]:
            perfect = f"{r['perfect_at']} updates, {r['perfect_seconds']:.0f} s"
        lines.append(f"| {seed} | {first['lost']} + {second['lost']} "
                     f"| {first['worse_than_minimax']} + {second['worse_than_minimax']} "
                     f"| {r['all_positions_worse_than_minimax']} | {perfect} "
                     f"| {r['train_seconds']:.0f} | {r['proof_seconds']:.0f} "
                     f"| {as_first[0]:.1%} / {as_second[0]:.1%} "
                     f"| {as_first[2] + as_second[2]:.0%} |")
    best_first, best_second = against_random(values)
    return lines + ["", "The most that never-losing play can win against the random player: "
                    f"{best_first[0]:.1%} as first, {best_second[0]:.1%} as second."]


def table_of_variants(runs, variants, values):
    from tictactoe_eval import greedy_table
    lines = ["| variant | losing lines of the best weights, first + second, each seed "
             "| of all 4,520 | lost to a random player, worse side | entropy at the end |",
             "|---|---|---|---|---|"]
    for name in variants:
        results = [run for (variant, _), run in runs.items() if variant == name]
        lost = ", ".join(f"{r['first']['lost']} + {r['second']['lost']}" for r in results)
        errors = ", ".join(str(r["all_positions_worse_than_minimax"]) for r in results)
        entropy = ", ".join(f"{r['entropy']:.2f}" for r in results)
        beaten = []
        for r in results:
            sides = against_random(values, greedy_table(r["agent"]["actor"], values))
            beaten.append(f"{max(shares[2] for shares in sides):.1%}")
        lines.append(f"| {name} | {lost} | {errors} | {', '.join(beaten)} | {entropy} |")
    return lines


# ---- figures ----------------------------------------------------------------------------------

def draw_losing_lines(runs, path):
    from matplotlib import pyplot as plt
    plt.style.use("petroff10")        # colours that colour-blind eyes can tell apart
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for seed in range(SEEDS):
        proofs = runs[NORMAL, seed]["proofs"]
        updates = [proof["update"] for proof in proofs]
        axes.plot(updates, [proof["lost"] for proof in proofs], color="C0", alpha=0.7,
                  label="losing lines" if seed == 0 else None)
        axes.plot(updates, [proof["all_worse"] for proof in proofs], color="C1", alpha=0.7,
                  label="positions of 4,520 played worse than minimax" if seed == 0 else None)
    axes.set_yscale("symlog", linthresh=1)
    axes.set(xlabel="updates", ylim=(-0.3, None),
             ylabel="count, a line for each of five seeds",
             title="Tic-Tac-Toe by self-play: losing lines and errors fall to 0")
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_variants(runs, breaks, path):
    from matplotlib import pyplot as plt
    plt.style.use("petroff10")
    figure, grid = plt.subplots(2, 2, figsize=(8, 5.6), sharex=True, sharey=True,
                                layout="constrained")
    panels = grid.flat
    for panel, name in zip(panels, breaks):
        for variant, colour in ((NORMAL, "C0"), (name, "C2")):
            for seed in range(SEEDS_OF_VARIANTS):
                proofs = runs[variant, seed]["proofs"]
                panel.plot([proof["update"] for proof in proofs],
                           [proof["lost"] for proof in proofs], color=colour, alpha=0.7)
        panel.set_yscale("symlog", linthresh=1)
        panel.set(title=name, ylim=(-0.3, None))
    figure.supxlabel("updates")
    figure.supylabel("losing lines (blue: as it is, red: broken)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_portrait(agent, values, path):
    """Three panels: the first move, the reply to a corner, the critic against the true values."""
    from matplotlib import pyplot as plt
    from play_tictactoe import opinion
    from tictactoe_eval import after, encode, open_positions
    positions = open_positions(values)
    with torch.no_grad():
        boards = torch.tensor(positions, dtype=torch.int8)
        guesses = agent["critic"](encode(boards)).squeeze(-1).numpy()
    truth = np.array([values[board] for board in positions])
    plt.style.use("petroff10")
    figure, axes = plt.subplot_mosaic([["left", "middle"], ["right", "right"]], figsize=(8, 7),
                                      height_ratios=[1.4, 1], layout="constrained")
    left, middle, right = axes.values()
    empty = (0,) * 9
    for panel, board, title in ((left, empty, "first move"),
                                (middle, after(empty, 0), "reply to a corner")):
        probabilities, value = opinion(agent, board)
        panel.imshow(np.array(probabilities).reshape(3, 3), cmap="Blues", vmin=0, vmax=1.3)
        for square, probability in enumerate(probabilities):
            text = f"{probability:.1%}" if board[square] == 0 else "X"
            panel.text(square % 3, square // 3, text, ha="center", va="center")
        panel.set(xticks=[], yticks=[], title=f"{title}; critic {value:+.2f}")
    for true, colour in ((-1, "C2"), (0, "C3"), (1, "C0")):
        right.hist(guesses[truth == true], bins=np.linspace(-1.3, 1.3, 53), color=colour, alpha=0.6,
                   label=f"true value {true} ({(truth == true).sum()} positions)")
    right.set(xlabel="critic's value", ylabel="positions",
              title="critic against minimax, all 4,520 positions")
    right.legend(fontsize=9, loc="upper left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_ply(figure, game, value, person_first):
    """A picture of the game: blue stones are the agent's. Where it is the agent's turn, each free
    square shows its probability, and the bar what its critic expects. Returns the critic's value.
    """
    from PIL import Image
    from play_tictactoe import opinion
    over, agents_mark = game.over(), "O" if person_first else "X"
    agents_turn = not over and (len(game.plies) % 2 == 0) != person_first
    probabilities = [0.0] * 9
    if agents_turn:
        probabilities, value = opinion(game.agent, game.board())
    if over:
        value = dict(zip(("you lose", "you win", "a draw"), (1, -1, 0)))[over]
    figure.clear()
    axes, bar = figure.subplots(1, 2, width_ratios=[8, 1])
    axes.imshow(np.array(probabilities).reshape(3, 3), cmap="Blues", vmin=0, vmax=1.6)
    for square, mark in enumerate(game.marks()):
        row, column = divmod(square, 3)
        text, size = (f"{probabilities[square]:.0%}", 13) if mark == "." else (mark, 44)
        if mark != "." or agents_turn:
            axes.text(column, row, text, ha="center", va="center", fontsize=size,
                      color="C0" if mark == agents_mark else "black")
    for at in (0.5, 1.5):
        axes.axhline(at, color="black")
        axes.axvline(at, color="black")
    ending = {"you lose": "the agent has won", "you win": "the agent has lost", "a draw": "a draw"}
    title = "the agent's turn" if agents_turn else "a random player's turn"
    axes.set(xticks=[], yticks=[], title=ending[over] if over else title)
    bar.bar([0], [value], color="C0" if value > 0 else "C1")
    bar.axhline(0, color="black", linewidth=0.8)
    bar.set(ylim=(-1.05, 1.05), xticks=[], title="result" if over else "critic")
    bar.yaxis.tick_right()
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    return Image.fromarray(pixels).quantize(colors=64), value


def game_frames(agent, person_first, rng):
    """One picture per ply of a game; a random player takes the person's side."""
    from matplotlib import pyplot as plt
    from play_tictactoe import Game
    plt.style.use("petroff10")
    figure = plt.figure(figsize=(4.6, 3.7), dpi=100, layout="constrained")
    game, frames, value = Game(agent, person_first), [], 0.0
    while True:
        picture, value = draw_ply(figure, game, value, person_first)
        frames.append(picture)
        if game.over():
            plt.close(figure)
            return frames + [picture] * 3
        if (len(game.plies) % 2 == 0) == person_first:
            game.play(rng.choice([k for k, mark in enumerate(game.marks()) if mark == "."]))
        else:
            game.reply()


def make_gif(out, weights, seed):
    """Two animated games, the agent as X and as O."""
    from tictactoe_eval import load_agent, write_or_fail
    agent, rng = load_agent(weights), random.Random(seed)
    frames = game_frames(agent, False, rng) + game_frames(agent, True, rng)
    content = io.BytesIO()
    frames[0].save(content, format="GIF", save_all=True, append_images=frames[1:], duration=1200,
                   loop=0, optimize=True)
    write_or_fail("--gif", out, content.getvalue())
    print(f"wrote {out}, {len(content.getvalue()) // 1024} kB")


# ---- command line -----------------------------------------------------------------------------

def study(directory):
    """Trains, and writes tables.md, losing_lines.png, ablation.png, portrait.png."""
    from tictactoe_eval import minimax_values, write
    from train_tictactoe import BREAKS
    if not directory or directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        fail("give a directory that is empty or does not exist yet")
    jobs = [(NORMAL, seed) for seed in range(SEEDS)]
    jobs += [(name, seed) for name in BREAKS for seed in range(SEEDS_OF_VARIANTS)]
    runs = {}
    for job in tqdm(jobs, disable=not sys.stderr.isatty(), unit="run"):
        runs[job] = run_of(directory, *job)
    values = minimax_values()
    lines = table_of_seeds(runs, values) + [""]
    lines += table_of_variants(runs, (NORMAL, *BREAKS), values)
    write(directory / "tables.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    draw_losing_lines(runs, directory / "losing_lines.png")
    draw_variants(runs, BREAKS, directory / "ablation.png")
    draw_portrait(runs[NORMAL, 1]["agent"], values, directory / "portrait.png")
    print(f"tables.md and three figures are in {directory}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("directory", type=Path, nargs="?", help="where the runs and results go")
    parser.add_argument("--gif", type=Path, metavar="FILE", help="only an animation, no training")
    parser.add_argument("--weights", default=str(HERE / "weights"),
                        metavar="PATH|DIR|latest|random",
                        help="the agent of the animation (default: the shipped one)")
    parser.add_argument("--seed", type=int, default=0, help="of the animation's random player")
    parser.add_argument("--smoke", action="store_true", help="says what would run, and stops")
    args = parser.parse_args()
    if args.smoke or not all((HERE / name).exists() for name in NEEDED):
        print(f"the study trains 17 runs; it belongs beside {', '.join(NEEDED)}")
        return
    import matplotlib
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    if args.gif:
        make_gif(args.gif, args.weights, args.seed)
    else:
        study(args.directory)


if __name__ == "__main__":
    main()
