"""Methods in which one network makes the weights of another."""
