"""Exercise 4: half the width of the demo's model, as --model hr9t. See README.md."""

from functools import partial

from solution import run

from ocrnet.models import BACKBONES, HRNet

BACKBONES["hr9t"] = partial(HRNet, width=9, num_modules=(1, 1, 1), num_blocks=2, head_channels=(128, 64))

if __name__ == "__main__":
    run()
