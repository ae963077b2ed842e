"""What the extension service's ports are made of."""
