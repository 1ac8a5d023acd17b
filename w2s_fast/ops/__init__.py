"""The public ops: checks, schemas, fake kernels and gradients."""
