"""What every adapter around a tuner of PEFT shares."""
