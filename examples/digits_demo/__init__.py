"""Train a small class-conditional diffusion transformer on 8 x 8 digits, make it sparse, and compare the two."""
