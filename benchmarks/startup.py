"""How long a user waits for help and for the news of a mistake: `python -m benchmarks.startup`.

Whole processes, a warm-up first, medians of the rest; the last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "help_s": ["--help"],
    "verb_help_s": ["pretrain", "--help"],
    "config_error_s": ["pretrain", "data", "out", "batch_sise=3", "model.dim=wide"],
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one `align` process."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments], capture_output=True, check=False
    )
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    figures = {}
    print(f"{'command':<60} median s    min    max")
    for name, arguments in COMMANDS.items():
        seconds(arguments)
        taken = [seconds(arguments) for _ in range(runs)]
        figures[name] = round(statistics.median(taken), 3)
        line = "align " + " ".join(arguments)
        print(f"{line:<60} {figures[name]:8.3f} {min(taken):6.3f} {max(taken):6.3f}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
