"""What a training run leaves behind: its record, and sketches of its own backward passes."""
