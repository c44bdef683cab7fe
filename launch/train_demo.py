"""Trains the shipped demo model from scratch: python launch/train_demo.py --out FILE.safetensors"""

import sys

from moeca_dist.demo.train import main

if __name__ == "__main__":
    sys.exit(main())
