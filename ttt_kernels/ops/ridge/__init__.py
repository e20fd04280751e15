"""ridge_write: one closed-form write from a whole prompt, instead of one per chunk."""
