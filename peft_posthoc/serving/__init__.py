"""What engines do with an adapter, and adapters that they all take."""
