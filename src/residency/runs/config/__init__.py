"""Words and YAML in, objects or one sentence out."""
