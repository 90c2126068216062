"""`python -m flowrl`, which torchrun needs."""

from flowrl.cli import main

main()
