"""Post-training improvement: better int8 models without training, from a few batches."""
