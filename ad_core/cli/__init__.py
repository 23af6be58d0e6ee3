"""The command `ad`. Importing it imports no torch, and no command before it is called."""
