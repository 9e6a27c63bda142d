"""Where two tokenizers agree: aligned positions of a text, and tokens of both vocabularies."""
