"""Tic-Tac-Toe: games per second in training, and what the games alone cost.

    python tests/benchmarks/bench_tictactoe.py            half a minute; prints a Markdown table

No library trains this task with a method like ours, so there is no peer. "Random" plays the same games, both sides with random moves and without a network: nothing
that plays them in this way can be faster. One thread.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from common import OURS, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tictactoe_actorcritic"))
import train_tictactoe as ours


def no_network(boards):
    """Logits of a policy that does not look at the board: every legal move is as likely."""
    return torch.zeros(len(boards), 9)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=60, help="timed updates (default 60)")
    parser.add_argument("--quick", action="store_true", help="20 updates")
    parser.add_argument("--json", metavar="FILE", help="also write the table to a file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config, generator = ours.Config(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    agent = ours.make_agent(config.hidden)
    optimizer = torch.optim.Adam(agent.parameters(), lr=config.lr, fused=True)
    positions = torch.tensor(ours.open_positions(ours.minimax_values()), dtype=torch.int8)
    parts = {"playing": [], "update": [], "random": []}
    for number in range((20 if args.quick else args.updates) + 5):
        opponent, starts = ours.choose(config, [agent["actor"]], positions, generator)
        start = time.perf_counter()
        batch = ours.play_games(agent["actor"], opponent, starts, config, generator)
        played = time.perf_counter()
        ours.update(agent, optimizer, batch, config, 1.0, generator)
        learnt = time.perf_counter()
        ours.play_games(no_network, no_network, starts, config, generator)
        end = time.perf_counter()
        if number >= 5:                                   # the first ones warm up
            for name, seconds in (("playing", played - start), ("update", learnt - played), ("random", end - learnt)):
                parts[name].append(seconds)
    playing, update, random = (statistics.median(values) for values in parts.values())
    print("| | ms per update | games per second |\n|---|---|---|")
    for name, seconds in ((OURS, playing + update), ("its games alone", playing), ("the same games with random moves", random)):
        print(f"| {name} | {seconds * 1e3:.1f} | {config.games / seconds:,.0f} |")
    rows = [dict(name=OURS, seconds=playing + update, rate=config.games / (playing + update), times_ours=1.0)]
    write_json(args.json, lesson="tictactoe_actorcritic", what=f"{config.games:,} games an update", model="", threads=1, rows=rows, floor=random)


if __name__ == "__main__":
    main()
