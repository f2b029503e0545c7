"""What is tuned to the machine: compiled loops, the thread team, memory."""
