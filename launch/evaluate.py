"""Measures images against a reference: python launch/evaluate.py OUT --reference REF"""

import sys

from moeca_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
