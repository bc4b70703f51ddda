"""What other libraries hide from a compiler, said in plain loops; one file a library."""
