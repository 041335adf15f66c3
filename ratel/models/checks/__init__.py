"""What is found out by trying: whether a block can run twice, and what models of a family do."""
