"""Networks trained a layer or a unit at a time, without a backward pass through the whole."""
