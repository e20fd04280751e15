"""fast_weight_scan: apply then write, chunk by chunk, over a whole sequence."""
