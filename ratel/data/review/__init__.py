"""Records looked at for their own sake: all of them with their lines, one as it is learned, and a
check beside training."""
