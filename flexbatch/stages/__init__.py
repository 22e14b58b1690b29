"""What the pipeline's steps are made of: each turns the previous step's record into the next."""
