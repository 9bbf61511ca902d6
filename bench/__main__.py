"""`python -m bench` measures side by side, `python -m bench fleet` a repository of many images,
`python -m bench tracking` disks that are written meanwhile, `python -m bench serving` NBD."""

import sys

if sys.argv[1:2] == ["fleet"]:
    from bench.fleet import main as fleet

    fleet(sys.argv[2:])
elif sys.argv[1:2] == ["tracking"]:
    from bench.tracking import main as track

    track(sys.argv[2:])
elif sys.argv[1:2] == ["serving"]:
    from bench.serving import main as serve

    serve(sys.argv[2:])
else:
    from bench.compare import main

    main()
