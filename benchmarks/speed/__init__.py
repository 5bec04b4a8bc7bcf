"""What methods cost: time, memory, compilation, and on several devices."""
