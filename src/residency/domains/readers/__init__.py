"""From files as people have them to rows: containers, formats, conversations, published layouts."""
