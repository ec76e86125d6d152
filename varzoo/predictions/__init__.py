"""What a decoding hands out for the positions of a step, guidance applied: one module per kind of head."""
