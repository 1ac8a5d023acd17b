"""Methods that fit a trained model to data of another distribution."""
