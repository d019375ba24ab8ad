"""What is known of a model without running it: header, shape, tokenizer, where it lies."""
