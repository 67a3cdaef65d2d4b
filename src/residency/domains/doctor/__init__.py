"""What is wrong with data, before a minute of training is paid for."""
