"""One step of a fast weight, for decode: fast_weight_apply (read) and fast_weight_update_ (write)."""
