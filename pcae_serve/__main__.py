"""Run pcae-serve as `python -m pcae_serve`."""

from pcae_serve.cli import main

main()
