"""The nouns everybody uses, and files that are there whole or not at all. Knows nobody."""
