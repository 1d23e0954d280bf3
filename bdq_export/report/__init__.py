"""What an export did and measured, as JSON and as a page."""
