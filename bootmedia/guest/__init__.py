"""What runs inside the rescue system."""
