"""`flexbatch chat`: a conversation with one model, in a terminal or through a pipe."""
