"""What a run is made of: the frozen model and its queries, pieces of work, and who does which."""
