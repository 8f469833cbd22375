"""The products that cost the time."""
