"""What only makes it quicker, or exact: each equals a plain formula, and a test says so."""
