"""From files to uint8 tensors, and from those to normalized images. Independent of models."""
