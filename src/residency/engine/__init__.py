"""One stage: train it and score the state it leaves."""
