"""qhub-demo: a small trained model with its data, so that everything in qhub works offline."""
