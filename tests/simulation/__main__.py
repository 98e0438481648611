"""`make simulate`: plays seeds, and names those after which not all held."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import time

from tests.simulation.play import FAULTS, Outcome, play, shrink


def _play(job: tuple[int, tuple[str, ...]]) -> Outcome:
    outcome = play(*job)
    gc.collect()
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--first", type=int, default=0, help="seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--faults", default=",".join(FAULTS), help="kinds, separated by commas")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--until-found", action="store_true", help="end with the first seed after which not all held")
    parser.add_argument(
        "--shrink", action="store_true", help="play those seeds again with as few parts as leave a problem"
    )
    parser.add_argument("--notes", action="store_true", help="show what happened in seeds after which not all held")
    arguments = parser.parse_args()
    kinds = tuple(kind for kind in arguments.faults.split(",") if kind)
    jobs = [(seed, kinds) for seed in range(arguments.first, arguments.first + arguments.seeds)]
    began, outcomes = time.perf_counter(), list[Outcome]()
    gc.freeze()  # a seed's garbage is collected after it, and the modules never
    with multiprocessing.get_context("fork").Pool(arguments.processes, gc.disable) as pool:
        played = pool.imap(_play, jobs) if arguments.until_found else pool.imap_unordered(_play, jobs, 4)
        for outcome in played:
            outcomes.append(outcome)
            if outcome.problem:
                print(f"seed {outcome.seed}: {outcome.problem}", flush=True)
                shown = shrink(outcome.seed, kinds) if arguments.shrink else outcome
                if arguments.shrink:
                    print(f"  with {', '.join(shown.parts)}: {shown.problem}", flush=True)
                if arguments.notes:
                    print(*shown.notes, sep="\n  ", flush=True)
                if arguments.until_found:
                    break
    seconds = time.perf_counter() - began
    broken = sum(bool(outcome.problem) for outcome in outcomes)
    reports = [outcome.report for outcome in outcomes]
    print(
        f"{len(outcomes)} seeds in {seconds:.0f} s, {60 * len(outcomes) / seconds:.0f} a minute, "
        f"{sum(outcome.seconds for outcome in outcomes) / 3600:.1f} virtual hours: {broken} with problems; "
        f"{sum(report.whole for report in reports)} streams whole, {sum(report.left for report in reports)} left by clients, "
        f"{sum(report.resumed for report in reports)} times resumed at another gateway"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
