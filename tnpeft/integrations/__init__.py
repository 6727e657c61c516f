"""What other libraries call: one module for each library, named like it, which imports it."""
