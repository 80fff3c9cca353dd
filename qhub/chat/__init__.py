"""A conversation with a language model, apart from the terminal: texts to tokens and back, what was said, what a session keeps."""
