"""What other libraries call: one module for each, named like the library, which it imports."""
