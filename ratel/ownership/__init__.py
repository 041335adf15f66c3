"""Whose a file is: nothing is written to or removed that is not known to be Ratel's, and of the run
that does it."""
