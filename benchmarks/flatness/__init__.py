"""What flatness tells of generalization."""
