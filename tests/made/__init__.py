"""What several test files need, by what is made. Test files import from here, and never from each other."""
