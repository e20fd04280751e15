"""Step sizes: how far each chunk's write goes. `spectral_step_size`, `clipped_step_size`."""
