"""Passes on graphs after AOTAutograd: of ATen's ops alone, with the collectives of distributed tensors in them."""
