"""`python -m bench` runs the side-by-side measurements."""

from bench.compare import main

main()
