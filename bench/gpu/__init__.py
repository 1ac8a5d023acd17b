"""What is run on a GPU that is at hand for half an hour: see day.sh."""
