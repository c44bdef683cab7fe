"""Generates images: torchrun --standalone --nproc_per_node=2 launch/generate.py --config configs/demo.yaml --out OUT"""

import sys

from moeca_dist.cli import generate_main

if __name__ == "__main__":
    sys.exit(generate_main())
