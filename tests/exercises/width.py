"""Exercise 5: half the width of hr18s, as --model hr9s. See README.md."""

from functools import partial

from solution import run

from ocrnet.models import BACKBONES, HRNet

BACKBONES["hr9s"] = partial(HRNet, width=9, num_modules=(1, 3, 2), num_blocks=2)

if __name__ == "__main__":
    run()
