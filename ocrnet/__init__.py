"""OCRNet (object-contextual representations on HRNet) for semantic segmentation, in plain PyTorch."""
