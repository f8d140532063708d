"""Where quantizers go in a model that is already built: found, listed, then put there."""
