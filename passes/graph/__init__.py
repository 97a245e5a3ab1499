"""What is known of FX graphs and ATen: ops, dims, products, constants, memory. Nothing of attention."""
