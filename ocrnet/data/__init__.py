"""From files to uint8 tensors. Independent of models and devices."""
