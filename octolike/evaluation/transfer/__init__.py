"""Does sharing help? Datasets or tasks compared before, during and after training together."""
