"""What papers say about the things this project does, each claim checked: a register and a DVC pipeline of its own."""
