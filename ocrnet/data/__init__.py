"""Files in, uint8 tensors out. Knows nothing of models or devices."""
