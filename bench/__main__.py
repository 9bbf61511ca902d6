"""`python -m bench` measures side by side, `python -m bench fleet` a repository of many images."""

import sys

if sys.argv[1:2] == ["fleet"]:
    from bench.fleet import main as fleet

    fleet(sys.argv[2:])
else:
    from bench.compare import main

    main()
