"""Text and tokens: the tokenizer, and grammars."""
