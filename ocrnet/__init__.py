"""OCRNet (object-contextual representations on HRNet) for street scenes, in plain PyTorch."""
