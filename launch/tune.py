"""Chooses a cache for a target: python launch/tune.py --config configs/demo.yaml --target-speedup 4.3 --out OUT.yaml"""

import sys

from moeca_dist.cli import tune_main

if __name__ == "__main__":
    sys.exit(tune_main())
