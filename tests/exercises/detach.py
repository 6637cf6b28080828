"""Exercise 1: the final loss does not train the soft object regions. See README.md."""

import torch
from solution import run

from ocrnet.models import OCRHead


def forward(self, region_features, features):
    region_logits = self.region_head(region_features)
    x = self.pixel_head(features)
    f = self.gather(x, region_logits.detach())  # the change
    y = self.attention(x, f)
    z = self.g(torch.cat([y, x], dim=1))
    return self.classifier(z), region_logits


OCRHead.forward = forward

if __name__ == "__main__":
    run()
