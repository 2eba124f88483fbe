"""Pure functional quantizers: 8-bit codes, and the 4-bit codes inside them."""
