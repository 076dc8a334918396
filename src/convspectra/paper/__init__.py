"""Section 4 of the paper reproduced, and the demonstration of its title."""
