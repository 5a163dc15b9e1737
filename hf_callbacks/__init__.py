"""The Trainer callback. Coming: nothing is here yet."""
