"""What a `TensorQuantizer` is made of."""
