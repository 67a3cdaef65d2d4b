"""The one decision about evidence; whatever shows a comparison prints its result."""
