"""`python -m linfusion`, which is how `accelerate launch -m linfusion train ...` starts it."""

from linfusion.cli import main

main()
