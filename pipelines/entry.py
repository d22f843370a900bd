"""Where the command `align` begins: from its first moment an interrupt is told in a line.

It imports next to nothing, so that there is hardly a moment before.
"""

import sys


def main() -> None:
    """Run the command line of this process and leave with its exit code."""
    try:
        from pipelines.cli import main as run

        run()
    except KeyboardInterrupt:  # while that was being imported: later ones are told there
        print(f"{' '.join(['align', *sys.argv[1:2]])}: interrupted", file=sys.stderr)
        sys.exit(130)
