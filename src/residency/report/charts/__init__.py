"""Charts as Altair definitions: one gives the interactive page and SVG, PDF and PNG.

No chart sets a text colour, a background or a font: `theme` does, so that light, dark and print are one definition.
Names are data: they enter as values, never as expressions.
"""
