"""Generates on Ray: python launch/ray_generate.py --config configs/demo.yaml --gangs 2 --gang-size 2 --out OUT"""

import sys

from moeca_dist.cli import batch_main

if __name__ == "__main__":
    sys.exit(batch_main())
