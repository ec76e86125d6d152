"""What is likely: generators hold weights, decodings hold the state of one batch being drawn."""
