"""`python -m pipelines.serve`."""

from pipelines.cli import main_of

main_of("serve")
